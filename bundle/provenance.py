"""How two bundles came about differently, in words."""

from __future__ import annotations

from collections.abc import Iterator
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from .manifest import Manifest


def differences(first: Manifest, second: Manifest) -> Iterator[tuple[str, str, str]]:
    """What the manifests say differently about how the bundles came about."""
    sides = [facts_of(first), facts_of(second)]
    for what in dict.fromkeys([*sides[0], *sides[1]]):
        a, b = (side.get(what, "-") for side in sides)
        if a != b:
            yield what, a, b


def facts_of(manifest: Manifest) -> dict[str, str]:
    facts = manifest.provenance
    default = manifest.schedule.default
    recipe = " ".join(line for line in manifest.recipe.splitlines() if line.strip() and not line.startswith("#"))
    return {
        "name": manifest.name,
        "family": manifest.family,
        "runtime": f"{manifest.target.name} {manifest.target.version}",
        "oldest runtime": manifest.target.min_runtime,
        "gate": manifest.gate,
        "checkpoint": facts.checkpoint[:12],
        "adapters": ", ".join(f"{adapter.file} x {adapter.scale:g}" for adapter in facts.adapters) or "none",
        "schedule": f"{default['scheduler']}, {default['steps']} steps",
        "guidance": f"{manifest.guidance.mode}, {manifest.guidance.default:g}",
        "recipe": recipe,
        **{f"{name} precision": entry.precision for name, entry in manifest.components.items()},
        **{f"{name} bits per weight": f"{entry.bits_per_weight:.4g}" for name, entry in manifest.components.items()},
        **{f"{tool} version": version for tool, version in facts.tools.items()},
    }
