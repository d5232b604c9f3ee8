"""From a cache full of models to a bundle: copied, hashed, described, and visible by one rename."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Iterator, Mapping
from functools import partial
from pathlib import Path
from typing import Any, Final

from ..export.compiled_schedule import CompiledSchedule
from ..stages.artifacts import TargetModel
from ..stages.cache_object import ARTIFACT
from ..stages.disk import copy_file
from ..stages.errors import BundleError, UsageError
from ..stages.hashing import sha256_of_file
from ..stages.publish import published, written
from ..stages.safe_path import inside
from .bundle import Bundle, open_bundle
from .bundle_readme import bundle_readme
from .manifest import MANIFEST, Gate, Manifest
from .manifest_arithmetic import ArithmeticEntry
from .manifest_entries import (
    ComponentEntry,
    FileEntry,
    MemoryEntry,
    OtherSchedule,
    ParityEntry,
    PlanEntry,
    Provenance,
    ScheduleEntry,
    SchemeEntry,
    SourceEntry,
    SpeedEntry,
    TensorEntry,
    TokenizerEntry,
)
from .pack_inputs import Content, PackInputs

_LICENCES: Final = ("license", "licence", "notice", "copying", "use_policy")  # file names begin so, in any case

Put = Callable[[Content, str], FileEntry]  # content, path in the bundle


def pack(inputs: PackInputs, output: Path, *, replace: bool = False) -> Bundle:
    """Write the bundle folder `output`, which appears whole or not at all, and open it.

    Args:
        replace: put it in the place of an older bundle; only of a bundle, never of another folder.
    Raises:
        UsageError: `output` exists, or is to be replaced and is no bundle, or may not be written.
        NoRoom: the disk cannot hold it.
    """
    if replace and _is_something_else(output):
        raise UsageError(f"{output}: is no bundle, and is not replaced", hint="choose another name with -o")
    with published(output, existing="replace" if replace else "refuse", needed=_bytes_needed(inputs)) as scratch:
        manifest = _manifest(inputs, partial(_write, scratch, _recorded(inputs)))
        (scratch / MANIFEST).write_text(manifest.to_json(), encoding="utf-8", newline="\n")
    return open_bundle(output)


def packed_before(inputs: PackInputs, output: Path) -> Bundle | None:
    """The bundle at `output`, if it is the one that `pack` would write, with every file in place; else None.

    Compares the manifest, and the size of every file: gigabytes are not read. `Bundle.verify` does that.
    """
    try:
        bundle = open_bundle(output)
    except BundleError:
        return None
    wanted = _manifest(inputs, partial(_describe, _recorded(inputs)))
    if set(bundle.manifest.speed) == set(wanted.speed):  # a measurement, never twice the same
        wanted = wanted.model_copy(update={"speed": bundle.manifest.speed})
    if bundle.manifest.arithmetic and wanted.arithmetic and _ran_alike(bundle.manifest.arithmetic, wanted.arithmetic):
        wanted = wanted.model_copy(update={"arithmetic": bundle.manifest.arithmetic})
    return bundle if bundle.manifest == wanted else None


def _ran_alike(one: ArithmeticEntry, other: ArithmeticEntry) -> bool:
    """Whether both were run on the same machines with the same outcome; the last decimal may differ."""
    outcome = [
        [
            (machine.machine, machine.recommended, {n: row.verdict for n, row in machine.rows.items()})
            for machine in each.machines
        ]
        for each in (one, other)
    ]
    return outcome[0] == outcome[1]


def staged(inputs: PackInputs, folder: Path) -> Manifest:
    """Make the empty `folder` read like the bundle to come, for those who have to run it before it is packed.

    Models are hard links into the cache where the disk allows it: gigabytes are not copied, and nobody may write there.
    """
    manifest = _manifest(inputs, partial(_link, folder, _recorded(inputs)))
    (folder / MANIFEST).write_text(manifest.to_json(), encoding="utf-8", newline="\n")
    return manifest


def record(
    bundle: Bundle,
    *,
    parity: Mapping[str, ParityEntry] | None = None,
    speed: Mapping[str, SpeedEntry] | None = None,
    memory: MemoryEntry | None = None,
    gate: Gate | None = None,
) -> Bundle:
    """Put what was measured on a finished bundle into its manifest; what is None stays as it was."""
    given = {"parity": parity, "speed": speed, "memory": memory, "gate": gate}
    facts = {name: getattr(bundle.manifest, name) for name in Manifest.model_fields}
    facts |= {name: value for name, value in given.items() if value is not None}
    manifest = Manifest(**facts)
    with written(bundle.path / MANIFEST) as file:
        file.write_text(manifest.to_json(), encoding="utf-8", newline="\n")
    return Bundle(bundle.path, manifest)


def _is_something_else(output: Path) -> bool:
    """Whether `output` is there, and is neither a bundle nor an empty folder."""
    if output.is_dir():
        return any(output.iterdir()) and not (output / MANIFEST).is_file()
    return output.exists()


def _manifest(inputs: PackInputs, put: Put) -> Manifest:
    checkpoint, default = inputs.checkpoint, inputs.schedules[0]
    manifest = Manifest(
        name=checkpoint.name,
        family=checkpoint.family,
        target=inputs.target,
        components={model.component: _component(model, inputs, put) for model in inputs.models},
        tokenizer=_tokenizer(inputs, 0, put),
        tokenizer_2=_tokenizer(inputs, 1, put) if len(inputs.tokenizers) > 1 else None,
        schedule=ScheduleEntry(
            default=default.to_json(),
            prediction_type=default.prediction_type,
            timestep_spacing=default.timestep_spacing,
            others=tuple(_schedules(inputs.schedules[1:], put)),
        ),
        guidance=inputs.guidance,
        conditioning=inputs.conditioning,
        control=inputs.control,
        vae=inputs.vae,
        time_embedding=inputs.time_embedding,
        size=inputs.size,
        recipe=inputs.recipe,
        provenance=Provenance(
            checkpoint=checkpoint.digest,
            sources=tuple(SourceEntry(file=f, sha256=h) for f, h in sorted(checkpoint.sources.items())),
            adapters=inputs.adapters,
            tools=dict(inputs.tools),
        ),
        parity=dict(inputs.parity),
        speed=dict(inputs.speed),
        memory=inputs.memory,
        gate=inputs.gate,
        arithmetic=inputs.arithmetic,
        assets=tuple(put(content, path) for path, content in sorted(_assets(inputs).items())),
    )
    readme = put(bundle_readme(manifest).encode(), "README.md")
    return manifest.model_copy(update={"assets": (readme, *manifest.assets)})


def _component(model: TargetModel, inputs: PackInputs, put: Put) -> ComponentEntry:
    wanted = dict.fromkeys(_all_files(model))
    # Each component has its folder; some targets build into one already.
    prefix = f"{model.component}/"
    entries = {file: put(model.folder / file, prefix + file.removeprefix(prefix)) for file in wanted}
    return ComponentEntry(
        precision=model.precision,
        bits_per_weight=model.bits_per_weight,
        **_storage(model.component, inputs),
        files=tuple(entries[file] for file in model.files),
        inputs=tuple(TensorEntry.of(spec) for spec in model.inputs),
        outputs=tuple(TensorEntry.of(spec) for spec in model.outputs),
        forms={name: tuple(entries[file] for file in files) for name, files in model.forms.items()},
        notes=model.notes,
    )


def _storage(component: str, inputs: PackInputs) -> dict[str, Any]:
    """The plan, and each scheme's share of the parameters."""
    from ..quantize.plan import shares

    if component not in inputs.plans:
        return {}
    plan = inputs.plans[component]
    found = shares(plan, inputs.shapes[component])
    return {
        "plan": PlanEntry(default=plan.default, exceptions=dict(plan.exceptions), channels=plan.channels),
        "schemes": {name: SchemeEntry(share=share, bits_per_weight=bits) for name, (share, bits) in found.items()},
    }


def _tokenizer(inputs: PackInputs, index: int, put: Put) -> TokenizerEntry:
    folder, stated = inputs.tokenizers[index]
    facts, place = dict(stated), ("tokenizer", "tokenizer_2")[index]
    files = tuple(put(folder / file, f"{place}/{file}") for file in sorted(facts.pop("files")))
    return TokenizerEntry(files=files, **facts)


def _schedules(schedules: tuple[CompiledSchedule, ...], put: Put) -> Iterator[OtherSchedule]:
    for schedule in schedules:
        content = json.dumps(schedule.to_json(), sort_keys=True, indent=1, allow_nan=False) + "\n"
        file = put(content.encode(), f"schedules/{schedule.scheduler}-{schedule.steps}.json")
        yield OtherSchedule(name=schedule.scheduler, steps=schedule.steps, **file.model_dump())


def _assets(inputs: PackInputs) -> dict[str, Content]:
    root = inputs.checkpoint.root
    licences: dict[str, Content] = {
        f"licence/{file.name}": file
        for file in (root.iterdir() if root.is_dir() else ())
        if file.is_file() and file.name.lower().startswith(_LICENCES)
    }
    return {**licences, **inputs.assets}


def _link(folder: Path, recorded: Mapping[Path, str], content: Content, path: str) -> FileEntry:
    if isinstance(content, bytes):
        return _write(folder, recorded, content, path)
    target = folder / inside(path)
    target.parent.mkdir(parents=True, exist_ok=True)
    try:
        target.hardlink_to(content)
    except OSError:  # another disk, or one that has no hard links
        copy_file(content, target)
    return _describe(recorded, content, path)


def _write(scratch: Path, recorded: Mapping[Path, str], content: Content, path: str) -> FileEntry:
    target = scratch / inside(path)
    target.parent.mkdir(parents=True, exist_ok=True)
    if isinstance(content, bytes):
        with target.open("xb") as file:
            file.write(content)
    else:
        copy_file(content, target)
    return _describe(recorded, content, path)


def _describe(recorded: Mapping[Path, str], content: Content, path: str) -> FileEntry:
    if isinstance(content, bytes):
        return FileEntry(path=path, sha256=hashlib.sha256(content).hexdigest(), bytes=len(content))
    digest = recorded.get(content) or sha256_of_file(content)
    return FileEntry(path=path, sha256=digest, bytes=content.stat().st_size)


def _recorded(inputs: PackInputs) -> dict[Path, str]:
    """Hashes that the cache took when it stored the models.

    Hashing gigabytes again would cost seconds, and would bless a file that was damaged in the cache since.
    """
    found = {}
    for folder in {model.folder for model in inputs.models}:
        if (folder / ARTIFACT).is_file():
            files = json.loads((folder / ARTIFACT).read_bytes())["files"]
            found.update({folder / name: str(facts["sha256"]) for name, facts in files.items()})
    return found


def _bytes_needed(inputs: PackInputs) -> int:
    """Size of the models, which is nearly all of a bundle."""
    files = {model.folder / file for model in inputs.models for file in _all_files(model)}
    return sum(file.stat().st_size for file in files)


def _all_files(model: TargetModel) -> Iterator[str]:
    yield from model.files
    for files in model.forms.values():
        yield from files
