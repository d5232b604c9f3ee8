"""One run of a model that is fed by PyTorch's names, whatever the runtime's own model takes."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np
from numpy.typing import NDArray

from ...stages.errors import ModelError
from ..inputs import native_feeds
from ..protocol import Array, Session

Floats = NDArray[np.float32]


def run_model(session: Session, feeds: Mapping[str, Array], time: Mapping[str, Any], where: str) -> Floats:
    """The only output of a model.

    Args:
        time: `inputs.time_embedding_facts`.
        where: names the model, and the call, in errors.
    """
    outputs = run_whole(session, feeds, time, where)
    if len(outputs) != 1:
        raise ModelError(f"{where} gives {len(outputs)} outputs ({', '.join(outputs)}), one is expected")
    return next(iter(outputs.values()))


def run_whole(session: Session, feeds: Mapping[str, Array], time: Mapping[str, Any], where: str) -> dict[str, Floats]:
    """Every output, in float32."""
    outputs = session.run(native_feeds(feeds, session.inputs, time))
    for output in outputs.values():
        if not np.isfinite(output).all():
            raise ModelError(
                f"{where} gives NaN or infinity",
                hint="float16 may overflow in this model; convert with --precision fp32",
            )
    return {name: output.astype(np.float32, copy=False) for name, output in outputs.items()}
