"""One weight, changed as its adapters say. The mathematics is PEFT's: its layers are built around it, and merged.

What PEFT has no layer for is written here with its source: LyCORIS' diagonal OFT, and DoRA along the inputs.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from typing import TYPE_CHECKING, Any, Final

import numpy as np
from numpy.typing import NDArray

from ...stages.artifacts import Adapted
from ...stages.errors import CheckpointError
from ..safetensors_file import read_tensor

if TYPE_CHECKING:
    from torch import Tensor

Factors = Mapping[str, "Tensor"]


def merge_all(values: NDArray[Any], changes: Sequence[Adapted]) -> NDArray[Any]:
    """`values` after `changes`, one after the other, in float32."""
    import torch

    weight = torch.from_numpy(np.ascontiguousarray(values, np.float32))
    for change in changes:
        weight = merge(weight, change)
    return np.ascontiguousarray(weight.numpy())


def merge(weight: Tensor, change: Adapted) -> Tensor:
    """`weight` (float32, any layer's) after `change`.

    A scale multiplies what additive kinds (LoRA, DoRA, LoHa, LoKr) add, as PEFT's; between the weight and what a
    rotation (OFT, BOFT) makes of it, it interpolates: PEFT knows no scale there, LyCORIS' multiplier is this one.

    Raises:
        CheckpointError: the factors do not fit the weight, or the result is NaN or infinite.
    """
    import torch

    factors = {}
    for role, stored in zip(change.roles, change.factors, strict=True):
        values = read_tensor(stored)
        widened = values.astype("float32") if values.dtype.kind not in "iu" else values
        factors[role] = torch.from_numpy(widened).float()
    try:
        with torch.no_grad():
            changed: Tensor = _KINDS[change.kind](weight, factors, change)
            changed = changed if change.kind == "rows" else changed.reshape(weight.shape)
    except (RuntimeError, ValueError) as error:
        raise CheckpointError(
            f"{change.factors[0].file}: the {change.kind} factors of {change.parameter} do not fit its weight "
            f"{list(weight.shape)}: {error}",
            hint="it was trained on another family or size of model",
        ) from error
    if not bool(torch.isfinite(changed).all()):
        raise CheckpointError(f"{change.factors[0].file}: {change.parameter} becomes NaN or infinite")
    return changed


def _lora(weight: Tensor, factors: Factors, change: Adapted) -> Tensor:
    import peft
    import torch

    down, up = factors["down"], factors["up"]
    if "mid" in factors:  # Tucker: the kernel lies in the middle factor; LyCORIS, functional/general.py
        down = torch.einsum("nmkl,mi->nikl", factors["mid"], down.flatten(1))
    rank = down.shape[0]
    if weight.dim() == 2:  # trained on a 1x1 convolution, or the other way round
        down, up = down.flatten(1), up.flatten(1)
    else:
        down, up = down.reshape(rank, *weight.shape[1:]), up.reshape(len(weight), rank, 1, 1)
    magnitude = factors.get("magnitude")
    if magnitude is not None and not _is_per_output(magnitude, weight):
        delta = (up.flatten(1) @ down.flatten(1)).reshape(weight.shape)
        return _weighted(weight, delta * (_alpha(factors, change, rank) / rank * change.scale), factors)
    kind: Any = peft.LoraConfig  # its alpha is declared whole, and is a quotient's numerator
    config = kind(
        r=rank, lora_alpha=_alpha(factors, change, rank), target_modules=["m"], use_dora=magnitude is not None
    )
    state = {"lora_A.weight": down, "lora_B.weight": up}
    if magnitude is not None:
        state["lora_magnitude_vector.weight"] = (
            magnitude.reshape(-1) if weight.dim() == 2 else magnitude.reshape(1, -1, 1, 1)
        )
    return _with_peft(weight, config, state, change.scale)


def _loha(weight: Tensor, factors: Factors, change: Adapted) -> Tensor:
    import torch
    from peft.tuners.loha import layer

    peft: Any = layer
    part = {name.removeprefix("hada_"): values for name, values in factors.items()}
    rank = part["w1_b"].shape[0]
    scale = torch.tensor(_alpha(factors, change, rank) / rank * change.scale)
    if "t1" in part:
        delta = peft.make_weight_cp(*(part[n] for n in ("t1", "w1_a", "w1_b", "t2", "w2_a", "w2_b")), scale)
    else:
        delta = peft.make_weight(*(part[n] for n in ("w1_a", "w1_b", "w2_a", "w2_b")), scale)
    return _weighted(weight, delta, factors)


def _lokr(weight: Tensor, factors: Factors, change: Adapted) -> Tensor:
    from peft.tuners.lokr import layer

    peft: Any = layer
    part = {name.removeprefix("lokr_"): values for name, values in factors.items()}
    one = part["w1"] if "w1" in part else part["w1_a"] @ part["w1_b"]
    if "w2" in part:
        two = part["w2"]
    elif "t2" in part:
        two = peft.make_weight_cp(part["t2"], part["w2_a"], part["w2_b"])
    else:
        two = part["w2_a"] @ part["w2_b"].flatten(1)
    ranks = [part[n].shape[0] for n in ("w2_b", "w1_b") if n in part]
    if ranks:
        scale = _alpha(factors, change, ranks[0]) / ranks[0]
    else:  # both whole: LyCORIS sets alpha to the rank then; PEFT's settings hold all the same
        rank = change.settings.get("r")
        scale = _alpha({}, change, rank) / rank if rank else 1.0
    return _weighted(weight, peft.make_kron(one, two, scale * change.scale), factors)


def _oft(weight: Tensor, factors: Factors, change: Adapted) -> Tensor:
    from peft import OFTConfig

    elements = factors["oft_R"].shape[1]
    size = (1 + math.isqrt(1 + 8 * elements)) // 2  # elements = size (size - 1) / 2
    chosen = {k: change.settings[k] for k in _ROTATION if k in change.settings}
    config = OFTConfig(r=0, oft_block_size=size, target_modules=["m"], **chosen)
    return _turned(weight, _with_peft(weight, config, {"oft_R.weight": factors["oft_R"]}, None), change)


def _boft(weight: Tensor, factors: Factors, change: Adapted) -> Tensor:
    from peft import BOFTConfig

    rotation = factors["boft_R"]
    config = BOFTConfig(
        boft_block_size=rotation.shape[2], boft_n_butterfly_factor=rotation.shape[0], target_modules=["m"]
    )
    state = {"boft_R": rotation, "boft_s": factors["boft_s"]}
    return _turned(weight, _with_peft(weight, config, state, None), change)


def _lycoris_oft(weight: Tensor, factors: Factors, change: Adapted) -> Tensor:
    """LyCORIS' diagonal OFT (lycoris/modules/diag_oft.py), and kohya's: rotations of blocks of outputs."""
    import torch

    blocks = factors["oft_blocks"]  # [n, b, b]
    skew = blocks - blocks.transpose(-1, -2)
    constraint = float(factors["alpha"]) if "alpha" in factors else 0.0
    if constraint > 0:
        norm = torch.norm(skew) + 1e-8
        skew = skew * (torch.minimum(norm, torch.tensor(constraint * len(weight))) / norm)
    eye = torch.eye(blocks.shape[-1])
    rotation = torch.linalg.solve(eye - skew, eye + skew, left=False)  # (I + Q) (I - Q)^-1
    split = weight.flatten(1).reshape(len(rotation), rotation.shape[-1], -1)
    changed = torch.einsum("knm,kn...->km...", rotation, split).reshape(weight.shape[0], -1)
    if "rescale" in factors:
        changed = changed * factors["rescale"].reshape(-1, 1)
    return _turned(weight, changed.reshape(weight.shape), change)


def _full(weight: Tensor, factors: Factors, change: Adapted) -> Tensor:
    return weight + factors["diff"].reshape(weight.shape) * change.scale


def _rows(weight: Tensor, factors: Factors, change: Adapted) -> Tensor:
    import torch

    return torch.cat([weight, factors["rows"]])


def _turned(weight: Tensor, changed: Tensor, change: Adapted) -> Tensor:
    return changed if change.scale == 1.0 else weight + change.scale * (changed.reshape(weight.shape) - weight)


def _weighted(weight: Tensor, delta: Tensor, factors: Factors) -> Tensor:
    """The sum, with DoRA's magnitudes where there are some ("DoRA", Liu et al. 2024, equation 5).

    They are of rows, or of columns: LyCORIS' `wd_on_output` false, its default before 3.0.
    """
    changed = weight + delta.reshape(weight.shape)
    if "magnitude" not in factors:
        return changed
    magnitude = factors["magnitude"]
    if not _is_per_output(magnitude, weight):
        norm = changed.transpose(0, 1).flatten(1).norm(dim=1).reshape(1, -1, *[1] * (weight.dim() - 2))
    else:
        norm = changed.flatten(1).norm(dim=1).reshape(-1, *[1] * (weight.dim() - 1))
    weighted: Tensor = changed * (magnitude.reshape(norm.shape) / norm)
    return weighted


def _is_per_output(magnitude: Tensor, weight: Tensor) -> bool:
    """Whether the magnitudes are of rows: [out], [out, 1, ...], or PEFT's [1, out, 1, 1] of convolutions."""
    shape = tuple(magnitude.shape)
    if len(shape) == 4 and weight.dim() == 4 and shape[0] == 1 and shape[1] == weight.shape[0]:
        return True
    return shape[0] == weight.shape[0]


def _alpha(factors: Factors, change: Adapted, rank: int) -> float:
    """alpha as PEFT's `alpha / rank` takes it: the file's own, else PEFT's settings, else the rank itself."""
    if "alpha" in factors:
        return float(factors["alpha"])
    settings = change.settings
    pattern = settings.get("alpha_pattern") or {}
    own = next(
        (value for key, value in pattern.items() if change.parameter.removesuffix(".weight").endswith(key)), None
    )
    alpha = own if own is not None else settings.get("lora_alpha", settings.get("alpha", rank))
    return float(alpha) * (math.sqrt(rank) if settings.get("use_rslora") else 1.0)


def _with_peft(weight: Tensor, config: Any, state: Factors, scale: float | None) -> Tensor:
    """`weight` merged with the factors `state` by PEFT's own layer of the kind that `config` asks for."""
    import torch
    from peft import inject_adapter_in_model, utils

    load: Any = utils.set_peft_model_state_dict
    holder = torch.nn.Module()
    if weight.dim() == 2:
        layer: Any = torch.nn.Linear(weight.shape[1], weight.shape[0], bias=False, device="meta")
    else:
        kernel = (weight.shape[2], weight.shape[3])
        layer = torch.nn.Conv2d(weight.shape[1], weight.shape[0], kernel, bias=False, device="meta")
    layer.weight = torch.nn.Parameter(weight.clone(), requires_grad=False)
    holder.m = layer
    model = inject_adapter_in_model(config, holder)
    result = load(model, {f"m.{name}": values for name, values in state.items()})
    if result.unexpected_keys or any("m." in name and "base_layer" not in name for name in result.missing_keys):
        raise ValueError(f"PEFT did not take {result.unexpected_keys}, and missed {result.missing_keys}")
    tuner: Any = model.m
    if scale is not None:
        tuner.set_scale("default", scale)
    tuner.merge(safe_merge=True)
    merged: Tensor = tuner.get_base_layer().weight
    return merged


_ROTATION: Final = ("coft", "eps", "block_share", "use_cayley_neumann", "num_cayley_neumann_terms")
_KINDS: Final[Mapping[str, Callable[[Any, Any, Adapted], Any]]] = {
    "lora": _lora,
    "loha": _loha,
    "lokr": _lokr,
    "oft": _oft,
    "boft": _boft,
    "lycoris-oft": _lycoris_oft,
    "full": _full,
    "rows": _rows,
}
