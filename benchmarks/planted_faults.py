"""How many of many faults, planted into one component of a built bundle, does `validate --layers` name?

    python benchmarks/planted_faults.py BUNDLE COMPONENT RESULT.json [--count N] [--seed N] [--checkpoint PLACE]

Every module is fed with PyTorch's own inputs, so faults in different modules do not touch each other: N of them, of all
kinds that the weights' types allow, are planted at once into a copy of the component's files, each in another block,
in modules drawn with the seed. The sound component is run first, undivided, for its peak memory and its worst inputs.
RESULT.json gets each fault with what was made of it, the modules that were named falsely, and what it took; stdout the
same without the faults that were named first. Exits with 1 unless all are named and nothing else is. The copy lies
beside RESULT.json and is deleted.

A fault's `rank` is its place among the wrong modules, in the order of execution, if it were alone. A module that holds
a damaged one, such as an attention that is one layer on ncnn, may be wrong as well; it is no false alarm.
"""

from __future__ import annotations

import argparse
import json
import random
import shutil
import sys
import tempfile
from collections.abc import Iterator, Mapping
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any, Final

import numpy as np
from diffusette.bundle.bundle import Bundle, open_bundle
from diffusette.bundle.recorded_rounding import recorded_rounding
from diffusette.bundle.sessions import opener
from diffusette.quantize.quantized import quantized_weights
from diffusette.quantize.stored_weights import StoredWeights
from diffusette.runtimes.registry import get_target
from diffusette.runtimes.taps import Tapped, Wiring, inside
from diffusette.stages.artifacts import TargetModel
from diffusette.stages.cache import Cache
from diffusette.stages.progress import Silent
from diffusette.stages.run_stage import run_stage
from diffusette.stages.stage import Runner
from diffusette.tests.faults import CODED, EDITS, Fault, guilty, plant
from diffusette.validate.gate import ask_pytorch, ask_rounded
from diffusette.validate.gates import check_components
from diffusette.validate.layers.of_bundle import look_into
from diffusette.validate.layers.report import ComponentLayers
from diffusette.validate.reference.calibrate import calibrated
from diffusette.validate.reference.origin import open_reference_checkpoint

HEADS: Final = ("to_v", "v_proj")  # the last part of the modules whose rows are of attention heads


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("bundle", type=Path)
    parser.add_argument("component")
    parser.add_argument("result", type=Path)
    parser.add_argument("--count", type=int, default=20)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--checkpoint", help="where it was converted from; needed on another machine")
    parser.add_argument("--threads", type=int, default=2)
    options = parser.parse_args()
    options.result.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(prefix="planted ", dir=options.result.parent) as folder:
        row = measure(options, open_bundle(options.bundle), Path(folder))
    options.result.write_text(json.dumps(row, indent=1) + "\n")
    print(json.dumps({key: value for key, value in row.items() if key != "faults"}))
    print(*(fault for fault in row["faults"] if fault["rank"] != 1), sep="\n")
    return 0 if row["named"] == row["planted"] and not row["false_alarms"] else 1


def measure(options: argparse.Namespace, bundle: Bundle, folder: Path) -> dict[str, Any]:
    """Plant, look, count."""
    part, facts, threads = options.component, bundle.manifest, options.threads
    cache, progress = Cache.default(), Progress()
    run: Runner = partial(run_stage, cache=cache, progress=progress)
    checkpoint = open_reference_checkpoint(bundle, options.checkpoint, cache)
    source, sound, target = checkpoint.components[part], bundle.model(part), get_target(facts.target.name)
    assert isinstance(target, Tapped)
    with cache.used():
        probes = ask_pytorch(checkpoint, facts.size, run)
        plan = calibrated({part: bundle.plan(part)}, checkpoint, facts.size, recorded_rounding(bundle), run)[part]
        time_embedding = facts.time_embedding.model_dump()
        (report,) = check_components(
            opener(bundle, threads),
            probes,
            target=facts.target.name,
            precisions={part: sound.precision},
            time_embedding=time_embedding,
            rounded={} if sound.precision == "fp32" else {part: ask_rounded(probes, source, plan, run)},
        )
        stored = StoredWeights(source, plan, quantized_weights(source, plan, run))
        damaged = copy_of(sound, folder)
        faults = planted(options, stored, damaged, target.wiring(sound, source, facts.size, run))
        how: dict[str, Any] = {"time_embedding": time_embedding, "threads": threads, "cache": cache}
        found = look_into(damaged, source, plan, report, probes, progress=progress, **how)
    about = {"target": facts.target.name, "component": part, "precision": sound.precision, "sound": report.ok}
    return {**about, "seed": options.seed, **counted(faults, found), **found.cost_json()}


def copy_of(model: TargetModel, folder: Path) -> TargetModel:
    """A copy of a component's files; of what lies in them, nothing is held in memory."""
    for file in {*model.files, *(file for form in model.forms.values() for file in form)}:
        (folder / file).parent.mkdir(parents=True, exist_ok=True)
        shutil.copyfile(model.folder / file, folder / file)
    return replace(model, folder=folder)


def planted(options: argparse.Namespace, stored: StoredWeights, model: TargetModel, wiring: Wiring) -> list[Fault]:
    """Plant `count` faults, kinds in turn, no two in the same block; fewer where there are no more places."""
    places = candidates(options.component, stored, random.Random(options.seed))
    found: list[Fault] = []
    taken: set[str] = set()
    while places and len(found) < options.count:
        for kind in list(places):
            fault = next((each for each in places[kind] if block_of(each) not in taken), None)
            if fault is None:
                del places[kind]
            elif len(found) < options.count:
                taken.add(block_of(fault))
                plant(fault, model, stored, wiring)
                found.append(fault)
                print(f"planted: {fault}", file=sys.stderr)
    return found


def candidates(part: str, stored: StoredWeights, draw: random.Random) -> dict[str, Iterator[Fault]]:
    """Kind -> faults that change something, in a random order; a weight is read when it is its turn."""
    shapes = stored.shapes()
    weights = [name for name in shapes if name.endswith(".weight")]
    coded = [name for name in weights if not stored.scheme(name).is_float]
    floats = [name for name in weights if name not in coded]
    matrices = [name for name in floats if len(shapes[name]) > 1]
    norms = [name for name in floats if len(shapes[name]) == 1]
    attentions = [name for name in matrices if name.endswith(".to_q.weight") and alike(shapes, name)]
    of = {
        "scaled weight": matrices,
        "swapped channels": matrices,
        "dropped bias": [name for name in shapes if name.endswith(".bias")],
        "wrong epsilon": norms,
        "swapped q and k": [name.removesuffix(".to_q.weight") + ".weight" for name in attentions],
        "rotated heads": [name for name in matrices if name.split(".")[-2] in HEADS],
        "fp16 overflow": matrices,
        "lost scale": norms,
        **dict.fromkeys(CODED, coded),
    }

    def faults(kind: str, names: list[str]) -> Iterator[Fault]:
        for name in draw.sample(names, len(names)):
            if kind not in EDITS or changes(stored.read(name), kind):
                yield Fault(kind, part, name.rpartition(".")[0])

    return {kind: faults(kind, names) for kind, names in of.items() if names}


def alike(shapes: Mapping[str, tuple[int, ...]], query: str) -> bool:
    return shapes[query] == shapes[query.replace(".to_q.", ".to_k.")]


def changes(value: np.ndarray[Any, Any], kind: str) -> bool:
    """Whether the damage shows. What is all ones or zeros (random checkpoints have such) is in the files many times."""
    return np.ptp(value) > 0 and not np.array_equal(EDITS[kind][1](value), value)


def block_of(fault: Fault) -> str:
    return fault.module if fault.kind == "swapped q and k" else fault.module.rpartition(".")[0]


def counted(faults: list[Fault], found: ComponentLayers) -> dict[str, Any]:
    """Each fault's fate; and which modules are wrong for no fault."""
    blamed = {
        fault: guilty(fault) | {row.module for row in found.bad if inside(fault.module, row.module)} for fault in faults
    }
    rows = []
    for fault in faults:
        others = set().union(*(modules for other, modules in blamed.items() if other != fault))
        alone = [layer for layer in found.bad if layer.module in blamed[fault] or layer.module not in others]
        rank = next((at for at, layer in enumerate(alone, 1) if layer.module in guilty(fault)), None)
        db = alone[rank - 1].made_db if rank else None
        rows.append({"kind": fault.kind, "module": fault.module, "rank": rank, "snr_db": db})
    explained = set().union(*blamed.values())
    return {
        "modules": len(found.layers),
        "planted": len(faults),
        "named": sum(row["rank"] is not None for row in rows),
        "named_first": sum(row["rank"] == 1 for row in rows),
        "false_alarms": [layer.module for layer in found.bad if layer.module not in explained],
        "least_intact_db": min((layer.made_db for layer in found.layers if layer.ok), default=None),
        "faults": rows,
    }


class Progress(Silent):
    """A line a stage, on stderr."""

    def end(self, label: str, seconds: float, peak_mib: float, outcome: str) -> None:
        print(f"{label} {seconds:.1f} s {peak_mib:.0f} MiB {outcome}", file=sys.stderr)


if __name__ == "__main__":
    sys.exit(main())
