"""The file of golden vectors: its tables, and how they are read. docs/goldens.md has the format for other languages."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterator
from dataclasses import dataclass
from typing import TYPE_CHECKING, Annotated, Any, Final, Self

import numpy as np
from pydantic import Field

from ...runtimes.arithmetic import PROVEN
from ...runtimes.protocol import Array
from ...runtimes.txt2img.picture import to_uint8
from ...stages.errors import BundleError
from ...stages.strict import Strict, parsed
from .limits import PORT_LIMITS, Limits
from .sample import MOST_VALUES, Sample

if TYPE_CHECKING:
    from ...runtimes.txt2img.tokenizer import PromptTokenizer

    Tokenizers = tuple[PromptTokenizer, PromptTokenizer | None]  # of the first and second text encoder

SCHEMA: Final = 2
OLDEST: Final = 1  # that is read: it has nothing to check a port with but what its models compute
MAX_BYTES: Final = 4 * 2**20
_LIMITS_OF_1: Final = {"noise_max_abs", "latents_snr_db", "image_max_levels"}


class Tokens(Strict):
    """A prompt, and the ids that the text encoder reads; `ids_2` are the second encoder's, where there is one."""

    prompt: str
    ids: tuple[int, ...]
    ids_2: tuple[int, ...] | None = None

    @classmethod
    def of(cls, tokenizers: Tokenizers, prompt: str) -> Self:
        first, second = tokenizers
        return cls(prompt=prompt, ids=_ids(first, prompt), ids_2=_ids(second, prompt) if second else None)


class Call(Strict):
    """One call of the UNet (two with guidance) and one row of the schedule.

    `inputs` are those that each call changes, by the model's names. `outputs` are the UNet's, one for each of
    `GoldenPicture.conditions`, in the same places as `latents`, which are those after the row.
    """

    timestep: float
    latents: Sample
    inputs: dict[str, Sample] = Field(default_factory=dict)
    outputs: tuple[Sample, ...] = ()


class Condition(Strict):
    """A branch of guidance: its prompt, and what the UNet was told in each call."""

    prompt: str
    inputs: dict[str, Sample]


class GoldenImage(Strict):
    """The picture, [height, width, 3] in 0..1; `sha256` is that of its bytes once rounded to 8 bits.

    `decoded` is what the VAE decoder gave, about -1..1, with its axes in the picture's order; `decoded` and `bytes`
    are in the same places as `sample`.
    """

    sample: Sample
    sha256: Annotated[str, Field(pattern=r"^[0-9a-f]{64}$")]
    decoded: Sample | None = None
    bytes: tuple[Annotated[int, Field(ge=0, le=255)], ...] = ()


class GoldenPicture(Strict):
    """One prompt from noise to picture, with a schedule that the bundle carries."""

    prompt: str
    negative: str
    seed: int
    guidance: float
    scheduler: str
    steps: Annotated[int, Field(ge=1)]
    noise: Sample  # the first draw, standard normal
    conditions: tuple[Condition, ...] = ()  # with guidance two: the negative prompt's, then the prompt's
    latent_sample: Sample | None = None  # what the VAE decoder was given
    calls: Annotated[tuple[Call, ...], Field(min_length=1)]
    image: GoldenImage


@dataclass(frozen=True, slots=True)
class Encoding:
    """What comes of a picture before the first call of the UNet."""

    strength: float
    encoded: Array  # [1, 2 C, h, w], as the VAE encoder gives it: mean and log-variance
    start: Array  # [1, C, h, w]


class Gaussian(Strict):
    """What the VAE encoder gives, in halves: both [1, C, h, w], in the places of the latents."""

    mean: Sample
    log_variance: Sample

    @classmethod
    def of(cls, encoded: Array, most: int = MOST_VALUES) -> Self:
        mean, log_variance = np.split(encoded, 2, axis=1)
        return cls(mean=Sample.of(mean, most), log_variance=Sample.of(log_variance, most))


class GoldenCanvas(Strict):
    """The picture in the bundle, encoded; and the latents that a run of `strength`, seed and schedule starts from."""

    strength: Annotated[float, Field(gt=0, le=1)]
    encoded: Sample
    start: Sample
    parameters: Gaussian | None = None  # `encoded` again, in halves
    kept: Gaussian | None = None  # of an inpainting bundle: the picture without what is drawn anew

    @classmethod
    def of(cls, encoding: Encoding, kept: Array | None = None) -> Self:
        return cls(
            strength=encoding.strength,
            encoded=Sample.of(encoding.encoded),
            start=Sample.of(encoding.start),
            parameters=Gaussian.of(encoding.encoded),
            kept=None if kept is None else Gaussian.of(kept),
        )


class Goldens(Strict):
    """goldens/goldens.json as a whole."""

    schema_: Annotated[int, Field(ge=OLDEST, le=SCHEMA)] = Field(alias="schema")
    runtime: str  # that computed them, with its version
    tokens: Annotated[tuple[Tokens, ...], Field(min_length=1)]
    picture: GoldenPicture
    canvas: GoldenCanvas | None = None  # in a bundle with a VAE encoder
    limits: Limits

    def to_json(self) -> str:
        """Canonical text: the same goldens give the same bytes."""
        plain = self.model_dump(mode="json", by_alias=True)
        return json.dumps(plain, sort_keys=True, separators=(",", ":"), ensure_ascii=False, allow_nan=False) + "\n"


def read_goldens(text: bytes, where: str) -> Goldens:
    """Parse goldens.json.

    Raises:
        BundleError: it is no such file, or contradicts itself.
    """
    try:
        if len(text) > MAX_BYTES:
            raise ValueError(f"{len(text)} bytes, at most {MAX_BYTES} are read")
        data = json.loads(text)
    except (ValueError, RecursionError) as error:
        raise BundleError(f"{where}: no goldens: {error}", hint="convert the checkpoint again") from None
    if isinstance(data, dict) and data.get("schema") == OLDEST:
        data = _of_today(data)
    found = parsed(Goldens, data, lambda place: ".".join([where, *map(str, place)]), BundleError)
    if contradiction := next(_contradictions(found), None):
        raise BundleError(f"{where}: {contradiction}", hint="convert the checkpoint again")
    return found


def _of_today(data: dict[str, Any]) -> dict[str, Any]:
    """Schema 1 in the form of schema 2. Its two limits of what models compute are those of the arithmetic it was
    made in, whose name it does not say."""
    limits = data.get("limits")
    if not isinstance(limits, dict) or set(limits) != _LIMITS_OF_1:
        return data
    own = {"snr_db": limits["latents_snr_db"], "image_max_levels": limits["image_max_levels"]}
    ports = {name: value for name, (value, _) in PORT_LIMITS.items()}
    return {**data, "limits": {**ports, "noise_max_abs": limits["noise_max_abs"], "arithmetics": {PROVEN: own}}}


def _contradictions(goldens: Goldens) -> Iterator[str]:
    """What is wrong between the parts, for people."""
    picture, canvas = goldens.picture, goldens.canvas
    samples = [picture.noise, picture.image.sample, picture.image.decoded, picture.latent_sample]
    for call in picture.calls:
        samples += [call.latents, *call.inputs.values(), *call.outputs]
    for condition in picture.conditions:
        samples += condition.inputs.values()
    if canvas:
        samples += [canvas.encoded, canvas.start]
        for half in filter(None, (canvas.parameters, canvas.kept)):
            samples += [half.mean, half.log_variance]
    for sample in filter(None, samples):
        if not sample.is_whole:
            yield f"{len(sample.values)} values with stride {sample.stride} are no sample of {sample.shape}"
    if goldens.schema_ == OLDEST:
        return
    image = picture.image
    if not picture.conditions or picture.latent_sample is None or image.decoded is None:
        yield "schema 2 without picture.conditions, picture.latent_sample or picture.image.decoded"
    elif len(image.bytes) != len(image.sample.values):
        yield f"{len(image.bytes)} bytes beside {len(image.sample.values)} values of the picture"
    for number, call in enumerate(picture.calls, start=1):
        if len(call.outputs) != len(picture.conditions):
            yield f"call {number}: {len(call.outputs)} outputs for {len(picture.conditions)} conditions"
        elif any((each.shape, each.stride) != (call.latents.shape, call.latents.stride) for each in call.outputs):
            yield f"call {number}: outputs and latents are sampled in different places"


def _ids(tokenizer: PromptTokenizer, prompt: str) -> tuple[int, ...]:
    return tuple(int(token) for token in tokenizer(prompt).ids.ravel())


def image_hash(image: Array) -> str:
    return hashlib.sha256(to_uint8(image).tobytes()).hexdigest()
