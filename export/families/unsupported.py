"""Checkpoints that people hand in and that are refused by name, most specific first."""

from __future__ import annotations

from typing import Final

from .family import Signature, Unsupported

UNSUPPORTED: Final[tuple[Unsupported, ...]] = ()
