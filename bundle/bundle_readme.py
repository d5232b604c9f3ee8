"""README.md of a bundle: for the app developer who is handed the folder and nothing else."""

from __future__ import annotations

from collections.abc import Iterator

from ..stages.disk import mebibytes
from .manifest import Manifest
from .manifest_arithmetic import ArithmeticEntry, ChoiceEntry


def bundle_readme(manifest: Manifest) -> str:
    """Markdown made of the manifest's facts alone, so that equal bundles have equal pages."""
    target, (height, width) = manifest.target, manifest.size
    lines = [
        f"# {manifest.name} for {target.name}",
        "",
        f"A {manifest.family} checkpoint as {target.name} models (runtime {target.min_runtime} or newer), for pictures",
        f"of {width} x {height} pixels. `manifest.json` says everything an app has to know: inputs and outputs of each",
        "model, the sampling schedule as a table of coefficients, the VAE's scale, how far each model was found from",
        "PyTorch, and a sha256 of every file.",
        "",
        "| component | precision | bits per weight | size |",
        "|---|---|---|---|",
    ]
    for name, entry in manifest.components.items():
        size = mebibytes(sum(file.bytes for file in entry.files))
        lines.append(f"| {name} | {entry.precision} | {entry.bits_per_weight:g} | {size} |")
    if manifest.control:
        lines += [
            "",
            "It draws along a control picture (`generate --control FILE`): what `controlnet` makes of one is added",
            "inside the UNet; `control` in the manifest says which output goes where.",
        ]
    notes = [f"- {name}: {note}" for name, entry in manifest.components.items() for note in entry.notes]
    lines += ["", *notes, ""] if notes else [""]
    lines += [
        "Check it with `diffusette verify`, draw with `diffusette generate`, compare with PyTorch with",
        "`diffusette validate`.",
        "",
        *arithmetic_lines(manifest.arithmetic, target.name),
        "## Licence",
        "",
        "The weights are those of the checkpoint and stay under its licence; converting them changes nothing about it.",
        "Licence files that lay beside the checkpoint are in `licence/`.",
    ]
    return "\n".join(lines) + "\n"


def arithmetic_lines(entry: ArithmeticEntry | None, target: str) -> Iterator[str]:
    """What to set, and what each choice leaves."""
    if entry is None:
        return
    yield "## Arithmetic"
    yield ""
    yield f"arithmetic: {entry.status}. Options in {target}'s own words; what is not named keeps its default."
    yield ""
    for title, chosen in (("Recommended", entry.recommended), ("Proven against PyTorch", entry.proven_in)):
        for name in dict.fromkeys(chosen.values()):
            those = ", ".join(part for part, how in chosen.items() if how == name)
            yield f"- {title}, {those}: **{name}**: {_options(entry.choices[name])}"
    failing = [(name, choice.fails) for name, choice in entry.choices.items() if choice.fails]
    yield from (f"- Do not use **{name}**: {why}" for name, why in failing)
    for machine in entry.machines:
        parts = list(next(iter(machine.rows.values())).snr_db)
        yield ""
        yield f"dB from PyTorch in float32 on {machine.machine}, {target} {machine.runtime}:"
        yield ""
        yield "| arithmetic | computes | " + " | ".join(parts) + " | picture | verdict |"
        yield "|---|---|" + "---|" * (len(parts) + 2)
        for name, row in machine.rows.items():
            values = (row.snr_db[part] for part in parts)
            cells = ["died" if value is None else f"{value:.1f}" for value in values]
            picture = "-" if row.picture_psnr_db is None else f"{row.picture_psnr_db:.1f}"
            mark = " (no option set)" if entry.choices[name].default else ""
            yield f"| {name}{mark} | {row.computes} | {' | '.join(cells)} | {picture} | {row.verdict} |"
    yield ""


def _options(choice: ChoiceEntry) -> str:
    said = [f"{name} = {_value(value)}" for name, value in choice.options.items()]
    return f"`{'`, `'.join(said)}`" if said else "no option"


def _value(value: object) -> str:
    return str(value).lower() if isinstance(value, bool) else str(value)
