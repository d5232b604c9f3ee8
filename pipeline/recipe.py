"""Recipes: TOML files that fully define a conversion. Each key is defined here and nowhere else; docs/recipes.md."""

from __future__ import annotations

import json
import tomllib
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Final, Literal

from pydantic import AfterValidator, BeforeValidator, Field, PrivateAttr
from pydantic_core import PydanticCustomError

from .artifacts import Checkpoint
from .errors import RecipeError, UsageError, refuse_unknown
from .plain_file import read_plain
from .rules import Rule, plans_by_rules, refuse_idle_branch, scheme_name
from .strict import Location, Strict, parsed

if TYPE_CHECKING:
    from ..quantize.plan import Plan, Shapes

AUTO: Final = "auto"  # as a precision: the smallest that passes its gates and is not slower than fp32 here
MAX_BYTES: Final = 2**20
"""Of a recipe; one has a few kilobytes."""

SchedulerName = Literal["ddim", "euler", "euler_a", "pndm", "dpmpp_2m", "unipc", "lcm", "tcd"]
"""What export/scheduler.py names; a test compares the two."""

_SHELF: Final = Path(__file__).parents[1] / "recipes"


def _precision(name: str) -> str:
    from ..quantize.scheme import KEEP

    if name == AUTO:
        return name
    if name == KEEP:
        hint = {"hint": "fp32 for all; keep is for rules"}
        raise PydanticCustomError("scheme", "a precision is what all components are stored at", hint)
    return scheme_name(name)


def _whole_latents(size: tuple[int, int]) -> tuple[int, int]:
    if any(side <= 0 or side % 8 for side in size):
        hint = "height and width in pixels, e.g. [512, 512]"
        raise PydanticCustomError("size", "both sides must be positive multiples of 8", {"hint": hint})
    return size


def _falling(values: tuple[int, ...]) -> tuple[int, ...]:
    if list(values) != sorted(set(values), reverse=True):
        raise PydanticCustomError("falling", "timesteps must fall, from noise to picture")
    return values


def _a_list(value: Any) -> Any:
    if isinstance(value, str):
        hint = {"hint": f"prompts is a list; for a file with a prompt a line: prompts_file = {json.dumps(value)}"}
        raise PydanticCustomError("prompts", "should be a list of prompts", hint)
    return tuple(value) if isinstance(value, list) else value


def _prompts(values: tuple[str, ...] | None) -> tuple[str, ...] | None:
    if values is not None and not all(value.strip() for value in values or ("",)):
        hint = {"hint": "name a few sentences of the checkpoint's own world, or leave the key out for bundled ones"}
        raise PydanticCustomError("prompts", "should be prompts, none of them empty", hint)
    return values


def _distinct(values: tuple[Any, ...]) -> tuple[Any, ...]:
    if len(set(values)) != len(values):
        raise PydanticCustomError("distinct", "the same value is listed twice")
    return values


Precision = Annotated[str, AfterValidator(_precision)]
Size = Annotated[tuple[int, int], AfterValidator(_whole_latents)]
Steps = Annotated[int, Field(ge=1, le=1000)]
Timestep = Annotated[int, Field(ge=0, lt=1000)]
OrtForm = Literal["onnx", "ort"]


class ModelChoice(Strict):
    """`[model]`"""

    family: str | None = None  # None: whatever the checkpoint is


class ExportChoice(Strict):
    """`[export]`"""

    size: Size | None = None  # height, width in pixels; None: the checkpoint's own


class QuantizeChoice(Strict):
    """`[quantize]`: a scheme for all, then rules in order, of which the last match wins; and how to round."""

    precision: Precision = "fp16"
    rounding: Literal["nearest", "gptq"] = "nearest"  # to integer codes
    activations: Literal["static", "dynamic"] | None = None  # to 8 bits; None: as the target does best
    rules: tuple[Rule, ...] = ()


class CalibrateChoice(Strict):
    """`[calibrate]`: what methods that look at activations run the model on."""

    prompts: Annotated[tuple[str, ...] | None, BeforeValidator(_a_list), AfterValidator(_prompts)] = None  # bundled
    prompts_file: Annotated[str, Field(min_length=1)] | None = None  # a prompt a line; beside the recipe
    ranges: Literal["minmax", "percentile", "mse", "entropy"] = "percentile"  # of static activations


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
    steps: Steps | None = None  # None: what the checkpoint was made for, 20 where nothing was distilled
    timesteps: Annotated[tuple[Timestep, ...], AfterValidator(_falling)] = ()  # of the default, in place of its choice
    also: tuple[Compiled, ...] = tuple(Compiled(name=name, steps=_USUAL_STEPS) for name in _USUAL)


class GuidanceChoice(Strict):
    """`[guidance]`: the scale that an app starts with, 1 and below is none; and how the UNet is guided."""

    default: Annotated[float, Field(ge=0.0, le=100.0)] | None = None  # None: what the checkpoint was made for
    mode: Literal["auto", "cfg", "embedded", "none"] = "auto"  # auto: told from the checkpoint


class BundleChoice(Strict):
    """`[bundle]`: what else goes into it."""

    goldens: bool = False  # golden vectors, by which a port of text-to-image can be checked on the device


class ValidateChoice(Strict):
    """`[validate]`: which prompts and steps the gate uses; `auto` chooses by the model's size."""

    plan: Literal["auto"] = "auto"


class Recipe(Strict):
    """A recipe file. `name` is the file's, `text` what it says word for word."""

    schema_: Annotated[int, Field(ge=1, le=1)] = Field(alias="schema")  # no Literal[1]: true equals 1
    model: ModelChoice = ModelChoice()
    export: ExportChoice = ExportChoice()
    quantize: QuantizeChoice = QuantizeChoice()
    calibrate: CalibrateChoice = CalibrateChoice()
    target: TargetChoice = TargetChoice()
    schedule: ScheduleChoice = ScheduleChoice()
    guidance: GuidanceChoice = GuidanceChoice()
    bundle: BundleChoice = BundleChoice()
    validate_: ValidateChoice = Field(default=ValidateChoice(), alias="validate")

    _name: str = PrivateAttr("")
    _text: str = PrivateAttr("")

    @property
    def name(self) -> str:
        return self._name

    def to_toml(self) -> str:
        """The file's own text, comments included; for a merged recipe, the keys in force."""
        return self._text

    def settled(self, precision: str) -> Recipe:
        """This recipe with `precision` for what no rule takes: what `auto` tries, and then writes down."""
        import tomli_w

        data = self.model_dump(mode="json", exclude_none=True)
        data["quantize"]["precision"] = precision
        changed = Recipe.model_validate_json(json.dumps(data))
        changed._name = self.name
        changed._text = f"# {self.name}, for which precision auto chose {precision}\n" + tomli_w.dumps(data)
        return changed

    def plans(self, parameters: Mapping[str, Shapes]) -> dict[str, Plan]:
        """The plan of each component: the recipe's precision, or the scheme of the last rule that matches.

        Args:
            parameters: component -> name -> shape of every parameter; `parameters_of` reads them from a checkpoint.
        Raises:
            RecipeError: a rule matches nothing, or only what every scheme leaves in float32, or takes for ever.
        """
        precision, rules = self.quantize.precision, self.quantize.rules
        if precision != AUTO:
            whole = [(c, name) for c, shapes in parameters.items() for name, shape in shapes.items() if len(shape) > 1]
            refuse_idle_branch(precision, f"{self.name} [quantize]", whole, parameters)
        return plans_by_rules(precision, rules, self.name, parameters)

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
        text = read_plain(path, MAX_BYTES).decode()
    except OSError as error:
        hint = f"shipped recipes: {', '.join(shipped_recipes())}"
        raise RecipeError(f"recipe {path}: cannot be read: {error.strerror}", hint=hint) from None
    except UnicodeDecodeError as error:
        raise RecipeError(f"recipe {path}: not UTF-8 at byte {error.start}", hint="save it as UTF-8") from None
    return _with_prompts(parse_recipe(text, path.name), path.parent)


def _with_prompts(recipe: Recipe, folder: Path) -> Recipe:
    """`recipe` with the prompts of its file in place of the file's name: a bundle's recipe must stand for itself."""
    import tomli_w

    name = recipe.calibrate.prompts_file
    if name is None:
        return recipe
    where = f"{recipe.name} [calibrate]"
    if recipe.calibrate.prompts is not None:
        raise RecipeError(f"{where}: both prompts and prompts_file", hint="leave one of them out")
    file = folder / name
    try:
        lines = read_plain(file, MAX_BYTES).decode().splitlines()
    except OSError as error:
        raise RecipeError(
            f"{where}: prompts_file {name!r} cannot be read: {error.strerror}",
            hint=f"a text file with a prompt a line, at {file}; without the key, bundled prompts serve",
        ) from None
    except UnicodeDecodeError as error:
        raise RecipeError(f"{where}: {name!r} is not UTF-8 at byte {error.start}", hint="save it as UTF-8") from None
    prompts = [line.strip() for line in lines if line.strip()]
    if not prompts:
        raise RecipeError(f"{where}: prompts_file {name!r} has no prompts", hint="write one a line")
    data = recipe.model_dump(mode="json", exclude_none=True)
    del data["calibrate"]["prompts_file"]
    data["calibrate"]["prompts"] = prompts
    changed = Recipe.model_validate_json(json.dumps(data))
    changed._name, changed._text = recipe.name, f"# {recipe.name} with the prompts of its file\n" + tomli_w.dumps(data)
    return changed


def parse_recipe(text: str, name: str) -> Recipe:
    """Read a recipe from its text; `name` stands for the file in errors."""
    try:
        data = tomllib.loads(text)
    except (ValueError, RecursionError) as error:  # also numbers of 4,300 digits, and nesting
        raise RecipeError(f"{name}: not TOML: {error}", hint="see https://toml.io, or docs/recipes.md") from None
    _refuse_other_schema(data, name)
    recipe = parsed(Recipe, data, lambda table: f"{name} {_table(table)}".rstrip(), RecipeError)
    recipe._name, recipe._text = name, text
    return recipe


def merged(
    recipe: Recipe,
    *,
    precision: str | None = None,
    size: tuple[int, int] | None = None,
    target: str | None = None,
    goldens: bool = False,
) -> Recipe:
    """`recipe` with what the command line says instead.

    `precision` is for all components, so it also drops the rules; how codes are rounded stays. The text of the
    result holds the keys in force: a bundle's recipe, used again, must give the same bundle.

    Raises:
        UsageError: an option has a value that no recipe could have.
    """
    import tomli_w

    data = recipe.model_dump(mode="json", exclude_none=True)
    options = []
    if precision is not None:
        data["quantize"]["precision"] = precision
        del data["quantize"]["rules"]
        options.append(("quantize", f"--precision {precision}"))
    if size is not None:
        data["export"]["size"] = list(size)
        options.append(("export", f"--size {size[0]}x{size[1]}"))
    if target is not None:
        data["target"]["name"] = target
        options.append(("target", f"--target {target}"))
    if goldens:
        data["bundle"]["goldens"] = True
        options.append(("bundle", "--goldens"))
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


def parameters_of(checkpoint: Checkpoint) -> dict[str, dict[str, tuple[int, ...]]]:
    """Component -> name -> shape of every parameter, from the headers of the checkpoint's files."""
    from ..export.weights import Weights

    found = {component: Weights(source) for component, source in checkpoint.components.items()}
    return {c: {name: weights.spec(name)[1] for name in weights.names()} for c, weights in found.items()}
