"""One of several processes that use one cache at once: `python crowd.py WHAT CACHE LOGS SECONDS`."""

from __future__ import annotations

import random
import sys
import time
from pathlib import Path

from diffusette.stages.cache import Cache
from diffusette.stages.errors import UsageError
from diffusette.stages.progress import Silent
from diffusette.stages.run_stage import run_stage
from obedient import Write

WORDS = tuple(f"word {number}" for number in range(4))


def convert(cache: Cache, logs: Path) -> None:
    """Several stages, each of whose results stays readable until the end."""
    words = random.sample(WORDS, len(WORDS))
    with cache.used():
        made = [run_stage(Write(word, logs / word.replace(" ", "-")), cache, Silent()) for word in words]
        for word, result in zip(words, made, strict=True):
            assert (result.folder / "text.txt").read_text() == word


def prune(cache: Cache) -> None:
    try:
        cache.prune(0)
    except UsageError:
        time.sleep(0.01)  # somebody uses it, and that is what it has to say


if __name__ == "__main__":
    what, root, logs, seconds = sys.argv[1], Path(sys.argv[2]), Path(sys.argv[3]), float(sys.argv[4])
    cache = Cache(root)
    cache.prepare()
    until = time.monotonic() + seconds
    while True:
        if what == "convert":
            convert(cache, logs)
        elif what == "prune":
            prune(cache)
        else:
            assert what == "list"
            list(cache.damaged())
            cache.prepare()
        if time.monotonic() > until:
            break
