"""What a manifest says of arithmetic: in which numbers an app may compute, by which options, and what each leaves."""

from __future__ import annotations

from typing import Annotated, Literal

from pydantic import Field, JsonValue, model_validator
from pydantic_core import PydanticCustomError

from ..stages.strict import Strict
from .manifest_entries import ComponentName, Decibels

Status = Literal["run on AArch64", "not run on AArch64"]


class ChoiceEntry(Strict):
    """One arithmetic. `options`: what an app sets, in the runtime's own words; what is absent keeps its default.

    `default`: an app that sets no option gets this one on AArch64.
    `fails`: why these models cannot be run in it, as far as their graphs tell.
    """

    options: dict[str, JsonValue]
    expects: str
    default: bool = False
    fails: str = ""


class RowEntry(Strict):
    """One arithmetic on one machine: `computes`, as a probe found; dB against PyTorch, null where the runtime died."""

    computes: str
    snr_db: dict[ComponentName, Decibels | None]
    picture_psnr_db: Decibels | None = None
    verdict: str


class MachineEntry(Strict):
    """A machine that the bundle was run on. `recommended`: the fastest there whose picture passes."""

    machine: Annotated[str, Field(min_length=1)]
    runtime: str
    rows: dict[str, RowEntry]
    recommended: dict[ComponentName, str]
    picture_psnr_db: Decibels | None = None


class ArithmeticEntry(Strict):
    """By component: `proven_in`, compared with PyTorch where the bundle was made; `recommended`, for an app to set.

    Without a run on AArch64 what is recommended is what is proven.
    """

    status: Status
    proven_in: Annotated[dict[ComponentName, str], Field(min_length=1)]
    recommended: Annotated[dict[ComponentName, str], Field(min_length=1)]
    choices: Annotated[dict[str, ChoiceEntry], Field(min_length=1)]
    machines: tuple[MachineEntry, ...] = ()

    @model_validator(mode="after")
    def _agree(self) -> ArithmeticEntry:
        named = [*self.proven_in.values(), *self.recommended.values()]
        for machine in self.machines:
            named += [*machine.rows, *machine.recommended.values()]
        if strangers := sorted(set(named) - self.choices.keys()):
            raise PydanticCustomError("stranger", "{name} is none of the choices", {"name": repr(strangers[0])})
        if (self.status == "run on AArch64") != bool(self.machines):
            raise PydanticCustomError("status", "the status contradicts the machines that are listed")
        return self
