"""What a bundle carries beside its models: a tokenizer and compiled schedules, as stages."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ..stages.errors import CheckpointError, UsageError
from ..stages.stage import Stage
from .compiled_schedule import CompiledSchedule


@dataclass(frozen=True, slots=True)
class Tokenizer:
    """A folder with tokenizer.json, and what an app must know to use it."""

    folder: Path
    kind: str
    files: tuple[str, ...]
    max_tokens: int
    pad_id: int
    bos_id: int
    eos_id: int
    digest: str = ""
    added_tokens: tuple[str, ...] = ()  # words of textual inversions, in the order of their ids

    @property
    def facts(self) -> dict[str, int]:
        """What `runtimes.txt2img.tokenizer.PromptTokenizer` is made with."""
        return {"max_tokens": self.max_tokens, "pad_id": self.pad_id}


@dataclass(frozen=True)
class WriteTokenizer(
    Stage[Tokenizer], name="tokenizer", version=1, tools=("transformers", "tokenizers"), aside=("folder",)
):
    """The checkpoint's tokenizer folder -> tokenizer.json."""

    folder: Path
    sources: Mapping[str, str]  # file name -> sha256
    added: tuple[str, ...] = ()  # tokens behind all others

    def run(self, into: Path) -> Tokenizer:
        from ..checkpoints.tokenizer import write_tokenizer

        facts = write_tokenizer(self.folder, into, self.added)
        max_tokens, pad_id, bos_id, eos_id = (facts[name] for name in _TOKENIZER_NUMBERS)
        files = tuple(facts["files"])
        return Tokenizer(into, facts["kind"], files, max_tokens, pad_id, bos_id, eos_id, added_tokens=self.added)


_TOKENIZER_NUMBERS = ("max_tokens", "pad_id", "bos_id", "eos_id")


@dataclass(frozen=True, slots=True)
class Schedules:
    """A folder with one JSON file a compiled schedule, `NAME-STEPS.json`."""

    folder: Path
    compiled: tuple[tuple[str, int], ...]  # (scheduler, steps), the default first
    skipped: Mapping[str, str]  # scheduler -> why the checkpoint cannot be sampled with it
    digest: str = ""

    def read(self, scheduler: str, steps: int) -> CompiledSchedule:
        """One of `compiled`."""
        return CompiledSchedule.from_json(json.loads((self.folder / f"{scheduler}-{steps}.json").read_text()))

    def remarks(self) -> list[str]:
        """What was skipped, for people: a line for each scheduler and reason, with all its step counts."""
        counts: dict[tuple[str, str], list[str]] = {}
        for asked, why in self.skipped.items():
            scheduler, steps = asked.split()
            # a reason begins with what was compiled, `CLASS at N steps: `
            counts.setdefault((scheduler, why.partition(f" at {steps} steps: ")[2] or why), []).append(steps)
        return [
            f"no schedule for {scheduler} at {', '.join(steps)} steps: {why}"
            for (scheduler, why), steps in counts.items()
        ]

    @property
    def default(self) -> CompiledSchedule:
        return self.read(*self.compiled[0])


@dataclass(frozen=True)
class CompileSchedules(Stage[Schedules], name="schedules", version=1, tools=("diffusers", "torch", "numpy")):
    """A scheduler's configuration -> coefficient tables for each wanted (scheduler, steps).

    The first of `wanted` is the bundle's default and must compile; another that cannot be compiled for this
    checkpoint is skipped, with the reason kept.
    """

    config: Mapping[str, Any]
    wanted: tuple[tuple[str, int], ...]  # "checkpoint" stands for the scheduler that the checkpoint names
    pipeline: str = "StableDiffusionPipeline"  # diffusers' class that holds the scheduler
    timesteps: tuple[int, ...] = ()  # of the default schedule, where a recipe names them

    def key(self) -> Mapping[str, object]:
        config = {name: value for name, value in self.config.items() if name != "_diffusers_version"}
        wanted = [list(pair) for pair in self.wanted]
        return {"config": config, "wanted": wanted, "pipeline": self.pipeline, "timesteps": list(self.timesteps)}

    def run(self, into: Path) -> Schedules:
        from .compile_schedule import compile_schedule
        from .scheduler import default_scheduler

        own = default_scheduler(self.config) if any(name == "checkpoint" for name, _ in self.wanted) else ""
        pairs = dict.fromkeys((own if name == "checkpoint" else name, steps) for name, steps in self.wanted)
        compiled: list[tuple[str, int]] = []
        skipped: dict[str, str] = {}
        for scheduler, steps in pairs:
            try:
                own_steps = () if compiled else self.timesteps  # of the default
                schedule = compile_schedule(self.config, scheduler, steps, pipeline=self.pipeline, timesteps=own_steps)
            except (CheckpointError, UsageError) as error:
                if not compiled:
                    raise
                skipped[f"{scheduler} {steps}"] = error.what
                continue
            compiled.append((scheduler, steps))
            text = json.dumps(schedule.to_json(), sort_keys=True, separators=(",", ":"))
            (into / f"{scheduler}-{steps}.json").write_text(text + "\n")
        return Schedules(into, tuple(compiled), skipped)
