"""Probes that a bundle answers itself: what `compare` feeds to another bundle, without PyTorch and its checkpoint.

The first bundle draws pictures; some of its calls are kept with what it answered. The other bundle then gets the same
feeds. So feeds come from the models' own world here too, and both need nothing but their files.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from ..runtimes.inputs import native_feeds, pytorch_inputs
from ..runtimes.protocol import Array, Closing, Feeds, Session
from ..runtimes.txt2img.generate import draw
from ..runtimes.txt2img.guidance import unconditional_needed
from ..stages.artifacts import role_of
from .reference.probes import ProbePlan, Probes, pictures_for

if TYPE_CHECKING:
    from ..runtimes.txt2img.generate import TextToImage


class _Recorder(Closing):
    """A session by PyTorch's names, whatever the runtime's model takes; writes the calls it is to keep."""

    def __init__(self, session: Session, component: str, book: _Book) -> None:
        self._session, self._component, self._book = session, component, book
        self.inputs = pytorch_inputs(session.inputs)
        self.outputs = session.outputs

    def run(self, feeds: Feeds) -> dict[str, Array]:
        outputs = self._session.run(native_feeds(feeds, self._session.inputs, self._book.time_embedding))
        self._book.note(self._component, feeds, outputs)
        return outputs

    def close(self) -> None:
        self._session.close()


@dataclass
class _Book:
    """Where calls are written, as `Probes` reads them."""

    into: Path
    time_embedding: Mapping[str, Any]
    unet_calls: frozenset[int]  # which of a picture's calls to keep
    prompt: str = ""

    def __post_init__(self) -> None:
        self.labels: dict[str, list[str]] = {}
        self._calls: Counter[str] = Counter()

    def turn(self, prompt: str) -> None:
        self.prompt = prompt
        self._calls.clear()

    def note(self, component: str, feeds: Feeds, outputs: Mapping[str, Array]) -> None:
        label = repr(self.prompt)
        if role_of(component) in ("denoiser", "control"):
            call = self._calls[component]
            self._calls[component] += 1
            if call not in self.unet_calls:
                return
            label = f"{label} call {call} (t = {float(feeds['timestep']):g})"
        labels = self.labels.setdefault(component, [])
        arrays = {f"feed.{name}": a for name, a in feeds.items()} | {f"output.{name}": a for name, a in outputs.items()}
        np.savez(self.into / f"{component}-{len(labels):03}.npz", allow_pickle=False, **arrays)
        labels.append(label)


def ask_bundle(painter: TextToImage, plan: ProbePlan, into: Path, *, guidance: float, encoder: bool) -> Probes:
    """Draw the plan's pictures with `painter` and write what its models were asked and answered under `into`.

    Args:
        plan: its `picked` steps are kept, both branches of guidance of each where there are two.
        guidance: what the model is asked to follow; 1 and less for one that was made to work without.
        encoder: also ask the VAE encoder about the pictures.
    """
    branches = 2 if unconditional_needed(painter.guidance_mode, guidance) else 1
    calls = frozenset(step * branches + branch for step, _ in plan.picked for branch in range(branches))
    book = _Book(into, painter.time_embedding, calls)

    def record(component: str) -> Session:
        return _Recorder(painter.open(component), component, book)

    recording = replace(painter, open=record)
    images, pictures = [], pictures_for(painter)
    for index, prompt in enumerate(plan.prompts):
        book.turn(prompt)
        how: dict[str, Any] = {"guidance": guidance, "seed": plan.seed + index, **pictures}
        drawing = draw(recording, prompt, keep_trajectory=True, **how)
        np.savez(into / f"picture-{index:03}.npz", trajectory=np.stack(drawing.trajectory), image=drawing.image)
        images.append(drawing.image)
    if encoder:
        with record("vae_encoder") as session:
            for prompt, image in zip(plan.prompts, images, strict=True):
                book.turn(prompt)
                session.run({"sample": np.ascontiguousarray(image.transpose(2, 0, 1)[None] * 2 - 1, np.float32)})
    labels = {component: tuple(names) for component, names in book.labels.items()}
    return Probes(into, plan, painter.size, labels)
