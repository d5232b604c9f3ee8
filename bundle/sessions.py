"""Models of a bundle, opened where they can be watched: each in a process of its own."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

from ..export.compiled_schedule import CompiledSchedule
from ..runtimes.isolation import IsolatedSession, open_isolated
from ..runtimes.registry import get_target
from ..runtimes.txt2img.generate import TextToImage
from ..runtimes.txt2img.tokenizer import PromptTokenizer
from .bundle import Bundle
from .manifest_entries import TokenizerEntry

OPENER = "diffusette.runtimes.registry:open_model"


def opener(
    bundle: Bundle, threads: int, form: str | None = None, *, timed: bool = False
) -> Callable[[str], IsolatedSession]:
    """A function that loads a component of `bundle` by name.

    Raises:
        MissingTool: the bundle's runtime is not installed.
    """
    target = bundle.manifest.target.name
    get_target(target).require()

    def open_component(name: str) -> IsolatedSession:
        return open_isolated(OPENER, bundle.model(name, form), threads=threads, name=f"{target} {name}", timed=timed)

    return open_component


def painter(bundle: Bundle, schedule: CompiledSchedule, threads: int) -> TextToImage:
    """What `runtimes.txt2img` needs to draw with `bundle`."""
    facts = bundle.manifest
    return TextToImage(
        tokenizer=_tokenizer(bundle, facts.tokenizer),
        tokenizer_2=_tokenizer(bundle, facts.tokenizer_2) if facts.tokenizer_2 else None,
        controlled=facts.control is not None,
        input_channels=facts.conditioning.input_channels,
        zeros_for_empty=facts.conditioning.zeros_for_empty,
        open=opener(bundle, threads),
        denoiser=bundle.denoiser,
        schedules=(schedule,),
        guidance_mode=facts.guidance.mode,
        default_guidance=facts.guidance.default,
        scaling_factor=facts.vae.scaling_factor,
        shift=facts.vae.shift,
        encoder_scaling=(facts.vae.encoder_scaling_factor, facts.vae.encoder_shift),
        size=facts.size,
        time_embedding=facts.time_embedding.model_dump(),
    )


def _tokenizer(bundle: Bundle, entry: TokenizerEntry) -> PromptTokenizer:
    return PromptTokenizer(Path(bundle.path, entry.files[0].path).parent, entry.max_tokens, entry.pad_id)
