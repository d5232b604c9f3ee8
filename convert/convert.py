"""The whole conversion, in order, on one page."""

from __future__ import annotations

import time
from collections.abc import Sequence
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ..bundle.manifest import MANIFEST
from ..stages.cache import CAP, Cache
from ..stages.extras import require_converter
from ..stages.hashing import sha256_of_file
from ..stages.progress import Progress, Silent
from .conversion import Conversion, Converted
from .job import resolve
from .request import Request

if TYPE_CHECKING:
    from .ledger import Compared


def convert(request: Request, *, cache: Cache | None = None, progress: Progress | None = None) -> Conversion:
    """Convert a checkpoint as `request` says; each bundle appears whole or not at all.

    Raises:
        DiffusetteError: see `errors`; nothing at the request's `output` has changed then.
    """
    require_converter("a conversion")
    from ..stages.run_stage import run_stage
    from .ledger import Ledger, compared
    from .one_bundle import make_ready
    from .shared import share

    started = time.monotonic()
    cache, progress = cache or Cache.default(), progress or Silent()
    cache.cap()  # a mistake in it is told now, and not after the work
    job = resolve(request, cache, progress)
    cache.remember_source(job.checkpoint.digest, job.checkpoint.root, job.checkpoint.companions)
    with cache.used():  # nobody may prune what later stages read
        run = Ledger(partial(run_stage, cache=cache, progress=progress), cache)
        shared = share(job, run, progress)
        ready = [make_ready(job, shared, name, run, cache, progress) for name in job.targets]
        converted = tuple(each.publish() for each in ready)  # only now does anything at `output` change
        taken = run.taken()
        beside = () if job.is_automatic else compared(job.forecast, taken)  # what `auto` tries nobody knows beforehand
        _remember_memory(converted, beside, cache)
    if gone := cache.keep_to_cap():
        progress.say(f"{len(gone)} least recently used stages were removed from the cache, which {CAP} limits")
    took = time.monotonic() - started
    stages = tuple(progress.stages)
    return Conversion(converted, job.forecast, took, progress.peak_mib, stages, shared.moved, job.found, beside, taken)


def convert_checkpoint(
    checkpoint: str | Path,
    output: str | Path,
    *,
    cache: Cache | None = None,
    progress: Progress | None = None,
    **options: Any,
) -> Conversion:
    """`convert` for Python: `options` are the further fields of `Request`."""
    return convert(Request(checkpoint, output, **options), cache=cache, progress=progress)


def _remember_memory(converted: Sequence[Converted], beside: Sequence[Compared], cache: Cache) -> None:
    """What each bundle's stages took, under the digest of its manifest, for `inspect`."""
    for each in converted if beside else ():
        digest = sha256_of_file(each.bundle.path / MANIFEST)
        cache.remember_memory(digest, [stage.to_json() for stage in beside])
