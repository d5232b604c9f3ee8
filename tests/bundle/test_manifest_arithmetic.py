"""The manifest's `arithmetic`: what it says without a run, what it may not say."""

from __future__ import annotations

import json
from typing import Any

import pytest
from diffusette.bundle.bundle_readme import arithmetic_lines
from diffusette.bundle.manifest_arithmetic import ArithmeticEntry
from pydantic import ValidationError

PLAIN: dict[str, Any] = {
    "status": "run on AArch64",
    "proven_in": {"unet": "float32", "vae_decoder": "float32"},
    "recommended": {"unet": "fp16", "vae_decoder": "float32"},
    "choices": {
        "float32": {"options": {"use_fp16_storage": False}, "expects": "float32"},
        "fp16": {
            "options": {"use_fp16_storage": True},
            "expects": "float16",
        },
        "defaults": {"options": {}, "expects": "float16", "default": True, "fails": "unet: sums overflow"},
    },
    "machines": [
        {
            "machine": "arm64:cortex-a76",
            "runtime": "1.0",
            "rows": {
                "fp16": {
                    "computes": "float16",
                    "snr_db": {"unet": 48.25, "vae_decoder": None},
                    "picture_psnr_db": 41.0,
                    "verdict": "passed",
                }
            },
            "recommended": {"unet": "fp16", "vae_decoder": "float32"},
            "picture_psnr_db": 41.0,
        }
    ],
}


def read(plain: dict[str, Any]) -> ArithmeticEntry:
    return ArithmeticEntry.model_validate_json(json.dumps(plain))


def test_the_readme_states_options_in_the_runtimes_own_words_and_every_row() -> None:
    text = "\n".join(arithmetic_lines(read(PLAIN), "ncnn"))
    assert "arithmetic: run on AArch64" in text
    assert "- Recommended, unet: **fp16**: `use_fp16_storage = true`" in text
    assert "- Proven against PyTorch, unet, vae_decoder: **float32**: `use_fp16_storage = false`" in text
    assert "- Do not use **defaults**: unet: sums overflow" in text
    assert "| fp16 | float16 | 48.2 | died | 41.0 | passed |" in text


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"recommended": {"unet": "bf8"}}, "'bf8' is none of the choices"),
        ({"status": "not run on AArch64"}, "the status contradicts the machines"),
        ({"machines": []}, "the status contradicts the machines"),
        ({"status": "green"}, "Input should be"),
        ({"proven_in": {}}, "at least 1"),
        ({"hologram": 1}, "hologram"),
    ],
)
def test_a_section_that_contradicts_itself_is_refused(changes: dict[str, Any], said: str) -> None:
    with pytest.raises(ValidationError, match=said):
        read({**PLAIN, **changes})
