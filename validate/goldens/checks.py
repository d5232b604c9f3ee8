"""A replay held against a bundle's golden vectors, part by part."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from math import inf
from typing import TYPE_CHECKING, Any, Final

from ...runtimes.txt2img.noise import TorchNoise
from ...runtimes.txt2img.picture import to_uint8
from ..parity import finite_db
from .file import Goldens, Tokens, image_hash
from .models import MASK, MASKED_LATENTS, SAMPLE, unet_inputs
from .sample import Sample, apart, snr_db

if TYPE_CHECKING:
    from ...runtimes.protocol import Array
    from .file import Tokenizers
    from .limits import ArithmeticLimits
    from .replay import Replayed

# Inputs of the UNet that an app computes of numbers, without a model: sinusoids and what they are of.
TIMES: Final = ("timestep", "timestep_embedding", "timestep_cond", "time_ids", "time_ids_embedding")
ELEMENTWISE: Final = (SAMPLE, MASK, MASKED_LATENTS)  # of latents, which models gave


@dataclass(frozen=True, slots=True)
class Check:
    """One thing that was replayed. `found` and `limit` are in `unit`; for dB more is better, else less.

    `golden_answers`: the models' answers were taken from the goldens, so that only what a port writes itself shows.
    """

    what: str
    ok: bool
    found: float
    limit: float
    unit: str
    note: str = ""
    golden_answers: bool = False

    def to_json(self) -> dict[str, Any]:
        return {
            "what": self.what,
            "ok": self.ok,
            "found": finite_db(self.found),
            "limit": self.limit,
            "unit": self.unit,
            "golden_answers": self.golden_answers,
            "note": self.note or None,
        }


def check_texts(goldens: Goldens, tokenizers: Tokenizers) -> Iterator[Check]:
    """Token ids and noise, which no model has a part in."""
    wrong = [tokens.prompt for tokens in goldens.tokens if Tokens.of(tokenizers, tokens.prompt) != tokens]
    note = f"first: {wrong[0]!r:.60}" if wrong else f"{len(goldens.tokens)} prompts"
    yield Check("token ids", not wrong, len(wrong), 0, "wrong", note)
    picture, limit = goldens.picture, goldens.limits.noise_max_abs
    noise = apart(picture.noise, TorchNoise(picture.seed).normal(picture.noise.shape))
    yield Check("noise", noise <= limit, noise, limit, "max abs")


def check_port(goldens: Goldens, replayed: Replayed) -> Iterator[Check]:
    """What lies between two calls of a model, in the order in which a picture comes about.

    Args:
        replayed: with golden answers.
    Raises:
        BundleError: the goldens are of another shape than what the bundle draws.
    """
    picture, limits, drawing = goldens.picture, goldens.limits, replayed.drawing
    if goldens.canvas and replayed.encoding:
        start = snr_db(goldens.canvas.start, replayed.encoding.start)
        yield _snr(f"start at strength {goldens.canvas.strength:g}", start, limits.port_snr_db, golden=True)
    if len(drawing.trajectory) != len(picture.calls):
        yield Check("steps", False, len(drawing.trajectory), len(picture.calls), "calls", "", True)
        return
    branches = len(picture.conditions)
    runs = replayed.denoised
    if len(runs) != branches * len(picture.calls):
        yield Check("calls of the UNet", False, len(runs), branches * len(picture.calls), "calls", "", True)
        return
    asked = [unet_inputs(run.given, drawing.latents.shape[1]) for run in runs]
    for name in picture.conditions[0].inputs:
        if name in (*TIMES, *ELEMENTWISE):
            given = [(told.inputs[name], asked[branch][name], "") for branch, told in enumerate(picture.conditions)]
            yield _worst(name, given, goldens)[1]
    steps: dict[str, list[tuple[Sample, Array, str]]] = {name: [] for name in (*picture.calls[0].inputs, "latents")}
    for step, (call, latents) in enumerate(zip(picture.calls, drawing.trajectory, strict=True)):
        where = _step(step, call.timestep)
        for name, sample in call.inputs.items():
            steps[name] += [(sample, asked[step * branches + branch][name], where) for branch in range(branches)]
        steps["latents"].append((call.latents, latents, where))
    found = [_worst(name, pairs, goldens) for name, pairs in steps.items()]
    yield from (check for _, check in sorted(found, key=lambda each: each[0]))  # what goes wrong first is the cause
    if picture.latent_sample and picture.image.decoded:
        found_ratio = snr_db(picture.latent_sample, replayed.runs["vae_decoder"][-1].given["latent_sample"])
        yield _snr("latent_sample", found_ratio, limits.port_snr_db, golden=True)
        # not against the golden picture: the same golden answer of the decoder has the same picture
        levels = apart(picture.image.sample, drawing.image) * 255
        yield Check("pixels", levels <= limits.pixels_max_levels, levels, limits.pixels_max_levels, "levels", "", True)
        found_bytes = to_uint8(drawing.image).ravel()[:: picture.image.sample.stride]
        share = sum(int(a) != b for a, b in zip(found_bytes, picture.image.bytes, strict=True)) / len(found_bytes)
        yield Check("bytes", share <= limits.differing_bytes, share, limits.differing_bytes, "differ", "", True)


def check_models(goldens: Goldens, replayed: Replayed, limits: ArithmeticLimits) -> Iterator[Check]:
    """What the models compute, in the order in which a picture comes about: the first failure is the cause.

    Args:
        limits: of the arithmetic in which they compute.
    Raises:
        BundleError: the goldens are of another shape than what the bundle draws.
    """
    picture, drawing = goldens.picture, replayed.drawing
    if goldens.canvas and replayed.encoding:
        for what, golden, found in (
            ("picture encoded", goldens.canvas.encoded, replayed.encoding.encoded),
            (f"start at strength {goldens.canvas.strength:g}", goldens.canvas.start, replayed.encoding.start),
        ):
            yield _snr(what, snr_db(golden, found), limits.snr_db)
    for told, run in zip(picture.conditions, replayed.denoised, strict=False):
        for name, sample in told.inputs.items():
            if name not in (*TIMES, *ELEMENTWISE):
                which = "prompt" if told is picture.conditions[-1] else "negative prompt"
                yield _snr(f"{name}, {which}", snr_db(sample, run.given[name]), limits.snr_db)
    if len(drawing.trajectory) != len(picture.calls):
        yield Check("steps", False, len(drawing.trajectory), len(picture.calls), "calls")
        return
    for step, (call, latents) in enumerate(zip(picture.calls, drawing.trajectory, strict=True)):
        yield _snr(f"latents after {_step(step, call.timestep)}", snr_db(call.latents, latents), limits.snr_db)
    levels = apart(picture.image.sample, drawing.image) * 255
    same = image_hash(drawing.image) == picture.image.sha256
    note = "equal to the last bit of 8" if same else "not bit for bit, which other processors need not reach"
    yield Check("picture", levels <= limits.image_max_levels, levels, limits.image_max_levels, "levels of 255", note)


def _step(index: int, timestep: float) -> str:
    return f"step {index + 1} (t = {timestep:g})"


def _snr(what: str, found: float, limit: float, *, golden: bool = False) -> Check:
    return Check(what, found >= limit, found, limit, "dB SNR", "", golden)


def _worst(name: str, pairs: Sequence[tuple[Sample, Array, str]], goldens: Goldens) -> tuple[float, Check]:
    """One check for all steps: the worst of them, the first past the limit, and its index."""
    limits, is_time = goldens.limits, name in TIMES
    found = [(apart if is_time else snr_db)(sample, tensor) for sample, tensor, _ in pairs]
    ok = [value <= limits.time_max_abs if is_time else value >= limits.port_snr_db for value in found]
    first = ok.index(False) if False in ok else None
    note = f"first at {pairs[first][2]}" if first is not None and pairs[first][2] else ""
    if is_time:
        check = Check(name, first is None, max(found), limits.time_max_abs, "max abs", note, True)
    else:
        check = Check(name, first is None, min(found), limits.port_snr_db, "dB SNR", note, True)
    return inf if first is None else first, check


def facts_of(
    checks: Sequence[Check], goldens: Goldens, arithmetics: Mapping[str, str], machine: str
) -> Mapping[str, Any]:
    """What `check-goldens --json` prints.

    Args:
        arithmetics: component -> name of the arithmetic it was opened in.
    """
    first = next((check.what for check in checks if not check.ok), None)
    return {
        "ok": first is None,
        "first_bad": first,
        "made_by": goldens.runtime,
        "machine": machine,
        "arithmetics": dict(arithmetics),
        "checks": [check.to_json() for check in checks],
    }
