"""What every runtime must do, whatever it is: over the table of targets, and over the template for new ones."""

from __future__ import annotations

import dataclasses
import os
import shutil
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any, Final

import numpy as np
import pytest
from diffusette.checkpoints.families import FAMILIES
from diffusette.quantize.scheme import FLOATS, parse_scheme
from diffusette.runtimes.example.target import ExampleTarget
from diffusette.runtimes.inputs import native_feeds
from diffusette.runtimes.isolation import IsolatedSession, open_isolated
from diffusette.runtimes.protocol import Session, Target
from diffusette.runtimes.registry import TARGETS, get_target
from diffusette.stages.artifacts import Checkpoint, TargetModel
from diffusette.stages.errors import DiffusetteError, FeedError, MissingTool, UnsupportedPrecision

from .workshop import Array, Workshop, snr_db

TEMPLATE: Final = "example"
NAMES: Final = (*TARGETS, TEMPLATE)
# An embedding with attention, and convolutions; the UNet is each target's own test's business.
SMALL: Final = ("text_encoder", "vae_decoder")
# float32 arithmetic in another order. MNN approximates exp and erf: docs/parity.md.
FLOOR_DB: Final = {"mnn": 80.0}
USUAL_FLOOR_DB: Final = 100.0
# Which weights a runtime stores as float16 is its own choice; what that costs beyond rounding, its own test's business.
HALF_DB: Final = 45.0


def target_named(name: str) -> Target:
    target: Target = ExampleTarget() if name == TEMPLATE else get_target(name)
    try:
        target.require_build()
    except MissingTool as missing:
        pytest.skip(f"{missing.what}: {missing.hint}")
    return target


@pytest.fixture(scope="module")
def shop(tmp_path_factory: pytest.TempPathFactory, demo_checkpoint: Checkpoint) -> Workshop:
    return Workshop(tmp_path_factory.mktemp("contract"), demo_checkpoint.components)


def isolated(model: TargetModel, monkeypatch: pytest.MonkeyPatch) -> IsolatedSession:
    if model.target == TEMPLATE:
        monkeypatch.setenv("PYTHONPATH", str(Path(__file__).parent), prepend=os.pathsep)
        return open_isolated("example_opener:open_model", model, threads=1)
    return open_isolated("diffusette.runtimes.registry:open_model", model, threads=1)


@pytest.fixture(params=NAMES)
def session(
    request: pytest.FixtureRequest, shop: Workshop, monkeypatch: pytest.MonkeyPatch
) -> Iterator[IsolatedSession]:
    """The VAE decoder in a child process: one float input."""
    model = shop.build(target_named(request.param), "vae_decoder", "fp32")
    with isolated(model, monkeypatch) as opened:
        yield opened


def fed(session: Session, shop: Workshop, component: str) -> dict[str, Array]:
    return native_feeds(shop.feeds(component), session.inputs, {})


# -- data


@pytest.mark.parametrize("name", NAMES)
def test_it_declares_what_it_can_do(name: str) -> None:
    target = target_named(name)
    assert target.name == name
    assert {"fp32", "fp16"} <= set(target.precisions)
    assert set(target.families) <= {family.name for family in FAMILIES}
    assert target.families
    assert target.version()[0].isdigit()
    assert target.min_runtime[0].isdigit()


@pytest.mark.parametrize("name", NAMES)
def test_asking_for_it_imports_nothing_heavy(name: str) -> None:
    make = (
        "from diffusette.runtimes.example.target import ExampleTarget as make"
        if name == TEMPLATE
        else f"from diffusette.runtimes.registry import get_target; make = lambda: get_target({name!r})"
    )
    heavy = "{'torch', 'onnx', 'onnxruntime', 'onnx_ir', 'ncnn', 'pnnx', 'MNN', 'diffusers', 'transformers'}"
    program = f"import sys; {make}; t = make(); t.require_build(); t.version(); print({heavy} & set(sys.modules))"
    done = subprocess.run([sys.executable, "-P", "-c", program], capture_output=True, text=True, check=False)
    assert done.stdout.strip() == "set()", done.stdout + done.stderr


# -- building and running


@pytest.mark.parametrize("precision", FLOATS)
@pytest.mark.parametrize("component", SMALL)
@pytest.mark.parametrize("name", NAMES)
def test_it_computes_what_pytorch_computes(
    name: str, component: str, precision: str, shop: Workshop, monkeypatch: pytest.MonkeyPatch
) -> None:
    if precision not in target_named(name).precisions:
        with pytest.raises(UnsupportedPrecision, match=precision):
            shop.build(target_named(name), component, precision)
        return
    model = shop.build(target_named(name), component, precision)
    with isolated(model, monkeypatch) as opened:
        assert opened.inputs == model.inputs
        assert opened.outputs == model.outputs
        (output,) = opened.run(fed(opened, shop, component)).values()
    assert output.dtype == np.float32
    floor = HALF_DB if parse_scheme(precision).is_half else FLOOR_DB.get(name, USUAL_FLOOR_DB)
    assert snr_db(shop.reference(component), output) >= floor


@pytest.mark.parametrize("name", NAMES)
def test_a_model_says_what_it_is(name: str, shop: Workshop) -> None:
    wide, narrow = (shop.build(target_named(name), "vae_decoder", p) for p in ("fp32", "fp16"))
    for model, precision in ((wide, "fp32"), (narrow, "fp16")):
        assert (model.target, model.component, model.precision) == (name, "vae_decoder", precision)
        for file in [*model.files, *(f for files in model.forms.values() for f in files)]:
            assert (model.folder / file).is_file(), file
            assert not Path(file).is_absolute()
    assert wide.bits_per_weight == pytest.approx(32, abs=0.1)
    assert 16 <= narrow.bits_per_weight < 17
    sizes = [sum((model.folder / file).stat().st_size for file in model.files) for model in (wide, narrow)]
    assert sizes[1] < 0.6 * sizes[0]


@pytest.mark.parametrize("name", NAMES)
def test_two_runs_of_the_same_feeds_agree_to_the_bit(
    name: str, shop: Workshop, monkeypatch: pytest.MonkeyPatch
) -> None:
    with isolated(shop.build(target_named(name), "text_encoder", "fp32"), monkeypatch) as opened:
        feeds = fed(opened, shop, "text_encoder")
        (first,), (second,) = opened.run(feeds).values(), opened.run(feeds).values()
    np.testing.assert_array_equal(first, second)


# -- refusing


def with_a_nan(array: Array) -> Array:
    bad = array.copy()
    bad.flat[3] = np.nan
    return bad


@pytest.mark.parametrize(
    "spoil",
    [
        pytest.param(lambda name, array: {}, id="no feeds"),
        pytest.param(lambda name, array: {name + "_": array}, id="wrong name"),
        pytest.param(lambda name, array: {name: array, "more": array}, id="one too many"),
        pytest.param(lambda name, array: {name: array.astype(np.float64)}, id="dtype"),
        pytest.param(lambda name, array: {name: array[..., :-1]}, id="shape"),
        pytest.param(lambda name, array: {name: array[0]}, id="rank"),
        pytest.param(lambda name, array: {name: with_a_nan(array)}, id="NaN"),
        pytest.param(lambda name, array: {name: np.full_like(array, np.inf)}, id="infinity"),
    ],
)
def test_feeds_that_do_not_fit_are_refused_and_the_next_ones_run(
    spoil: Any, session: IsolatedSession, shop: Workshop
) -> None:
    feeds = fed(session, shop, "vae_decoder")
    ((name, array),) = feeds.items()
    with pytest.raises(FeedError):
        session.run(spoil(name, array))
    (output,) = session.run(feeds).values()
    assert np.isfinite(output).all()


@pytest.mark.parametrize("name", NAMES)
def test_a_model_whose_weights_are_cut_is_our_error(
    name: str, shop: Workshop, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    model = shop.build(target_named(name), "text_encoder", "fp32")
    copy = dataclasses.replace(model, folder=Path(shutil.copytree(model.folder, tmp_path / "copy")))
    largest = max((copy.folder / file for file in copy.files), key=lambda file: file.stat().st_size)
    largest.write_bytes(largest.read_bytes()[: largest.stat().st_size // 2])
    with pytest.raises(DiffusetteError), isolated(copy, monkeypatch) as opened:
        opened.run(fed(opened, shop, "text_encoder"))


@pytest.mark.parametrize("name", NAMES)
def test_closing_twice_is_no_error(name: str, shop: Workshop, monkeypatch: pytest.MonkeyPatch) -> None:
    opened = isolated(shop.build(target_named(name), "text_encoder", "fp32"), monkeypatch)
    opened.close()
    opened.close()
    assert opened._process.returncode is not None  # its child is gone
