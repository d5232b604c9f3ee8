"""Does a recipe that was found on one checkpoint serve a fine-tune of it? Prints what both cost, as JSON.

    python benchmarks/transfer.py FOLDER [--steps N] [--bits B] [--target T]

The demo's UNet is trained further for N steps, on its own scenes with their colours turned into the opposite, so that
it draws other pictures from the same captions; FOLDER gets the checkpoint. Then both are searched, and the fine-tune is
measured with the mixture that was found on it and with the one that was found on the demo.
"""

from __future__ import annotations

import argparse
import json
import shutil
import sys
from functools import partial
from pathlib import Path
from typing import Any, Final

from diffusette.checkpoints.checkpoint import DEMO_FOLDER, open_checkpoint
from diffusette.convert.recipe import parameters_of, parse_recipe
from diffusette.convert.search.goal import Goal
from diffusette.convert.search.measurements import Measurements
from diffusette.convert.search.search import candidates, search
from diffusette.runtimes.registry import get_target
from diffusette.stages.cache import Cache
from diffusette.stages.progress import Silent
from diffusette.stages.run_stage import run_stage
from diffusette.validate.reference.calibrate import draw_samples
from diffusette.validate.reference.scenes import oracle_prompts, render

SIZE: Final = (64, 64)
BATCH: Final = 16
RATE: Final = 1e-3


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", type=Path)
    parser.add_argument("--steps", type=int, default=300)
    parser.add_argument("--bits", type=float, default=4.5)
    parser.add_argument("--target", default="ort")
    options = parser.parse_args()
    if not options.folder.exists():
        fine_tune(options.folder, options.steps)
    print(json.dumps(compare(options.folder, options.bits, options.target), indent=2))


def fine_tune(folder: Path, steps: int) -> None:
    """Train the demo's UNet to predict the noise in latents of pictures in the opposite colours."""
    import diffusers
    import numpy as np
    import torch

    kind: Any = diffusers
    torch.manual_seed(0)
    pipeline = kind.StableDiffusionPipeline.from_pretrained(DEMO_FOLDER, safety_checker=None)
    noise_of = kind.DDPMScheduler.from_config(pipeline.scheduler.config)
    scenes = oracle_prompts(BATCH * 64, seed=77)
    pictures = np.stack([255 - render(scene, seed) for seed, scene in enumerate(scenes)]).astype(np.float32)
    ids = pipeline.tokenizer(
        [scene.caption for scene in scenes], padding="max_length", max_length=77, truncation=True, return_tensors="pt"
    ).input_ids
    with torch.no_grad():
        sample: Any = torch.from_numpy(pictures / 127.5 - 1).permute(0, 3, 1, 2)
        scale = pipeline.vae.config.scaling_factor
        latents = torch.cat([pipeline.vae.encode(part).latent_dist.mean * scale for part in sample.split(BATCH)])
        told = torch.cat([pipeline.text_encoder(part).last_hidden_state for part in ids.split(BATCH)])
        empty = pipeline.tokenizer([""], padding="max_length", max_length=77, return_tensors="pt").input_ids
        nothing = pipeline.text_encoder(empty).last_hidden_state[0]
    told[::10] = nothing  # guidance needs the answer to an empty prompt, too
    unet = pipeline.unet.train()
    optimiser = torch.optim.AdamW(unet.parameters(), lr=RATE)
    for step in range(steps):
        for group in optimiser.param_groups:
            group["lr"] = RATE * min(1, (step + 1) / 20) * (1 - step / steps)
        some = torch.randint(len(latents), (BATCH,))
        noise, times = torch.randn_like(latents[some]), torch.randint(1000, (BATCH,))
        answer = unet(noise_of.add_noise(latents[some], noise, times), times, told[some]).sample
        loss = torch.nn.functional.mse_loss(answer, noise)
        optimiser.zero_grad()
        loss.backward()  # type: ignore[no-untyped-call]
        optimiser.step()
        if step % 50 == 0:
            print(f"step {step}: loss {loss.item():.3f}", file=sys.stderr)
    shutil.copytree(DEMO_FOLDER, folder)
    shutil.rmtree(folder / "unet")
    unet.eval().save_pretrained(folder / "unet")


def compare(folder: Path, bits: float, target: str) -> dict[str, Any]:
    """Search the demo and the fine-tune; what each of the two mixtures costs the fine-tune."""
    cache = Cache.default()
    run = partial(run_stage, cache=cache, progress=Progress())
    demo, tuned = (open_checkpoint(each, memo=cache.memo) for each in ("demo", folder))
    # tuning is done again for every checkpoint: what transfers is the mixture
    recipe = parse_recipe('schema = 1\n[quantize]\nrounding = "gptq"\n', "transfer.toml")
    runtime, goal = get_target(target), Goal(bits=bits)
    schemes = candidates((runtime,))
    found = {
        name: search(source, SIZE, recipe, target, schemes, goal, run, lambda _: None)
        for name, source in (("demo", demo), ("fine-tune", tuned))
    }
    shapes = parameters_of(tuned)
    bench = Measurements(
        tuned, SIZE, draw_samples(tuned, SIZE, recipe.rounding, run), schemes, recipe.rounding, shapes, run
    )
    rows = {}
    for name, each in found.items():
        plans = each.recipe.plans(shapes)
        mixture = {
            part: {parameter: plans[part].scheme(parameter, shapes[part][parameter]).name for parameter in options}
            for part, options in bench.table.options.items()
        }
        rows[f"found on the {name}"] = bench.row(mixture, chosen=False).to_json()
    return {"bits": bits, "target": target, "on the fine-tune": rows, "agreeing layers": agreement(found, shapes)}


def agreement(found: dict[str, Any], shapes: Any) -> float:
    """The share of parameters of two or more dimensions at the same scheme in both."""
    ours, theirs = (each.recipe.plans(shapes) for each in found.values())
    places = [(part, name, shape) for part, each in shapes.items() for name, shape in each.items() if len(shape) > 1]
    same = sum(ours[part].scheme(name, shape) == theirs[part].scheme(name, shape) for part, name, shape in places)
    return float(round(same / len(places), 3))


class Progress(Silent):
    """A line a stage, on stderr."""

    def end(self, label: str, seconds: float, peak_mib: float, outcome: str) -> None:
        print(f"{label} {seconds:.1f} s", file=sys.stderr)


if __name__ == "__main__":
    main()
