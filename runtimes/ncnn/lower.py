"""The PyTorch modules in the form that pnnx digests, with fingerprints for weights.

Some components differ from the canonical modules of `export.modules`: the UNet takes ready-made sinusoids of the
timestep and of SDXL's time ids (ncnn has no int64 casts, and t * frequency is beyond float16), a text encoder gives its
causal mask to the attention as a tensor (pnnx knows no `is_causal`), and one that pools is told where the text ends.
"""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any, Final

from ...checkpoints import network
from ...export import contract, modules
from ...stages.artifacts import ComponentSource, TensorSpec, role_of
from ...stages.errors import ExportError
from ..fingerprints import Fingerprints
from ..inputs import END_OF_TEXT, TIME_IDS_EMBEDDING, TIMESTEP_EMBEDDING

if TYPE_CHECKING:
    from torch import Tensor, nn

# AutoencoderKL's other half: forward never reads it, and pnnx dies on parameters without storage.
_UNUSED: Final = {"decoder": ("encoder", "quant_conv"), "encoder": ("decoder", "post_quant_conv")}

# Entries of config.json that change no graph, and that fine-tunes of one model differ in.
_INCIDENTAL: Final = (
    "_name_or_path",
    "_diffusers_version",
    "transformers_version",
    "architectures",
    "dtype",
    "torch_dtype",
)

_ATTENTION: Final = "diffusette_explicit_causal_mask"
_MASKED: Final = -1e4  # exp(-1e4) is 0 in float32, and unlike -inf it survives float16 and bfloat16


def architecture(config: Mapping[str, Any]) -> dict[str, Any]:
    """A component's configuration without what does not decide its graph."""
    return {name: value for name, value in config.items() if name not in _INCIDENTAL}


def without_weights(component: str, config: Mapping[str, Any]) -> ComponentSource:
    """A source that names an architecture only."""
    return ComponentSource(component, family="", config=config, files=(), digest="", parameters=0, dtype="float32")


def native_inputs(source: ComponentSource, size: tuple[int, int]) -> tuple[TensorSpec, ...]:
    """Inputs of the ncnn model: `timestep_embedding` float32 [1, C0] for the timestep, int32 for int64."""
    specs = contract.input_specs(source, size)
    native = tuple(_native(spec, source.config) for spec in specs)
    if source.component != "text_encoder_2":
        return native
    last, eos = source.config["vocab_size"] - 1, source.config.get("eos_token_id", 2)
    if eos not in (2, last):
        raise ExportError(
            f"text_encoder_2: the end token {eos} is not the last of the vocabulary, {last}: where a text ends is "
            "told by its largest id",
            hint="ncnn cannot run this text encoder as it is: convert it with --target ort or mnn",
        )
    return *native, TensorSpec(END_OF_TEXT, "float32", specs[0].shape)


def _native(spec: TensorSpec, config: Mapping[str, Any]) -> TensorSpec:
    if spec.name == "timestep":
        return TensorSpec(TIMESTEP_EMBEDDING, "float32", (1, int(config["block_out_channels"][0])))
    if spec.name == "time_ids":
        return TensorSpec(TIME_IDS_EMBEDDING, "float32", (1, spec.shape[1] * int(config["addition_time_embed_dim"])))
    return dataclasses.replace(spec, dtype="int32") if spec.dtype == "int64" else spec


def shapes_and_heads(source: ComponentSource) -> tuple[dict[str, tuple[int, ...]], dict[str, int]]:
    """The parameters of `source` with their shapes, and its attention modules with their heads; without weights."""
    from diffusers.models.attention_processor import Attention

    module = _half(source)
    shapes = {name: tuple(parameter.shape) for name, parameter in module.named_parameters()}
    heads = {name: int(part.heads) for name, part in module.named_modules() if isinstance(part, Attention)}
    return shapes, heads


def _half(source: ComponentSource) -> Any:
    """The bare module on the meta device, without what its forward pass never reads."""
    module: Any = network.build(source)
    for name in _UNUSED.get(role_of(source.component), ()):
        if hasattr(module, name):
            delattr(module, name)
    return module


def lowered(source: ComponentSource) -> tuple[nn.Module, Fingerprints]:
    """The wrapped module of `source.config` with fingerprints in place of its parameters, and these.

    Names are those of the bare module's state_dict, as `export.weights` has them.
    """
    from torch import nn

    module = _half(source)
    fingerprints = Fingerprints({name: tuple(parameter.shape) for name, parameter in module.named_parameters()})
    for name in fingerprints.shapes:
        owner, _, leaf = name.rpartition(".")
        parameter = nn.Parameter(fingerprints.stub(name), requires_grad=False)
        module.get_submodule(owner)._parameters[leaf] = parameter
    role = role_of(source.component)
    if role == "control":
        _take_sinusoids(module)
    if role == "denoiser":
        module.get_time_embed = lambda sample, timestep: timestep
        if source.config.get("addition_embed_type") == "text_time":
            module.get_aug_embed = functools.partial(_added_embedding, module)
    if role == "text":
        _use_explicit_mask(module)
    return modules.wrap(source, module), fingerprints


def _take_sinusoids(module: Any) -> None:
    """ControlNetModel.forward embeds the timestep and SDXL's time ids by two modules: they hand on what it is given."""
    forward = module.forward
    del module.time_proj
    if module.config.addition_embed_type == "text_time":
        del module.add_time_proj

    def given(sample: Tensor, timestep: Tensor, *states: Tensor, added_cond_kwargs: Any, return_dict: bool) -> Any:
        added = dict(added_cond_kwargs or {})
        module.time_proj = lambda _: timestep
        if "time_ids" in added:
            sinusoids = added["time_ids"]
            module.add_time_proj = lambda _: sinusoids
        return forward(sample, 0, *states, added_cond_kwargs=added, return_dict=return_dict)

    module.forward = given


def _added_embedding(module: Any, emb: Tensor, encoder_hidden_states: Tensor, added_cond_kwargs: Any) -> Any:
    """UNet2DConditionModel.get_aug_embed for SDXL, given sinusoids in place of the time ids."""
    import torch

    both = torch.cat([added_cond_kwargs["text_embeds"], added_cond_kwargs["time_ids"]], dim=-1)  # [1, P]
    return module.add_embedding(both)


def _use_explicit_mask(module: Any) -> None:
    import torch
    from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

    def attend(
        module: nn.Module,
        query: Tensor,  # [1, heads, tokens, D / heads]
        key: Tensor,
        value: Tensor,
        attention_mask: Tensor | None,
        scaling: float | None = None,
        dropout: float = 0.0,
        **_: Any,
    ) -> tuple[Tensor, None]:
        tokens = query.shape[-2]
        mask = torch.full((tokens, tokens), _MASKED).triu(1)
        attended = torch.nn.functional.scaled_dot_product_attention(query, key, value, attn_mask=mask, scale=scaling)
        return attended.transpose(1, 2).contiguous(), None

    ALL_ATTENTION_FUNCTIONS.register(_ATTENTION, attend)
    module.set_attn_implementation(_ATTENTION)
