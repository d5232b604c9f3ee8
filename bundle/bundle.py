"""Opening a bundle. Whoever made it is a stranger: nothing outside its folder is read because the bundle says so."""

from __future__ import annotations

import json
import os
import stat
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Final

from ..export.compiled_schedule import CompiledSchedule
from ..stages.artifacts import TargetModel, sole
from ..stages.errors import BundleError, UsageError, refuse_unknown
from ..stages.hashing import sha256_of_file, sha256_of_json
from ..stages.plain_file import read_plain
from .manifest import MANIFEST, MAX_BYTES, Manifest, parse_manifest
from .manifest_entries import FileEntry
from .stray_weights import stray_weights

if TYPE_CHECKING:
    from ..quantize.plan import Plan

_HINT: Final = "copy the bundle again from an intact copy, or convert the checkpoint again"
# Not part of a bundle, and put into every folder by the systems that bundles are copied through.
_LITTER: Final = (".DS_Store", "Thumbs.db", "desktop.ini")


@dataclass(frozen=True, slots=True)
class BadFile:
    """A declared file that is not what the manifest says."""

    path: str
    problem: str

    def __str__(self) -> str:
        return f"{self.path}: {self.problem}"


@dataclass(frozen=True, slots=True)
class Verification:
    """What `verify` found. Undeclared files do no harm to what is declared: they are worth a warning."""

    checked: int  # files
    bytes: int
    bad: tuple[BadFile, ...]
    undeclared: tuple[str, ...]

    @property
    def ok(self) -> bool:
        return not self.bad


@dataclass(frozen=True, slots=True)
class Bundle:
    """An opened bundle: every declared file is inside, is a regular file, and has the declared size."""

    path: Path
    manifest: Manifest

    @property
    def components(self) -> tuple[str, ...]:
        return tuple(self.manifest.components)

    @property
    def denoiser(self) -> str:
        """Name of the component that predicts noise (or velocity) in latents."""
        return sole("denoiser", self.manifest.components)

    def model(self, component: str, form: str | None = None) -> TargetModel:
        """The model of a component, as its target's `open` takes it; `form` names another form of the same model.

        Raises:
            UsageError: the bundle has no such component or form.
            BundleError: an ONNX graph keeps weights in a file that the manifest does not declare.
        """
        refuse_unknown([component], self.manifest.components, f"{self.path}: component", UsageError)
        entry = self.manifest.components[component]
        if form is not None and form not in entry.forms:
            have = f"it has: {', '.join(entry.forms)}" if entry.forms else "it has no other forms"
            raise UsageError(f"{self.path}: {component} has no form {form!r}", hint="; ".join([have, *entry.notes]))
        files = entry.files if form is None else entry.forms[form]
        if stray := _stray_files(self.path, files):
            raise _damaged(self.path, stray)
        return TargetModel(
            folder=self.path,
            component=component,
            target=self.manifest.target.name,
            precision=entry.precision,
            files=tuple(file.path for file in files),
            inputs=tuple(tensor.spec() for tensor in entry.inputs),
            outputs=tuple(tensor.spec() for tensor in entry.outputs),
            bits_per_weight=entry.bits_per_weight,
            forms={name: tuple(file.path for file in other) for name, other in entry.forms.items()},
            notes=entry.notes,
            digest=sha256_of_json({file.path: file.sha256 for file in files}),
        )

    def plan(self, component: str) -> Plan:
        """How the component's weights are stored."""
        from ..quantize.plan import Plan

        entry = self.manifest.components[component]
        if entry.plan is None:
            return Plan(entry.precision)
        return Plan(entry.plan.default, tuple(sorted(entry.plan.exceptions.items())), channels=entry.plan.channels)

    def schedules(self) -> tuple[CompiledSchedule, ...]:
        """Every compiled schedule of the bundle, the default first.

        Raises:
            BundleError: a file holds no compiled schedule, or another one than the manifest says.
        """
        found = [CompiledSchedule.from_json(self.manifest.schedule.default)]
        for other in self.manifest.schedule.others:
            schedule = CompiledSchedule.from_json(_json(self.path, other.path))
            if (schedule.scheduler, schedule.steps) != (other.name, other.steps):
                problem = f"holds {schedule.scheduler} at {schedule.steps} steps, not {other.name} at {other.steps}"
                raise _damaged(self.path, [BadFile(other.path, problem)])
            found.append(schedule)
        return tuple(found)

    def schedule(self, scheduler: str | None = None, steps: int | None = None) -> CompiledSchedule:
        """One compiled schedule; what is not given is as in the default, or else the first that fits.

        Raises:
            UsageError: there is none; names those that there are.
        """
        every = self.schedules()
        default = every[0]
        wanted = (scheduler or default.scheduler, default.steps if steps is None else steps)
        fitting = [found for found in every if (found.scheduler, found.steps) == wanted]
        if not fitting and steps is None:
            fitting = [found for found in every if found.scheduler == wanted[0]]
        if fitting:
            return fitting[0]
        counts = sorted({found.steps for found in every if found.scheduler == wanted[0]})
        names = ", ".join(dict.fromkeys(found.scheduler for found in every))
        have = f"{wanted[0]} has {', '.join(map(str, counts))} steps" if counts else f"schedulers: {names}"
        raise UsageError(
            f"{self.path}: the bundle carries no schedule for {wanted[0]} at {wanted[1]} steps",
            hint=f"{have}; [schedule] also = [...] in a recipe adds more",
        )

    def refuse_damage(self) -> None:
        """Hash every declared file again.

        Raises:
            BundleError: lists each file that is not what the manifest says.
        """
        found = self.verify()
        if not found.ok:
            raise _damaged(self.path, list(found.bad))

    def verify(self) -> Verification:
        """Hash every declared file again. Opening compares sizes only, which is fast."""
        return _verification(self.path, self.manifest)


def open_bundle(path: str | Path) -> Bundle:
    """Open the bundle in folder `path`.

    Fast: reads the manifest and the size of each file. `Bundle.verify` reads everything.

    Raises:
        BundleError: no bundle, a damaged or a newer one; or one that names a file outside of its folder, a
            symbolic link, or anything else that is not a regular file. Lists every file that is wrong.
    """
    root, manifest = _read_manifest(Path(path))
    bad = list(_wrong_files(root, manifest))
    if bad:
        raise _damaged(root, bad)
    return Bundle(root, manifest)


def verify_bundle(path: str | Path) -> Verification:
    """Check every file of a bundle, hashes included, even where `open_bundle` would refuse it at the first look.

    Raises:
        BundleError: there is no readable manifest to compare with.
    """
    return _verification(*_read_manifest(Path(path)))


def _read_manifest(path: Path) -> tuple[Path, Manifest]:
    try:
        is_folder = stat.S_ISDIR(path.stat().st_mode)
        root = path.resolve()
    except (FileNotFoundError, NotADirectoryError):
        raise BundleError(f"{path}: does not exist", hint="give the folder that holds manifest.json") from None
    except OSError as error:  # a name that is too long, a folder above that may not be entered
        raise BundleError(f"{path}: cannot be opened: {error.strerror}", hint="check the path and its rights") from None
    if not is_folder:
        raise BundleError(f"{path}: is a file, a bundle is a folder", hint="give the folder that holds manifest.json")
    file = root / MANIFEST
    try:
        kind = file.lstat()
        if not stat.S_ISREG(kind.st_mode):
            raise BundleError(f"{file}: is not a regular file", hint=_HINT)
        if kind.st_size > MAX_BYTES:
            raise BundleError(f"{file}: {kind.st_size} bytes, at most {MAX_BYTES} are read", hint=_HINT)
        text = file.read_bytes()
    except FileNotFoundError:
        inner = sorted(found.parent.name for found in root.glob(f"*/{MANIFEST}"))
        hint = f"several targets were converted: give one of {', '.join(inner)} in it" if inner else _HINT
        raise BundleError(f"{path}: no {MANIFEST}, so no bundle", hint=hint) from None
    except OSError as error:
        raise BundleError(f"{file}: cannot be read: {error.strerror}", hint="check that you may read it") from None
    return root, parse_manifest(text, str(file))


def _wrong_files(root: Path, manifest: Manifest) -> Iterator[BadFile]:
    """Declared files that are absent, no regular files, or of another size."""
    for file in dict.fromkeys(manifest.files()):
        problem = _misplaced(root, file.path)
        if problem is None and (size := Path(root, file.path).stat().st_size) != file.bytes:
            problem = f"{size} bytes instead of {file.bytes}"
        if problem is not None:
            yield BadFile(file.path, problem)


def _json(root: Path, path: str) -> Any:
    try:
        return json.loads(read_plain(Path(root, path)))
    except (OSError, ValueError, RecursionError) as error:
        raise _damaged(root, [BadFile(path, f"no valid JSON: {error}")]) from None


def _misplaced(root: Path, path: str) -> str | None:
    """Why `path` is no regular file below `root`, or None. No part of it may be a link, even one that stays inside."""
    step = root
    for part in path.split("/"):
        step = step / part
        try:
            mode = step.lstat().st_mode
        except OSError as error:
            return "is missing" if isinstance(error, FileNotFoundError | NotADirectoryError) else str(error.strerror)
        if stat.S_ISLNK(mode):
            return "is a symbolic link" if step == Path(root, path) else f"lies behind the symbolic link {part}"
    return None if stat.S_ISREG(mode) else "is not a regular file"


def _verification(root: Path, manifest: Manifest) -> Verification:
    files = tuple(dict.fromkeys(manifest.files()))
    bad = {file.path: file for file in _wrong_files(root, manifest)}
    for file in files:
        if file.path not in bad and sha256_of_file(Path(root, file.path)) != file.sha256:
            bad[file.path] = BadFile(file.path, "its bytes have changed (sha256 differs)")
    for entry in manifest.components.values():
        for group in (entry.files, *entry.forms.values()):
            if not any(file.path in bad for file in group):
                bad |= {stray.path: stray for stray in _stray_files(root, group)}
    declared = {file.path for file in files} | {MANIFEST}
    undeclared = sorted(path for path in _all_paths(root) if path not in declared)
    return Verification(len(files), sum(file.bytes for file in files), tuple(bad.values()), tuple(undeclared))


def _all_paths(root: Path) -> Iterator[str]:
    for folder, _, names in os.walk(root):
        for name in names:
            if name not in _LITTER:
                yield Path(folder, name).relative_to(root).as_posix()


def _stray_files(root: Path, files: tuple[FileEntry, ...]) -> list[BadFile]:
    """ONNX graphs among `files` that keep weights in a file which is not among them."""
    strays = stray_weights(root, tuple(file.path for file in files))
    why = "keeps weights in {!r}, which the manifest does not declare"
    return [BadFile(graph, why.format(place)) for graph, place in strays]


def _damaged(root: Path, bad: list[BadFile]) -> BundleError:
    lines = "".join(f"\n  {file}" for file in bad)
    return BundleError(f"{root}: {len(bad)} {'file is' if len(bad) == 1 else 'files are'} damaged{lines}", hint=_HINT)
