"""README.md of a bundle: for the app developer who is handed the folder and nothing else."""

from __future__ import annotations

from .disk import mebibytes
from .manifest import Manifest


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
        "## Licence",
        "",
        "The weights are those of the checkpoint and stay under its licence; converting them changes nothing about it.",
        "Licence files that lay beside the checkpoint are in `licence/`.",
    ]
    return "\n".join(lines) + "\n"
