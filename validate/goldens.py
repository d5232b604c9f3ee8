"""Golden vectors: what a bundle's own runtime computed when it was made, small enough to ship and to read anywhere.

Whoever ports text-to-image to C++ or Kotlin replays them on the device, part by part: token ids, noise, the schedule's
steps, the picture. docs/goldens.md has the format for readers of other languages.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Annotated, Any, Final, Self

import numpy as np
from pydantic import Field

from ..pipeline.errors import BundleError
from ..pipeline.strict import Strict, parsed
from ..runtimes.arithmetic import PROVEN
from ..runtimes.protocol import Array
from ..runtimes.txt2img.noise import TorchNoise
from ..runtimes.txt2img.picture import to_uint8
from .golden_limits import PORT_LIMITS, Limits
from .golden_models import PER_CALL, unet_inputs
from .golden_sample import MOST_VALUES, Sample
from .prompts import too_long

if TYPE_CHECKING:
    from ..runtimes.txt2img.generate import Drawing
    from ..runtimes.txt2img.tokenizer import PromptTokenizer
    from .golden_models import Run

    Tokenizers = tuple[PromptTokenizer, PromptTokenizer | None]  # of the first and second text encoder

SCHEMA: Final = 2
OLDEST: Final = 1  # that is read: it has nothing to check a port with but what its models compute
PLACE: Final = "goldens/goldens.json"
CONTROL_PLACE: Final = "goldens/control.png"  # what the golden picture is drawn along, in a bundle with a ControlNet
CANVAS_PLACE: Final = "goldens/canvas.png"  # what the VAE encoder was given
MASK_PLACE: Final = "goldens/mask.png"  # beside it, in an inpainting bundle: white is drawn anew
MAX_BYTES: Final = 4 * 2**20
MOST_CALL_VALUES: Final = 12_000  # of one tensor over all calls, so that 50 calls stay below a megabyte
LEAST_VALUES: Final = 16
THINNED: Final = 4  # inputs of a call are samples of so many times fewer values
_LIMITS_OF_1: Final = {"noise_max_abs", "latents_snr_db", "image_max_levels"}

# Each is handled wrongly by some tokenizer: nothing, case, contractions, digits, accents in two spellings, other
# scripts, emoji with joiners, brackets of prompt weights (which are not syntax here), white space, more than fits.
TRICKY: Final = (
    "",
    "A Red STAR",
    "it's the dog's; we'll don't",
    "1girl, 8k, 3.14 and 50%",
    "café naïve cafe\u0301",
    "星 и звезда",
    "👩\u200d🚀 ☕️",
    '(a:1.2), [b] & c--d <e> "f"',
    "  two   spaces\tand\na line ",
    too_long("a red star on a blue background"),
)

PROMPT: Final = "a large red star in the center, on a blue background"
SEED: Final = 7


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


def write_goldens(
    tokenizers: Tokenizers,
    drawing: Drawing,
    runs: Mapping[str, Sequence[Run]],
    timesteps: Sequence[float],
    runtime: str,
    limits: Limits,
    encoding: Encoding | None = None,
) -> Goldens:
    """Goldens of what `drawing`, with its trajectory kept, shows, of what its models were asked, and of `encoding`.

    Args:
        runs: component -> its runs, from a `Recorder` around the models that drew.
        timesteps: of the rows.
    """
    calls = len(drawing.trajectory)
    if calls != len(timesteps):
        raise ValueError(f"{calls} latents for {len(timesteps)} calls: was the trajectory kept?")
    branches = len(runs["unet"]) // calls
    prompts = [drawing.negative, drawing.prompt][-branches:]
    channels = drawing.latents.shape[1]
    most = min(MOST_VALUES, max(LEAST_VALUES, MOST_CALL_VALUES // calls))
    asked = [unet_inputs(run.given, channels) for run in runs["unet"]]
    decoder, latents = runs["vae_decoder"][-1], drawing.trajectory
    image = Sample.of(drawing.image)
    return Goldens(
        schema=SCHEMA,
        runtime=runtime,
        tokens=tuple(Tokens.of(tokenizers, prompt) for prompt in TRICKY),
        picture=GoldenPicture(
            prompt=drawing.prompt,
            negative=drawing.negative,
            seed=drawing.seed,
            guidance=drawing.guidance,
            scheduler=drawing.scheduler,
            steps=drawing.steps,
            noise=Sample.of(TorchNoise(drawing.seed).normal(drawing.latents.shape)),
            conditions=tuple(
                Condition(
                    prompt=prompt, inputs={name: Sample.of(x) for name, x in told.items() if name not in PER_CALL}
                )
                for prompt, told in zip(prompts, asked[:branches], strict=True)
            ),
            calls=tuple(
                Call(
                    timestep=timestep,
                    latents=Sample.of(latents[call], most),
                    inputs={
                        name: Sample.of(x, most, THINNED)
                        for name, x in asked[call * branches].items()
                        if name in PER_CALL
                    },
                    outputs=tuple(
                        Sample.of(_only(run.answered), most) for run in runs["unet"][call * branches :][:branches]
                    ),
                )
                for call, timestep in enumerate(timesteps)
            ),
            latent_sample=Sample.of(decoder.given["latent_sample"], most),  # in the places of the latents
            image=GoldenImage(
                sample=image,
                sha256=image_hash(drawing.image),
                decoded=Sample.of(_only(decoder.answered)[0].transpose(1, 2, 0)),
                bytes=tuple(int(byte) for byte in to_uint8(drawing.image).ravel()[:: image.stride]),
            ),
        ),
        canvas=GoldenCanvas.of(encoding, _kept(runs)) if encoding else None,
        limits=limits,
    )


def _only(answered: Mapping[str, Array]) -> Array:
    (answer,) = answered.values()
    return answer


def _kept(runs: Mapping[str, Sequence[Run]]) -> Array | None:
    """What the VAE encoder gave for an inpainting bundle's picture, which starts from noise: what the mask keeps."""
    encoder = runs.get("vae_encoder", ())
    return _only(encoder[-1].answered) if encoder else None


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
