"""A bundle's `onnx` form is what optimum's own exporter would have written: its pipeline draws the same picture.

optimum-onnx cannot live beside current diffusers and transformers, so its side runs in an environment of its own:
`make interop` builds it and sets DIFFUSETTE_INTEROP_PYTHON. DIFFUSETTE_INTEROP_BUNDLE names an ORT bundle of the
demo checkpoint to take instead of building one.
"""

from __future__ import annotations

import json
import os
import shutil
import subprocess
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

ROOT = Path(__file__).parents[2]
PROMPT = "a large red circle in the centre on a blue background"
STEPS, GUIDANCE, SEED = 20, 4.0, 7

pytestmark = pytest.mark.interop


@pytest.fixture(scope="module")
def interop_python() -> str:
    python = os.environ.get("DIFFUSETTE_INTEROP_PYTHON", "")
    if not python:
        pytest.skip("DIFFUSETTE_INTEROP_PYTHON is not set: run `make interop`")
    return python


@pytest.fixture(scope="module")
def latents() -> np.ndarray[Any, np.dtype[np.float32]]:
    return np.random.default_rng(SEED).standard_normal((1, 4, 8, 8), dtype=np.float32)


@pytest.fixture(scope="module")
def picture_of_diffusers(latents: np.ndarray[Any, np.dtype[np.float32]]) -> np.ndarray[Any, Any]:
    """What PyTorch draws: float [64, 64, 3] in 0..1."""
    import torch
    from diffusers import StableDiffusionPipeline

    pipeline: Any = StableDiffusionPipeline.from_pretrained(ROOT / "demo")
    pipeline.set_progress_bar_config(disable=True)
    drawn = pipeline(
        PROMPT,
        num_inference_steps=STEPS,
        guidance_scale=GUIDANCE,
        latents=torch.from_numpy(latents),
        output_type="np",
    )
    image: np.ndarray[Any, Any] = drawn.images[0]
    return image


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Callable[[Any], Any]:
    """Runs equal stages once: both precisions share the export."""
    work = tmp_path_factory.mktemp("stages")
    done: dict[str, Any] = {}

    def run(stage: Any) -> Any:
        if repr(stage) not in done:
            into = work / str(len(done))
            into.mkdir()
            done[repr(stage)] = stage.run(into)
        return done[repr(stage)]

    return run


def laid_out(checkpoint_folder: Path, precision: str, folder: Path, run: Callable[[Any], Any]) -> Path:
    """The models of every component and optimum's small files, laid out as a bundle is."""
    from diffusette.checkpoints.checkpoint import open_checkpoint
    from diffusette.quantize.plan import Plan
    from diffusette.runtimes.ort.target import OrtTarget

    checkpoint, target = open_checkpoint(checkpoint_folder), OrtTarget(forms=("onnx",))
    for path, content in target.assets(checkpoint, (64, 64)).items():
        (folder / path).parent.mkdir(parents=True, exist_ok=True)
        (folder / path).write_bytes(content)
    for source in checkpoint.components.values():
        model = target.build(source, (64, 64), Plan(precision), run)
        for file in model.files:
            shutil.copyfile(model.folder / file, folder / file)
    return folder


@pytest.mark.parametrize(
    ("precision", "floor_db"),
    # fp32: summation order only. fp16: rounding the weights to float16 inside PyTorch leaves 82 dB.
    [("fp32", 80.0), ("fp16", 60.0)],
)
def test_optimum_draws_the_picture_that_pytorch_draws(
    precision: str,
    floor_db: float,
    interop_python: str,
    run: Callable[[Any], Any],
    latents: np.ndarray[Any, Any],
    picture_of_diffusers: np.ndarray[Any, Any],
    tmp_path: Path,
) -> None:
    given = os.environ.get("DIFFUSETTE_INTEROP_BUNDLE")
    bundle = Path(given) if given else laid_out(ROOT / "demo", precision, tmp_path / "bundle", run)
    drawn = drawn_by_optimum(bundle, PROMPT, latents, interop_python, tmp_path)
    assert picture_of_diffusers.std() > 0.05, "the reference is a blank picture and proves nothing"
    assert psnr_db(drawn, picture_of_diffusers) >= (min(floor_db, 60.0) if given else floor_db)


def drawn_by_optimum(
    bundle: Path, prompt: str, latents: np.ndarray[Any, Any], python: str, scratch: Path
) -> np.ndarray[Any, Any]:
    np.save(scratch / "latents.npy", latents)
    request = {"prompt": prompt, "steps": STEPS, "guidance": GUIDANCE, "latents": str(scratch / "latents.npy")}
    (scratch / "request.json").write_text(json.dumps(request))
    script, out = Path(__file__).with_name("draw_with_optimum.py"), scratch / "out.npz"
    environment = {k: v for k, v in os.environ.items() if k != "PYTHONPATH"} | {"HF_HUB_OFFLINE": "1"}
    done = subprocess.run(
        [python, "-P", str(script), str(bundle), str(scratch / "request.json"), str(out)],
        capture_output=True, text=True, env=environment, cwd=scratch, check=False,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr[-3000:]
    image: np.ndarray[Any, Any] = np.load(out)["image"]
    return image


def psnr_db(drawn: np.ndarray[Any, Any], reference: np.ndarray[Any, Any]) -> float:
    """With a peak of 1.0."""
    assert drawn.shape == reference.shape == (64, 64, 3)
    error = float(np.mean((drawn.astype(np.float64) - reference) ** 2))
    return float("inf") if error == 0 else float(-10 * np.log10(error))


def test_optimum_draws_with_both_text_encoders_of_sdxl(
    interop_python: str,
    run: Callable[[Any], Any],
    latents: np.ndarray[Any, Any],
    kind_folder: Callable[[str], Path],
    tmp_path: Path,
) -> None:
    import torch
    from diffusers import StableDiffusionXLPipeline

    folder = kind_folder("sdxl")
    bundle = laid_out(folder, "fp32", tmp_path / "bundle", run)
    live: Any = StableDiffusionXLPipeline.from_pretrained(folder)
    live.set_progress_bar_config(disable=True)

    def expected(prompt: str) -> np.ndarray[Any, Any]:
        how = {"num_inference_steps": STEPS, "guidance_scale": GUIDANCE, "output_type": "np"}
        image: np.ndarray[Any, Any] = live(prompt, latents=torch.from_numpy(latents), **how).images[0]
        return image

    found = psnr_db(drawn_by_optimum(bundle, PROMPT, latents, interop_python, tmp_path), expected(PROMPT))
    assert found >= 80.0  # summation order only
    # random weights: the prompt must show in the picture, or the text encoders were not compared
    assert psnr_db(expected("blue"), expected(PROMPT)) < found - 20


def test_optimums_tokenizer_reads_the_prompt_as_ours_does(interop_python: str, tmp_path: Path) -> None:
    from diffusette.checkpoints.checkpoint import open_checkpoint
    from diffusette.runtimes.ort.optimum_layout import write_layout
    from transformers import CLIPTokenizer

    # as transformers 5 saves it: without vocab.json and merges.txt, which its predecessor needs
    checkpoint = tmp_path / "checkpoint"
    shutil.copytree(ROOT / "demo", checkpoint)
    for name in ("vocab.json", "merges.txt", "special_tokens_map.json"):
        (checkpoint / "tokenizer" / name).unlink(missing_ok=True)
    write_layout(open_checkpoint(checkpoint), tmp_path)
    program = (
        "import json, sys; from transformers import CLIPTokenizer; "
        "t = CLIPTokenizer.from_pretrained(sys.argv[1]); "
        "print(json.dumps([t(p, padding='max_length', max_length=77, truncation=True).input_ids "
        "for p in json.loads(sys.argv[2])]))"
    )
    prompts = [PROMPT, "", "Two SMALL  squares, green & yellow!"]
    done = subprocess.run(
        [interop_python, "-P", "-c", program, str(tmp_path / "tokenizer"), json.dumps(prompts)],
        capture_output=True, text=True, check=False, cwd=tmp_path,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr[-3000:]
    ours = CLIPTokenizer.from_pretrained(ROOT / "demo" / "tokenizer")
    expected = [ours(p, padding="max_length", max_length=77, truncation=True).input_ids for p in prompts]
    assert json.loads(done.stdout) == expected
