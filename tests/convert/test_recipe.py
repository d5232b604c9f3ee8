"""A recipe says what it means, or is refused in the words of its own file."""

from __future__ import annotations

import tomllib
from collections.abc import Mapping
from pathlib import Path

import pytest
from diffusette.checkpoints.checkpoint import open_checkpoint
from diffusette.convert.recipe import Recipe, load_recipe, merged, parameters_of, parse_recipe, shipped_recipes
from diffusette.convert.recipe_tables import Compiled
from diffusette.quantize.plan import Plan
from diffusette.runtimes.registry import get_target
from diffusette.stages.artifacts import ROLES, Checkpoint, ComponentSource
from diffusette.stages.errors import RecipeError, UnsupportedPrecision, UsageError
from diffusette.validate.reference.calibrate import refuse_activations

from ..bundle.tiny_bundle import A_VARIANT

PARAMETERS: Mapping[str, Mapping[str, tuple[int, ...]]] = {
    component: {"conv_in.weight": (8, 4, 3, 3), "conv_in.bias": (8,), "mid.weight": (64, 64), "norm.weight": (64,)}
    for component in ROLES
}


def labels(of: Recipe) -> dict[str, str]:
    return {component: plan.label for component, plan in of.plans(PARAMETERS).items()}


def recipe(body: str = "") -> Recipe:
    return parse_recipe(f"schema = 1\n{body}", "my.toml")


def checkpoint(sample_size: object, family: str = "sd1") -> Checkpoint:
    def part(name: str, **config: object) -> ComponentSource:
        return ComponentSource(name, family, config, (), "", 0, "float32")

    parts = {
        "unet": part("unet", sample_size=sample_size),
        "vae_decoder": part("vae_decoder", block_out_channels=[1, 2, 3, 4]),
    }
    return Checkpoint("tiny", Path("tiny"), family, "a test says so", parts, {}, Path("tiny"), {}, "", A_VARIANT)


@pytest.mark.parametrize("name", shipped_recipes())
def test_shipped_recipes_are_valid_explained_and_kept_word_for_word(name: str) -> None:
    shipped = load_recipe(name)
    text = shipped_recipes()[name].read_text()
    assert shipped.name == f"{name}.toml"
    assert shipped.to_toml() == text
    assert text.startswith("# ")
    assert set(shipped.plans(parameters_of(open_checkpoint("demo", survey=False)))) == set(ROLES) - {
        "controlnet",
        "text_encoder_2",
    }


def test_the_shelf_is_sorted_and_holds_the_default() -> None:
    names = list(shipped_recipes())
    assert names == sorted(names)
    assert {"sd1-fp16", "sd1-fp16-vae32", "sd1-fp32"} <= set(names)
    assert load_recipe("sd1-fp16").quantize.precision == "fp16"


def test_vae32_keeps_only_the_decoder_in_float32() -> None:
    found = labels(load_recipe("sd1-fp16-vae32"))
    assert found == {**dict.fromkeys(ROLES, "fp16"), "vae_decoder": "fp32"}


def test_an_empty_recipe_has_sensible_defaults() -> None:
    empty = recipe()
    assert empty.quantize.precision == "fp16"
    assert empty.target.ort.forms == ("onnx", "ort")
    assert (empty.schedule.default, empty.schedule.steps) == ("checkpoint", None)  # None: the checkpoint's
    assert empty.schedule.also[0] == Compiled(name="ddim", steps=(10, 20, 25, 30, 50))
    assert [also.name for also in empty.schedule.also] == ["ddim", "euler", "euler_a", "dpmpp_2m", "unipc", "pndm"]
    assert (empty.guidance.default, empty.guidance.mode) == (None, "auto")
    assert empty.validate_.plan == "auto"
    assert (empty.export.size, empty.model.family, empty.target.name) == (None, None, None)
    assert empty.target_options("ort") == {"forms": ("onnx", "ort")}
    assert empty.target_options("ncnn") == empty.target_options("name") == {}


def test_scheduler_names_are_those_that_can_be_compiled() -> None:
    from diffusette.export.scheduler import SCHEDULERS

    for name in SCHEDULERS:
        assert recipe(f'[schedule]\ndefault = "{name}"').schedule.default == name
    with pytest.raises(RecipeError) as caught:
        recipe('[schedule]\ndefault = "nonesuch"')
    assert all(repr(name) in caught.value.what for name in [*SCHEDULERS, "checkpoint"])
    assert caught.value.what.count("'") == 2 * (len(SCHEDULERS) + 1)


@pytest.mark.parametrize(
    ("body", "what", "hint"),
    [
        ("[export]\nsiez = [64, 64]", "my.toml [export]: unknown 'siez'", "did you mean 'size'?"),
        ("[export]\nopset = 18", "my.toml [export]: unknown 'opset'", "known: size"),
        ("[exprot]\nsize = [64, 64]", "my.toml: unknown 'exprot'", "did you mean 'export'?"),
        ("[export]\nsize = [512, 500]", "size = [512, 500]: both sides must be positive multiples of 8", "[512, 512]"),
        ("[export]\nsize = [0, 8]", "my.toml [export]: size = [0, 8]: both sides", ""),
        ('[export]\nsize = "512x512"', 'my.toml [export]: size = "512x512": should be a valid array', ""),
        ("[export]\nsize = [512]", "my.toml [export]: 'size[1]' is missing", ""),
        ('[quantize]\nprecision = "w8"', 'my.toml [quantize]: precision = "w8": not a scheme', "such as w8c_afp"),
        ('[quantize]\nprecision = "keep"', "a precision is what all components are stored at", "keep is for rules"),
        ("[[quantize.rules]]\nmatch = 'unet/.*'", "my.toml [[quantize.rules]] 1: 'scheme' is missing", ""),
        (
            "[[quantize.rules]]\nmatch = '.*'\nscheme = 'fp32'\n[[quantize.rules]]\nmatch = '.*'\nshceme = 'fp32'",
            "my.toml [[quantize.rules]] 2: unknown 'shceme'",
            "did you mean 'scheme'?",
        ),
        ("[[quantize.rules]]\nmatch = 'unet/(.*'\nscheme = 'fp32'", "not a regular expression: missing )", "escape"),
        ("[target.ort]\nforms = ['onxn']", '[target.ort]: forms[0] = "onxn"', "did you mean 'onnx'?"),
        ("[target.ort]\nforms = []", "my.toml [target.ort]: forms = []", ""),
        ("[target.ort]\nforms = ['ort', 'ort']", "the same value is listed twice", ""),
        ("[schedule]\nsteps = 0", "my.toml [schedule]: steps = 0", ""),
        ("[schedule]\nsteps = true", "my.toml [schedule]: steps = true", ""),
        ("[schedule]\nsteps = 20.5", "my.toml [schedule]: steps = 20.5", ""),
        ('[schedule]\ndefault = "eular"', 'my.toml [schedule]: default = "eular"', "did you mean 'euler'?"),
        ('[schedule]\nalso = [{name = "ddim", steps = [0]}]', "my.toml [[schedule.also]] 1: steps[0] = 0", ""),
        ("[guidance]\ndefault = -1", "my.toml [guidance]: default = -1", ""),
        ("[guidance]\ndefault = nan", "my.toml: Out of range float", ""),
        ("[guidance]\ndefault = 2026-11-22", "my.toml: Object of type date", ""),
        ('[validate]\nplan = "none"', 'my.toml [validate]: plan = "none"', ""),
        ("[validate]\nplan = ", "my.toml: not TOML", "toml.io"),
        ("export = 3", "my.toml: export = 3", ""),
    ],
)
def test_what_cannot_be_done_is_refused_where_it_stands(body: str, what: str, hint: str) -> None:
    with pytest.raises(RecipeError) as caught:
        recipe(body)
    assert what in caught.value.what
    assert hint in caught.value.hint
    assert caught.value.exit_code == 2


@pytest.mark.parametrize(
    ("text", "what"),
    [
        ("", "my.toml: 'schema' is missing"),
        ("schema = 2\nnew = 1", "my.toml: schema = 2: this version reads schema 1"),
        ("schema = true", "my.toml: schema = true"),
        ('schema = "1"', 'my.toml: schema = "1"'),
    ],
)
def test_another_schema_is_refused_before_its_keys(text: str, what: str) -> None:
    with pytest.raises(RecipeError) as caught:
        parse_recipe(text, "my.toml")
    assert what in caught.value.what


def test_size_comes_from_the_recipe_else_from_the_unet() -> None:
    assert recipe("[export]\nsize = [256, 512]").size_for(checkpoint(8)) == (256, 512)
    assert recipe().size_for(checkpoint(8)) == (64, 64)
    assert recipe().size_for(checkpoint([8, 16])) == (64, 128)
    with pytest.raises(RecipeError, match=r"'size' is missing, and the UNet of tiny states no sample_size"):
        recipe().size_for(checkpoint(None))


def test_a_recipe_for_another_family_is_refused() -> None:
    recipe("[model]\nfamily = 'sd1'").check_family(checkpoint(8))
    recipe().check_family(checkpoint(8, family="sd2"))
    with pytest.raises(RecipeError, match=r"my.toml \[model\]: family = 'sd1', but tiny is 'sd2' \(a test says so\)"):
        recipe("[model]\nfamily = 'sd1'").check_family(checkpoint(8, family="sd2"))


def test_a_recipe_is_found_by_name_or_by_path(tmp_path: Path) -> None:
    (tmp_path / "mine.toml").write_text("schema = 1")
    assert load_recipe(tmp_path / "mine.toml").name == "mine.toml"
    assert load_recipe(str(shipped_recipes()["sd1-fp32"])) == load_recipe("sd1-fp32")
    with pytest.raises(RecipeError, match="recipe: unknown 'sd1-fp61'") as caught:
        load_recipe("sd1-fp61")
    assert caught.value.hint == "did you mean 'sd1-fp16'?"
    with pytest.raises(RecipeError, match=r"nowhere.toml: cannot be read: No such file"):
        load_recipe(tmp_path / "nowhere.toml")
    with pytest.raises(RecipeError, match="cannot be read: Is a directory"):
        load_recipe(f"{tmp_path}/")
    (tmp_path / "latin.toml").write_bytes("# für\nschema = 1".encode("latin-1"))
    with pytest.raises(RecipeError, match="not UTF-8 at byte 3"):
        load_recipe(tmp_path / "latin.toml")


def test_the_command_line_overrules_and_the_text_says_so_and_reproduces_it() -> None:
    changed = merged(load_recipe("sd1-fp16-vae32"), precision="fp32", size=(64, 128), target="ncnn")
    assert labels(changed) == dict.fromkeys(ROLES, "fp32")
    assert changed.export.size == (64, 128)
    assert changed.target.name == "ncnn"
    first, *_ = changed.to_toml().splitlines()
    assert first == "# sd1-fp16-vae32.toml with --precision fp32 --size 64x128 --target ncnn"
    again = parse_recipe(changed.to_toml(), changed.name)
    assert again == changed
    assert tomllib.loads(changed.to_toml())["quantize"] == {"precision": "fp32", "rounding": "nearest"}


def test_nothing_on_the_command_line_changes_nothing() -> None:
    plain = load_recipe("sd1-fp16")
    assert merged(plain) is plain
    kept = merged(load_recipe("sd1-fp16-vae32"), size=(64, 64))
    assert labels(kept)["vae_decoder"] == "fp32"


def test_a_wrong_option_is_blamed_on_the_option() -> None:
    with pytest.raises(UsageError, match=r"^--precision w4: precision") as caught:
        merged(load_recipe("sd1-fp16"), precision="w4")
    assert "w8c_afp" in caught.value.hint
    with pytest.raises(UsageError, match=r"^--size 512x500: size = \[512, 500\]: both sides"):
        merged(load_recipe("sd1-fp16"), size=(512, 500))


def test_a_file_of_prompts_becomes_part_of_the_recipe(tmp_path: Path) -> None:
    file = tmp_path / "mine.toml"
    file.write_text('schema = 1\n[calibrate]\nprompts_file = "prompts.txt"\nranges = "mse"\n')
    with pytest.raises(
        RecipeError, match=r"mine.toml \[calibrate\]: prompts_file 'prompts.txt' cannot be read"
    ) as caught:
        load_recipe(file)
    assert str(tmp_path / "prompts.txt") in caught.value.hint
    (tmp_path / "prompts.txt").write_text("\n  \n")
    with pytest.raises(RecipeError, match="has no prompts"):
        load_recipe(file)
    (tmp_path / "prompts.txt").write_text("a red star\n\n a blue disc \n")
    found = load_recipe(file)
    assert found.calibrate.prompts == ("a red star", "a blue disc")
    assert parse_recipe(found.to_toml(), "bundle").calibrate == found.calibrate
    assert found.calibrate.ranges == "mse"
    file.write_text('schema = 1\n[calibrate]\nprompts = "prompts.txt"\n')
    with pytest.raises(RecipeError, match="should be a list of prompts") as caught:
        load_recipe(str(file))
    assert 'prompts_file = "prompts.txt"' in caught.value.hint
    for empty in ("[]", '["a", " "]'):
        with pytest.raises(RecipeError, match="should be prompts, none of them empty"):
            parse_recipe(f"schema = 1\n[calibrate]\nprompts = {empty}\n", "mine.toml")
    file.write_text('schema = 1\n[calibrate]\nprompts_file = "prompts.txt"\nprompts = ["a"]\n')
    with pytest.raises(RecipeError, match="both prompts and prompts_file"):
        load_recipe(file)


def test_how_activations_are_rounded_outlives_a_precision_of_the_command_line() -> None:
    asked = recipe('[quantize]\nactivations = "static"\n')
    assert merged(asked, precision="w8c_a8").quantize.activations == "static"


def test_a_precision_drops_rules_and_keeps_how_codes_are_rounded() -> None:
    asked = recipe(
        "[quantize]\nprecision = 'fp16'\nrounding = 'gptq'\n[[quantize.rules]]\nmatch = '.*'\nscheme = 'fp32'"
    )
    changed = merged(asked, precision="w4g64_afp").quantize
    assert (changed.precision, changed.rounding, changed.rules) == ("w4g64_afp", "gptq", ())


def test_a_rounding_of_activations_that_the_target_lacks_is_refused_with_those_that_it_has() -> None:
    asked = recipe('[quantize]\nprecision = "w8c_a8"\nactivations = "static"\n')
    plans = asked.plans(PARAMETERS)
    refuse_activations(get_target("ort"), asked.rounding, plans)
    with pytest.raises(UnsupportedPrecision, match="'mnn' has no static rounding of activations") as caught:
        refuse_activations(get_target("mnn"), asked.rounding, plans)
    assert "dynamic" in caught.value.hint
    assert "static runs on --target ort" in caught.value.hint
    refuse_activations(get_target("mnn"), asked.rounding, {"unet": Plan("w8c_afp")})
