"""Models of a bundle on another machine, as stages: emulation takes minutes, and what is done is not done again.

The keys hold the digests of the bundle's files, so that a bundle that has changed is asked again.
"""

from __future__ import annotations

import time
from collections.abc import Mapping
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any, Final

import numpy as np

from ...runtimes.arithmetic import PROBE_ROWS, Arithmetic, Computed, Opening
from ...runtimes.isolation import IsolatedSession, open_isolated
from ...runtimes.machines.machine import Machine
from ...stages.artifacts import TargetModel
from ...stages.stage import Stage
from ..gates import measure
from ..reference.probes import Probes, RoundedAnswers
from ..report import ComponentReport
from .tolerances import arithmetic_fidelity, arithmetic_tolerance

OPENER: Final = "diffusette.runtimes.registry:open_model"
_SUMMANDS: Final = 1024
_COLUMNS: Final = 512
_NEAR: Final = 2**-4  # of a sum: more than 1024 additions in 16 bits lose


@dataclass(frozen=True, slots=True)
class MachineKey:
    """What decides what a machine computes: its name, and the versions of what it is made of."""

    name: str
    parts: str  # digest of the lock for an emulated one, the processor's name for this computer
    runtime: str  # the runtime's version there


def open_on(machine: Machine, model: TargetModel, arithmetic: str, threads: int) -> IsolatedSession:
    """Load `model` on `machine`."""
    name = f"{model.target} {model.component} on {machine.name}, {arithmetic}"
    return open_isolated(OPENER, Opening(model, arithmetic), threads=threads, name=name, machine=machine)


@dataclass(frozen=True, slots=True)
class ComputedIn:
    """What a probe found.

    Args:
        operations_per_second: of the product, multiplications and additions. Of an emulator's processor: nobody else's.
    """

    folder: Path
    computed: Computed
    operations_per_second: float
    digest: str = ""


@dataclass(frozen=True)
class ProbeArithmetic(Stage[ComputedIn], name="probe", version=3, tools=("numpy",), aside=("machine", "threads")):
    """Let the runtime multiply two matrices, and tell from the sums in what numbers it added.

    All factors are multiples of 1/8 in -1..1, so that they and their products are exact even in bfloat16; the sums of
    1024 products are exact in float32 and need more bits than float16 has. So an answer that is the sum was added and
    kept in float32; one that is the sum rounded once was added in float32 and kept in 16 bits; any other near it was
    added in 16 bits.
    """

    model: TargetModel  # `Target.probe_model`
    arithmetic: str
    machine: Machine
    key_of_machine: MachineKey
    threads: int = 2

    def run(self, into: Path) -> ComputedIn:
        x, w = probe_factors()
        with open_on(self.machine, self.model, self.arithmetic, self.threads) as session:
            (spec,) = session.inputs
            feeds = {spec.name: x.reshape(spec.shape)}
            (answer,) = session.run(feeds).values()
            started = time.monotonic()  # an emulator translates code when it first meets it
            session.run(feeds)
            seconds = time.monotonic() - started
        operations = 2 * x.shape[0] * w.size
        return ComputedIn(
            into, computed_in(x.astype(np.float64) @ w.astype(np.float64), answer), operations / max(seconds, 1e-6)
        )


def probe_factors() -> tuple[np.ndarray[Any, Any], np.ndarray[Any, Any]]:
    """x [64, 1024] and w [1024, 512], float32: multiples of 1/8 in -1..1, most positive so that sums are large."""
    random = np.random.default_rng(1024)
    x = random.integers(1, 9, (PROBE_ROWS, _SUMMANDS)) / 8
    w = random.integers(-1, 9, (_SUMMANDS, _COLUMNS)) / 8
    return x.astype(np.float32), w.astype(np.float32)


def computed_in(sums: np.ndarray[Any, Any], answer: np.ndarray[Any, Any]) -> Computed:
    """In what numbers `answer` was computed, when `sums`, [64, 512] in float64, are right."""
    found = np.asarray(answer, np.float32).reshape(sums.shape)
    exact = sums.astype(np.float32)
    if np.array_equal(found, exact):
        return "float32"
    if np.array_equal(found, exact.astype(np.float16).astype(np.float32)):
        return "float16 stored"
    cut = found.view(np.uint32) & 0xFFFF == 0  # bfloat16 is the upper half of a float32
    # runtimes cut the lower half off, or round it: either way the answer is one of the two neighbours of the sum
    apart = np.abs(found.view(np.int32).astype(np.int64) - exact.view(np.int32))
    if cut.all() and (apart < 2**16).all():
        return "bfloat16 stored"
    near = bool(np.all(np.abs(found / exact - 1) < _NEAR))
    if near and cut.all():
        return "bfloat16"
    return "float16" if near and np.array_equal(found, found.astype(np.float16)) else "other"


@dataclass(frozen=True, slots=True)
class MeasuredOnMachine:
    """A component's report from another machine."""

    folder: Path
    report: ComponentReport
    digest: str = ""


@dataclass(frozen=True)
class MeasureOnMachine(Stage[MeasuredOnMachine], name="on machine", version=1, tools=("numpy",), aside=("machine",)):
    """Run a model on a machine in one arithmetic over some of its probes.

    Args:
        only: indices of the probes; empty: all.
    """

    model: TargetModel
    form: str
    arithmetic: Arithmetic
    machine: Machine
    key_of_machine: MachineKey
    probes: Probes
    rounded: RoundedAnswers | None
    time_embedding: Mapping[str, Any]
    only: tuple[int, ...] = ()
    threads: int = 2

    def key(self) -> Mapping[str, object]:
        bare = self.unanswered()
        fidelity = asdict(bare.fidelity_tolerance) if bare.fidelity_tolerance else None
        return {**super().key(), "tolerances": [asdict(bare.tolerance), fidelity]}

    def run(self, into: Path) -> MeasuredOnMachine:
        with open_on(self.machine, self.model, self.arithmetic.name, self.threads) as session:
            report = measure(
                self.unanswered(), session, self.probes, self.rounded, self.time_embedding, self.only or None
            )
        # what the emulator takes says nothing about a phone
        return MeasuredOnMachine(into, replace(report, run_peak_mib=0.0))

    def unanswered(self, problem: str = "") -> ComponentReport:
        """The report before anything is asked, or, with a `problem`, when nothing was answered."""
        how = (self.arithmetic.expects, self.arithmetic.device)
        where = (self.model.component, self.model.target, self.model.precision, *how)
        return ComponentReport(
            self.model.component,
            self.model.precision,
            arithmetic_tolerance(*where),
            None,
            fidelity_tolerance=arithmetic_fidelity(*where) if self.rounded else None,
            problem=problem,
            form=self.form,
        )
