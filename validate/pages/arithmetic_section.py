"""The page's section about arithmetic: the manifest's own words, in tables."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from ...bundle.manifest import Manifest


def arithmetic_section(manifest: Manifest) -> dict[str, Any] | None:
    """What to set, and what each arithmetic leaves on each machine; None for a bundle that says nothing of it."""
    entry = manifest.arithmetic
    if entry is None:
        return None
    advice = []
    for name in dict.fromkeys(entry.recommended.values()):
        parts = ", ".join(part for part, how in entry.recommended.items() if how == name)
        stated = entry.choices[name].options.items()
        options = [f"{key} = {str(value).lower() if isinstance(value, bool) else value}" for key, value in stated]
        advice.append({"name": name, "parts": parts, "options": options})
    return {
        "status": entry.status,
        "target": manifest.target.name,
        "advice": advice,
        "unfit": [{"name": name, "why": choice.fails} for name, choice in entry.choices.items() if choice.fails],
        "machines": [
            {
                "name": machine.machine,
                "components": list(next(iter(machine.rows.values())).snr_db) if machine.rows else [],
                "rows": [
                    {
                        "name": name,
                        "default": entry.choices[name].default,
                        "computes": row.computes,
                        "snr": ["died" if value is None else f"{value:.1f}" for value in row.snr_db.values()],
                        "picture": "-" if row.picture_psnr_db is None else f"{row.picture_psnr_db:.1f}",
                        "verdict": row.verdict,
                    }
                    for name, row in machine.rows.items()
                ],
            }
            for machine in entry.machines
        ],
    }
