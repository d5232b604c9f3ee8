"""The table of runtimes. A new one is a folder and a line here, or an entry point of another package."""

from __future__ import annotations

from importlib import import_module
from importlib.metadata import entry_points
from typing import Any, Final

from ..stages.errors import UnknownTarget
from .arithmetic import Opening
from .protocol import Session, Target

TARGETS: Final = {
    "ort": ".ort.target:OrtTarget",
    "ncnn": ".ncnn.target:NcnnTarget",
    "mnn": ".mnn.target:MnnTarget",
}
PLUGINS: Final = "diffusette.targets"  # entry-point group


def get_target(name: str, **options: Any) -> Target:
    """The runtime of that name; `options` are those of the recipe's `[target.NAME]`.

    Raises:
        UnknownTarget: neither the table nor an installed package knows it.
    """
    if name in TARGETS:
        module, _, kind = TARGETS[name].partition(":")
        target: Target = getattr(import_module(module, __package__), kind)(**options)
        return target
    plugins = {point.name: point for point in entry_points(group=PLUGINS)}
    if name in plugins:
        plugin: Target = plugins[name].load()(**options)
        return plugin
    raise UnknownTarget(f"no target named {name!r}", hint=f"one of: {', '.join([*TARGETS, *plugins])}")


def open_model(argument: Any, threads: int) -> Session:
    """Opener for `isolation.open_isolated`: loads a model in this process.

    Args:
        argument: an `Opening`, or a `TargetModel` alone.
    """
    from pydantic import TypeAdapter

    opening = TypeAdapter(Opening).validate_python(argument if "model" in argument else {"model": argument})
    return get_target(opening.target).open(opening.model, threads=threads, arithmetic=opening.arithmetic)
