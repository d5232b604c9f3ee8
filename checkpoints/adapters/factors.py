"""What kind of adapter a module's factors are, and whether they fit the weight that they are to change."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any, Final

from ...stages.artifacts import Adapted, StoredTensor
from ...stages.errors import CheckpointError
from .file import AdapterFile, StoredModule

Shape = tuple[int, ...]

# kind -> factors that it needs; the first kind whose factors are all there
_NEEDED: Final[Mapping[str, tuple[str, ...]]] = {
    "lora": ("down", "up"),
    "loha": ("hada_w1_a", "hada_w1_b", "hada_w2_a", "hada_w2_b"),
    "oft": ("oft_R",),
    "boft": ("boft_R", "boft_s"),
    "lycoris-oft": ("oft_blocks",),
    "full": ("diff",),
}
# PEFT's settings that decide the arithmetic
_SETTINGS: Final = (
    "lora_alpha", "alpha", "r", "use_rslora", "use_dora", "fan_in_fan_out", "alpha_pattern", "rank_pattern",
    "coft", "eps", "block_share", "use_cayley_neumann", "num_cayley_neumann_terms",
)  # fmt: skip


def changes(
    adapter: AdapterFile, component: str, module: str, stored: StoredModule, shape: Shape, scale: float
) -> list[Adapted]:
    """What happens to one module's weight (and bias), checked against the shape of the weight.

    Raises:
        CheckpointError: the factors are incomplete, or are for a weight of another shape.
    """
    kind = _kind(stored, adapter)
    if kind == "lycoris-oft" and len(stored.factors["oft_blocks"].shape) != 3:
        raise CheckpointError(
            f"--adapter {adapter.weights}: {stored.name} is BOFT as LyCORIS stores it, which its releases compute in "
            "different ways",
            hint="merge it into the checkpoint with the release that trained it, or train with PEFT's BOFT",
        )
    settings = {k: v for k, v in _settings_of(adapter, component).items() if k in _SETTINGS and v is not None}
    values = _values(kind, stored.factors, settings)
    if values is not None and values != math.prod(shape):
        raise CheckpointError(
            f"--adapter {adapter.weights}: {stored.name} is made for a weight of {values} values, "
            f"{component}'s {module} is {list(shape)}",
            hint="it was trained on another family or size of model",
        )
    found = []
    own = {role: tensor for role, tensor in sorted(stored.factors.items()) if role != "diff_b"}
    if own:
        found.append(Adapted(f"{module}.weight", kind, tuple(own), tuple(own.values()), settings, scale))
    if "diff_b" in stored.factors:
        bias = stored.factors["diff_b"]
        found.append(Adapted(f"{module}.bias", "full", ("diff",), (bias,), {}, scale))
    return found


def _kind(stored: StoredModule, adapter: AdapterFile) -> str:
    names = set(stored.factors)
    for kind, needed in _NEEDED.items():
        if names.issuperset(needed):
            return kind
    if names == {"diff_b"}:
        return "full"
    one = {"lokr_w1"} <= names or {"lokr_w1_a", "lokr_w1_b"} <= names
    two = {"lokr_w2"} <= names or {"lokr_w2_a", "lokr_w2_b"} <= names
    if one and two:
        return "lokr"
    raise CheckpointError(
        f"--adapter {adapter.weights}: {stored.name} has only {', '.join(sorted(names))}",
        hint="the file is incomplete: download it again",
    )


def _settings_of(adapter: AdapterFile, component: str) -> Mapping[str, Any]:
    return adapter.component_settings.get(component, adapter.settings)


def _values(kind: str, factors: Mapping[str, StoredTensor], settings: Mapping[str, Any]) -> int | None:
    """How many values the weight has that the factors are for; None where any will do that the rotation divides."""

    def size(role: str, axis: slice | int) -> int:
        shape = factors[role].shape
        return math.prod(shape[axis]) if isinstance(axis, slice) else shape[axis]

    if kind == "lora":
        kernel = size("mid", slice(2, None)) if "mid" in factors else 1
        return size("up", 0) * size("down", slice(1, None)) * kernel
    if kind == "loha":
        if "hada_t1" in factors:
            return size("hada_w1_a", 1) * size("hada_w1_b", 1) * size("hada_t1", slice(2, None))
        return size("hada_w1_a", 0) * size("hada_w1_b", 1)
    if kind == "lokr":
        one = size("lokr_w1", slice(None)) if "lokr_w1" in factors else size("lokr_w1_a", 0) * size("lokr_w1_b", 1)
        if "lokr_w2" in factors:
            return one * size("lokr_w2", slice(None))
        if "lokr_t2" in factors:
            return one * size("lokr_w2_a", 1) * size("lokr_w2_b", 1) * size("lokr_t2", slice(2, None))
        return one * size("lokr_w2_a", 0) * size("lokr_w2_b", slice(1, None))
    if kind == "full" and "diff" in factors:
        return size("diff", slice(None))
    return None
