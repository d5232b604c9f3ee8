"""MNN's `BackendConfig` and hints that decide in which numbers it computes. Source: alibaba/MNN, `MNNForwardType.h`."""

from __future__ import annotations

from typing import Any, Final

from ...quantize.scheme import parse_scheme
from ...stages.artifacts import TargetModel
from ..arithmetic import FLOAT32, Arithmetic, Computed, arithmetic_named

# Names as in MNN's headers, values as its C++ and Python interfaces take them. Python takes names of memory and power
# modes too, and ignores them silently.
PRECISION: Final = {"Precision_Normal": 0, "Precision_High": 1, "Precision_Low": 2}
MEMORY: Final = {"Memory_Normal": 0, "Memory_High": 1, "Memory_Low": 2}

# MNN::Interpreter::HintMode, and its value for "no Winograd". The default costs 45 dB on 3x3 convolutions and 6 GB in
# an SD1.5 UNet, for a tenth of the time; MNN's own diffusion demo ships with 0 as well.
WINOGRAD: Final = "WINOGRAD_MEMORY_LEVEL"
HINTS: Final = {WINOGRAD: 3}
NO_WINOGRAD: Final = 0


GROUP_CHANNELS: Final = 16
"""Input channels of which a group of weights holds a multiple: the largest unit in which MNN packs them (0102)."""

MEMORY_LOW: Final = "float32-memory-low"


def _options(precision: str, memory: str) -> dict[str, Any]:
    return {"precision": f"Precision_{precision}", "memory": f"Memory_{memory}", WINOGRAD: NO_WINOGRAD}


def _arithmetic(name: str, precision: str, memory: str, expects: Computed, rank: int) -> Arithmetic:
    return Arithmetic(name, _options(precision, memory), expects, rank=rank)


# With Memory_Low, MNN keeps integer weights as they are and rounds activations to 8 bits; otherwise it widens weights
# when it loads.
ARITHMETICS: Final = (
    _arithmetic(FLOAT32, "High", "Normal", "float32", 7),
    _arithmetic(MEMORY_LOW, "High", "Low", "float32", 5),
    _arithmetic("normal", "Normal", "Normal", "float32", 6),
    _arithmetic("normal-memory-low", "Normal", "Low", "float32", 4),
    _arithmetic("fp16", "Low", "Normal", "float16", 2),
    _arithmetic("fp16-memory-low", "Low", "Low", "float16", 1),
    Arithmetic("defaults", {}, "float32", is_default=True, rank=3),  # Precision_Normal, Memory_Normal, Winograd
)


def rounds_activations(model: TargetModel) -> bool:
    """Whether the model is meant to run with activations of 8 bits."""
    return any(parse_scheme(name).activation_bits == 8 for name in model.precision.split("+"))


def proven_in(model: TargetModel) -> str:
    """The arithmetic in which `model` is compared with PyTorch: activations of 8 bits need Memory_Low."""
    return MEMORY_LOW if rounds_activations(model) else FLOAT32


def configuration(arithmetic: str, threads: int) -> tuple[dict[str, Any], dict[int, int]]:
    """What MNN's Python interface takes for that arithmetic on the CPU: a backend's configuration, and hints."""
    options = dict(arithmetic_named(arithmetic, ARITHMETICS, "mnn").options)
    hints = {HINTS[name]: options.pop(name) for name in HINTS if name in options}
    values = {"precision": PRECISION, "memory": MEMORY}
    return {"backend": "CPU", "numThread": threads, **{key: values[key][word] for key, word in options.items()}}, hints
