"""Scales fitted to what a whole component answers, after GPTQ has fitted each layer's codes to that layer's own output.

Layers make up for each other's errors: the scales of all of them are moved along the gradient of the component's error
over its calibration calls, and the codes stay. It is the second, end-to-end phase of EfficientQAT ("EfficientQAT:
Efficient Quantization-Aware Training for Large Language Models", Chen et al., 2024, arXiv:2407.11062), with the
full-precision component's answers as the target. Norms and biases are left alone: training them too gains nothing on
the demo, and every runtime would have to carry other ones.

A step runs the component forwards and backwards on a batch, so this is for models whose calls take milliseconds.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, Final

import numpy as np
from numpy.typing import NDArray

from ..stages.artifacts import ComponentSource
from ..stages.hashing import sha256_of_file
from ..stages.stage import Runner, Stage
from .calibrated import bare, calibrated_weights
from .codes import Codes
from .codes_file import FILE, QuantizedWeights, tensors_of, write_codes
from .plan import Plan
from .samples import Feeds, Samples
from .stored_weights import StoredWeights

if TYPE_CHECKING:
    from torch import Tensor, nn

STEPS: Final = 300
BATCH: Final = 16  # calls of a step; of the VAE, whose calls are pictures, `_PICTURES`
RATE: Final = 0.003
"""Of Adam, as a share of a weight's median scale. It rises over a fifteenth of the steps, then falls along a cosine."""

_PICTURES: Final = 4
_WARMUP: Final = STEPS // 15
_HELD_OUT: Final = 8  # one of so many calls, the last ones, is not trained on: other prompts than the rest
_SEED: Final = 0


@dataclass(frozen=True, slots=True)
class TunedWeights:
    """Codes with their scales fitted, and what that did on calls that were not trained on.

    Where it did no good there, they are the codes as they came.
    """

    folder: Path
    component: str
    before_db: float  # signal to error, over the calls that were held out
    after_db: float
    digest: str = ""

    @property
    def weights(self) -> QuantizedWeights:
        return QuantizedWeights(self.folder, self.component, self.digest)


@dataclass(frozen=True)
class TuneScales(Stage[TunedWeights], name="tune", version=1, tools=("torch", "diffusers", "transformers", "numpy")):
    """Fit the scales of `quantized`, the codes of `source` at `plan`, to what `source` answers along `samples`."""

    source: ComponentSource
    plan: Plan
    samples: Samples
    quantized: QuantizedWeights

    def key(self) -> Mapping[str, object]:
        return {
            "component": self.source.component,
            "source": self.source.digest,
            "plan": self.plan.key(),
            "samples": self.samples.digest,
            # what they are, not how they were come by: a search rounds at every scheme, `validate` at one
            "quantized": sha256_of_file(self.quantized.file),
        }

    def run(self, into: Path) -> TunedWeights:
        import torch

        from ..export import modules

        wrapped = modules.load(self.source)
        calls = _Calls.of(wrapped, self.samples, self.source.component)
        stored = StoredWeights(self.source, self.plan, self.quantized)
        coded = {name: stored.codes(name) for name in stored.names() if not stored.scheme(name).is_float}
        with torch.no_grad():  # what is stored as float16 stays as it is
            for name in stored.names():
                if name not in coded and stored.is_rounded(name):
                    bare(wrapped).get_parameter(name).copy_(torch.from_numpy(stored.read(name)))
        before, after, scales = _fit(wrapped, coded, calls)
        if after > before:
            coded = {name: replace(codes, scales=scales[name]) for name, codes in coded.items()}
        shapes = {name: (codes.values.shape, stored.scheme(name)) for name, codes in coded.items()}

        def tensors() -> Iterator[NDArray[Any]]:
            for codes in coded.values():
                yield from tensors_of(codes)

        write_codes(into / FILE, shapes, tensors())
        return TunedWeights(into, self.source.component, before, max(before, after))


def tuned_weights(source: ComponentSource, plan: Plan, run: Runner) -> TunedWeights:
    """The codes of `source` at `plan`, which says along which samples they are rounded and tuned."""
    if plan.samples is None or plan.tuned is None:
        raise ValueError(f"{source.component} at {plan.label} is not to be tuned")
    rounded = calibrated_weights(source, replace(plan, tuned=None), plan.samples, run)
    return run(TuneScales(source, plan, plan.tuned, rounded))


@dataclass(frozen=True)
class _Calls:
    """What a component was asked along the samples, what it answered in float32, and what an error there counts."""

    feeds: Sequence[Feeds]
    truth: Sequence[Tensor]  # flat
    weights: Sequence[float]
    batch: int

    @classmethod
    def of(cls, wrapped: nn.Module, samples: Samples, component: str) -> _Calls:
        import torch

        from .moments import run_once

        feeds = list(samples.feeds(component))
        with torch.no_grad():
            truth = [run_once(wrapped, each).flatten() for each in feeds]
        weights = [samples.weight(each) for each in feeds]
        return cls(feeds, truth, weights, _PICTURES if component.startswith("vae") else BATCH)

    @property
    def trained(self) -> range:
        """Those to train on. A handful is too few to hold any back."""
        return range(len(self.feeds) - len(self.feeds) // _HELD_OUT)

    @property
    def held_out(self) -> range:
        return range(self.trained.stop, len(self.feeds)) or self.trained

    def error(self, answer: Any, picked: Sequence[int]) -> Tensor:
        """Power of the error of each of `picked` calls, asked of `answer` in one batch, times its weight: [N]."""
        import torch

        some = [self.feeds[index] for index in picked]
        outs = answer({name: _together([each[name] for each in some]) for name in some[0]})
        found = torch.cat([out.reshape(len(picked), -1) for out in (outs if isinstance(outs, tuple) else (outs,))], 1)
        truth = torch.stack([self.truth[index] for index in picked])
        power: Tensor = ((found - truth) ** 2).mean(1)
        return power * torch.tensor([self.weights[index] for index in picked])

    def decibels(self, answer: Any) -> float:
        """Signal to error over the calls that are held out."""
        import torch

        held, noise = list(self.held_out), 0.0
        with torch.no_grad():
            for at in range(0, len(held), self.batch):
                noise += float(self.error(answer, held[at : at + self.batch]).sum())
        signal = sum(self.weights[index] * float((self.truth[index] ** 2).mean()) for index in held)
        return 10 * math.log10(signal / noise) if signal > 0 and noise > 0 else 999.0


def _together(arrays: Sequence[NDArray[Any]]) -> NDArray[Any]:
    """One input of several calls, along the first dimension; a timestep has none of its own."""
    return np.stack(arrays) if arrays[0].ndim == 0 else np.concatenate(arrays)


def _fit(
    wrapped: nn.Module, coded: Mapping[str, Codes], calls: _Calls
) -> tuple[float, float, dict[str, NDArray[np.float32]]]:
    """Decibels over the calls that are held out, before and after, and the fitted scales of each parameter."""
    import torch

    names: Any = wrapped.input_names
    scales = {name: torch.from_numpy(codes.scales.copy()).requires_grad_() for name, codes in coded.items()}
    fixed = {name: _fixed(codes) for name, codes in coded.items()}

    def answer(feeds: Feeds) -> Any:
        values = {f"m.{name}": _values(scales[name], *fixed[name], coded[name].values.shape) for name in coded}
        return torch.func.functional_call(wrapped, values, tuple(torch.from_numpy(np.array(feeds[n])) for n in names))

    before = calls.decibels(answer)
    optimiser = torch.optim.Adam(
        [{"params": [each], "lr": RATE * float(each.detach().median())} for each in scales.values()], betas=(0.9, 0.99)
    )
    schedule = torch.optim.lr_scheduler.LambdaLR(optimiser, _rate)
    chance = torch.Generator().manual_seed(_SEED)
    for _ in range(STEPS):
        picked = torch.randint(len(calls.trained), (calls.batch,), generator=chance).tolist()
        with torch.enable_grad():
            error = calls.error(answer, picked).sum() / sum(calls.weights[index] for index in picked)
            optimiser.zero_grad()
            error.backward()
        optimiser.step()
        schedule.step()
    after = calls.decibels(answer)
    return before, after, {name: each.detach().numpy() for name, each in scales.items()}


def _fixed(codes: Codes) -> tuple[Tensor, Tensor | None]:
    """What is not fitted: the codes [O, G, K / G], and the product of a low-rank branch."""
    import torch

    rows, groups = codes.scales.shape
    branch = None if codes.branch is None else torch.from_numpy(codes.branch.product()).reshape(codes.values.shape)
    return torch.from_numpy(codes.values).float().reshape(rows, groups, -1), branch


def _values(scales: Tensor, codes: Tensor, branch: Tensor | None, shape: tuple[int, ...]) -> Tensor:
    values = (codes * scales[:, :, None]).reshape(shape)
    return values if branch is None else values + branch


def _rate(step: int) -> float:
    return min(1.0, (step + 1) / _WARMUP) * 0.5 * (1 + math.cos(math.pi * min(step, STEPS) / STEPS))
