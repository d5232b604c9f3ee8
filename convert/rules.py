"""Rules of a recipe: which scheme each parameter of a checkpoint gets.

Patterns are regular expressions by people one may not know, and such an expression can take longer than the universe
lasts on a name of thirty letters. So `regex` matches them: it reads what Python's `re` reads, and can be stopped.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
from difflib import get_close_matches
from math import prod
from typing import TYPE_CHECKING, Annotated, Final, NoReturn

from pydantic import AfterValidator
from pydantic_core import PydanticCustomError

from ..stages.errors import RecipeError, UsageError
from ..stages.strict import Strict

if TYPE_CHECKING:
    from ..quantize.plan import Plan, Shapes

PATIENCE: Final = 1.0
"""Seconds for one pattern on one name; honest ones take microseconds."""


def scheme_name(name: str) -> str:
    """`name` if it is a scheme; raises what pydantic turns into an error otherwise."""
    from ..quantize.scheme import parse_scheme

    try:
        parse_scheme(name)
    except UsageError as error:
        raise PydanticCustomError("scheme", "not a scheme", {"hint": error.hint}) from None
    return name


def _regex(pattern: str) -> str:
    import regex

    try:
        regex.compile(pattern)
    except (regex.error, RecursionError, OverflowError, MemoryError) as error:
        reason = {"reason": str(error), "hint": "escape dots and brackets with a backslash, in 'single quotes'"}
        raise PydanticCustomError("regex", "not a regular expression: {reason}", reason) from None
    return pattern


Scheme = Annotated[str, AfterValidator(scheme_name)]


class Rule(Strict):
    """`[[quantize.rules]]`: `match` is compared with the entire `component/module.path`, or that of a parameter."""

    match: Annotated[str, AfterValidator(_regex)]
    scheme: Scheme
    why: str = ""


def plans_by_rules(
    precision: str, rules: Sequence[Rule], recipe: str, parameters: Mapping[str, Shapes]
) -> dict[str, Plan]:
    """The plan of each component: `precision`, or the scheme of the last rule that matches.

    Args:
        recipe: how errors call it.
        parameters: component -> name -> shape of every parameter.
    Raises:
        RecipeError: a rule matches nothing, or only what every scheme leaves in float32, or takes for ever.
    """
    from ..quantize.plan import plan_of

    rounded = {c: [name for name, shape in shapes.items() if len(shape) > 1] for c, shapes in parameters.items()}
    chosen = {c: dict.fromkeys(names, precision) for c, names in rounded.items()}
    for number, rule in enumerate(rules, start=1):
        where = f"{recipe} [[quantize.rules]] {number}"
        matched = _matched(rule, where, parameters)
        taken = [(c, name) for c, name in matched if name in chosen[c]]
        if not taken:
            _refuse(rule, where, matched, parameters)
        refuse_idle_branch(rule.scheme, where, taken, parameters)
        for component, name in taken:
            chosen[component][name] = rule.scheme
    return {c: plan_of(schemes, parameters[c]) for c, schemes in chosen.items()}


def _matched(rule: Rule, where: str, parameters: Mapping[str, Shapes]) -> list[tuple[str, str]]:
    """Component and name of the parameters that a rule takes: by their own name, or their module's."""
    import regex

    pattern = regex.compile(rule.match)
    found = []
    for component, shapes in parameters.items():
        for name in shapes:
            for path in (f"{component}/{name.rpartition('.')[0]}", f"{component}/{name}"):
                try:
                    hit = pattern.fullmatch(path, timeout=PATIENCE)
                except TimeoutError:
                    raise RecipeError(
                        f"{where}: {rule.match!r} was still undecided about {path!r} after {PATIENCE:g} s",
                        hint="repetitions inside of repetitions, as in (a+)+, multiply: write it without them",
                    ) from None
                if hit:
                    found.append((component, name))
                    break
    return found


def refuse_idle_branch(
    scheme: str, where: str, taken: Collection[tuple[str, str]], parameters: Mapping[str, Shapes]
) -> None:
    """Refuse a low-rank branch that no layer of those it is asked for can have.

    Args:
        where: how errors call the place that asks; `taken`: component and name of the parameters it asks for.
    Raises:
        RecipeError: names the largest of them.
    """
    from ..quantize.plan import EMBEDDING, has_branch
    from ..quantize.scheme import parse_scheme

    rank = parse_scheme(scheme).rank
    shapes = {f"{component}/{name}": parameters[component][name] for component, name in taken}
    if not rank or not shapes or any(has_branch(name, shape, rank) for name, shape in shapes.items()):
        return
    layers = {name: shape for name, shape in shapes.items() if not EMBEDDING.search(name)} or shapes
    name, largest = max(layers.items(), key=lambda item: min(item[1][0], prod(item[1][1:])))
    raise RecipeError(
        f"{where}: {scheme!r}: no layer that it matches can have a branch of rank {rank}; "
        f"the largest, {name}, is {largest[0]} x {prod(largest[1:])}",
        hint="a rank below both sides of a linear layer or convolution, such as 16; embeddings have no branch",
    )


def _refuse(rule: Rule, where: str, matched: Collection[tuple[str, str]], parameters: Mapping[str, Shapes]) -> NoReturn:
    if matched:
        component, name = next(iter(matched))
        raise RecipeError(
            f"{where}: {rule.match!r} matches only biases and norms, such as {component}/{name}",
            hint="these stay float32 at every scheme; match a convolution, a linear layer or an embedding",
        )
    components = f"COMPONENT/MODULE; components here: {', '.join(parameters)}"
    part = next((c for c in parameters if rule.match.startswith(f"{c}/")), None)
    modules = [f"{part}/{name.rpartition('.')[0]}" for name in parameters[part]] if part else []
    near = get_close_matches(rule.match.replace("\\", ""), modules, n=1, cutoff=0.8)
    raise RecipeError(
        f"{where}: {rule.match!r} matches nothing",
        hint=f"did you mean {near[0]!r}?" if near else f"a rule is compared with the whole of {components}",
    )
