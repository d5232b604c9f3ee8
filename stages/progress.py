"""What is shown while a conversion works: a live line on a terminal, a line a stage elsewhere."""

from __future__ import annotations

import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any, Protocol


class Watch(Protocol):
    """Told about a running stage, several times a second."""

    def __call__(self, rss_mib: float) -> None: ...


class Progress(Protocol):
    """Told what happens; draws it, or not.

    Args:
        stages: what each stage cost.
        peak_mib: the highest memory of any, with this process.
    """

    stages: list[dict[str, Any]]
    peak_mib: float

    def running(self, label: str, digest: str = "") -> Any:
        """A context manager around a stage's work; gives a `Watch`."""
        ...

    def reused(self, label: str, digest: str, measured: Mapping[str, Any]) -> None:
        """A stage came from the cache; `measured` says what it once cost."""
        ...

    def advance(self, part: str, done: int, total: int) -> None:
        """Within the running stage, `done` of `total` pieces of `part` are finished."""
        ...

    def say(self, text: str) -> None:
        """One line for people."""
        ...


class Silent:
    """Shows nothing; remembers the stages and what they cost."""

    def __init__(self) -> None:
        self.stages: list[dict[str, Any]] = []
        self._known: set[str] = set()  # digests of stages that were told of: targets share them
        self.peak_mib = 0.0

    @contextmanager
    def running(self, label: str, digest: str = "") -> Iterator[Watch]:
        started = time.monotonic()
        peak = 0.0
        self._known.add(digest)

        def watch(rss_mib: float) -> None:
            nonlocal peak
            peak = max(peak, rss_mib)
            self.tick(label, time.monotonic() - started, rss_mib)

        self.begin(label)
        try:
            yield watch
        except BaseException:
            self.end(label, time.monotonic() - started, peak, "failed")
            raise
        self.peak_mib = max(self.peak_mib, peak)
        self.stages.append(
            {"stage": label, "seconds": round(time.monotonic() - started, 2), "tree_peak_mib": round(peak)}
        )
        self.end(label, time.monotonic() - started, peak, "done")

    def reused(self, label: str, digest: str, measured: Mapping[str, Any]) -> None:
        if digest not in self._known:
            self._known.add(digest)
            self.stages.append({"stage": label, "seconds": 0.0, "cached": True, "measured": dict(measured)})
            self.end(label, 0.0, 0.0, "cached")

    def advance(self, part: str, done: int, total: int) -> None:
        """Shows nothing here."""

    def say(self, text: str) -> None:
        """Shows nothing here."""

    def begin(self, label: str) -> None:
        """A stage starts. Drawing classes override this."""

    def tick(self, label: str, seconds: float, rss_mib: float) -> None:
        """A stage goes on."""

    def end(self, label: str, seconds: float, peak_mib: float, outcome: str) -> None:
        """A stage ended: done, cached or failed."""
