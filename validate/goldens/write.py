"""Golden vectors: what a bundle's own runtime computed when it was made, small enough to ship and to read anywhere.

Whoever ports text-to-image to C++ or Kotlin replays them on the device, part by part: token ids, noise, the schedule's
steps, the picture. docs/goldens.md has the format for readers of other languages.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Final

from ...runtimes.protocol import Array
from ...runtimes.txt2img.noise import TorchNoise
from ...runtimes.txt2img.picture import to_uint8
from ...stages.artifacts import sole
from ..reference.prompts import too_long
from .file import (
    SCHEMA,
    Call,
    Condition,
    Encoding,
    GoldenCanvas,
    GoldenImage,
    GoldenPicture,
    Goldens,
    Tokens,
    image_hash,
)
from .models import PER_CALL, unet_inputs
from .sample import MOST_VALUES, Sample

if TYPE_CHECKING:
    from ...runtimes.txt2img.generate import Drawing
    from .file import Tokenizers
    from .limits import Limits
    from .models import Run

PLACE: Final = "goldens/goldens.json"
CONTROL_PLACE: Final = "goldens/control.png"  # what the golden picture is drawn along, in a bundle with a ControlNet
CANVAS_PLACE: Final = "goldens/canvas.png"  # what the VAE encoder was given
MASK_PLACE: Final = "goldens/mask.png"  # beside it, in an inpainting bundle: white is drawn anew
MOST_CALL_VALUES: Final = 12_000  # of one tensor over all calls, so that 50 calls stay below a megabyte
LEAST_VALUES: Final = 16
THINNED: Final = 4  # inputs of a call are samples of so many times fewer values

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
    denoised = runs[sole("denoiser", runs)]
    branches = len(denoised) // calls
    prompts = [drawing.negative, drawing.prompt][-branches:]
    channels = drawing.latents.shape[1]
    most = min(MOST_VALUES, max(LEAST_VALUES, MOST_CALL_VALUES // calls))
    asked = [unet_inputs(run.given, channels) for run in denoised]
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
                        Sample.of(_only(run.answered), most) for run in denoised[call * branches :][:branches]
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
