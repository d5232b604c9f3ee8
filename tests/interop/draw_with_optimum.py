"""Run by the interop environment: draw with optimum's pipeline from a folder of ours, whose class it names.

    python draw_with_optimum.py FOLDER REQUEST.json OUT.npz

REQUEST holds `prompt`, `steps`, `guidance` and `latents` (path of a .npy file). OUT gets `image`, float [H, W, 3]
in 0..1, and `ids`, what the pipeline's tokenizer made of the prompt.
"""

import json
import sys
from pathlib import Path

import numpy as np
import torch
from optimum.onnxruntime import ORTDiffusionPipeline


def main(folder: str, request: str, out: str) -> None:
    wanted = json.loads(Path(request).read_text())
    torch.set_num_threads(1)
    pipeline = ORTDiffusionPipeline.from_pretrained(folder)
    pipeline.set_progress_bar_config(disable=True)
    result = pipeline(
        wanted["prompt"],
        num_inference_steps=wanted["steps"],
        guidance_scale=wanted["guidance"],
        latents=torch.from_numpy(np.load(wanted["latents"])),
        output_type="np",
    )
    ids = pipeline.tokenizer(wanted["prompt"], padding="max_length", max_length=77, truncation=True).input_ids
    np.savez(out, image=result.images[0], ids=ids)


if __name__ == "__main__":
    main(*sys.argv[1:])
