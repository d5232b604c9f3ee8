"""A search's result as an ordinary recipe: names of modules, and for each rule what it costs."""

from __future__ import annotations

import re
from collections.abc import Mapping
from math import log10
from typing import TYPE_CHECKING

from ..recipe import Recipe, parse_recipe

if TYPE_CHECKING:
    from ...quantize.losses import LossTable, Option
    from ...quantize.rounding import Method
    from .goal import Goal, MenuRow


def found_recipe(
    base: Recipe,
    chosen: Mapping[str, Mapping[str, str]],
    table: LossTable,
    row: MenuRow,
    goal: Goal,
    target: str,
    rounding: Method,
) -> Recipe:
    """`base` with the rules that give every layer its scheme; modules are named, so it fits any fine-tune."""
    import tomli_w

    data = base.model_dump(mode="json", exclude_none=True, by_alias=True)
    usual = {part: _usual(table.options[part], schemes) for part, schemes in chosen.items()}
    overall = max(
        set(usual.values()), key=lambda scheme: sum(table.numbers[p] for p, s in usual.items() if s == scheme)
    )
    data["quantize"] = {"precision": overall, "rounding": rounding}
    data["target"].pop("name", None)
    if " " not in target:
        data["target"]["name"] = target
    rules = []
    for part, schemes in chosen.items():
        if usual[part] != overall:
            rules.append(_rule(f"{part}/.*", usual[part], "what most of its weights take"))
        for parameter, scheme in schemes.items():
            if scheme != usual[part]:
                module = parameter.removesuffix(".weight")
                why = _why(table.options[part][parameter], usual[part], scheme)
                rules.append(_rule(re.escape(f"{part}/{module}"), scheme, why))
    image = "" if row.psnr_db is None else f", pictures {row.psnr_db:.1f} dB PSNR in the median"
    snr = ", ".join(f"{part} {value:.1f}" for part, value in row.snr_db.items())
    text = (
        f"# Found by a search, {goal} for {target}: {row.bits:.2f} bits a weight, {row.bytes / 1e6:.2f} MB.\n"
        f"# In PyTorch with weights rounded so, on calibration prompts: SNR in dB: {snr}{image}.\n"
        "# Each `why` is what the layer alone does to its component's output: at the usual scheme, and at its own.\n\n"
        f"{tomli_w.dumps(data)}\n" + "\n".join(rules)
    )
    name = f"{base.name.removesuffix('.toml')}-searched.toml"
    return parse_recipe(text, name)


def _usual(options: Mapping[str, tuple[Option, ...]], chosen: Mapping[str, str]) -> str:
    """The scheme of most bits."""
    bits: dict[str, int] = {}
    for parameter, scheme in chosen.items():
        bits[scheme] = bits.get(scheme, 0) + next(o.bits for o in options[parameter] if o.scheme == scheme)
    return max(sorted(bits), key=lambda scheme: bits[scheme])


def _rule(match: str, scheme: str, why: str) -> str:
    return f'[[quantize.rules]]\nmatch = \'{match}\'\nscheme = "{scheme}"\nwhy = "{why}"\n'


def _why(options: tuple[Option, ...], usual: str, scheme: str) -> str:
    losses = {option.scheme: option.loss for option in options}
    here = f"{10 * log10(max(losses[scheme], 1e-30)):.0f} dB"
    there = f"{10 * log10(max(losses[usual], 1e-30)):.0f} dB at {usual}, " if usual in losses else ""
    return f"{there}{here} so"
