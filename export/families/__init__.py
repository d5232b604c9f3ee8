"""Families of checkpoints, told apart by configs and tensor names alone. A new family is one file and one entry."""

from __future__ import annotations

from typing import Final

from ...pipeline.errors import CheckpointError
from .family import Family, Headers, Part, Shape, Signature, Unsupported
from .sd1 import SD1
from .unsupported import UNSUPPORTED

__all__ = ["FAMILIES", "Family", "Headers", "Part", "Shape", "Signature", "get_family", "recognise", "refuse_unsupported"]

FAMILIES: Final[tuple[Family, ...]] = (SD1,)  # most specific first


def get_family(name: str) -> Family:
    """The family of that name.

    Raises:
        CheckpointError: there is none.
    """
    for family in FAMILIES:
        if family.name == name:
            return family
    raise CheckpointError(f"no family named {name!r}", hint=f"one of: {', '.join(f.name for f in FAMILIES)}")


def refuse_unsupported(headers: Headers, where: str) -> None:
    """Raise for everything that is known by name and cannot be converted.

    Raises:
        CheckpointError: says what `where` is, by which evidence, and why that is refused.
    """
    for kind in UNSUPPORTED:
        evidence = kind.detect(headers)
        if evidence is not None:
            supported = f"supported: {', '.join(f.title for f in FAMILIES)} as a diffusers folder"
            raise CheckpointError(f"{where} is {kind.name} ({evidence}): {kind.why}", hint=kind.hint or supported)


def recognise(headers: Headers, where: str) -> tuple[Family, str]:
    """The family that `headers` belong to, and the evidence.

    Raises:
        CheckpointError: it is something known but unsupported, or nothing known; names the facts that speak against.
    """
    refuse_unsupported(headers, where)
    for family in FAMILIES:
        evidence = family.detect(headers)
        if evidence is not None:
            return family, evidence
    against = [f"not {f.title}: {'; '.join(f.signature.compare(headers)[1])}" for f in FAMILIES]
    raise CheckpointError(f"{where}: no supported family\n  " + "\n  ".join(against), hint="see docs: adding a family")
