"""Golden vectors: what a bundle's own runtime computed when it was made, small enough to ship and to read anywhere.

Whoever ports text-to-image to C++ or Kotlin replays them on the device, part by part: token ids, noise, the schedule's
steps, the picture. docs/goldens.md has the format for readers of other languages.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Annotated, Final, Self

import numpy as np
from pydantic import Field

from ..pipeline.errors import BundleError
from ..pipeline.strict import Strict, parsed
from ..runtimes.protocol import Array
from ..runtimes.txt2img.noise import TorchNoise
from .prompts import too_long
from .tolerances import GOLDEN_LIMITS

if TYPE_CHECKING:
    from ..runtimes.txt2img.generate import Drawing
    from ..runtimes.txt2img.tokenizer import PromptTokenizer

    Tokenizers = tuple[PromptTokenizer, PromptTokenizer | None]  # of the first and second text encoder

SCHEMA: Final = 1
PLACE: Final = "goldens/goldens.json"
CONTROL_PLACE: Final = "goldens/control.png"  # what the golden picture is drawn along, in a bundle with a ControlNet
CANVAS_PLACE: Final = "goldens/canvas.png"  # what the VAE encoder was given
MASK_PLACE: Final = "goldens/mask.png"  # beside it, in an inpainting bundle: white is drawn anew
MOST_VALUES: Final = 256
"""Of a tensor: a port that errs, errs everywhere; 256 values are 3 kB as text."""

MAX_BYTES: Final = 4 * 2**20

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


class Sample(Strict):
    """A tensor in brief: every `stride`-th value of its C-order, at most 256, and what sums over all of it give."""

    shape: tuple[int, ...]
    stride: Annotated[int, Field(ge=1)]
    values: tuple[float, ...]
    mean: float
    std: float

    @classmethod
    def of(cls, tensor: Array) -> Self:
        flat = np.asarray(tensor, np.float64).ravel()
        stride = -(-flat.size // MOST_VALUES)
        values = tuple(float(str(np.float32(value))) for value in flat[::stride])  # the shortest that is this float32
        return cls(
            shape=tuple(tensor.shape), stride=stride, values=values, mean=float(flat.mean()), std=float(flat.std())
        )


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
    """The latents after one call of the UNet (two with guidance) and one row of the schedule."""

    timestep: float
    latents: Sample


class GoldenImage(Strict):
    """The picture, [height, width, 3] in 0..1; `sha256` is that of its bytes once rounded to 8 bits."""

    sample: Sample
    sha256: Annotated[str, Field(pattern=r"^[0-9a-f]{64}$")]


class GoldenPicture(Strict):
    """One prompt from noise to picture, with a schedule that the bundle carries."""

    prompt: str
    negative: str
    seed: int
    guidance: float
    scheduler: str
    steps: Annotated[int, Field(ge=1)]
    noise: Sample  # the first draw, standard normal
    calls: Annotated[tuple[Call, ...], Field(min_length=1)]
    image: GoldenImage


@dataclass(frozen=True, slots=True)
class Encoding:
    """What comes of a picture before the first call of the UNet."""

    strength: float
    encoded: Array  # [1, 2 C, h, w], as the VAE encoder gives it: mean and log-variance
    start: Array  # [1, C, h, w]


class GoldenCanvas(Strict):
    """The picture in the bundle, encoded; and the latents that a run of `strength`, seed and schedule starts from."""

    strength: Annotated[float, Field(gt=0, le=1)]
    encoded: Sample
    start: Sample

    @classmethod
    def of(cls, encoding: Encoding) -> Self:
        encoded, start = Sample.of(encoding.encoded), Sample.of(encoding.start)
        return cls(strength=encoding.strength, encoded=encoded, start=start)


class Limits(Strict):
    """How far a replay may lie from the goldens; `tolerances.GOLDEN_LIMITS` has the reasons."""

    noise_max_abs: float
    latents_snr_db: float
    image_max_levels: float


class Goldens(Strict):
    """goldens/goldens.json as a whole."""

    schema_: Annotated[int, Field(ge=SCHEMA, le=SCHEMA)] = Field(alias="schema")
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
    timesteps: Sequence[float],
    runtime: str,
    encoding: Encoding | None = None,
) -> Goldens:
    """Goldens of what `drawing`, with its trajectory kept, shows, and of a picture's `encoding`."""
    if len(drawing.trajectory) != len(timesteps):
        raise ValueError(f"{len(drawing.trajectory)} latents for {len(timesteps)} calls: was the trajectory kept?")
    calls = tuple(
        Call(timestep=timestep, latents=Sample.of(latents))
        for timestep, latents in zip(timesteps, drawing.trajectory, strict=True)
    )
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
            calls=calls,
            image=GoldenImage(sample=Sample.of(drawing.image), sha256=image_hash(drawing.image)),
        ),
        canvas=GoldenCanvas.of(encoding) if encoding else None,
        limits=Limits(**{name: value for name, (value, _) in GOLDEN_LIMITS.items()}),
    )


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
    found = parsed(Goldens, data, lambda place: ".".join([where, *map(str, place)]), BundleError)
    samples = [found.picture.noise, *(call.latents for call in found.picture.calls), found.picture.image.sample]
    samples += [found.canvas.encoded, found.canvas.start] if found.canvas else []
    for sample in samples:
        size = int(np.prod(sample.shape))
        if len(sample.values) != -(-size // sample.stride):
            raise BundleError(
                f"{where}: {len(sample.values)} values with stride {sample.stride} are no sample of {sample.shape}",
                hint="convert the checkpoint again",
            )
    return found


def _ids(tokenizer: PromptTokenizer, prompt: str) -> tuple[int, ...]:
    return tuple(int(token) for token in tokenizer(prompt).ids.ravel())


def image_hash(image: Array) -> str:
    return hashlib.sha256(np.rint(image * 255).astype(np.uint8).tobytes()).hexdigest()
