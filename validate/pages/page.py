"""Facts become a page that can be sent to a colleague: one HTML file, the verdict first.

Pages are made from the JSON documents that the commands print, so that a page cannot say more than `--json` does.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, Final

from ...runtimes.txt2img.canvas import INPAINTING_CHANNELS
from ..parity import EXACT_DB
from ..pictures import SMALL, Shown, difference_of, png_uri
from .arithmetic_section import arithmetic_section
from .charts import bundle_charts, size_text
from .layer_section import layer_section
from .plots import drift_plot, histogram_plot
from .timestep_section import timestep_section

if TYPE_CHECKING:
    from ...bundle.manifest import Manifest

GENERATOR: Final = "diffusette"
"""Begins the page's `<meta name="generator">`, by which a later run knows that it may replace the file."""

MOST_PICTURES: Final = 4

Facts = Mapping[str, Any]


def parity_page(
    facts: Facts,
    manifest: Manifest,
    shown: Sequence[Shown],
    profile: Facts | None,
    command: str,
    beside: Mapping[str, Sequence[Facts]] | None = None,
) -> str:
    """The page of `validate --html`.

    Args:
        facts: `ParityReport.to_json()`.
        shown: pictures by both, in any order; the worst are shown.
        profile: `ProfileReport.to_json()`, None where speed was not measured.
        command: the words that were typed, for whoever wants to repeat it.
        beside: label -> `layers` of other bundles of the checkpoint, to be shown beside this one's.
    """
    target = manifest.target
    components: Facts = facts["components"]
    return render(
        "validate.html.j2",
        title=f"{manifest.name} for {target.name}: {'passed' if facts['ok'] else 'failed'}",
        verdict={
            "kind": "ok" if facts["ok"] else "bad",
            "word": "passed" if facts["ok"] else "failed",
            "line": parity_line(facts, manifest.name),
        },
        failures=facts["failures"] if len(facts["failures"]) > 1 else [],
        about=about(manifest),
        target=target.name,
        components=[component_card(name, part) for name, part in components.items()],
        pictures=pictures_section(facts["image"], shown, "PyTorch", drawn_from(manifest)),
        timesteps=timestep_section(facts["timesteps"]),
        oracle=_oracle(facts["oracle"]),
        layers=layer_section(facts, target.name, beside or {}),
        arithmetic=arithmetic_section(manifest),
        charts=bundle_charts(manifest, profile),
        busy=busy_note(profile["busy"] if profile else None),
        method=[*_method(facts), *speed_method(profile), ("command", command)],
        reasons=_reasons(facts),
        provenance=provenance(manifest),
    )


def render(template: str, **context: Any) -> str:
    """Fill a template of this folder; every string in it is escaped."""
    from jinja2 import Environment, FileSystemLoader, StrictUndefined

    from ... import __version__

    environment = Environment(
        loader=FileSystemLoader(Path(__file__).parent),
        autoescape=True,
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    return environment.get_template(template).render(generator=f"{GENERATOR} {__version__}", **context)


def parity_line(facts: Facts, name: str) -> str:
    """The verdict in one sentence."""
    target = facts["target"]
    if not facts["ok"]:
        count = len(facts["failures"]) - 1
        more = f", and {count} more" if count else ""
        return f"{name} on {target} is not what PyTorch computes: {_first_failure(facts)}{more}"
    worst = min(facts["components"].items(), key=lambda part: part[1]["snr_db"])
    line = f"{name} on {target} computes what PyTorch computes: {db(worst[1]['snr_db'])} or better in every model"
    return line + (f", {db(facts['image']['psnr_db'])} in the pictures" if facts["image"] else "")


def _first_failure(facts: Facts) -> str:
    """The first line of `failures` in brief: its card has the place."""
    part_name, part = next(iter(facts["components"].items()), ("", None))
    if part is None or part["ok"] or part["problem"]:
        return str(facts["failures"][0])
    if part["snr_db"] < part["tolerance"]:
        return f"{part_name} is {db(part['snr_db'])} from it, {part['tolerance']:g} dB needed"
    fidelity = part["fidelity"]
    found = db(fidelity["snr_db"]) if "snr_db" in fidelity else "nothing"
    return f"{part_name} is {found} from its rounded weights, {fidelity['tolerance']:g} dB needed"


def about(manifest: Manifest) -> list[tuple[str, str]]:
    """What the page is about, in a few words each."""
    height, width = manifest.size
    precisions = ", ".join(dict.fromkeys(part.precision for part in manifest.components.values()))
    return [
        ("bundle", manifest.name),
        ("family", manifest.family),
        ("runtime", f"{manifest.target.name} {manifest.target.version}"),
        ("precision", precisions),
        ("pictures", f"{width} x {height}"),
        ("size", size_text(sum(file.bytes for file in dict.fromkeys(manifest.files())))),
        ("checkpoint", manifest.provenance.checkpoint[:12]),
    ]


def component_card(name: str, part: Facts) -> dict[str, Any]:
    meters = []
    if part["snr_db"] is not None:
        wanted = part["tolerance"]
        meters.append(_meter("against PyTorch in float32", part["snr_db"], wanted))
    if (fidelity := part["fidelity"]) and fidelity.get("snr_db") is not None:
        meters.append(_meter("with equally rounded weights", fidelity["snr_db"], fidelity["tolerance"]))
    largest = f"largest error {part['max_abs']:.2g}; " if part["max_abs"] is not None else ""
    form = f" ({part['form']} form)" if part["form"] else ""
    note = part["problem"] or f"{largest}worst of {part['probes']} inputs at {part['worst_probe']}"
    return {"name": name, "ok": part["ok"], "meters": meters, "note": f"{part['precision']}{form}; {note}"}


def _meter(label: str, value: float, needed: float) -> dict[str, Any]:
    text = f"{db(value)}, {needed:g} needed"
    return {"label": label, "value": value, "needed": needed, "text": text, "ok": value >= needed}


def drawn_from(manifest: Manifest) -> str:
    """What a probe's picture is drawn from besides its prompt; empty where that is all."""
    if manifest.conditioning.input_channels == INPAINTING_CHANNELS:
        return "Each fills in the middle of a bright disc on a smooth ground."
    return "Each follows the edges of a diamond in a ring." if manifest.control else ""


def pictures_section(
    image: Facts | None, shown: Sequence[Shown], reference: str, more: str = ""
) -> dict[str, Any] | None:
    """The worst pictures beside each other, how the latents drifted, how pixels differ; None: none were drawn."""
    if image is None:
        return None
    order = [(picture["prompt"], picture["seed"]) for picture in image["pictures"]]  # the worst first
    ranked = sorted(shown, key=lambda each: order.index((each.prompt, each.seed)))[:MOST_PICTURES]
    scheduler = f", {image['scheduler']}" if image["scheduler"] else ""
    count = len(order)
    worst = f"the worst {len(ranked)} of {count}" if count > len(ranked) else f"all {count}, the worst first"
    words = f"{image['steps']} steps, guidance {image['guidance']:g}{scheduler}, from the same noise; {worst}."
    words = f"{words} {more}".rstrip()
    section: dict[str, Any] = {"words": image["problem"] or words, "drift": "", "shown": []}
    if not order:
        return section
    figures = {(each["prompt"], each["seed"]): each for each in image["pictures"]}
    section["shown"] = [_picture(each, figures[each.prompt, each.seed]) for each in ranked]
    drift = image["drift_db"]
    labels = {f"{each['prompt']} {each['seed']}": each["drift_db"] for each in image["pictures"]}
    counts = [sum(bins) for bins in zip(*(each["histogram"]["counts"] for each in image["pictures"]), strict=True)]
    edges = image["pictures"][0]["histogram"]["edges_levels"]
    visible = sum(count for edge, count in zip(edges, counts, strict=False) if edge >= 1) / sum(counts)
    turned = max(each["histogram"]["changed_share_8bit"] for each in image["pictures"])
    section |= {
        "drift": drift_plot(labels, drift, f"Latents start at {db(drift[0])} and end at {db(drift[-1])}"),
        "drift_words": f"Signal over error of the latents after each step, against {reference}: {db(drift[0])} after "
        f"the first, {db(drift[-1])} after the last. Thick: the worst picture at each step.",
        "histogram": histogram_plot(edges, counts, f"{visible:.1%} of channel values differ by a level or more"),
        "histogram_words": f"{visible:.2%} of channel values differ by one level of 255 or more (right of the dashed "
        f"line). Once rounded to 8 bits, at most {turned:.2%} of a picture's values differ at all.",
    }
    return section


def _picture(shown: Shown, figures: Facts) -> dict[str, Any]:
    height, width = shown.reference.shape[:2]
    difference = difference_of(shown.reference, shown.candidate)
    caption = f"difference × {difference.gain:,}" if difference.gain else "no difference"
    return {
        "prompt": shown.prompt,
        "seed": shown.seed,
        "reference": png_uri(shown.reference),
        "candidate": png_uri(shown.candidate),
        "difference": difference.uri,
        "difference_caption": caption.replace("× ", "×\u00a0"),  # no line ends between them
        "difference_words": f"{caption}; the largest is {difference.largest:.2g} levels of 255",
        "small": min(height, width) < SMALL,
        "height": height,
        "width": width,
        "figures": f"PSNR {db(figures['psnr_db'])} · SSIM {figures['ssim']:.5f} · largest difference "
        f"{difference.largest:.2g} of 255 levels",
    }


def speed_method(profile: Facts | None) -> list[tuple[str, str]]:
    if profile is None:
        return [("speed", "not measured for this page; `diffusette profile` measures it")]
    some = next(iter(profile["components"].values()))
    return [
        ("speed", f"{profile['method']}; {some['runs']} runs, {some['threads']} threads, on {profile['machine']}"),
        ("memory", profile["memory_definition"]),
    ]


def provenance(manifest: Manifest) -> list[tuple[str, str]]:
    facts = manifest.provenance
    return [
        ("checkpoint", facts.checkpoint),
        *((source.file, source.sha256) for source in facts.sources),
        *((f"{adapter.file} x {adapter.scale:g}", adapter.sha256) for adapter in facts.adapters),
        ("tools", ", ".join(f"{name} {version}" for name, version in facts.tools.items())),
    ]


def _method(facts: Facts) -> list[tuple[str, str]]:
    probes = sum(part["probes"] for part in facts["components"].values())
    return [
        ("inputs", f"{probes} calls, from prompts and a denoising trajectory of PyTorch, the same for both"),
        ("SNR", "10·log10(Σr² / Σ(r - c)²), r being PyTorch in float32 on this CPU and c the bundle's runtime"),
        ("PSNR", "of pictures: 10·log10(1 / mean((r - c)²)), as floats in 0..1, before rounding to 8 bits"),
    ]


def _reasons(facts: Facts) -> list[tuple[str, str]]:
    rows = []
    for name, part in facts["components"].items():
        rows.append((name, f"{part['tolerance']:g} dB against PyTorch: {part['why']}"))
        if fidelity := part["fidelity"]:
            rows.append((name, f"{fidelity['tolerance']:g} dB with equally rounded weights: {fidelity['why']}"))
    if image := facts["image"]:
        rows.append(("pictures", f"PSNR {image['tolerance']:g} dB: {image['why']}"))
    return rows


def _oracle(oracle: Facts | None) -> str:
    if not oracle:
        return ""
    return (
        f"The demo's oracle reads {oracle['score']:.1f} % of {oracle['pictures']} captions as right in these pictures, "
        f"{oracle['reference_score']:.1f} % in PyTorch's: "
        f"{'within' if oracle['ok'] else 'beyond'} the {oracle['tolerance']:g} points that are allowed."
    )


def busy_note(load: float | None) -> str:
    """A warning under the times, where the machine had other work; None: it had not."""
    if load is None:
        return ""
    return f"The machine was busy with other work (load {load:.1f}): do not trust these milliseconds."


def db(value: float) -> str:
    """A ratio for people; JSON's stand-in for infinity is "equal"."""
    return "equal" if value >= EXACT_DB else f"{value:.1f} dB"
