"""Recipes: TOML files that fully define a conversion. What keys there are: `recipe_tables.py`; docs/recipes.md."""

from __future__ import annotations

import json
import tomllib
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Final

from pydantic import Field, PrivateAttr

from ..quantize.rounding import Rounding
from ..stages.artifacts import Checkpoint
from ..stages.errors import RecipeError, UsageError, refuse_unknown
from ..stages.plain_file import read_plain
from ..stages.strict import Location, Strict, parsed
from .recipe_tables import (
    AUTO,
    BundleChoice,
    CalibrateChoice,
    ExportChoice,
    GuidanceChoice,
    ModelChoice,
    QuantizeChoice,
    ScheduleChoice,
    TargetChoice,
    ValidateChoice,
)
from .rules import plans_by_rules, refuse_idle_branch

if TYPE_CHECKING:
    from ..quantize.plan import Plan, Shapes

MAX_BYTES: Final = 2**20
"""Of a recipe; one has a few kilobytes."""

_SHELF: Final = Path(__file__).parents[1] / "recipes"


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
    def rounding(self) -> Rounding:
        """What it says about rounding, beside the schemes."""
        said, seen = self.quantize, self.calibrate
        return Rounding(said.rounding, said.activations, seen.ranges, seen.prompts)

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
        latent = checkpoint.denoiser.config.get("sample_size")
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
            hint=f"a text file with a prompt a line, at {file}; without the key, bundled prompts are used",
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
    from ..checkpoints.weights import Weights

    found = {component: Weights(source) for component, source in checkpoint.components.items()}
    return {c: {name: weights.spec(name)[1] for name in weights.names()} for c, weights in found.items()}
