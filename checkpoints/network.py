"""The bare diffusers or transformers network that a component's configuration describes.

This module imports torch only inside its functions.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any, Final

from ..stages.artifacts import ComponentSource, role_of
from ..stages.errors import CheckpointError
from .config import PIXELS_PER_LATENT
from .families.family import PENULTIMATE, STATES, TAKES_RESIDUALS

if TYPE_CHECKING:
    from torch import nn

# Entries of a config that no constructor knows.
_OURS: Final = ("_name_or_path", STATES, TAKES_RESIDUALS, PIXELS_PER_LATENT)
MAX_LAYERS: Final = 1000  # of one kind in a network, and entries of a list in its config; SDXL has 10 and 4
MAX_WIDTH: Final = 2**20  # channels, words of a vocabulary, pixels; the largest seen is CLIP's vocabulary, 49,408


def build(source: ComponentSource, device: str = "meta") -> nn.Module:
    """Build the bare diffusers or transformers module of `source.config` on `device`, in eval mode.

    Parameters are uninitialised (on the meta device they have no storage at all); buffers that the module
    computes for itself, such as position ids, are real so that they can enter a graph as constants.

    Raises:
        CheckpointError: the configuration describes no network.
    """
    import torch

    config = {name: value for name, value in source.config.items() if name not in _OURS}
    _refuse_absurd(source.component, config)
    penultimate = source.component == "text_encoder" and source.config.get(STATES) == PENULTIMATE
    if penultimate:
        config["num_hidden_layers"] -= 1  # nothing reads what the last one makes
    try:
        with torch.device(device):
            module = _construct(source.component, config)
        if device == "meta":
            _materialise_buffers(module, lambda: _construct(source.component, config))
        if penultimate:
            module.final_layer_norm = torch.nn.Identity()
    except (CheckpointError, MemoryError):
        raise
    except Exception as error:
        what = (
            f"{source.component}: no network can be built from its config.json: {type(error).__name__}: {error!s:.500}"
        )
        raise CheckpointError(what, hint="take config.json from the same checkpoint as the weights") from error
    module.eval()
    module.requires_grad_(False)
    return module


def _refuse_absurd(component: str, config: Mapping[str, Any]) -> None:
    """Refuse what would keep the constructors busy until memory ends; real networks are far below each bound."""
    for key, value in config.items():
        values = value if isinstance(value, list | tuple) else [value]
        numbers = [number for number in values if isinstance(number, int | float)]
        most = MAX_LAYERS if "layers" in key else MAX_WIDTH
        if len(values) > MAX_LAYERS or any(not abs(number) <= most for number in numbers):
            raise CheckpointError(
                f"{component}: config.json says {key} = {value!r:.80}: no network is that large",
                hint="take config.json from the same checkpoint as the weights",
            )


def _construct(component: str, config: dict[str, Any]) -> nn.Module:
    module: nn.Module
    kind: Any  # the libraries' constructors carry no types
    role = role_of(component)
    if role == "text":
        from transformers import CLIPTextConfig, CLIPTextModel, CLIPTextModelWithProjection

        # eager attention: plain MatMul and Softmax, which every converter digests; SDPA adds NaN guards to the graph
        kind = CLIPTextModel if component == "text_encoder" else CLIPTextModelWithProjection
        module = kind._from_config(CLIPTextConfig(**config), attn_implementation="eager")
    elif role == "denoiser":
        from diffusers import UNet2DConditionModel

        kind = UNet2DConditionModel
        module = kind.from_config(config)
    elif role == "control":
        from diffusers import ControlNetModel

        kind = ControlNetModel
        module = kind.from_config(config)
    else:
        from diffusers import AutoencoderKL, AutoencoderTiny

        kind = AutoencoderTiny if config.get("_class_name") == "AutoencoderTiny" else AutoencoderKL
        module = kind.from_config(config)
    return module


def _materialise_buffers(module: nn.Module, construct: Any) -> None:
    """Give buffers of a meta module the values that the constructor computes on the CPU, where weights stay away."""
    if not any(True for _ in module.buffers()):
        return
    import torch
    from accelerate import init_empty_weights

    with torch.device("cpu"), init_empty_weights(include_buffers=False):
        real = dict(construct().named_buffers())
    for name, _ in list(module.named_buffers()):
        owner, _, leaf = name.rpartition(".")
        module.get_submodule(owner)._buffers[leaf] = real[name]
