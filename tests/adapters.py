"""Adapters on tiny models: made and applied live by PEFT itself, and written in the key styles that people have."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import torch
from peft import BOFTConfig, LoHaConfig, LoKrConfig, LoraConfig, OFTConfig, get_peft_model_state_dict
from peft import inject_adapter_in_model as inject
from safetensors.torch import save_file

ATTENTION = r".*\.(attn1|attn2)\.(to_q|to_v|to_out\.0)"
WITH_CONVOLUTIONS = rf"({ATTENTION}|.*\.(conv1|proj_in|conv_shortcut))"
CONFIGS: dict[str, Any] = {
    "lora": LoraConfig(r=4, lora_alpha=6, target_modules=ATTENTION),
    "rslora": LoraConfig(r=4, lora_alpha=6, use_rslora=True, target_modules=ATTENTION),
    "patterns": LoraConfig(
        r=4, lora_alpha=6, rank_pattern={"to_q": 2}, alpha_pattern={"to_v": 3}, target_modules=ATTENTION
    ),
    "conv-lora": LoraConfig(r=4, lora_alpha=6, target_modules=WITH_CONVOLUTIONS),
    "dora": LoraConfig(r=4, lora_alpha=6, use_dora=True, target_modules=WITH_CONVOLUTIONS),
    "loha": LoHaConfig(r=4, alpha=6, target_modules=WITH_CONVOLUTIONS),
    "loha-tucker": LoHaConfig(r=4, alpha=6, use_effective_conv2d=True, target_modules=WITH_CONVOLUTIONS),
    "lokr": LoKrConfig(r=2, alpha=3, target_modules=WITH_CONVOLUTIONS),
    "lokr-tucker": LoKrConfig(
        r=1, alpha=3, use_effective_conv2d=True, decompose_both=True, target_modules=WITH_CONVOLUTIONS
    ),
    "oft": OFTConfig(oft_block_size=4, target_modules=ATTENTION),
    "oft-exact": OFTConfig(oft_block_size=4, use_cayley_neumann=False, target_modules=ATTENTION),
    "boft": BOFTConfig(boft_block_size=4, boft_n_butterfly_factor=2, target_modules=ATTENTION),
}


def adapt(module: Any, kind: str, seed: int = 7) -> Any:
    """Inject the adapter into `module` in place, with factors that really change it; return PEFT's model."""
    import copy

    model = inject(copy.deepcopy(CONFIGS[kind]), module)
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if re.search(r"\.(lora_[AB]|hada_|lokr_|oft_R|boft_R)", name):
                parameter.copy_(torch.randn(parameter.shape, generator=generator) * 0.15)
            elif re.search(r"lora_magnitude_vector|boft_s", name):
                parameter.mul_(1 + 0.2 * torch.rand(parameter.shape, generator=generator))
    return model


def save_peft(module: Any, kind: str, folder: Path) -> Path:
    """As `PeftModel.save_pretrained` writes it: adapter_config.json and adapter_model.safetensors."""
    state = {f"base_model.model.{n}": v.contiguous() for n, v in get_peft_model_state_dict(module).items()}
    folder.mkdir(parents=True)
    save_file(state, folder / "adapter_model.safetensors")
    CONFIGS[kind].save_pretrained(folder)
    return folder


def random_lora(
    module: Any,
    pattern: str,
    prefix: str,
    *,
    rank: int = 4,
    alpha: float | None = 2.0,
    seed: int = 3,
    text: bool = False,
) -> dict[str, torch.Tensor]:
    """A LoRA in kohya's keys for the linear layers and convolutions of `module` whose names match `pattern`."""
    generator = torch.Generator().manual_seed(seed)
    found = {}
    for name, layer in module.named_modules():
        if not re.fullmatch(pattern, name) or not hasattr(layer, "weight"):
            continue
        out, into, *kernel = layer.weight.shape
        flat = prefix + (("text_model_" if text else "") + name.removeprefix("text_model.")).replace(".", "_")
        ones = [1] * len(kernel)
        found[f"{flat}.lora_down.weight"] = torch.randn(rank, into, *kernel, generator=generator) * 0.15
        found[f"{flat}.lora_up.weight"] = torch.randn(out, rank, *ones, generator=generator) * 0.15
        if alpha is not None:
            found[f"{flat}.alpha"] = torch.tensor(alpha)
    return found
