"""Recipes: TOML files that fully define a conversion. Each key is defined here and nowhere else; docs/recipes.md."""

from __future__ import annotations

import re
import tomllib
from collections.abc import Collection, Mapping
from pathlib import Path
from typing import Annotated, Any, Final, Literal

from pydantic import AfterValidator, Field, PrivateAttr
from pydantic_core import PydanticCustomError

from .artifacts import COMPONENTS, Checkpoint
from .errors import RecipeError, UsageError, refuse_unknown
from .strict import Location, Strict, parsed

DEFAULT_RECIPE: Final = "sd1-fp16"
SCHEMES: Final = ("fp16", "fp32")
"""Schemes that this release executes."""

SchedulerName = Literal["ddim", "euler", "euler_a", "pndm", "dpmpp_2m", "unipc", "lcm", "tcd"]
"""What export/schedule.py compiles; a test compares the two."""

_SHELF: Final = Path(__file__).parents[1] / "recipes"

# Module paths of every kind that Stable Diffusion's components have, and one that none has. A rule that takes all
# of them takes the component; a rule that takes some would split it.
_PROBES: Final = (
    "conv_in",
    "conv_norm_out.weight",
    "down_blocks.0.attentions.1.transformer_blocks.0.attn1.to_q.weight",
    "decoder.mid_block.resnets.0.conv1.bias",
    "encoder.layers.11.self_attn.k_proj",
    "text_model.embeddings.token_embedding",
    "time_embedding.linear_1",
    "post_quant_conv",
    "Zq-7/none such",
)


def _known_scheme(scheme: str) -> str:
    if scheme not in SCHEMES:
        raise PydanticCustomError(
            "scheme",
            "this release executes no such scheme",
            {"hint": f"schemes: {', '.join(SCHEMES)}"},
        )
    return scheme


def _whole_latents(size: tuple[int, int]) -> tuple[int, int]:
    if any(side <= 0 or side % 8 for side in size):
        hint = "height and width in pixels, e.g. [512, 512]"
        raise PydanticCustomError("size", "both sides must be positive multiples of 8", {"hint": hint})
    return size


def _regex(pattern: str) -> str:
    try:
        re.compile(pattern)
    except re.error as error:
        reason = {"reason": str(error), "hint": "escape dots and brackets with a backslash, in 'single quotes'"}
        raise PydanticCustomError("regex", "not a regular expression: {reason}", reason) from None
    return pattern


def _distinct(values: tuple[Any, ...]) -> tuple[Any, ...]:
    if len(set(values)) != len(values):
        raise PydanticCustomError("distinct", "the same value is listed twice")
    return values


Scheme = Annotated[str, AfterValidator(_known_scheme)]
Size = Annotated[tuple[int, int], AfterValidator(_whole_latents)]
Steps = Annotated[int, Field(ge=1, le=1000)]
OrtForm = Literal["onnx", "ort"]


class ModelChoice(Strict):
    """`[model]`"""

    family: str | None = None  # None: whatever the checkpoint is


class ExportChoice(Strict):
    """`[export]`"""

    size: Size | None = None  # height, width in pixels; None: the checkpoint's own


class Rule(Strict):
    """`[[quantize.rules]]`: `match` is compared with the entire `component/module.path`."""

    match: Annotated[str, AfterValidator(_regex)]
    scheme: Scheme
    why: str = ""


class QuantizeChoice(Strict):
    """`[quantize]`: a scheme for all, then rules in order, of which the last match wins."""

    precision: Scheme = "fp16"
    rules: tuple[Rule, ...] = ()


class OrtChoice(Strict):
    """`[target.ort]`"""

    forms: Annotated[tuple[OrtForm, ...], Field(min_length=1), AfterValidator(_distinct)] = ("onnx", "ort")


class TargetChoice(Strict):
    """`[target]`: `name` serves where the command line names no target."""

    name: str | None = None
    ort: OrtChoice = OrtChoice()


class Compiled(Strict):
    """One scheduler, compiled for several step counts."""

    name: SchedulerName
    steps: Annotated[tuple[Steps, ...], Field(min_length=1), AfterValidator(_distinct)]


# LCM and TCD need a checkpoint distilled for them.
_USUAL: Final[tuple[SchedulerName, ...]] = ("ddim", "euler", "euler_a", "dpmpp_2m", "unipc", "pndm")
_USUAL_STEPS: Final = (10, 20, 25, 30, 50)


class ScheduleChoice(Strict):
    """`[schedule]`: the default, and what else the bundle carries ready-made."""

    default: Literal["checkpoint", SchedulerName] = "checkpoint"
    steps: Steps = 20
    also: tuple[Compiled, ...] = tuple(Compiled(name=name, steps=_USUAL_STEPS) for name in _USUAL)


class GuidanceChoice(Strict):
    """`[guidance]`: the scale that an app starts with; 1 and below is none."""

    default: Annotated[float, Field(ge=0.0, le=100.0)] = 7.5


class ValidateChoice(Strict):
    """`[validate]`: which prompts and steps the gate uses; `auto` chooses by the model's size."""

    plan: Literal["auto"] = "auto"


class Recipe(Strict):
    """A recipe file. `name` is the file's, `text` what it says word for word."""

    schema_: Annotated[int, Field(ge=1, le=1)] = Field(alias="schema")  # no Literal[1]: true equals 1
    model: ModelChoice = ModelChoice()
    export: ExportChoice = ExportChoice()
    quantize: QuantizeChoice = QuantizeChoice()
    target: TargetChoice = TargetChoice()
    schedule: ScheduleChoice = ScheduleChoice()
    guidance: GuidanceChoice = GuidanceChoice()
    validate_: ValidateChoice = Field(default=ValidateChoice(), alias="validate")

    _name: str = PrivateAttr("")
    _text: str = PrivateAttr("")

    @property
    def name(self) -> str:
        return self._name

    def to_toml(self) -> str:
        """The file's own text, comments included; for a merged recipe, the keys in force."""
        return self._text

    def precisions(self, components: Collection[str]) -> dict[str, str]:
        """The scheme of each of `components`: the recipe's precision, or that of the last rule that matches.

        Raises:
            RecipeError: a rule matches none of them, or only part of one: this release keeps a component whole.
        """
        chosen = dict.fromkeys(components, self.quantize.precision)
        for number, rule in enumerate(self.quantize.rules, start=1):
            where = f"{self.name} [[quantize.rules]] {number}"
            matched = [component for component in components if _takes_whole(rule.match, component, where)]
            if not matched:
                raise RecipeError(
                    f"{where}: {rule.match!r} matches nothing",
                    hint=f"a rule is compared with COMPONENT/MODULE; components here: {', '.join(components)}",
                )
            chosen.update(dict.fromkeys(matched, rule.scheme))
        return chosen

    def target_options(self, name: str) -> dict[str, Any]:
        """The keys of `[target.NAME]`, as the runtime's constructor takes them."""
        section = getattr(self.target, name, None)
        return section.model_dump() if isinstance(section, Strict) else {}

    def size_for(self, checkpoint: Checkpoint) -> tuple[int, int]:
        """Height and width in pixels: the recipe's, else what the UNet was trained on."""
        if self.export.size is not None:
            return self.export.size
        latent = checkpoint.components["unet"].config.get("sample_size")
        sides = (latent, latent) if isinstance(latent, int) else tuple(latent or ())
        if len(sides) != 2:
            raise RecipeError(
                f"{self.name} [export]: 'size' is missing, and the UNet of {checkpoint.name} states no sample_size",
                hint="add size = [512, 512], or --size 512x512",
            )
        return sides[0] * checkpoint.vae_scale, sides[1] * checkpoint.vae_scale

    def check_family(self, checkpoint: Checkpoint) -> None:
        """Raise `RecipeError` when the recipe was written for another family than the checkpoint's."""
        if self.model.family not in (None, checkpoint.family):
            raise RecipeError(
                f"{self.name} [model]: family = {self.model.family!r}, but {checkpoint.name} is {checkpoint.family!r} "
                f"({checkpoint.why})",
                hint="choose another recipe with -r, or remove the key",
            )


def recipe_for(checkpoint: str | Path) -> str:
    """The shipped recipe that is used where the user names none."""
    return "demo" if str(checkpoint) == "demo" else DEFAULT_RECIPE


def shipped_recipes() -> dict[str, Path]:
    """Name -> file of each recipe that comes with diffusette, in the order of their names."""
    return {file.stem: file for file in sorted(_SHELF.glob("*.toml"), key=lambda file: file.stem)}


def load_recipe(name_or_path: str | Path) -> Recipe:
    """Read a shipped recipe by name, or any recipe by path (`.toml`, or with a folder in it).

    Raises:
        RecipeError: there is none, it is not TOML, or it says something that cannot be done.
    """
    path = Path(name_or_path)
    if path.suffix != ".toml" and len(path.parts) == 1:
        shelf = shipped_recipes()
        refuse_unknown([str(name_or_path)], list(shelf), "recipe")
        path = shelf[str(name_or_path)]
    try:
        text = path.read_bytes().decode()
    except OSError as error:
        hint = f"shipped recipes: {', '.join(shipped_recipes())}"
        raise RecipeError(f"recipe {path}: cannot be read: {error.strerror}", hint=hint) from None
    except UnicodeDecodeError as error:
        raise RecipeError(f"recipe {path}: not UTF-8 at byte {error.start}", hint="save it as UTF-8") from None
    return parse_recipe(text, path.name)


def parse_recipe(text: str, name: str) -> Recipe:
    """Read a recipe from its text; `name` stands for the file in errors."""
    try:
        data = tomllib.loads(text)
    except tomllib.TOMLDecodeError as error:
        raise RecipeError(f"{name}: not TOML: {error}", hint="see https://toml.io, or docs/recipes.md") from None
    _refuse_other_schema(data, name)
    recipe = parsed(Recipe, data, lambda table: f"{name} {_table(table)}".rstrip(), RecipeError)
    recipe._name, recipe._text = name, text
    recipe.precisions(COMPONENTS)  # a rule that can never match is refused before any checkpoint is opened
    return recipe


def merged(
    recipe: Recipe,
    *,
    precision: str | None = None,
    size: tuple[int, int] | None = None,
    target: str | None = None,
) -> Recipe:
    """`recipe` with what the command line says instead.

    `precision` is for all components, so it also drops the rules. The text of the result holds the keys in
    force: a bundle's recipe, used again, must give the same bundle.

    Raises:
        UsageError: an option has a value that no recipe could have.
    """
    import tomli_w

    data = recipe.model_dump(mode="json", exclude_none=True)
    options = []
    if precision is not None:
        data["quantize"] = {"precision": precision}
        options.append(("quantize", f"--precision {precision}"))
    if size is not None:
        data["export"]["size"] = list(size)
        options.append(("export", f"--size {size[0]}x{size[1]}"))
    if target is not None:
        data["target"]["name"] = target
        options.append(("target", f"--target {target}"))
    if not options:
        return recipe
    shown = dict(options)
    changed = parsed(Recipe, data, lambda table: shown.get(str(table[0]) if table else "", recipe.name), UsageError)
    changed._name = recipe.name
    changed._text = f"# {recipe.name} with {' '.join(shown.values())}\n" + tomli_w.dumps(data)
    return changed


def _refuse_other_schema(data: Mapping[str, Any], name: str) -> None:
    found = data.get("schema")
    if isinstance(found, int) and not isinstance(found, bool) and found > 1:
        raise RecipeError(f"{name}: schema = {found}: this version reads schema 1", hint="install a newer diffusette")


def _table(location: Location) -> str:
    """`[export]`, or `[[quantize.rules]] 2` for the second of several tables."""
    names = ".".join(step for step in location if isinstance(step, str))
    index = next((step for step in location if isinstance(step, int)), None)
    if index is not None:
        return f"[[{names}]] {index + 1}"
    return f"[{names}]" if names else ""


def _takes_whole(pattern: str, component: str, where: str) -> bool:
    """Whether `pattern` matches all modules of `component` (True) or none (False)."""
    taken = [re.fullmatch(pattern, f"{component}/{probe}") is not None for probe in _PROBES]
    if all(taken):
        return True
    if any(taken) or pattern.startswith(f"{component}/"):
        raise RecipeError(
            f"{where}: {pattern!r} addresses a part of {component}; this release keeps a component in one scheme",
            hint=f'match = "{component}/.*" with scheme {" or ".join(SCHEMES)}',
        )
    return False
