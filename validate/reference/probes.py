"""Probes: feeds from the model's own world, with what PyTorch in float32 answers. Plain files, numpy only.

Noise alone is a poor test: activations of a diffusion model differ by an order of magnitude between the first and the
last step, and a converter's mistake may show at one end only.
"""

from __future__ import annotations

from collections.abc import Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final, Literal

import numpy as np

from ...runtimes.protocol import Array
from ...runtimes.txt2img.canvas import INPAINTING_CHANNELS, Canvas
from ...runtimes.txt2img.control import Control
from ...runtimes.txt2img.generate import TextToImage
from ...runtimes.txt2img.guidance import Mode
from ...stages.artifacts import Checkpoint, Variant
from ...stages.errors import ModelError
from .prompts import prompts_for, too_long
from .scenes import Scene

Branch = Literal["conditional", "unconditional"]

CHEAP_UNET: Final = 1e11
"""Parameters x latent positions below which one UNet call takes well under a second on a laptop's core.

The embedded demo has 2e8, Stable Diffusion 1.5 at 512 x 512 has 3.5e12.
"""


@dataclass(frozen=True, slots=True)
class ProbePlan:
    """What PyTorch is asked. Prompt `i` is drawn with seed `seed + i` over the full schedule.

    `picked` names the UNet calls to keep, as (index in the schedule, branch of guidance), for each prompt.
    """

    prompts: tuple[str, ...]
    texts: tuple[str, ...] = ()  # more prompts, for the text encoder alone
    steps: int = 20
    picked: tuple[tuple[int, Branch], ...] = ()
    guidance: float = 4.0
    seed: int = 0
    scheduler: str = ""  # a key of export.scheduler.SCHEDULERS; empty for the checkpoint's own
    guidance_mode: Mode = "cfg"

    def __post_init__(self) -> None:
        if not self.prompts:
            raise ValueError("a plan without prompts proves nothing")
        if self.guidance_mode == "cfg" and self.guidance <= 1:
            raise ValueError(f"guidance {self.guidance} makes no unconditional run, the plan asks for both branches")
        if self.guidance_mode != "cfg" and any(branch == "unconditional" for _, branch in self.picked):
            raise ValueError(f"guidance {self.guidance_mode!r} makes no unconditional run")
        late = [step for step, _ in self.picked if not 0 <= step < self.steps]
        if late:
            raise ValueError(f"steps {late} are not among the {self.steps} of the schedule")


def plan_for(checkpoint: Checkpoint, size: tuple[int, int]) -> ProbePlan:
    """A thorough plan for a small model, a frugal one where a single UNet call takes many seconds.

    Args:
        size: height and width of the pictures, in pixels.
    """
    scale = checkpoint.vae_scale
    work = checkpoint.denoiser.parameters * (size[0] // scale) * (size[1] // scale)
    tokenizer = checkpoint.tokenizer
    variant = checkpoint.variant
    if variant.guidance_mode != "cfg":
        return _few_steps(tokenizer, variant, cheap=work < CHEAP_UNET)
    if work < CHEAP_UNET:
        prompts = prompts_for(tokenizer, 4)
        both: tuple[Branch, ...] = ("conditional", "unconditional")
        picked = tuple((step, branch) for step in (0, 6, 13, 19) for branch in both)
        return ProbePlan(prompts, texts=(too_long(prompts[0]),), steps=20, picked=picked)
    prompts = prompts_for(tokenizer, 3)
    return ProbePlan(
        prompts[:1],
        texts=(*prompts[1:], too_long(prompts[0])),
        steps=4,
        picked=((0, "conditional"), (2, "unconditional"), (3, "conditional")),
    )


def _few_steps(tokenizer: Path, variant: Variant, *, cheap: bool) -> ProbePlan:
    """A plan in the steps that a distilled model was made for: over more of them it leaves its own world."""
    prompts = prompts_for(tokenizer, 4)
    every: tuple[tuple[int, Branch], ...] = tuple((step, "conditional") for step in range(variant.steps))
    return ProbePlan(
        prompts if cheap else prompts[:1],
        texts=(too_long(prompts[0]),) if cheap else (*prompts[1:3], too_long(prompts[0])),
        steps=variant.steps,
        picked=every,
        guidance=variant.guidance,
        guidance_mode=variant.guidance_mode,
    )


def oracle_plan(scenes: Sequence[Scene], steps: int = 20, guidance: float = 4.0) -> ProbePlan:
    """Pictures for the oracle: the captions of `scenes`, no single calls kept."""
    return ProbePlan(tuple(scene.caption for scene in scenes), steps=steps, guidance=guidance)


def probe_canvas(size: tuple[int, int]) -> Canvas:
    """What an inpainting model is asked to fill in: a bright disc on a smooth ground, the middle of it masked."""
    rows, columns = np.meshgrid(np.linspace(-1, 1, size[0]), np.linspace(-1, 1, size[1]), indexing="ij")
    ground = np.stack([0.6 * rows, 0.6 * columns, -0.4 * rows * columns])
    picture = np.where(rows**2 + columns**2 < 0.5, np.array([0.8, 0.2, -0.5])[:, None, None], ground)
    mask = (np.abs(rows) < 0.5) & (np.abs(columns) < 0.6)
    return Canvas(picture[None].astype(np.float32), mask[None, None].astype(np.float32))


def probe_control(size: tuple[int, int]) -> Control:
    """What a ControlNet is asked to follow: the edges of a diamond in a ring, white on black, a pixel wide."""
    rows, columns = np.meshgrid(np.linspace(-1, 1, size[0]), np.linspace(-1, 1, size[1]), indexing="ij")
    radius = np.hypot(rows, columns)
    inside = ((radius < 0.5) & (radius > 0.35)) | (np.abs(rows) + np.abs(columns) < 0.3)
    edges = (inside != np.roll(inside, 1, axis=0)) | (inside != np.roll(inside, 1, axis=1))
    return Control(np.broadcast_to(edges, (1, 3, *size)).astype(np.float32))


def pictures_for(models: TextToImage) -> dict[str, Any]:
    """`canvas` and `control` of `txt2img.generate`, for models that need them to draw at all."""
    canvas = probe_canvas(models.size) if models.input_channels == INPAINTING_CHANNELS else None
    return {"canvas": canvas, "control": probe_control(models.size) if models.controlled else None}


@dataclass(frozen=True, slots=True)
class Probe:
    """One call of one component: canonical feeds, and PyTorch's float32 outputs."""

    label: str
    feeds: Mapping[str, Array]
    outputs: Mapping[str, Array]


@dataclass(frozen=True, slots=True)
class Picture:
    """What the full schedule leads to."""

    prompt: str
    seed: int
    latents: Array  # [1, C, h, w], as the scheduler leaves them
    image: Array  # [H, W, 3], float32 in 0..1, before rounding to 8 bits
    trajectory: Array  # [calls, 1, C, h, w], the latents after each call of the scheduler


@dataclass(frozen=True, slots=True)
class Probes:
    """A folder of probes: `COMPONENT-000.npz` in the order of `labels`, and `picture-000.npz` for each prompt."""

    folder: Path
    plan: ProbePlan
    size: tuple[int, int]  # height, width in pixels
    labels: Mapping[str, tuple[str, ...]]
    digest: str = ""

    def read(self, component: str, only: Collection[int] | None = None) -> Iterator[Probe]:
        """The component's probes, one at a time: at full size all of them together would be hundreds of MiB.

        Args:
            only: indices of those that are wanted; None: all.
        Raises:
            ModelError: there are none, so nothing could be proven.
        """
        labels = self.labels.get(component, ())
        if not labels:
            raise ModelError(f"there are no probes for {component}", hint=f"probed: {', '.join(self.labels)}")
        for index, label in enumerate(labels):
            if only is not None and index not in only:
                continue
            arrays = read_arrays(self.folder / f"{component}-{index:03}.npz")
            feeds = {name.removeprefix("feed."): a for name, a in arrays.items() if name.startswith("feed.")}
            outputs = {name.removeprefix("output."): a for name, a in arrays.items() if name.startswith("output.")}
            yield Probe(label, feeds, outputs)

    def pictures(self) -> Iterator[Picture]:
        for index, prompt in enumerate(self.plan.prompts):
            arrays = read_arrays(self.folder / f"picture-{index:03}.npz")
            trajectory = arrays["trajectory"]
            yield Picture(prompt, self.plan.seed + index, trajectory[-1], arrays["image"], trajectory)


@dataclass(frozen=True, slots=True)
class RoundedAnswers:
    """What PyTorch answers to a component's probes after its weights were rounded: `000.npz` ... in their order."""

    folder: Path
    component: str
    precision: str
    count: int
    digest: str = ""

    def read(self, only: Collection[int] | None = None) -> Iterator[Mapping[str, Array]]:
        """Answers in the order of the probes; `only`: as of `Probes.read`."""
        for index in range(self.count) if only is None else sorted(only):
            yield read_arrays(self.folder / f"{index:03}.npz")


def read_arrays(file: Path) -> dict[str, Array]:
    with np.load(file, allow_pickle=False) as stored:
        return dict(stored)
