"""Where a bundle goes: never over something of the user's, and a rejected one to the side."""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Final

from ..bundle.bundle import Bundle, open_bundle
from ..bundle.manifest import MANIFEST
from ..bundle.pack import pack, packed_before
from ..bundle.pack_inputs import PackInputs
from ..stages.errors import UsageError

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence

    from ..stages.artifacts import Checkpoint
    from ..validate.machines.report import MachineReport
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

    def refuse_if_taken(
        self, checkpoint: Checkpoint, target: str, size: tuple[int, int], precisions: Mapping[str, str] | None
    ) -> None:
        """Refuse before any work what can only be refused after it otherwise.

        Args:
            precisions: of each component; None: they are yet to be chosen.

        Raises:
            UsageError: there is something else than a bundle, a bundle of something else, or the parent cannot be
                written to.
        """
        try:
            for place in (self.path, self.rejected):
                occupied = place.exists() and not (place.is_dir() and not any(place.iterdir()))
                if occupied and not (place / MANIFEST).is_file():
                    raise UsageError(f"{place} exists and is not a bundle", hint="choose another folder with -o")
            parent = next(folder for folder in self.path.parents if folder.exists())
        except OSError as error:
            raise UsageError(f"{self.path}: {error.strerror}", hint="choose another folder with -o") from None
        _refuse_unwritable(parent)
        if (self.path / MANIFEST).is_file() and not self.overwrite:
            present = open_bundle(self.path).manifest
            there = (present.provenance.checkpoint, present.target.name, tuple(present.size))
            found = {name: _default(part.precision) for name, part in present.components.items()}
            wanted = None if precisions is None else {name: _default(label) for name, label in precisions.items()}
            if there != (checkpoint.digest, target, tuple(size)) or wanted not in (None, found):
                raise self._holds_another()

    def _holds_another(self) -> UsageError:
        return UsageError(
            f"{self.path} holds another bundle",
            hint="choose another folder with -o, or replace it with --overwrite",
        )

    def publish(
        self, inputs: PackInputs, parity: ParityReport | None, on_machines: Sequence[MachineReport] = ()
    ) -> Bundle:
        """Write the bundle: to `path`, or to `rejected` with the reports if the gate or a machine refused it.

        A bundle at `path` that is byte for byte what would be written stays as it is.

        Raises:
            UsageError: another bundle is at `path`, and `overwrite` was not asked for.
        """
        if not ((parity is None or parity.ok) and all(report.ok for report in on_machines)):
            bundle = pack(inputs, self.rejected, replace=True)
            found = (parity.to_json() if parity else {}) | {"machines": [report.to_json() for report in on_machines]}
            (self.rejected / REPORT).write_text(json.dumps(found, indent=2) + "\n")
            return bundle
        if (self.path / MANIFEST).is_file() and not self.overwrite:
            present = packed_before(inputs, self.path)
            if present is None:
                raise self._holds_another()
            present.refuse_damage()
            return present
        return pack(inputs, self.path, replace=self.overwrite)


def _default(precision: str) -> str:
    """A plan's default scheme: which tensors are kept out of it (`fp16+keep`) is found out by the conversion."""
    return precision.partition("+")[0]


def _refuse_unwritable(folder: Path) -> None:
    import tempfile

    try:
        with tempfile.TemporaryFile(dir=folder):
            pass
    except OSError as error:
        raise UsageError(
            f"{folder} cannot be written to: {error.strerror}", hint="choose another folder with -o"
        ) from None
