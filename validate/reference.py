"""The reference: PyTorch itself, in float32 on the CPU, one component in memory at a time.

The two stages run in a child process; torch and diffusers are imported inside their functions only.
"""

from __future__ import annotations

import gc
import inspect
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from types import TracebackType
from typing import TYPE_CHECKING, Any, ClassVar, Final, Self

import numpy as np

from ..export import modules
from ..export.schedule import SCHEDULERS, default_scheduler
from ..pipeline.artifacts import Checkpoint, ComponentSource, TensorSpec
from ..pipeline.errors import ModelError
from ..quantize.plan import Plan
from ..quantize.quantized import QuantizedWeights, StoredWeights
from ..runtimes.protocol import Array, Feeds
from .probes import ProbePlan, Probes, RoundedAnswers
from .prompts import EMPTY

if TYPE_CHECKING:
    from torch import nn

_AS_TRAINED: Final = Plan("fp32")


@dataclass(frozen=True, slots=True)
class TorchModel:
    """A component as PyTorch runs it, its weights rounded as a plan says; the argument of `open_reference`."""

    source: ComponentSource
    size: tuple[int, int]  # height, width in pixels
    plan: Plan = _AS_TRAINED
    quantized: QuantizedWeights | None = None  # the codes, where the plan has any


class TorchSession:
    """A component behind the protocol of every runtime."""

    def __init__(self, model: TorchModel) -> None:
        self.inputs: tuple[TensorSpec, ...] = modules.input_specs(model.source, model.size)
        self.outputs: tuple[TensorSpec, ...] = modules.output_specs(model.source, model.size)
        self._module: nn.Module | None = modules.load(model.source)
        if model.plan != _AS_TRAINED:
            round_weights(self._module, StoredWeights(model.source, model.plan, model.quantized))

    @property
    def module(self) -> nn.Module:
        if self._module is None:
            raise RuntimeError("the session is closed")
        return self._module

    def run(self, feeds: Feeds) -> dict[str, Array]:
        import torch

        with torch.inference_mode():
            # a copy: torch refuses to promise anything about arrays that are read-only
            result = self.module(*(torch.from_numpy(np.array(feeds[spec.name])) for spec in self.inputs))
        return {self.outputs[0].name: result.numpy()}

    def close(self) -> None:
        self._module = None
        gc.collect()  # modules hold reference cycles; gigabytes must not wait for the collector

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()


def open_reference(argument: Any, threads: int) -> TorchSession:
    """Opener for `runtimes.isolation.open_isolated`: loads a `TorchModel`, or its fields, in this process."""
    import torch
    from pydantic import TypeAdapter

    torch.set_num_threads(threads)
    return TorchSession(TypeAdapter(TorchModel).validate_python(argument))


def round_weights(module: nn.Module, stored: StoredWeights) -> None:
    """Give the wrapped `module` (from `modules.load`) the values that `stored` computes with, in place.

    Raises:
        ModelError: a weight that is to be float16 exceeds its largest value, 65504.
    """
    import torch

    bare: Any = module.m
    with torch.no_grad():
        for name in stored.names():
            if stored.is_rounded(name):
                bare.get_parameter(name).copy_(torch.from_numpy(stored.read(name)))


@dataclass(frozen=True)
class ReferenceProbes:
    """Ask PyTorch what `plan` wants to know: text encoder, then UNet, then VAE."""

    checkpoint: Checkpoint
    size: tuple[int, int]
    plan: ProbePlan

    name: ClassVar[str] = "reference-probes"
    version: ClassVar[int] = 2
    tools: ClassVar[tuple[str, ...]] = ("torch", "diffusers", "transformers", "tokenizers")
    output: ClassVar[type] = Probes

    def key(self) -> Mapping[str, object]:
        return {"checkpoint": self.checkpoint.digest, "size": self.size, "plan": asdict(self.plan)}

    def run(self, into: Path) -> Probes:
        written = _Written(into)
        plan = self.plan
        with self._open("text_encoder") as session:
            states = self._encode(session, written)
        with self._open("unet") as session:
            drawn = [self._draw(session, states, index, written) for index in range(len(plan.prompts))]
        images = []
        with self._open("vae_decoder") as session:
            scaling = _scaling_factor(session)
            for prompt, trajectory in zip(plan.prompts, drawn, strict=True):
                feeds = {"latent_sample": trajectory[-1] / scaling}
                sample = written.ask(session, "vae_decoder", repr(prompt), feeds)
                images.append(np.clip(sample, -1, 1))
        for index, (trajectory, image) in enumerate(zip(drawn, images, strict=True)):
            picture = np.ascontiguousarray((image[0] / 2 + 0.5).transpose(1, 2, 0))
            np.savez(into / f"picture-{index:03}.npz", trajectory=trajectory, image=picture)
        if "vae_encoder" in self.checkpoint.components:
            with self._open("vae_encoder") as session:
                for prompt, image in zip(plan.prompts, images, strict=True):
                    written.ask(session, "vae_encoder", repr(prompt), {"sample": image})
        labels = {component: tuple(names) for component, names in written.labels.items()}
        return Probes(into, plan, self.size, labels)

    def _open(self, component: str) -> TorchSession:
        return TorchSession(TorchModel(self.checkpoint.components[component], self.size))

    def _encode(self, session: TorchSession, written: _Written) -> dict[str, Array]:
        """Hidden states [1, 77, D] of every prompt."""
        from transformers import CLIPTokenizer

        tokenizer = CLIPTokenizer.from_pretrained(self.checkpoint.tokenizer)
        states = {}
        for prompt in dict.fromkeys((EMPTY, *self.plan.prompts, *self.plan.texts)):
            ids = tokenizer(prompt, padding="max_length", max_length=modules.MAX_TOKENS, truncation=True).input_ids
            feeds = {"input_ids": np.array([ids], np.int64)}
            states[prompt] = written.ask(session, "text_encoder", repr(_shorten(prompt)), feeds)
        return states

    def _draw(self, session: TorchSession, states: Mapping[str, Array], index: int, written: _Written) -> Array:
        """Latents after each step, [calls, 1, C, h, w], guided and with noise drawn as diffusers' pipeline does."""
        import torch
        from diffusers.utils.torch_utils import randn_tensor

        plan = self.plan
        prompt = plan.prompts[index]
        scheduler = _scheduler(self.checkpoint.scheduler, plan.scheduler)
        scheduler.set_timesteps(plan.steps)
        generator = torch.Generator("cpu").manual_seed(plan.seed + index)
        # a scheduler that adds noise draws it from the same generator, as in the pipeline
        more = {"generator": generator} if "generator" in inspect.signature(scheduler.step).parameters else {}
        latents = randn_tensor(session.inputs[0].shape, generator=generator, dtype=torch.float32)
        latents = latents * scheduler.init_noise_sigma
        branches = {"unconditional": states[EMPTY], "conditional": states[prompt]}
        trajectory = []
        for step, t in enumerate(scheduler.timesteps):
            sample = scheduler.scale_model_input(latents, t).numpy()
            noise = {}
            for branch, state in branches.items():
                feeds = {"sample": sample, "timestep": np.array(float(t), np.float32), "encoder_hidden_states": state}
                label = f"{prompt!r} step {step} (t = {float(t):g}) {branch}" if (step, branch) in plan.picked else ""
                noise[branch] = torch.from_numpy(written.ask(session, "unet", label, feeds))
            guided = noise["unconditional"] + plan.guidance * (noise["conditional"] - noise["unconditional"])
            latents = scheduler.step(guided, t, latents, **more, return_dict=False)[0]
            trajectory.append(latents.numpy().copy())
        return np.stack(trajectory)


class _Written:
    """Writes probes as they are answered, so that none has to be kept in memory."""

    def __init__(self, into: Path) -> None:
        self.into = into
        self.labels: dict[str, list[str]] = {}

    def ask(self, session: TorchSession, component: str, label: str, feeds: Feeds) -> Array:
        """Run `session`; keep the call as a probe unless `label` is empty. Returns the only output."""
        outputs = session.run(feeds)
        (value,) = outputs.values()
        if not np.isfinite(value).all():
            raise ModelError(
                f"PyTorch's {component} gives NaN or infinity for {label or 'a step of the schedule'}",
                hint="the checkpoint's weights are damaged or overflow; no conversion can mend them",
            )
        if label:
            labels = self.labels.setdefault(component, [])
            arrays = {f"feed.{name}": a for name, a in feeds.items()} | {f"output.{n}": a for n, a in outputs.items()}
            np.savez(self.into / f"{component}-{len(labels):03}.npz", allow_pickle=False, **arrays)
            labels.append(label)
        return value


@dataclass(frozen=True)
class RoundedReference:
    """Ask PyTorch the same questions after rounding the component's weights as `plan` says."""

    probes: Probes
    source: ComponentSource
    plan: Plan
    quantized: QuantizedWeights | None  # what `quantized_weights` gives for them

    name: ClassVar[str] = "rounded-reference"
    version: ClassVar[int] = 2
    tools: ClassVar[tuple[str, ...]] = ("torch", "diffusers", "transformers")
    output: ClassVar[type] = RoundedAnswers

    def key(self) -> Mapping[str, object]:
        return {
            "probes": self.probes.digest,
            "component": self.source.component,
            "source": self.source.digest,
            "plan": self.plan.key(),
            "quantized": self.quantized.digest if self.quantized else None,
        }

    @property
    def precision(self) -> str:
        return self.plan.label

    def run(self, into: Path) -> RoundedAnswers:
        count = 0
        with TorchSession(TorchModel(self.source, self.probes.size, self.plan, self.quantized)) as session:
            for count, probe in enumerate(self.probes.read(self.source.component), start=1):
                np.savez(into / f"{count - 1:03}.npz", allow_pickle=False, **session.run(probe.feeds))
        return RoundedAnswers(into, self.source.component, self.precision, count)


def _scheduler(config: Mapping[str, Any], name: str) -> Any:
    """diffusers' scheduler as its own pipeline holds it: the pipeline repairs outdated configurations."""
    import diffusers

    scheduler = getattr(diffusers, SCHEDULERS[name or default_scheduler(config)]).from_config(dict(config))
    pipeline: Any = diffusers.StableDiffusionPipeline
    absent = dict.fromkeys(("vae", "text_encoder", "tokenizer", "unet", "safety_checker", "feature_extractor"))
    return pipeline(**absent, scheduler=scheduler, requires_safety_checker=False).scheduler


def _scaling_factor(session: TorchSession) -> float:
    """The factor that brings the VAE's latents to unit variance, from its configuration."""
    autoencoder: Any = session.module.m
    return float(autoencoder.config.scaling_factor)


def _shorten(prompt: str, width: int = 60) -> str:
    return prompt if len(prompt) <= width else f"{prompt[: width - 3]}..."
