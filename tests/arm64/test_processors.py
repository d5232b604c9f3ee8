"""Small enough for every run: text encoder and VAE whole and one UNet call, in float32 and as a phone computes."""

from __future__ import annotations

import pytest
from diffusette.bundle.bundle import Bundle
from diffusette.stages.cache import Cache
from diffusette.stages.progress import Silent
from diffusette.validate.machines.check import check_on_machines

from .conftest import machine

FLOAT16 = {"ncnn": "defaults", "mnn": "fp16", "ort": "fp16"}
"""What a phone computes: ncnn's own defaults, MNN's Precision_Low; ONNX Runtime by the graph alone."""

PRECISION = {"ncnn": "fp16", "mnn": "fp16", "ort": "fp16_a16"}


@pytest.mark.parametrize("target", ["ncnn", "mnn", "ort"])
@pytest.mark.parametrize("processor", ["cortex-a76", "cortex-a72"])
def test_the_demo_is_right_on_a_phones_processor(
    target: str, processor: str, demo_bundles: dict[tuple[str, str], Bundle], demo_cache: Cache
) -> None:
    """Two processors: one with float16 arithmetic, one without, where the row says that it falls back."""
    bundle = demo_bundles[PRECISION[target], target]
    (report,) = check_on_machines(
        bundle,
        [machine(f"arm64:{processor}")],
        image=False,
        calls=1,
        arithmetics=[FLOAT16[target]],
        cache=demo_cache,
        progress=Silent(),
    )
    assert report.failures() == []
    rows = {row.arithmetic.name: row for row in report.rows}
    row = rows[FLOAT16[target]]
    assert row.ok, report.misfits()
    assert row.falls_back == (processor == "cortex-a72"), row.computed
    if processor == "cortex-a76":
        assert row.computed == "float16"
