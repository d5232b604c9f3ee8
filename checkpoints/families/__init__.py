"""Families of checkpoints, told apart by configs and tensor names alone. A new family is one file and one entry."""

from __future__ import annotations

from typing import Final

from ...stages.artifacts import Checkpoint
from ...stages.errors import CheckpointError
from .family import Family, Headers, Part, Shape, Signature, Unsupported
from .sd1 import SD1
from .sd2 import SD2
from .sdxl import SDXL
from .unsupported import UNSUPPORTED

__all__ = [
    "FAMILIES",
    "TEXT_WIDTHS",
    "Family",
    "Headers",
    "Part",
    "Shape",
    "Signature",
    "Unsupported",
    "get_family",
    "recognise",
    "reference_pipeline",
    "refuse_unsupported",
]

FAMILIES: Final[tuple[Family, ...]] = (SDXL, SD2, SD1)  # most specific first
# what a UNet's attention reads, and no two families have in common -> the family's title
TEXT_WIDTHS: Final = {768: SD1.title, 1024: SD2.title, 2048: SDXL.title}
_WITHOUT_CONFIG: Final = ("tokenizer", "tokenizer_2")  # parts without a config that detection could need


def get_family(name: str) -> Family:
    """The family of that name.

    Raises:
        CheckpointError: there is none.
    """
    for family in FAMILIES:
        if family.name == name:
            return family
    raise CheckpointError(f"no family named {name!r}", hint=f"one of: {', '.join(f.name for f in FAMILIES)}")


def reference_pipeline(checkpoint: Checkpoint) -> str:
    """diffusers' class that a picture is compared with: the checkpoint's own where it names one, else its family's."""
    return checkpoint.pipeline or get_family(checkpoint.family).pipeline


def refuse_unsupported(headers: Headers, where: str) -> None:
    """Raise for everything that is known by name and cannot be converted.

    Raises:
        CheckpointError: says what `where` is, by which evidence, and why that is refused.
    """
    for kind in UNSUPPORTED:
        evidence = kind.detect(headers)
        if evidence is not None:
            raise CheckpointError(f"{where}: {kind.name} ({evidence}): {kind.why}", hint=kind.hint or _supported())


def recognise(headers: Headers, where: str) -> tuple[Family, str]:
    """The family that `headers` belong to, and the evidence.

    Raises:
        CheckpointError: it is something known but unsupported, or nothing known; names the facts that speak against.
    """
    refuse_unsupported(headers, where)
    _refuse_absent(headers, where)
    for family in FAMILIES:
        evidence = family.detect(headers)
        if evidence is not None:
            return family, evidence
    compared = [(family, family.signature.compare(headers)) for family in FAMILIES]
    incomplete = [(family, found) for family, found in compared if found.holds and not found.fails]
    if incomplete:
        family, found = min(incomplete, key=lambda each: len(each[1].missing))
        raise CheckpointError(
            f"{where}: component {found.missing[0]!r} is missing: a {family.title} checkpoint without "
            f"{', '.join(found.missing)} ({', '.join(found.holds)})",
            hint="download the whole folder, or add the component from the base checkpoint",
        )
    against = "".join(
        f"\n  not {family.title}: {'; '.join((*found.fails, *(f'no {part}' for part in found.missing)))}"
        for family, found in compared
    )
    raise CheckpointError(
        f"{where}: {headers.pipeline or 'a model'} of no supported family{against}", hint=_supported()
    )


def _refuse_absent(headers: Headers, where: str) -> None:
    for part in (part for family in FAMILIES for part in family.signature.parts):
        if part in headers.parts and part not in headers.configs and part not in _WITHOUT_CONFIG:
            raise CheckpointError(
                f"{where}: component {part!r} is missing: model_index.json lists it, its folder has no configuration",
                hint="download the whole folder again",
            )


def _supported() -> str:
    return f"supported: {', '.join(family.title for family in FAMILIES)}, as a diffusers folder or a single file"
