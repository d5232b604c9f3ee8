"""The long form: schemes, targets and processors, each with a picture, and the demo's captions. `make test-arm64`."""

from __future__ import annotations

import pytest
from diffusette.bundle.bundle import Bundle
from diffusette.stages.cache import Cache
from diffusette.stages.progress import Silent
from diffusette.validate.machines.check import check_on_machines

from .conftest import machine

pytestmark = pytest.mark.arm64_long

CELLS = [
    *((target, scheme) for target in ("ncnn", "mnn", "ort") for scheme in ("fp16", "w8c_afp", "w8c_a8", "w4g32_afp")),
    ("ort", "fp16_a16"),
]
CAPTIONS = 16


@pytest.mark.parametrize(("target", "scheme"), CELLS)
@pytest.mark.parametrize("processor", ["cortex-a76", "neoverse-n1", "cortex-a72", "max"])
def test_a_bundle_is_right_as_proven_and_as_recommended(
    target: str, scheme: str, processor: str, demo_bundles: dict[tuple[str, str], Bundle], demo_cache: Cache
) -> None:
    bundle = demo_bundles[scheme, target]
    (report,) = check_on_machines(bundle, [machine(f"arm64:{processor}")], cache=demo_cache, progress=Silent())
    assert report.failures() == []
    assert report.recommended_db is not None
    assert bundle.manifest.arithmetic is not None
    unfit = {name for name, choice in bundle.manifest.arithmetic.choices.items() if choice.fails}
    bad = {row.arithmetic.name for row in report.rows if not row.ok}
    assert bad <= unfit, report.misfits()


@pytest.mark.parametrize(("target", "scheme"), [("ncnn", "fp16"), ("mnn", "fp16"), ("ort", "fp16_a16")])
def test_float16_draws_what_captions_state_as_often_as_float32_does(
    target: str, scheme: str, demo_bundles: dict[tuple[str, str], Bundle], demo_cache: Cache
) -> None:
    """In the recommended arithmetic; a miss of PyTorch's own is none."""
    (report,) = check_on_machines(
        demo_bundles[scheme, target],
        [machine("arm64:cortex-a76")],
        oracle_prompts=CAPTIONS,
        cache=demo_cache,
        progress=Silent(),
    )
    assert report.oracle is not None
    assert report.oracle.score >= report.oracle.reference_score, report.oracle.line
