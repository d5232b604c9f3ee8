"""Golden vectors: a replay that is the same passes, and each mistake of a port is named by the part it is in."""

from __future__ import annotations

import json
import tarfile
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import IO, Any, cast

import numpy as np
import pytest
from diffusette.checkpoints.checkpoint import DEMO_FOLDER
from diffusette.runtimes.arithmetic import PROVEN
from diffusette.runtimes.registry import TARGETS, get_target
from diffusette.runtimes.txt2img.canvas import Canvas
from diffusette.runtimes.txt2img.generate import TextToImage, draw
from diffusette.runtimes.txt2img.tokenizer import PromptTokenizer
from diffusette.stages.errors import BundleError
from diffusette.validate.goldens.checks import Check, check_models, check_port, check_texts
from diffusette.validate.goldens.file import Goldens, read_goldens
from diffusette.validate.goldens.limits import GOLDEN_LIMITS, limits_of, loosest, new_limits
from diffusette.validate.goldens.models import Recorder
from diffusette.validate.goldens.replay import Replay, encode
from diffusette.validate.goldens.sample import MOST_VALUES, Sample, snr_db
from diffusette.validate.goldens.write import MOST_CALL_VALUES, write_goldens

from .golden_toys import LARGE_MISTAKES, MISTAKES, RICH_MISTAKES, Port, a_canvas, toy, toys

KEPT = Path(__file__).parents[1] / "bundle" / "kept" / "schema-1.tgz"
NOISY = 48.0  # dB that float16 arithmetic leaves of one answer of the demo's models
FLOAT32 = GOLDEN_LIMITS["float32", False].limits
FLOAT16 = GOLDEN_LIMITS["float16", False].limits


def golden(models: TextToImage, canvas: Canvas | None = None) -> Goldens:
    """As `validate.goldens.of_bundle.DrawGoldens` writes them, and read again."""
    recorder = Recorder(models.open)
    pictures = {"canvas": replace(canvas, strength=1.0)} if canvas and canvas.mask is not None else {}
    drawing = draw(replace(models, open=recorder.open), "a red star", seed=7, keep_trajectory=True, **pictures)
    timesteps = [row.timestep for row in models.schedules[0].rows]
    limits = new_limits({"float32": FLOAT32, "fp16": FLOAT16})
    encoding = encode(models, canvas, "a red star", 7) if canvas else None
    tokenizers = (models.tokenizer, models.tokenizer_2)
    made = write_goldens(tokenizers, drawing, recorder.runs, timesteps, "toy 1.0", limits, encoding)
    return read_goldens(made.to_json().encode(), "goldens.json")


def replayed(
    goldens: Goldens, models: TextToImage, canvas: Canvas | None = None, limits: Any = FLOAT32, *, large: bool = False
) -> list[Check]:
    pictures = {"canvas": replace(canvas, strength=1.0)} if canvas and canvas.mask is not None else {}
    replay = Replay(models, goldens, canvas, pictures)
    channels = models.input_channels
    return [
        *check_texts(goldens, (models.tokenizer, models.tokenizer_2)),
        *check_port(goldens, replay.with_golden_answers(lambda name: toy(name, channels=channels, large=large))),
        *check_models(goldens, replay.with_models(), limits),
    ]


def first_bad(checks: list[Check]) -> str | None:
    return next((check.what for check in checks if not check.ok), None)


@pytest.fixture
def goldens() -> Goldens:
    return golden(toys(), a_canvas())


def test_an_equal_replay_is_found_equal(goldens: Goldens) -> None:
    checks = replayed(goldens, toys(), a_canvas())
    assert first_bad(checks) is None
    assert {check.found for check in checks} == {0, np.inf}
    port = ["sample", "timestep_embedding", "latents", "latent_sample", "pixels", "bytes"]
    assert [check.what for check in checks if check.golden_answers] == ["start at strength 0.5", *port]
    assert "last bit" in checks[-1].note
    assert checks[0].to_json()["golden_answers"] is False


@pytest.mark.parametrize("rich", [False, True])
@pytest.mark.parametrize("masked", [False, True])
@pytest.mark.parametrize("large", [False, True])
def test_a_right_port_passes_whatever_its_models_compute_in(rich: bool, masked: bool, large: bool) -> None:
    channels, canvas = (9, a_canvas(masked=True)) if masked else (4, None if rich else a_canvas())
    made = golden(toys(rich=rich, channels=channels, large=large), canvas)
    noisy = replayed(made, toys(NOISY, rich=rich, channels=channels, large=large), canvas, FLOAT16, large=large)
    assert first_bad(noisy) is None
    assert all(check.found in (0, np.inf) for check in noisy if check.golden_answers)
    strict = replayed(made, toys(NOISY, rich=rich, channels=channels, large=large), canvas, large=large)
    assert not all(check.ok for check in strict)
    if masked:
        assert {"mask", "masked_latents"} <= {check.what for check in strict if check.golden_answers}


@pytest.mark.parametrize("snr_db", [400.0, NOISY], ids=["float32", "float16"])
@pytest.mark.parametrize("mistake", MISTAKES)
def test_a_ports_mistake_is_named_in_any_arithmetic(
    mistake: str, snr_db: float, goldens: Goldens, monkeypatch: pytest.MonkeyPatch
) -> None:
    port, where = MISTAKES[mistake]
    assert found_at(port, goldens, toys(snr_db), monkeypatch, a_canvas()) == where


@pytest.mark.parametrize("mistake", RICH_MISTAKES)
def test_mistakes_in_richer_solvers_are_named(mistake: str, monkeypatch: pytest.MonkeyPatch) -> None:
    port, where = RICH_MISTAKES[mistake]
    assert found_at(port, golden(toys(rich=True)), toys(NOISY, rich=True), monkeypatch) == where


@pytest.mark.parametrize("mistake", LARGE_MISTAKES)
def test_mistakes_in_what_a_large_model_is_told_are_named(mistake: str, monkeypatch: pytest.MonkeyPatch) -> None:
    port, where = LARGE_MISTAKES[mistake]
    made = golden(toys(large=True))
    assert found_at(port, made, toys(NOISY, large=True), monkeypatch, large=True) == where


def found_at(
    port: Port,
    goldens: Goldens,
    models: TextToImage,
    monkeypatch: pytest.MonkeyPatch,
    canvas: Canvas | None = None,
    *,
    large: bool = False,
) -> str | None:
    """Where the first failure is, which has to be in what no model has a part in."""
    checks = replayed(goldens, port(models, monkeypatch), canvas, FLOAT16, large=large)
    failed = next(check for check in checks if not check.ok)
    assert failed.golden_answers or failed.what == "token ids"
    return failed.what


def test_the_first_step_that_goes_wrong_is_named(goldens: Goldens, monkeypatch: pytest.MonkeyPatch) -> None:
    port, _ = MISTAKES["a coefficient of one row 0.1 % off"]
    checks = replayed(goldens, port(toys(), monkeypatch), a_canvas())
    failed = next(check for check in checks if not check.ok)
    assert (failed.what, failed.note) == ("latents", "first at step 4 (t = 301)")


@pytest.mark.parametrize(
    ("component", "named"),
    [
        ("vae_encoder", "picture encoded"),
        ("text_encoder", "encoder_hidden_states, negative prompt"),
        ("unet", "latents after step 1 (t = 901)"),
        ("vae_decoder", "picture"),
    ],
)
def test_a_model_that_drifts_is_named_and_no_part_of_the_port(goldens: Goldens, component: str, named: str) -> None:
    drifted = replace(toys(), open=lambda name: toy(name, 40.0 if name == component else 400.0))
    checks = replayed(goldens, drifted, a_canvas())
    assert first_bad(checks) == named
    assert all(check.ok for check in checks if check.golden_answers)


def test_a_port_with_another_number_of_steps_is_told_so(goldens: Goldens) -> None:
    models = toys()
    schedule = models.schedules[0]
    short = replace(models, schedules=(replace(schedule, rows=(*schedule.rows, schedule.rows[-1])),))
    assert first_bad(replayed(goldens, short)) == "steps"


def test_another_processors_last_bits_pass(goldens: Goldens) -> None:
    near = replace(toys(), open=lambda name: toy(name, 80.0 if name == "vae_decoder" else 110.0))
    checks = replayed(goldens, near, a_canvas())
    assert first_bad(checks) is None
    assert "not bit for bit" in checks[-1].note


def test_a_sample_is_small_and_tells_the_whole_tensors_moments() -> None:
    tensor = np.arange(1000, dtype=np.float32).reshape(10, 100)
    sample = Sample.of(tensor)
    assert (sample.shape, sample.stride, len(sample.values)) == ((10, 100), 4, 250)
    assert sample.values[:3] == (0.0, 4.0, 8.0)
    assert sample.mean == pytest.approx(499.5)
    assert len(Sample.of(np.zeros(257)).values) <= MOST_VALUES
    tenth = Sample.of(np.array([0.1], np.float32)).values[0]
    assert (tenth, np.float32(tenth)) == (0.1, np.float32(0.1)), "short decimals that are the same float32"
    scattered = sample.scattered()
    assert snr_db(sample, scattered) == np.inf
    assert (scattered[0, :5].tolist(), scattered.shape) == ([0, 0, 0, 0, 4], (10, 100))
    picture = np.arange(64 * 64 * 3).reshape(64, 64, 3)
    assert {int(value) % 3 for value in Sample.of(picture).values} == {0, 1, 2}, "all three colours are seen"
    thin = Sample.of(tensor, thinned=4)
    assert (thin.stride, thin.is_whole, thin.values[1]) == (16, True, 16.0)


def test_many_steps_take_fewer_values_each() -> None:
    models = toys()
    schedule = models.schedules[0]
    many = replace(models, schedules=(replace(schedule, rows=schedule.rows * 20),))
    made = golden(many)
    assert first_bad(replayed(made, many)) is None
    assert len(made.picture.calls[0].outputs[0].values) <= MOST_CALL_VALUES // 120
    assert len(made.to_json()) < 2**20


def cut_values(data: Any) -> None:
    data["picture"]["noise"]["values"].pop()


def misspell(data: Any) -> None:
    data["picture"]["callz"] = data["picture"].pop("calls")


def newer(data: Any) -> None:
    data["schema"] = 3


def without_answers(data: Any) -> None:
    data["picture"]["calls"][1]["outputs"].pop()


def elsewhere(data: Any) -> None:
    output = data["picture"]["calls"][1]["outputs"][0]
    output.update(stride=output["stride"] * 2, values=output["values"][::2])


def undecoded(data: Any) -> None:
    data["picture"]["image"]["decoded"] = None


def fewer_bytes(data: Any) -> None:
    data["picture"]["image"]["bytes"].pop()


@pytest.mark.parametrize(
    ("damage", "said"),
    [
        (cut_values, "no sample of"),
        (misspell, "callz"),
        (newer, "schema"),
        (without_answers, "call 2: 1 outputs for 2 conditions"),
        (elsewhere, "call 2: outputs and latents are sampled in different places"),
        (undecoded, "schema 2 without"),
        (fewer_bytes, "bytes beside"),
    ],
)
def test_damaged_goldens_are_refused(goldens: Goldens, damage: Callable[[Any], None], said: str) -> None:
    data = json.loads(goldens.to_json())
    damage(data)
    with pytest.raises(BundleError, match=said):
        read_goldens(json.dumps(data).encode(), "goldens.json")
    with pytest.raises(BundleError, match="no goldens"):
        read_goldens(b"{", "goldens.json")


def test_goldens_of_another_size_are_refused(goldens: Goldens) -> None:
    with pytest.raises(BundleError, match="the bundle draws"):
        snr_db(goldens.picture.image.sample, np.zeros((8, 8, 3), np.float32))


def test_the_second_encoders_ids_are_held_too() -> None:
    models = toys(large=True)
    padded = PromptTokenizer(DEMO_FOLDER / "tokenizer", 77, 0)
    made = golden(replace(models, tokenizer_2=padded))
    assert next(check_texts(made, (models.tokenizer, padded))).ok
    assert not next(check_texts(made, (models.tokenizer, models.tokenizer))).ok
    wrong = next(check_texts(made, (models.tokenizer, None)))
    assert (wrong.what, wrong.ok, wrong.found) == ("token ids", False, 10)


def test_goldens_of_schema_1_are_read_with_the_limits_they_were_written_with() -> None:
    with tarfile.open(KEPT) as packed:
        name = next(name for name in packed.getnames() if name.endswith("goldens/goldens.json"))
        text = cast("IO[bytes]", packed.extractfile(name)).read()
    old = read_goldens(text, "goldens.json")
    assert (old.schema_, old.limits.noise_max_abs) == (1, 1e-5)
    own = old.limits.arithmetics[PROVEN]
    assert (own.snr_db, own.image_max_levels) == (90.0, 0.1)
    assert not old.picture.conditions
    with pytest.raises(BundleError, match="limits"):
        read_goldens(text.replace(b'"latents_snr_db"', b'"latents_db"'), "goldens.json")


@pytest.mark.parametrize("target", TARGETS)
@pytest.mark.parametrize("precision", ["fp16", "w8c_a8", "w8c_afp+w4g64_afp"])
def test_every_arithmetic_of_every_target_has_limits(target: str, precision: str) -> None:
    arithmetics = get_target(target).arithmetics
    limits = limits_of(arithmetics, [precision])
    assert list(limits) == [each.name for each in arithmetics]
    strict = limits["float32"]
    for each in limits.values():
        assert each.snr_db <= strict.snr_db
        assert each.image_max_levels >= strict.image_max_levels
    assert loosest(limits.values()).snr_db == min(each.snr_db for each in limits.values())
    assert (strict.snr_db == FLOAT32.snr_db) == (precision != "w8c_a8")
