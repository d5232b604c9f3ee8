"""Sessions around a replay of golden vectors: some write down what passes through, some answer from the goldens.

With models that answer from the goldens, all that is left of a picture is what a port writes itself: guidance, the
schedule, the timestep's embedding, the factors of the VAE, the way to 8 bits. That is checked to float32's rounding,
in whatever arithmetic the models compute.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Final, Protocol

import numpy as np

from ...export.contract import RESIDUALS_IN
from ...runtimes.protocol import Array, Closing, Feeds, Session
from ...stages.artifacts import TensorSpec, role_of

if TYPE_CHECKING:
    from ...runtimes.txt2img.tokenizer import PromptTokenizer
    from .file import Gaussian, Goldens

Open = Callable[[str], Session]

SAMPLE: Final = "sample"
STATES: Final = "encoder_hidden_states"
PER_CALL: Final = (SAMPLE, "timestep", "timestep_embedding")  # inputs of the UNet that each call changes
MASK: Final = "mask"  # what stands beside the latents in an inpainting UNet's sample, by names of our own
MASKED_LATENTS: Final = "masked_latents"
_BRANCHES: Final = 2  # of guidance: whatever does not change is written down once for each
_IS_PROMPT: Final = 1.0  # by which a stand-in for the UNet knows for which text it is asked
_IS_NEGATIVE: Final = 0.5


@dataclass(frozen=True, slots=True)
class Run:
    """What a model was given, by its own names, and what it answered."""

    given: Mapping[str, Array]
    answered: Mapping[str, Array]


@dataclass(slots=True)
class Recorder:
    """Opens models, and keeps their runs: of the UNet's all that changes, and the rest once a branch of guidance."""

    source: Open
    runs: dict[str, list[Run]] = field(default_factory=dict)

    def open(self, component: str) -> Session:
        """As `source`, written down."""
        session = self.source(component)
        return _Through(session.inputs, session.outputs, self._noting(component, session), session.close)

    def _noting(self, component: str, session: Session) -> Callable[[Feeds], dict[str, Array]]:
        runs = self.runs.setdefault(component, [])

        def run(feeds: Feeds) -> dict[str, Array]:
            answered = session.run(feeds)
            runs.append(Run(self._worth_keeping(component, feeds, len(runs)), answered if _is_kept(component) else {}))
            return answered

        return run

    @staticmethod
    def _worth_keeping(component: str, feeds: Feeds, earlier: int) -> dict[str, Array]:
        if not _is_kept(component):
            return {}
        names = [name for name in feeds if not name.startswith(RESIDUALS_IN)]
        if role_of(component) == "denoiser" and earlier >= _BRANCHES:
            names = [name for name in names if name in PER_CALL]
        return {name: np.array(feeds[name]) for name in names}  # a copy: feeds may be written over


def _is_kept(component: str) -> bool:
    return role_of(component) in ("denoiser", "decoder", "encoder")


def unet_inputs(given: Mapping[str, Array], channels: int) -> dict[str, Array]:
    """What a UNet was given, where the `sample` of an inpainting one is parted: latents, mask, latents of the rest."""
    sample = given[SAMPLE]
    parts = {**given, SAMPLE: sample[:, :channels]}
    if sample.shape[1] > channels:
        parts |= {MASK: sample[:, channels : channels + 1], MASKED_LATENTS: sample[:, channels + 1 :]}
    return parts


@dataclass(slots=True)
class _Through(Closing):
    """A session that is a function."""

    inputs: tuple[TensorSpec, ...]
    outputs: tuple[TensorSpec, ...]
    run: Callable[[Feeds], dict[str, Array]]
    end: Callable[[], None] = lambda: None

    def close(self) -> None:
        self.end()


def standing_in(answer: Mapping[str, Array]) -> Session:
    """A session that takes nothing and gives `answer`."""
    return _Through((), (), lambda _: dict(answer))


class Shaped(Protocol):
    """What says which inputs and outputs a component has: a model of a bundle, or a session."""

    @property
    def inputs(self) -> tuple[TensorSpec, ...]: ...

    @property
    def outputs(self) -> tuple[TensorSpec, ...]: ...


@dataclass(slots=True)
class GoldenModels:
    """Models that answer what the goldens say they answered.

    Only the sampled places hold a golden value, the others 0; everything between two calls of a model is computed
    element by element, so that the sampled places stay right.

    Args:
        shaped: inputs and outputs of a component.
        encoded: what the VAE encoder answers; None: nothing asks it.
    """

    goldens: Goldens
    tokenizer: PromptTokenizer
    shaped: Callable[[str], Shaped]
    encoded: Gaussian | None = None
    _calls: dict[bool, int] = field(default_factory=lambda: {False: 0, True: 0})

    def open(self, component: str) -> Session:
        """As a bundle opens its models."""
        shaped = self.shaped(component)
        answer = {
            "denoiser": self._noise,
            "encoder": self._parameters,
            "decoder": self._pixels,
            "text": self._states,
        }.get(role_of(component), self._nothing)
        return _Through(shaped.inputs, shaped.outputs, lambda feeds: answer(shaped.outputs, feeds))

    def _noise(self, outputs: Sequence[TensorSpec], feeds: Feeds) -> dict[str, Array]:
        calls = self.goldens.picture.calls
        prompted = bool(feeds[STATES].max() == _IS_PROMPT)
        call = self._calls[prompted]
        self._calls[prompted] += 1
        if call >= len(calls):  # of a port that makes too many steps, which is found when they are counted
            return self._nothing(outputs, feeds)
        return {outputs[0].name: calls[call].outputs[-1 if prompted else 0].scattered()}

    def _parameters(self, outputs: Sequence[TensorSpec], feeds: Feeds) -> dict[str, Array]:
        if self.encoded is None:
            return self._nothing(outputs, feeds)
        halves = [self.encoded.mean.scattered(), self.encoded.log_variance.scattered()]
        return {outputs[0].name: np.concatenate(halves, axis=1)}

    def _pixels(self, outputs: Sequence[TensorSpec], feeds: Feeds) -> dict[str, Array]:
        decoded = self.goldens.picture.image.decoded
        if decoded is None:
            return self._nothing(outputs, feeds)
        return {outputs[0].name: np.ascontiguousarray(decoded.scattered().transpose(2, 0, 1)[None])}

    def _states(self, outputs: Sequence[TensorSpec], feeds: Feeds) -> dict[str, Array]:
        wanted = self.tokenizer(self.goldens.picture.prompt).ids
        value = _IS_PROMPT if np.array_equal(feeds["input_ids"], wanted) else _IS_NEGATIVE
        return {spec.name: np.full(spec.shape, value, np.float32) for spec in outputs}

    @staticmethod
    def _nothing(outputs: Sequence[TensorSpec], _: Feeds) -> dict[str, Array]:
        return {spec.name: np.zeros(spec.shape, np.float32) for spec in outputs}
