"""One `nn.Module` per component, with flat, named, positional tensors in and out.

Names, dtypes and meanings of inputs and outputs are those of optimum's ONNX exports, batch 1. All sizes are
static: (height, width) in pixels decides them. This module imports torch only inside its functions.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, cast

from ..checkpoints.network import build
from ..stages.artifacts import ComponentSource, Role, role_of
from .contract import RESIDUALS_IN, input_specs, output_specs

if TYPE_CHECKING:
    from torch import Tensor, nn


def wrap(source: ComponentSource, module: Any) -> nn.Module:
    """Wrap `module` (from `network.build`) so that it takes and returns plain tensors; it is the attribute `m`.

    `input_names` of the result says which tensors it takes, in order.
    """
    from torch import nn

    class TextEncoder(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.m = module

        def forward(self, input_ids: Tensor) -> Any:  # [1, 77]
            return self.m(input_ids=input_ids, return_dict=True).last_hidden_state  # [1, 77, D]

    class ProjectedTextEncoder(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.m = module

        # [1, 77] -> [1, 77, D], [1, P]. `end_of_text` [1, 77] is 1 where the text ends and 0 elsewhere; runtimes
        # without integer arithmetic are given it.
        def forward(self, input_ids: Tensor, end_of_text: Tensor | None = None) -> Any:
            from transformers.masking_utils import create_causal_mask

            text = self.m.text_model
            states = text.embeddings(input_ids=input_ids)
            mask = create_causal_mask(
                config=text.config, inputs_embeds=states, attention_mask=None, past_key_values=None
            )
            *layers, last = text.encoder.layers
            for layer in layers:
                states = layer(states, mask, is_causal=True)
            final = text.final_layer_norm(last(states, mask, is_causal=True))
            if end_of_text is None:
                end_of_text = _end_of_text(input_ids, text.eos_token_id)
            pooled = (end_of_text[:, :, None] * final).sum(1)  # picks one row
            return states, self.m.text_projection(pooled)

    names = [spec.name for spec in input_specs(source, (64, 64))]  # of any size

    class UNet(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.m = module

        # as `input_specs` lists them -> [1, C, h, w]
        def forward(self, *tensors: Tensor) -> Any:
            given = dict(zip(names, tensors, strict=True))
            added = {name: given.pop(name) for name in ("text_embeds", "time_ids") if name in given}
            positional = [given.pop(name) for name in ("sample", "timestep", "encoder_hidden_states")]
            residuals = [given.pop(name) for name in names if name.startswith(RESIDUALS_IN)]
            more: dict[str, Any] = {}
            if residuals:
                more = dict(zip(RESIDUALS_IN, (residuals[:-1], residuals[-1]), strict=True))
            return self.m(*positional, **given, **more, added_cond_kwargs=added or None, return_dict=False)[0]

    class ControlNet(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.m = module

        # as `input_specs` lists them -> each residual of the UNet's down blocks, and that of its middle; the scale
        # multiplies them outside
        def forward(self, *tensors: Tensor) -> Any:
            first, added = tensors[:4], dict(zip(names[4:], tensors[4:], strict=True))
            down, middle = self.m(*first, added_cond_kwargs=added or None, return_dict=False)
            return *down, middle

    class VaeDecoder(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.m = module

        def forward(self, latent_sample: Tensor) -> Any:  # [1, 4, h, w] -> [1, 3, 8h, 8w]
            return self.m.decode(latent_sample, return_dict=False)[0]

    class VaeEncoder(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.m = module

        def forward(self, sample: Tensor) -> Any:  # [1, 3, H, W] -> [1, 8, h, w]: mean, log variance
            return self.m.encode(sample, return_dict=False)[0].parameters

    wrappers: dict[Role, type[nn.Module]] = {
        "text": TextEncoder if len(output_specs(source, (64, 64))) == 1 else ProjectedTextEncoder,
        "denoiser": UNet,
        "control": ControlNet,
        "decoder": VaeDecoder,
        "encoder": VaeEncoder,
    }
    wrapped: Any = wrappers[role_of(source.component)]().eval()
    wrapped.input_names = tuple(names)
    return cast("nn.Module", wrapped)


def _end_of_text(input_ids: Tensor, eos_id: int) -> Tensor:
    """1 at the first end token of each row [1, 77], 0 elsewhere: where CLIPTextModel takes its pooled output from.

    In float32, in which ids are exact, for the sake of runtimes whose ArgMax takes nothing else.
    """
    import torch

    # CLIP's end token is the largest id; published configs of before transformers 4.31 say 2 for it
    score = input_ids.to(torch.float32) if eos_id == 2 else (input_ids == eos_id).to(torch.float32)
    positions = torch.arange(input_ids.shape[1], device=input_ids.device)
    return (positions[None] == score.argmax(-1)[:, None]).to(torch.float32)


def load(source: ComponentSource) -> nn.Module:
    """The wrapped module on the CPU in float32 with the checkpoint's weights, every tensor accounted for.

    Raises:
        CheckpointError: a weight is missing, has another shape, or belongs to nothing.
    """
    import torch

    from ..checkpoints.weights import Weights

    module = build(source)
    weights = Weights(source)
    half = {name: p for name, p in module.named_parameters() if _belongs(source.component, name)}
    weights.check({name: tuple(p.shape) for name, p in half.items()})
    for name in half:
        owner, _, leaf = name.rpartition(".")
        value = torch.from_numpy(weights.read(name)).to(torch.float32)
        module.get_submodule(owner)._parameters[leaf] = torch.nn.Parameter(value, requires_grad=False)
    return wrap(source, module)


def _belongs(component: str, parameter: str) -> bool:
    """Whether a parameter of the shared AutoencoderKL belongs to this half of it."""
    halves = {"decoder": ("decoder.", "post_quant_conv."), "encoder": ("encoder.", "quant_conv.")}
    role = role_of(component)
    return role not in halves or parameter.startswith(halves[role])
