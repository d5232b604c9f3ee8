"""What to try about a module that adds much error: in words, and as a rule of a recipe that the target takes."""

from __future__ import annotations

import re
from collections.abc import Iterator
from dataclasses import dataclass, replace
from typing import Final

from ...quantize.plan import Plan, Shapes, plan_of
from ...runtimes.checks import refuse_schemes
from ...runtimes.protocol import Target
from ...stages.errors import UnsupportedPrecision

# The first pattern that is found in the module's own name, its parent's and its operation decides.
_ADVICE: Final[tuple[tuple[str, str], ...]] = (
    (
        r"norm",
        "A normalisation adds up squares: see whether its input is large (float16 ends at 65504). Its own numbers are "
        "float32 at every scheme; give more bits to what it reads.",
    ),
    (
        r"\battn\d?\b|self_attn|\bto_[qkv]\b|\bto_out\b|\b[qkv]_proj\b|softmax",
        "A part of an attention: the softmax exponentiates errors of queries and keys, those of values and outputs "
        "pass on as they are. Give it more bits.",
    ),
    (
        r"time_emb|add_embedding|timestep",
        "The time embedding is read by every block, and is small: more bits for it cost little.",
    ),
    (
        r"\bconv_in\b|\bconv_out\b|quant_conv",
        "A first or last convolution has few weights, and all of the picture passes through them: more bits for them "
        "cost little.",
    ),
    (
        r"conv",
        "A convolution: compare its weights' scales by output channel; one large channel costs the others bits. Give "
        "it more bits.",
    ),
    (
        r"embed",
        "A table with a row for each token or position is read, not multiplied: more bits cost no time.",
    ),
    (
        r"linear|gemm|matmul|\bfc\d|proj|\bff\b",
        "A matrix product: take smaller groups, or more bits for its weights.",
    ),
)
_OTHER: Final = "It has no weights of its own kind here: compare another target, and look at what it is fed with."


def advice_for(module: str, op: str) -> str:
    """One or two sentences about `module`, a path of PyTorch's, which is an `op`."""
    own = ".".join(module.split(".")[-2:])
    return next((words for pattern, words in _ADVICE if re.search(pattern, f"{own} {op}".lower())), _OTHER)


@dataclass(frozen=True, slots=True)
class RuleAdvice:
    """One of a recipe's `[[quantize.rules]]`."""

    match: str
    scheme: str
    why: str

    @property
    def toml(self) -> str:
        return f'[[quantize.rules]]\nmatch = \'{self.match}\'\nscheme = "{self.scheme}"\nwhy = "{self.why}"'


def rule_for(target: Target, component: str, module: str, plan: Plan, shapes: Shapes) -> RuleAdvice | None:
    """The rule that gives a module more bits; None where none could: its weights are float32 already, or it has none.

    Where the target refuses the module alone, it is about the whole component.

    Args:
        plan: what the component is stored at.
        shapes: of all of its parameters.
    """
    for rule, changed in _candidates(component, module, plan, shapes):
        try:
            refuse_schemes(target, component, changed)
        except UnsupportedPrecision:
            continue
        return rule
    return None


def _candidates(component: str, module: str, plan: Plan, shapes: Shapes) -> Iterator[tuple[RuleAdvice, Plan]]:
    """Rules, the one that costs least first, and the component's plan under each."""
    stored = {name: plan.scheme(name, shape).name for name, shape in shapes.items()}
    own = [name for name in shapes if name.rpartition(".")[0] == module and stored[name] != "fp32"]
    if not own:
        return
    told = dict(plan.exceptions)
    asked = {
        name: told.get(name) or told.get(name.rpartition(".")[0]) or plan.default
        for name, shape in shapes.items()
        if len(shape) > 1
    }
    one = re.escape(f"{component}/{module}")
    for scheme in ("fp32", "fp16"):
        if any(stored[name] != scheme for name in own):
            changed = plan_of(asked | dict.fromkeys(own, scheme), shapes)
            yield RuleAdvice(one, scheme, f"fewer bits cost much in {module}"), _kept(plan, changed)
    why = f"fewer bits cost much in {module}, and the target has one kind of float in a component"
    yield RuleAdvice(re.escape(component) + "/.*", "fp32", why), _kept(plan, Plan("fp32"))


def _kept(plan: Plan, changed: Plan) -> Plan:
    return replace(plan, default=changed.default, exceptions=changed.exceptions)
