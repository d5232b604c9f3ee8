"""The reference: what PyTorch answers, one component in memory at a time.

The two stages run in a child process; torch and diffusers are imported inside their functions only.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable, Mapping
from contextlib import ExitStack
from dataclasses import dataclass, replace
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import numpy as np

from ...checkpoints.families import reference_pipeline
from ...checkpoints.families.variant import reads_zeros_for_empty
from ...export import contract
from ...export.scheduler import build_scheduler, default_scheduler
from ...quantize.codes_file import QuantizedWeights
from ...quantize.plan import Plan
from ...quantize.stored_weights import StoredWeights
from ...runtimes.protocol import Array, Feeds
from ...runtimes.txt2img.canvas import INPAINTING_CHANNELS
from ...runtimes.txt2img.conditioning import ENCODERS, GUIDANCE_INPUT, conditioning, zeroed
from ...runtimes.txt2img.control import Control, picture_feeds, residual_feeds
from ...runtimes.txt2img.guidance import guidance_embedding
from ...stages.artifacts import Checkpoint, ComponentSource
from ...stages.errors import ModelError
from ...stages.stage import Stage
from .probes import Picture, ProbePlan, Probes, RoundedAnswers, probe_canvas, probe_control
from .prompts import EMPTY
from .torch_session import TorchModel, TorchSession, settle_threads


@dataclass(frozen=True)
class ReferenceProbes(
    Stage[Probes],
    name="reference-probes",
    version=4,
    tools=("torch", "diffusers", "transformers", "tokenizers"),
    aside=("form",),
):
    """Ask PyTorch what `plan` wants to know: text encoders, then UNet (and ControlNet, beside it), then VAE."""

    checkpoint: Checkpoint
    size: tuple[int, int]
    plan: ProbePlan
    form: str = ""  # what for, for people

    def run(self, into: Path) -> Probes:
        return Reference(self.checkpoint, self.size, self.plan).draw(into)


@dataclass(frozen=True)
class Reference:
    """PyTorch's own drawing; `opener` loads a component by name where its weights are not the checkpoint's."""

    checkpoint: Checkpoint
    size: tuple[int, int]
    plan: ProbePlan
    opener: Callable[[str], TorchSession] | None = None

    def pictures(self, into: Path) -> tuple[Picture, ...]:
        """What is drawn, without probes. Files lie below `into` meanwhile."""
        with TemporaryDirectory(dir=into) as folder:
            return tuple(replace(self, plan=replace(self.plan, picked=(), texts=())).draw(Path(folder)).pictures())

    def draw(self, into: Path) -> Probes:
        """Draw every prompt of the plan, and write what it asks for to `into`."""
        settle_threads()
        written = _Written(into)
        plan = self.plan
        conditions = self._encode(written)
        kept = self._kept(written)
        with ExitStack() as opened:
            session = opened.enter_context(self._open(self.checkpoint.denoiser.component))
            controlled = None
            if "controlnet" in self.checkpoint.components:
                controlled = _Controlled(opened.enter_context(self._open("controlnet")), probe_control(self.size))
            drawn = [
                self._draw(session, controlled, conditions, kept, index, written) for index in range(len(plan.prompts))
            ]
        images = []
        with self._open("vae_decoder") as session:
            scaling = _scaling_factor(session)
            for prompt, trajectory in zip(plan.prompts, drawn, strict=True):
                feeds = {"latent_sample": trajectory[-1] / scaling}
                (sample,) = written.ask(session, "vae_decoder", repr(prompt), feeds).values()
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
        own = TorchModel(self.checkpoint.components[component], self.size)
        return self.opener(component) if self.opener else TorchSession(own)

    def _encode(self, written: _Written) -> dict[str, dict[str, Array]]:
        """The UNet's feeds for every prompt, from one text encoder after the other."""
        from transformers import CLIPTokenizer

        prompts = tuple(dict.fromkeys((EMPTY, *self.plan.prompts, *self.plan.texts)))
        outputs: dict[str, list[Mapping[str, Array]]] = {prompt: [] for prompt in prompts}
        for component, folder in zip(ENCODERS, (self.checkpoint.tokenizer, self.checkpoint.tokenizer_2), strict=True):
            if folder is None:
                continue
            tokenizer = CLIPTokenizer.from_pretrained(folder)
            with self._open(component) as session:
                for prompt in prompts:
                    ids = tokenizer(prompt, padding="max_length", max_length=contract.MAX_TOKENS, truncation=True)
                    feeds = {"input_ids": np.array([ids.input_ids], np.int64)}
                    outputs[prompt].append(written.ask(session, component, repr(_shorten(prompt)), feeds))
        conditions = {prompt: conditioning(found, self.size) for prompt, found in outputs.items()}
        if reads_zeros_for_empty(self.checkpoint):
            conditions[EMPTY] = zeroed(conditions[EMPTY])
        return conditions

    def _kept(self, written: _Written) -> Array | None:
        """For an inpainting model, what the VAE encoder makes of the part of the picture that stays."""
        if self.checkpoint.denoiser.config["in_channels"] != INPAINTING_CHANNELS:
            return None
        with self._open("vae_encoder") as session:
            feeds = {"sample": probe_canvas(self.size).kept}
            return written.ask(session, "vae_encoder", "a picture with a hole", feeds)["latent_parameters"]

    def _draw(
        self,
        session: TorchSession,
        controlled: _Controlled | None,
        conditions: Mapping[str, Mapping[str, Array]],
        kept: Array | None,
        index: int,
        written: _Written,
    ) -> Array:
        """Latents after each step, [calls, 1, C, h, w], guided and with noise drawn as diffusers' pipeline does."""
        import torch
        from diffusers.utils.torch_utils import randn_tensor

        plan = self.plan
        prompt = plan.prompts[index]
        config = self.checkpoint.scheduler
        scheduler = build_scheduler(
            config, plan.scheduler or default_scheduler(config), reference_pipeline(self.checkpoint)
        )
        scheduler.set_timesteps(plan.steps)
        generator = torch.Generator("cpu").manual_seed(plan.seed + index)
        # a scheduler that adds noise draws it from the same generator, as in the pipeline
        more = {"generator": generator} if "generator" in inspect.signature(scheduler.step).parameters else {}
        latents = randn_tensor(session.outputs[0].shape, generator=generator, dtype=torch.float32)
        latents = latents * scheduler.init_noise_sigma
        beside = self._beside(kept, generator)
        branches = {"conditional": conditions[prompt]}
        if plan.guidance_mode == "cfg":
            branches = {"unconditional": conditions[EMPTY], **branches}
        read = {}
        if plan.guidance_mode == "embedded":
            width = next(spec.shape[-1] for spec in session.inputs if spec.name == GUIDANCE_INPUT)
            read[GUIDANCE_INPUT] = guidance_embedding(plan.guidance, width)
        trajectory = []
        for step, t in enumerate(scheduler.timesteps):
            seen = scheduler.scale_model_input(latents, t).numpy()
            sample = np.concatenate([seen, *beside], axis=1)
            noise = {}
            for branch, told in branches.items():
                feeds = {"sample": sample, "timestep": np.array(float(t), np.float32), **told, **read}
                label = f"{prompt!r} step {step} (t = {float(t):g}) {branch}" if (step, branch) in plan.picked else ""
                if controlled:
                    feeds |= controlled.ask(written, label, {**feeds, "sample": seen})
                (output,) = written.ask(session, self.checkpoint.denoiser.component, label, feeds).values()
                noise[branch] = torch.from_numpy(output)
            guided = noise["conditional"]
            if "unconditional" in noise:
                guided = noise["unconditional"] + plan.guidance * (guided - noise["unconditional"])
            latents = scheduler.step(guided, t, latents, **more, return_dict=False)[0]
            trajectory.append(latents.numpy().copy())
        return np.stack(trajectory)

    def _beside(self, kept: Array | None, generator: Any) -> tuple[Array, ...]:
        """What an inpainting UNet takes beside the latents: the mask, and latents of what stays."""
        if kept is None:
            return ()
        import torch
        from diffusers.models.autoencoders.vae import DiagonalGaussianDistribution

        drawn = DiagonalGaussianDistribution(torch.from_numpy(kept)).sample(generator)
        mask = torch.nn.functional.interpolate(torch.from_numpy(probe_canvas(self.size).mask), size=drawn.shape[2:])
        scaling = float(self.checkpoint.components["vae_encoder"].config["scaling_factor"])
        return mask.numpy(), (drawn * scaling).numpy()


@dataclass(frozen=True, slots=True)
class _Controlled:
    """A ControlNet, and the picture that it is asked to follow."""

    session: TorchSession
    control: Control

    def ask(self, written: _Written, label: str, feeds: Feeds) -> dict[str, Array]:
        """What the UNet is given beside `feeds`; of these, a ControlNet takes some."""
        whole = {**feeds, **picture_feeds(self.control)}
        own = {spec.name: whole[spec.name] for spec in self.session.inputs}
        return dict(residual_feeds(written.ask(self.session, "controlnet", label, own), self.control.scale))


class _Written:
    """Writes probes as they are answered, so that none has to be kept in memory."""

    def __init__(self, into: Path) -> None:
        self.into = into
        self.labels: dict[str, list[str]] = {}

    def ask(self, session: TorchSession, component: str, label: str, feeds: Feeds) -> dict[str, Array]:
        """Run `session`; keep the call as a probe unless `label` is empty. Returns its outputs."""
        outputs = session.run(feeds)
        if not all(np.isfinite(value).all() for value in outputs.values()):
            raise ModelError(
                f"PyTorch's {component} gives NaN or infinity for {label or 'a step of the schedule'}",
                hint="the checkpoint's weights are damaged or overflow; no conversion can mend them",
            )
        if label:
            labels = self.labels.setdefault(component, [])
            arrays = {f"feed.{name}": a for name, a in feeds.items()} | {f"output.{n}": a for n, a in outputs.items()}
            np.savez(self.into / f"{component}-{len(labels):03}.npz", allow_pickle=False, **arrays)
            labels.append(label)
        return outputs


@dataclass(frozen=True)
class RoundedReference(
    Stage[RoundedAnswers], name="rounded-reference", version=3, tools=("torch", "diffusers", "transformers")
):
    """Ask PyTorch the same questions after rounding the component's weights as `plan` says.

    Weights of a float16 checkpoint are float16 already: what PyTorch answered with them is not asked for again.
    """

    probes: Probes
    source: ComponentSource
    plan: Plan
    quantized: QuantizedWeights | None  # what `quantized_weights` gives for them

    def run(self, into: Path) -> RoundedAnswers:
        settle_threads()
        count = 0
        stored = StoredWeights(self.source, self.plan, self.quantized)
        if not any(stored.is_rounded(name) for name in stored.names()):
            for count, probe in enumerate(self.probes.read(self.source.component), start=1):
                np.savez(into / f"{count - 1:03}.npz", allow_pickle=False, **probe.outputs)
            return RoundedAnswers(into, self.source.component, self.plan.label, count)
        with TorchSession(TorchModel(self.source, self.probes.size, self.plan, self.quantized)) as session:
            for count, probe in enumerate(self.probes.read(self.source.component), start=1):
                np.savez(into / f"{count - 1:03}.npz", allow_pickle=False, **session.run(probe.feeds))
        return RoundedAnswers(into, self.source.component, self.plan.label, count)


def _scaling_factor(session: TorchSession) -> float:
    """The factor that brings the VAE's latents to unit variance, from its configuration."""
    autoencoder: Any = session.module.m
    return float(autoencoder.config.scaling_factor)


def _shorten(prompt: str, width: int = 60) -> str:
    return prompt if len(prompt) <= width else f"{prompt[: width - 3]}..."
