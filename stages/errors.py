"""Everything a user can do wrong, and the exit code that each mistake ends with.

A `DiffusetteError` says what happened (with the value), where, and what to do; `cli/` prints it without
a traceback. Any other exception that reaches `cli/` is a bug of ours and exits with 70.
"""

from __future__ import annotations

from collections.abc import Collection, Iterable
from difflib import get_close_matches
from typing import ClassVar


class DiffusetteError(Exception):
    """A failure that the user can act on.

    Args:
        what: the problem, with the offending value and its place, in one or a few lines.
        hint: what to do next, in one line; empty when nothing sensible can be said.
    """

    exit_code: ClassVar[int] = 1

    def __init__(self, what: str, *, hint: str = "") -> None:
        super().__init__(what)
        self.what = what
        self.hint = hint


class UsageError(DiffusetteError):
    """The command line asks for something that does not exist or contradicts itself."""

    exit_code = 2


class RecipeError(UsageError):
    """A recipe file has an unknown key, a wrong value or a rule that matches nothing."""


class UnknownTarget(UsageError):
    """No runtime of that name is registered."""


class MissingTool(DiffusetteError):
    """A package or program that the work needs is absent or of a wrong version."""

    exit_code = 3


class ModelError(DiffusetteError):
    """A model or file cannot be used."""

    exit_code = 4


class CheckpointError(ModelError):
    """The checkpoint is not one, is damaged, or belongs to a family that is not supported."""


class ExportError(ModelError):
    """PyTorch could not be exported to a graph."""


class UnsupportedPrecision(ModelError):
    """A runtime does not execute the scheme that was asked for."""


class ToolCrashed(ModelError):
    """A native converter or runtime ended with a signal or a failure status."""


class NoRoom(ModelError):
    """Memory or disk clearly cannot hold the work, or ran out during it."""


class FeedError(ModelError):
    """Arrays given to a model differ from its inputs in name, dtype or shape, or hold a NaN or an infinity."""


class ParityError(DiffusetteError):
    """A component drifted past its tolerance."""

    exit_code = 5


class BundleError(DiffusetteError):
    """A bundle is damaged, incomplete, or written by a newer version."""

    exit_code = 6


def refuse_unknown(
    found: Iterable[str], known: Collection[str], where: str, error: type[DiffusetteError] = RecipeError
) -> None:
    """Raise `error` for the first of `found` that is not in `known`, naming the nearest known word."""
    for key in found:
        if key not in known:
            near = get_close_matches(key, known, n=1)
            hint = f"did you mean {near[0]!r}?" if near else f"known: {', '.join(sorted(known))}"
            raise error(f"{where}: unknown {key!r}", hint=hint)
