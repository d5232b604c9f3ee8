"""The manifest's `arithmetic`: what a target knows of its options, and what machines were found to compute."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from typing import TYPE_CHECKING, Final

from ...bundle.bundle import open_bundle
from ...bundle.manifest_arithmetic import ArithmeticEntry, ChoiceEntry, MachineEntry, RowEntry
from ...bundle.pack import staged
from ...runtimes.registry import get_target
from ...stages.artifacts import TargetModel
from ...stages.cache import Cache
from ...stages.publish import scratch_folder
from ..reference.known_answers import known_answers
from .check import on_machine
from .report import ArithmeticRow, MachineReport

if TYPE_CHECKING:
    from ...bundle.pack_inputs import PackInputs
    from ...runtimes.machines.machine import Machine
    from ...stages.stage import Runner

NOT_RUN: Final = "not run on AArch64"


def arithmetic_entry(models: Mapping[str, TargetModel], reports: Sequence[MachineReport] = ()) -> ArithmeticEntry:
    """What a manifest says of `models`, one a component.

    Args:
        reports: of the machines that they were run on. The first one's recommendation is the bundle's: name the machine
            that matters most first.
    """
    target = get_target(next(iter(models.values())).target)
    proven = {name: target.proven_in(model) for name, model in models.items()}
    fails: dict[str, str] = {}
    for name, model in models.items():
        for arithmetic, why in target.unfit(model).items():
            fails[arithmetic] = "; ".join(filter(None, [fails.get(arithmetic, ""), f"{name}: {why}"]))
    choices = {
        each.name: ChoiceEntry(
            options=dict(each.options),
            expects=each.expects,
            default=each.is_default,
            fails=fails.get(each.name, ""),
        )
        for each in target.choices(models.values())
    }
    machines = tuple(_machine(report) for report in reports)
    return ArithmeticEntry(
        status="run on AArch64" if machines else NOT_RUN,
        proven_in=proven,
        recommended=(dict(machines[0].recommended) if machines else {}) or proven,
        choices=choices,
        machines=machines,
    )


def _machine(report: MachineReport) -> MachineEntry:
    return MachineEntry(
        machine=report.machine,
        runtime=report.runtime,
        rows={row.arithmetic.name: _row(row) for row in report.rows},
        recommended=dict(report.recommended),
        picture_psnr_db=report.recommended_db,
    )


def _row(row: ArithmeticRow) -> RowEntry:
    return RowEntry(
        computes=row.computed,
        snr_db={part.component: part.loss.snr_db if part.loss else None for part in row.components},
        picture_psnr_db=row.picture.image.psnr_db if row.picture else None,
        verdict=row.verdict,
    )


def with_arithmetic(
    inputs: PackInputs, machines: Sequence[Machine], cache: Cache, run: Runner, say: Callable[[str], None]
) -> tuple[PackInputs, tuple[MachineReport, ...]]:
    """`inputs` with the manifest's section, after a run of the bundle to come on each machine."""
    models = {model.component: model for model in inputs.models}
    inputs = replace(inputs, arithmetic=arithmetic_entry(models))
    if not machines:
        return inputs, ()
    with scratch_folder(cache.root / "work", "machine") as folder:
        staged(inputs, folder)
        bundle = open_bundle(folder)
        known = known_answers(bundle, inputs.checkpoint, run)
        reports = tuple(
            on_machine(bundle, inputs.checkpoint, known, machine, run, cache.root / "work", say=say).check()
            for machine in machines
        )
    return replace(inputs, arithmetic=arithmetic_entry(models, reports)), reports
