"""A replay held against a bundle's golden vectors, part by part."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np

from ..pipeline.errors import BundleError
from ..runtimes.protocol import Array
from ..runtimes.txt2img.noise import TorchNoise
from .goldens import Encoding, Goldens, Sample, Tokens, image_hash
from .parity import finite_db

if TYPE_CHECKING:
    from ..runtimes.txt2img.generate import Drawing
    from .goldens import Tokenizers


@dataclass(frozen=True, slots=True)
class Check:
    """One thing that was replayed. `found` and `limit` are in `unit`; for dB more is better, else less."""

    what: str
    ok: bool
    found: float
    limit: float
    unit: str
    note: str = ""

    def to_json(self) -> dict[str, Any]:
        return {
            "what": self.what,
            "ok": self.ok,
            "found": finite_db(self.found),
            "limit": self.limit,
            "unit": self.unit,
            "note": self.note or None,
        }


def check_goldens(
    goldens: Goldens, tokenizers: Tokenizers, drawing: Drawing, encoding: Encoding | None = None
) -> Iterator[Check]:
    """Hold a replay against the goldens, in the order in which a picture comes about: the first failure is the cause.

    Args:
        encoding: a replay of the goldens' canvas, where they have one.
    Raises:
        BundleError: the goldens are of another shape than what the bundle draws.
    """
    picture, limits = goldens.picture, goldens.limits
    wrong = [tokens.prompt for tokens in goldens.tokens if Tokens.of(tokenizers, tokens.prompt) != tokens]
    note = f"first: {wrong[0]!r:.60}" if wrong else f"{len(goldens.tokens)} prompts"
    yield Check("token ids", not wrong, len(wrong), 0, "wrong", note)
    noise = _apart(picture.noise, TorchNoise(picture.seed).normal(picture.noise.shape))
    yield Check("noise", noise <= limits.noise_max_abs, noise, limits.noise_max_abs, "max abs")
    if goldens.canvas and encoding:
        for what, golden, found in (
            ("picture encoded", goldens.canvas.encoded, encoding.encoded),
            (f"start at strength {goldens.canvas.strength:g}", goldens.canvas.start, encoding.start),
        ):
            ratio = _snr_db(golden, found)
            yield Check(what, ratio >= limits.latents_snr_db, ratio, limits.latents_snr_db, "dB SNR")
    if len(drawing.trajectory) != len(picture.calls):
        yield Check("steps", False, len(drawing.trajectory), len(picture.calls), "calls")
        return
    for step, (call, latents) in enumerate(zip(picture.calls, drawing.trajectory, strict=True), start=1):
        ratio = _snr_db(call.latents, latents)
        what = f"latents after step {step} (t = {call.timestep:g})"
        yield Check(what, ratio >= limits.latents_snr_db, ratio, limits.latents_snr_db, "dB SNR")
    levels = _apart(picture.image.sample, drawing.image) * 255
    same = image_hash(drawing.image) == picture.image.sha256
    note = "equal to the last bit of 8" if same else "not bit for bit, which other processors need not reach"
    yield Check("picture", levels <= limits.image_max_levels, levels, limits.image_max_levels, "levels of 255", note)


def _sampled(sample: Sample, tensor: Array) -> tuple[Array, Array]:
    if tuple(tensor.shape) != sample.shape:
        raise BundleError(
            f"the goldens are of shape {sample.shape}, the bundle draws {tuple(tensor.shape)}",
            hint="convert the checkpoint again",
        )
    return np.array(sample.values, np.float32).astype(np.float64), np.asarray(tensor, np.float64).ravel()[
        :: sample.stride
    ]


def _apart(sample: Sample, tensor: Array) -> float:
    golden, found = _sampled(sample, tensor)
    return float(np.abs(golden - found).max())


def _snr_db(sample: Sample, tensor: Array) -> float:
    golden, found = _sampled(sample, tensor)
    error = float(np.sum((golden - found) ** 2))
    return float("inf") if error == 0 else 10 * float(np.log10(np.sum(golden**2) / error))


def facts_of(checks: Sequence[Check], goldens: Goldens) -> Mapping[str, Any]:
    """What `check-goldens --json` prints."""
    first = next((check.what for check in checks if not check.ok), None)
    return {
        "ok": first is None,
        "first_bad": first,
        "made_by": goldens.runtime,
        "checks": [check.to_json() for check in checks],
    }
