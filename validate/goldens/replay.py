"""Drawing what the goldens say once more: with models that compute, and with models that answer from the goldens."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from contextlib import closing
from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING, Any

import numpy as np

from ...runtimes.txt2img.control import Control
from ...runtimes.txt2img.generate import draw, generate
from ...runtimes.txt2img.model_run import run_model
from ...stages.artifacts import with_role
from .file import Encoding
from .models import GoldenModels, Recorder, standing_in

if TYPE_CHECKING:
    from ...runtimes.txt2img.canvas import Canvas
    from ...runtimes.txt2img.generate import Drawing, Progress, TextToImage
    from .file import Goldens
    from .models import Open, Run, Shaped


@dataclass(frozen=True, slots=True)
class Replayed:
    """What came of it."""

    drawing: Drawing
    runs: Mapping[str, Sequence[Run]]
    encoding: Encoding | None

    @property
    def denoised(self) -> Sequence[Run]:
        """The denoiser's runs."""
        return next((self.runs[name] for name in with_role("denoiser", self.runs)), ())


@dataclass(frozen=True, slots=True)
class Replay:
    """A golden picture that is drawn again.

    Args:
        models: with the schedule of the goldens.
        canvas: the goldens' canvas, where they have one.
        pictures: `canvas` and `control` of `generate`, for models that need them to draw at all.
    """

    models: TextToImage
    goldens: Goldens
    canvas: Canvas | None = None
    pictures: Mapping[str, Any] = field(default_factory=dict)

    def with_models(self, watch: Callable[[Progress], None] | None = None) -> Replayed:
        """What the models compute."""
        encoding = self._encoding(self.models.open)
        drawing, runs = self._drawn(self.models.open, watch)
        return Replayed(drawing, runs, encoding)

    def with_golden_answers(self, shaped: Callable[[str], Shaped]) -> Replayed:
        """What is left to compute when the models' answers are golden.

        Args:
            shaped: inputs and outputs of a component.
        """
        canvas, tokenizer = self.goldens.canvas, self.models.tokenizer

        def answering(encoded: str) -> Open:
            given = getattr(canvas, encoded) if canvas else None
            return GoldenModels(self.goldens, tokenizer, shaped, given).open

        encoding = self._encoding(answering("parameters"))
        drawing, runs = self._drawn(answering("kept"), None)
        return Replayed(drawing, runs, encoding)

    def _drawn(
        self, source: Open, watch: Callable[[Progress], None] | None
    ) -> tuple[Drawing, Mapping[str, Sequence[Run]]]:
        wanted, recorder = self.goldens.picture, Recorder(source)
        drawing = draw(
            replace(self.models, open=recorder.open),
            wanted.prompt,
            wanted.negative,
            guidance=wanted.guidance,
            seed=wanted.seed,
            keep_trajectory=True,
            watch=watch,
            **self.pictures,
        )
        return drawing, recorder.runs

    def _encoding(self, source: Open) -> Encoding | None:
        if self.canvas is None:
            return None
        wanted = self.goldens.picture
        return encode(replace(self.models, open=source), self.canvas, wanted.prompt, wanted.seed)


def encode(models: TextToImage, canvas: Canvas, prompt: str, seed: int) -> Encoding:
    """A picture through the VAE encoder, once, and to the point where the UNet would be called."""
    with models.open("vae_encoder") as encoder:
        feeds = {"sample": canvas.image.astype(np.float32)}
        encoded = run_model(encoder, feeds, models.time_embedding, "vae_encoder")
    # where it starts depends on no text, and of a picture and what its mask keeps, on the picture
    answers = {"vae_encoder": {"latent_parameters": encoded}}
    nothing = {"last_hidden_state": np.zeros((1, 1, 1), np.float32)}
    resting = replace(models, open=lambda name: standing_in(answers.get(name, nothing)))
    control = Control(None, scale=0.0) if models.controlled else None
    with closing(generate(resting, prompt, seed=seed, canvas=canvas, control=control)) as steps:
        start = next(progress.latents for progress in steps if progress.component == models.denoiser)
    assert start is not None
    return Encoding(canvas.strength, encoded, start)
