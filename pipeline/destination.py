"""Where a bundle goes: never over something of the user's, and a rejected one to the side."""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Final

from .bundle import Bundle
from .errors import UsageError
from .manifest import MANIFEST
from .pack import PackInputs, pack, packed_before

if TYPE_CHECKING:
    from ..validate.report import ParityReport

REPORT: Final = "parity.json"  # beside the manifest of a rejected bundle


@dataclass(frozen=True, slots=True)
class Destination:
    """One bundle's place."""

    path: Path
    overwrite: bool

    @property
    def rejected(self) -> Path:
        """Where the bundle goes when it failed its gate."""
        return self.path.with_name(f"{self.path.name}.rejected")

    def refuse_if_taken(self) -> None:
        """Refuse before any work what `publish` would refuse after it.

        Raises:
            UsageError: there is something else than a bundle, or the parent cannot be written to.
        """
        occupied = self.path.exists() and not (self.path.is_dir() and not any(self.path.iterdir()))
        if occupied and not (self.path / MANIFEST).is_file():
            raise UsageError(f"{self.path} exists and is not a bundle", hint="choose another folder with -o")
        parent = next(folder for folder in self.path.absolute().parents if folder.exists())
        _refuse_unwritable(parent)

    def publish(self, inputs: PackInputs, *, accepted: bool, parity: ParityReport | None) -> Bundle:
        """Write the bundle: to `path`, or to `rejected` with the gate's report.

        A bundle at `path` that is byte for byte what would be written stays as it is.

        Raises:
            UsageError: another bundle is at `path`, and `overwrite` was not asked for.
        """
        if not accepted:
            bundle = pack(inputs, self.rejected, replace=True)
            (self.rejected / REPORT).write_text(json.dumps(parity.to_json() if parity else None, indent=2) + "\n")
            return bundle
        if (self.path / MANIFEST).is_file() and not self.overwrite:
            present = packed_before(inputs, self.path)
            if present is None:
                raise UsageError(
                    f"{self.path} holds another bundle",
                    hint="choose another folder with -o, or replace it with --overwrite",
                )
            present.refuse_damage()
            return present
        return pack(inputs, self.path, replace=self.overwrite)


def _refuse_unwritable(folder: Path) -> None:
    import tempfile

    try:
        with tempfile.TemporaryFile(dir=folder):
            pass
    except OSError as error:
        raise UsageError(
            f"{folder} cannot be written to: {error.strerror}", hint="choose another folder with -o"
        ) from None
