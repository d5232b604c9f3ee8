"""diffusette inspect: what a path is, and what a conversion would cost."""

from __future__ import annotations

from typing import Annotated, Any

import typer

from ..stages.artifacts import ALONE, Companions
from .options import Json, parse_size, takes_companions


@takes_companions
def inspect(
    path: Annotated[
        str,
        typer.Argument(
            metavar="PATH", help="A checkpoint, an .onnx file, a bundle, or the word demo.", show_default=False
        ),
    ],
    target: Annotated[
        list[str] | None,
        typer.Option("--target", metavar="NAME", help="Forecast for this target; repeat for several. [default: all]"),
    ] = None,
    precision: Annotated[
        str | None,
        typer.Option("--precision", metavar="SCHEME", help="Forecast for this scheme. [default: the recipe's]"),
    ] = None,
    size: Annotated[
        str | None, typer.Option("--size", metavar="HxW", help="HEIGHTxWIDTH. [default: the checkpoint's own]")
    ] = None,
    companions: Companions = ALONE,
    no_gate: Annotated[bool, typer.Option("--no-gate", help="Forecast without the comparison with PyTorch.")] = False,
    as_json: Json = False,
) -> int:
    """Say what PATH is. For a checkpoint, from headers alone, also what a conversion needs in memory, disk and time."""
    from ..convert.describe import describe
    from .terminal import print_json

    facts = describe(
        path,
        targets=tuple(target or ()),
        precision=precision,
        size=parse_size(size) if size else None,
        companions=companions,
        gate=not no_gate,
    )
    if as_json:
        print_json(facts)
    else:
        _SHOW[facts["kind"]](facts)
    return 0


def _show_checkpoint(facts: dict[str, Any]) -> None:
    from .terminal import print_lines, size_text

    print_lines(f"{facts['name']}: a checkpoint of family {facts['family']} ({facts['why']})")
    print_lines(f"  variant {facts['variant']} ({facts['variant_why']})")
    print_lines(
        f"  pictures {facts['size'][0]}x{facts['size'][1]}, {facts['scheduler']}, {facts['input_channels']} channels in"
    )
    prediction = f"prediction {facts['prediction_type']} ({facts['prediction_why']})"
    print_lines(f"  {prediction}")
    print_lines(f"  guidance {facts['guidance']['mode']} {facts['guidance']['default']:g}, {facts['steps']} steps")
    print_lines(f"  recipe {facts['recipe']}")
    for name, part in facts["components"].items():
        print_lines(f"  {name:<14} {part['parameters'] / 1e6:8.2f} M parameters, stored as {part['dtype']}")
    for remark in facts["remarks"]:
        if remark != prediction:  # of a single file it is a remark too, for `convert` to tell
            print_lines(f"  {remark}")
    needed = facts["forecast"]
    print_lines("", f"converting it to {', '.join(facts['targets'])} at {facts['precision']} needs about")
    print_lines(f"  memory {needed['peak_mib']} MiB at its peak ({facts['available_mib']:.0f} MiB are available)")
    print_lines(
        f"  disk   {size_text(needed['output_bytes'])} for the bundles, {size_text(needed['cache_bytes'])} in the cache"
    )
    print_lines(f"  time   {_minutes(needed['seconds'])} (rough: on two cores)")
    print_lines(
        "", "  memory of each stage, MiB (its own process and the programs that it starts), and disk that it leaves"
    )
    _show_stages(needed["stages"], tuple(facts["components"]))


def _show_stages(stages: list[dict[str, Any]], components: tuple[str, ...]) -> None:
    """A line for each stage, a column for each component; stages that belong to none are in the first."""
    from rich.table import Table

    from .terminal import print_table, size_text

    rows: dict[str, dict[str, dict[str, Any]]] = {}
    for stage in stages:
        component, _, row = stage["stage"].partition(" ")
        known = component in components
        rows.setdefault(row if known else stage["stage"], {})[component if known else ""] = stage
    table = Table("", *components, "disk", box=None, pad_edge=False, padding=(0, 0, 0, 2))
    for column in table.columns[1:]:
        column.justify = "right"
    for row, found in rows.items():
        cells = [f"{found[name]['peak_mib']}" if name in found else "" for name in components]
        cells[0] = cells[0] or (f"{found['']['peak_mib']}" if "" in found else "")
        disk = sum(stage["disk_bytes"] for stage in found.values())
        table.add_row(row, *cells, size_text(disk) if disk else "-")
    print_table(table)


def _show_bundle(facts: dict[str, Any]) -> None:
    from .terminal import print_lines, size_text

    target = facts["target"]
    print_lines(f"{facts['name']}: a bundle for {target['name']} {target['version']}, family {facts['family']}")
    print_lines(f"  parity gate: {facts['gate']}")
    reads, guidance = facts["conditioning"], facts["guidance"]
    print_lines(
        f"  variant {reads['variant']} ({reads['why']})",
        f"  pictures {facts['size'][0]}x{facts['size'][1]}, {reads['input_channels']} channels in, "
        f"text encoders: {reads['text_encoders']}",
        f"  prediction {facts['prediction_type']}, timesteps {facts['timestep_spacing']}, {facts['steps']} steps, "
        f"guidance {guidance['mode']} {guidance['default']:g}",
    )
    if facts["added_tokens"]:
        print_lines(f"  words added: {', '.join(facts['added_tokens'])}")
    for name, part in facts["components"].items():
        inputs = ", ".join(f"{i['name']} {i['dtype']}{i['shape']}" for i in part["inputs"])
        print_lines(f"  {name:<13} {part['precision']:<5} {size_text(part['bytes']):>8}  takes {inputs}")
    if facts["control"]:
        print_lines("  draws along a picture: generate --control FILE")
    schedules = ", ".join(f"{name} ({', '.join(map(str, steps))})" for name, steps in facts["schedules"].items())
    print_lines(f"  schedules: {schedules}")
    for kind, peaks in facts["memory"].items():
        if peaks:
            told = ", ".join(f"{name} {mib:.0f}" for name, mib in peaks.items())
            print_lines(f"  memory of a process that runs one component, {kind}, MiB: {told}")
    if facts["conversion"]:
        print_lines("  memory of the conversion here, MiB, forecast / measured")
        for stage in facts["conversion"]:
            memory = stage["memory_mib"]
            print_lines(f"  {stage['stage']:<32} {memory['forecast']:>6} / {memory['measured']}")


def _show_onnx(facts: dict[str, Any]) -> None:
    from .terminal import print_lines

    print_lines(f"{facts['name']}: an ONNX graph, opset {facts['opset']}")
    print_lines(f"  {facts['nodes']} nodes, {facts['parameters']} parameters")
    for kind in ("inputs", "outputs"):
        print_lines(f"  {kind}: " + ", ".join(f"{v['name']} {v['dtype']}{v['shape']}" for v in facts[kind]))
    print_lines("  ops: " + ", ".join(f"{name} {count}" for name, count in facts["ops"].items()))


_SHOW = {"checkpoint": _show_checkpoint, "bundle": _show_bundle, "onnx": _show_onnx}


def _minutes(seconds: float) -> str:
    return f"{seconds / 60:.0f} min" if seconds >= 90 else f"{seconds:.0f} s"
