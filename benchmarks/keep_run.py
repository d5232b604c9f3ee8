"""Keep what a conversion took for docs/measurements.md and for the test that holds the forecast against it.

    diffusette convert CHECKPOINT -o OUT ... --json > run.json
    python benchmarks/keep_run.py run.json sd15|sd21|sdxl HxW fp16|fp32

Stages that are already in docs/measured.json for these shapes, size and precision are replaced; run `make docs` then.
"""

from __future__ import annotations

import argparse
import json
from pathlib import Path
from typing import Any, Final

KEPT: Final = Path(__file__).parents[1] / "docs" / "measured.json"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("run", type=Path)
    parser.add_argument("shapes")
    parser.add_argument("size", help="HEIGHTxWIDTH in pixels")
    parser.add_argument("precision")
    options = parser.parse_args()
    kept: list[dict[str, Any]] = json.loads(KEPT.read_text())
    size = [int(side) for side in options.size.split("x")]
    what = {"shapes": options.shapes, "size": size, "precision": options.precision}
    run = next((run for run in kept if what.items() <= run.items()), None)
    if run is None:
        kept.append(run := {**what, "stages": {}})
    for stage in json.loads(options.run.read_text())["compared"]:
        run["stages"][stage["stage"]] = {
            "mib": stage["memory_mib"]["measured"],
            "bytes": stage["disk_bytes"]["measured"],
            "cpu_seconds": stage["cpu_seconds"],
        }
    KEPT.write_text(json.dumps(kept, indent=1) + "\n")


if __name__ == "__main__":
    main()
