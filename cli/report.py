"""Reports as tables and lines for a terminal."""

from __future__ import annotations

from typing import TYPE_CHECKING

from .terminal import print_table, size_text, stdout

if TYPE_CHECKING:
    from collections.abc import Iterator, Sequence

    from ..bundle.bundle import Bundle
    from ..convert.conversion import Conversion
    from ..convert.search.goal import Found
    from ..convert.sizes import SizedConversions
    from ..validate.bundle_difference import Comparison
    from ..validate.machines.report import MachineReport
    from ..validate.report import ParityReport
    from ..validate.speed.latency import ProfileReport


def show_sizes(several: SizedConversions) -> None:
    """The conversion of each size, then what the sizes share."""
    for conversion in several.conversions.values():
        show_conversion(conversion)
    stdout().print(f"{size_text(several.shared_bytes)} of equal files are stored only once", markup=False)


def show_conversion(conversion: Conversion) -> None:
    """For each target its parity table, then the path of each bundle."""
    console = stdout()
    if conversion.found:
        show_menu(conversion.found)
    for each in conversion.converted:
        if each.parity:
            show_parity(each.parity)
        show_machines(each.machines)
    for each in conversion.converted:
        facts = each.bundle.manifest
        size = size_text(sum(file.bytes for file in dict.fromkeys(facts.files())))
        verdict = {"passed": "parity passed", "failed": "PARITY FAILED", "skipped by --no-gate": "parity not checked"}
        console.print(f"{facts.target.name:<5} {size:>8}  {verdict[facts.gate]:<18} {each.bundle.path}", markup=False)
        if facts.arithmetic:
            console.print(f"      arithmetic: {facts.arithmetic.status}", markup=False)
        for line in _speed_lines(each.bundle):
            console.print(f"      {line}", markup=False)
        noted: dict[str, list[str]] = {}
        for name, component in facts.components.items():
            for note in component.notes:
                noted.setdefault(note, []).append(name)
        for note, names in noted.items():
            everyone = len(names) == len(facts.components) > 1
            console.print(f"      {'all models' if everyone else ', '.join(names)}: {note}", markup=False)
    count = len(conversion.converted)
    bundles = f"{count} bundle{'' if count == 1 else 's'}"
    console.print(
        f"{bundles} in {conversion.seconds:.0f} s, peak memory {conversion.peak_mib:.0f} MiB "
        "(this process and its children together)"
        if conversion.peak_mib
        else f"{bundles} in {conversion.seconds:.1f} s, all from the cache",
        markup=False,
    )


def _speed_lines(bundle: Bundle) -> Iterator[str]:
    """How long integers take against float32, one line for each component."""
    for name, speed in bundle.manifest.speed.items():
        forms = "".join(f", .{form} {ratio:.2f}x" for form, ratio in speed.forms.items())
        precision = bundle.manifest.components[name].precision
        yield f"{name} {precision}: {speed.ratio_to_fp32:.2f}x of fp32's time here{forms}"


def show_menu(found: Found) -> None:
    """What each size would cost, and the paths of the recipe and the plot."""
    from rich.table import Table

    console = stdout()
    parts = list(found.menu[0].snr_db)
    table = Table(title=f"{found.goal} on {found.target}, in PyTorch with weights rounded", title_justify="left")
    timed = list(found.menu[0].unet_ms)
    last = ("pictures dB", *(f"UNet ms, {target}" for target in timed))
    for name in ("", "bits a weight", "MB", *(f"{part} dB" for part in parts), *last):
        table.add_column(name, justify="right")
    rows = [("chosen" if row.chosen else "", row) for row in found.menu]
    if found.tuned:
        rows.insert(1 + [row.chosen for row in found.menu].index(True), ("tuned", found.tuned))
    for name, row in rows:
        mark = "" if row.measured else "~"  # what the losses of layers add up to
        snr = (f"{mark}{row.snr_db[part]:.1f}" for part in parts)
        picture = "-" if row.psnr_db is None else f"{row.psnr_db:.1f}"
        ms = (f"{row.unet_ms[target]:.1f}" if target in row.unet_ms else "" for target in timed)
        cells = (f"{row.bits:.2f}", f"{row.bytes / 1e6:.2f}", *snr, picture, *ms)
        table.add_row(name, *cells, style="bold" if row.chosen else None)
    print_table(table)
    if found.tuned:
        gains = ", ".join(f"{part} {a:.1f} -> {b:.1f}" for part, (a, b) in found.tuned.held_out_db.items())
        console.print("tuned: the chosen mixture with its scales fitted to whole components, which is what is built;")
        console.print(f"before and after, over calls that nothing was fitted to: {gains} dB", markup=False)
    if not all(row.measured for row in found.menu):
        console.print(
            "~ added up from the losses of single layers, not run; rounded to the nearest, GPTQ follows with the build"
        )
    for file in found.files:
        console.print(file, markup=False)
    console.print()


def show_parity(report: ParityReport) -> None:
    """The table, then a line for each failure, worst first."""
    from ..validate.layers.report import layers_table, ranges_table
    from ..validate.report import parity_table

    console = stdout()
    print_table(parity_table(report))
    if report.timesteps and report.timesteps.ok:
        console.print(report.timesteps.line, markup=False)
    for line in report.failures():
        console.print(f"FAILED {line}", markup=False)
    console.print()
    if report.layers:
        for component in report.layers:
            print_table(layers_table(component))
            console.print()
        print_table(ranges_table(report.layers))


def show_machines(reports: Sequence[MachineReport]) -> None:
    """For each machine a table, what to choose there, and why rows failed."""
    from ..validate.machines.report import machine_table, recommendation

    console = stdout()
    for report in reports:
        print_table(machine_table(report))
        for line in report.failures():
            console.print(f"FAILED {line}", markup=False)
        for line in report.misfits():
            console.print(f"not fit: {line}", markup=False, style="dim")
        counts = ", ".join(f"{count} of {name}" for name, count in (report.probes or {}).items())
        console.print(f"* an app that sets no option gets this one; compared: {counts}", markup=False, style="dim")
        console.print(recommendation(report), markup=False)
        if report.oracle:
            console.print(f"{report.oracle.line}, in the recommended arithmetic", markup=False)
        console.print()


def show_profile(report: ProfileReport, *, explained: bool = True) -> None:
    """The table, and if `explained` how it was measured; with operations, one more table for each component."""
    from ..validate.speed.latency import profile_table
    from ..validate.speed.op_profile import OPS_METHOD, ops_table

    console = stdout()
    print_table(profile_table(report, explained=explained))
    for profile in report.ops:
        console.print()
        print_table(ops_table(profile))
    if report.ops:
        console.print(f"{OPS_METHOD}.", markup=False, style="dim")


def show_comparison(found: Comparison) -> None:
    """The table, what the manifests say differently, then a line for each part that differs too much."""
    from ..validate.bundle_difference import contrast_table

    console = stdout()
    print_table(contrast_table(found))
    for what, a, b in found.differences:
        console.print(f"{what}: {a} | {b}", markup=False)
    for line in found.alone:
        console.print(f"not compared: {line}", markup=False)
    for line in found.failures():
        console.print(f"APART {line}", markup=False)
