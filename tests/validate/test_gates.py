"""Gates over numpy models: what passes, what fails, and that no gate can vanish."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
from diffusette.runtimes.protocol import Array, Closing, Feeds
from diffusette.stages.artifacts import TensorSpec
from diffusette.stages.errors import ModelError, ToolCrashed, UsageError
from diffusette.validate.error_histogram import EDGES, spread_of
from diffusette.validate.gates import Drawn, check_components, check_oracle, check_pictures, kept_open
from diffusette.validate.parity import EXACT_DB
from diffusette.validate.reference.probes import Picture, ProbePlan, Probes, RoundedAnswers, oracle_plan
from diffusette.validate.reference.scenes import oracle_prompts, render
from diffusette.validate.tolerances import image_tolerance

RNG = np.random.default_rng(0)
WEIGHTS = {name: RNG.normal(size=(16, 16)).astype(np.float32) for name in ("first", "second")}
TIME = {"dim": 4, "flip_sin_to_cos": True, "freq_shift": 0.0, "max_period": 10000.0}


class Matrix(Closing):
    """x -> second(tanh(first x) / 100 + x): the first matrix is nearly hidden, as a residual branch may be."""

    inputs = (TensorSpec("x", "float32", (1, 16)),)
    outputs = (TensorSpec("y", "float32", (1, 16)),)

    def __init__(self, scale_first: float = 1.0, half: bool = False, offset: float = 0.0) -> None:
        self.first, self.second = (
            WEIGHTS[n].astype(np.float16).astype(np.float32) if half else WEIGHTS[n] for n in WEIGHTS
        )
        self.first = self.first * np.float32(scale_first)
        self.offset = offset
        self.closed = 0

    def run(self, feeds: Feeds) -> dict[str, Array]:
        x = feeds["x"]
        return {"y": (np.tanh(x @ self.first) / 100 + x) @ self.second + np.float32(self.offset)}

    def close(self) -> None:
        self.closed += 1


class Crashing(Matrix):
    def run(self, feeds: Feeds) -> dict[str, Array]:
        raise ToolCrashed("ort unet crashed with SIGSEGV")


@pytest.fixture
def probes(tmp_path: Path) -> Probes:
    """Three probes of one model under two names, and two pictures."""
    plan = ProbePlan(("one", "two"))
    for component in ("unet", "vae_decoder"):
        for index in range(3):
            x = RNG.normal(size=(1, 16)).astype(np.float32)
            arrays = {"feed.x": x, "output.y": Matrix().run({"x": x})["y"]}
            np.savez(tmp_path / f"{component}-{index:03}.npz", **arrays)
    for index in range(2):
        image = RNG.uniform(size=(16, 16, 3)).astype(np.float32)
        trajectory = np.ones((3, 1, 4, 2, 2), np.float32)
        np.savez(tmp_path / f"picture-{index:03}.npz", trajectory=trajectory, image=image)
    labels = ("early", "middle", "late")
    return Probes(tmp_path, plan, (16, 16), {"unet": labels, "vae_decoder": labels})


@pytest.fixture
def rounded(probes: Probes, tmp_path: Path) -> RoundedAnswers:
    folder = tmp_path / "rounded"
    folder.mkdir()
    for index, probe in enumerate(probes.read("unet")):
        np.savez(folder / f"{index:03}.npz", **Matrix(half=True).run(probe.feeds))
    return RoundedAnswers(folder, "unet", "fp16", 3)


def test_an_equal_model_passes_and_is_closed(probes: Probes) -> None:
    model = Matrix()
    (report,) = check_components(
        lambda _: model, probes, target="ort", precisions={"unet": "fp32"}, time_embedding=TIME
    )
    assert report.ok
    assert report.probes == 3
    assert model.closed == 1


def test_the_worst_component_comes_first_and_names_its_worst_probe(probes: Probes) -> None:
    models = {"unet": Matrix(), "vae_decoder": Matrix(offset=1.0)}
    precisions = dict.fromkeys(models, "fp32")
    first, second = check_components(
        models.__getitem__, probes, target="ort", precisions=precisions, time_embedding=TIME
    )
    assert (first.component, first.ok, second.ok) == ("vae_decoder", False, True)
    assert first.worst_probe in ("early", "middle", "late")
    assert "100 dB needed" in first.verdict


def test_one_bad_probe_of_three_fails_the_component(probes: Probes) -> None:
    class LateFailure(Matrix):
        calls = 0

        def run(self, feeds: Feeds) -> dict[str, Array]:
            self.calls += 1
            self.offset = 0.01 if self.calls == 3 else 0.0
            return super().run(feeds)

    (report,) = check_components(
        lambda _: LateFailure(), probes, target="ort", precisions={"unet": "fp32"}, time_embedding=TIME
    )
    assert not report.ok
    assert report.worst_probe == "late"


def test_rounded_weights_pass_both_gates(probes: Probes, rounded: RoundedAnswers) -> None:
    (report,) = check_components(
        lambda _: Matrix(half=True),
        probes,
        target="ort",
        precisions={"unet": "fp16"},
        time_embedding=TIME,
        rounded={"unet": rounded},
    )
    assert report.ok
    assert report.loss is not None
    assert 45 < report.loss.snr_db < 90


def test_a_scaled_tensor_that_hides_under_the_rounding_loss_is_caught(probes: Probes, rounded: RoundedAnswers) -> None:
    (report,) = check_components(
        lambda _: Matrix(half=True, scale_first=1.1),
        probes,
        target="ort",
        precisions={"unet": "fp16"},
        time_embedding=TIME,
        rounded={"unet": rounded},
    )
    assert report.loss is not None
    assert report.loss.snr_db > 45, "the loss gate alone would have passed it"
    assert not report.ok
    assert "rounding does not explain it" in report.verdict


def test_the_fidelity_gate_cannot_be_left_out(probes: Probes, rounded: RoundedAnswers) -> None:
    def gate(answers: dict[str, RoundedAnswers]) -> None:
        check_components(
            lambda _: Matrix(),
            probes,
            target="ort",
            precisions={"unet": "fp16"},
            time_embedding=TIME,
            rounded=answers,
        )

    with pytest.raises(UsageError, match="there is none"):
        gate({})
    with pytest.raises(UsageError, match="there is only w8c_afp"):
        gate({"unet": RoundedAnswers(rounded.folder, "unet", "w8c_afp", 3)})
    with pytest.raises(ValueError, match="zip"):
        gate({"unet": RoundedAnswers(rounded.folder, "unet", "fp16", 2)})


@pytest.mark.parametrize(("model", "said"), [(Crashing(), "SIGSEGV"), (Matrix(offset=np.nan), "NaN")])
def test_a_dead_or_nan_model_fails_and_the_others_are_still_measured(model: Matrix, said: str, probes: Probes) -> None:
    models = {"vae_decoder": Matrix(), "unet": model}
    precisions = dict.fromkeys(models, "fp32")
    first, second = check_components(
        models.__getitem__, probes, target="ort", precisions=precisions, time_embedding=TIME
    )
    assert first.component == "unet"
    assert not first.ok
    assert said in first.verdict
    assert second.ok


def test_a_component_without_probes_is_an_error(probes: Probes) -> None:
    with pytest.raises(ModelError, match="no probes for text_encoder"):
        check_components(
            lambda _: Matrix(), probes, target="ort", precisions={"text_encoder": "fp32"}, time_embedding=TIME
        )


def test_pictures_are_compared_before_rounding(probes: Probes) -> None:
    def draw(picture: Picture, plan: ProbePlan) -> Drawn:
        assert picture.seed == plan.seed + plan.prompts.index(picture.prompt)
        return Drawn(picture.trajectory, picture.image + np.float32(1e-4 if picture.prompt == "one" else 1e-3))

    report = check_pictures(draw, probes, limit=image_tolerance("ort", "fp16"))
    assert report.psnr_db == pytest.approx(60, abs=0.05)  # 8 bits would have hidden a difference of 1e-3 below 51 dB
    assert report.ok
    assert not check_pictures(draw, probes, limit=image_tolerance("ort", "fp32")).ok
    assert report.pictures[0].ssim > 0.999


def test_drift_is_told_step_by_step_and_each_picture_to_whoever_shows_it(probes: Probes) -> None:
    def draw(picture: Picture, plan: ProbePlan) -> Drawn:
        scale = 0.001 if picture.prompt == "one" else 0.01
        return Drawn([x * np.float32(1 + scale * step) for step, x in enumerate(picture.trajectory)], picture.image)

    kept: list[tuple[str, Drawn]] = []
    report = check_pictures(
        draw,
        probes,
        limit=image_tolerance("ort", "fp16"),
        keep=lambda picture, drawn: kept.append((picture.prompt, drawn)),
    )
    assert report.pictures[0].drift_db == pytest.approx((EXACT_DB, 60.0, 54.0), abs=0.1)
    assert report.drift_db == report.pictures[1].drift_db == pytest.approx((EXACT_DB, 40.0, 34.0), abs=0.1)
    assert [prompt for prompt, _ in kept] == ["one", "two"]


def test_a_trajectory_of_another_length_fails(probes: Probes) -> None:
    report = check_pictures(
        lambda picture, _: Drawn(picture.trajectory[:2], picture.image), probes, limit=image_tolerance("ort", "fp16")
    )
    assert report.verdict == "'one' took 2 steps instead of 3"


def test_the_histogram_tells_a_haze_from_a_wrong_pixel() -> None:
    reference = np.full((10, 10, 3), 0.5, np.float32)
    haze = spread_of(reference, reference + np.float32(0.02 / 255))
    assert haze.counts[EDGES.index(0.01)] == 300
    pixel = reference.copy()
    pixel[3, 4] = 1.0
    spot = spread_of(reference, pixel)
    assert (spot.counts[0], spot.counts[EDGES.index(100.0)], spot.changed) == (297, 3, 0.01)
    opposite = spread_of(np.zeros((2, 2, 3), np.float32), np.ones((2, 2, 3), np.float32))
    assert (opposite.counts[-1], opposite.changed) == (12, 1.0)


def test_a_black_picture_fails(probes: Probes) -> None:
    report = check_pictures(
        lambda picture, _: Drawn(picture.trajectory, np.zeros_like(picture.image)),
        probes,
        limit=image_tolerance("ort", "fp16"),
    )
    assert not report.ok
    assert report.psnr_db < 10


def test_a_crash_while_drawing_is_reported(probes: Probes) -> None:
    def draw(picture: Picture, plan: ProbePlan) -> Drawn:
        raise ToolCrashed("mnn unet crashed")

    report = check_pictures(draw, probes, limit=image_tolerance("mnn", "fp32"))
    assert not report.ok
    assert report.verdict == "mnn unet crashed"


def test_borrowed_sessions_load_once_and_close_at_the_end() -> None:
    loaded: list[Matrix] = []

    def load(component: str) -> Matrix:
        loaded.append(Matrix())
        return loaded[-1]

    with kept_open(load) as open_component:
        for _ in range(3):
            with open_component("unet") as session:
                session.run({"x": np.zeros((1, 16), np.float32)})
        assert [model.closed for model in loaded] == [0]
    assert [model.closed for model in loaded] == [1]


def test_the_oracle_compares_scores_on_equal_captions(tmp_path: Path) -> None:
    scenes = oracle_prompts(4, seed=0)
    for index, scene in enumerate(scenes):
        image = (render(scene, index) / 255).astype(np.float32)
        np.savez(tmp_path / f"picture-{index:03}.npz", trajectory=np.zeros((1, 1)), image=image)
    probes = Probes(tmp_path, oracle_plan(scenes), (64, 64), {})
    same = check_oracle(lambda picture, _: Drawn(picture.trajectory, picture.image), probes, scenes, "fp16")
    assert same.ok
    assert same.score == same.reference_score == 100.0
    black = check_oracle(lambda picture, _: Drawn(picture.trajectory, picture.image * 0), probes, scenes, "fp16")
    assert not black.ok
    assert black.score == 0.0
    with pytest.raises(UsageError, match="captions"):
        check_oracle(lambda picture, _: Drawn(picture.trajectory, picture.image), probes, scenes[:3], "fp16")
