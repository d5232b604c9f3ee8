"""A stage's artifact: looked up in the cache, else made in a child process and published."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from .cache import Cache
from .cache_object import ARTIFACT, describe_file
from .child import run_in_child
from .progress import Progress
from .publish import published
from .stage import Out, Stage, digest_of, label_of
from .strict import adapter


def run_stage(stage: Stage[Out], cache: Cache, progress: Progress) -> Out:
    """Return the stage's artifact: from `cache`, or by running the stage in a child process.

    Raises:
        DiffusetteError: what the stage raised in its child, or `ToolCrashed`/`NoRoom` when the child died.
    """
    digest, label = digest_of(stage), label_of(stage)
    with cache.lock(digest):
        record = cache.read(digest)
        if record is not None:
            progress.reused(label, digest, record["measured"])
            return _load(stage, record, cache.folder(digest))
        with progress.running(label, digest) as watch, published(cache.folder(digest)) as scratch:
            facts, measured = run_in_child(stage, scratch, cache.root / "work", watch)
            files = {
                file.relative_to(scratch).as_posix(): describe_file(file)
                for file in sorted(scratch.rglob("*"))
                if file.is_file()
            }
            record = {"stage": stage.name, "label": label, "facts": facts, "files": files, "measured": measured}
            (scratch / ARTIFACT).write_text(json.dumps(record, indent=1, sort_keys=True))
        return _load(stage, record, cache.folder(digest))


def _load(stage: Stage[Out], record: Mapping[str, Any], folder: Path) -> Out:
    facts = {**record["facts"], "folder": str(folder), "digest": folder.name}
    artifact: Out = adapter(stage.output).validate_python(facts)
    return artifact
