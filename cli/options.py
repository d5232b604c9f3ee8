"""Options that several commands share, and what their text means."""

from __future__ import annotations

import math
import re
from collections.abc import Callable
from functools import wraps
from inspect import Parameter, Signature, signature
from pathlib import Path
from typing import Annotated, Any, Final

import typer

from ..stages.artifacts import Companions
from ..stages.errors import UsageError

Json = Annotated[bool, typer.Option("--json", help="Print one JSON document on stdout and nothing else.")]
Threads = Annotated[int, typer.Option("--threads", metavar="N", min=1, help="CPU threads that the runtime may use.")]

MachineOption = Annotated[
    list[str] | None,
    typer.Option(
        "--machine",
        metavar="NAME",
        help="Run the models on another processor: arm64 or arm64:PROCESSOR (emulated), vulkan or native; repeat.",
    ),
]

VaeDecoder = Annotated[
    Path | None,
    typer.Option(
        "--vae-decoder", metavar="PATH", help="The folder of a tiny decoder (TAESD, TAEXL) that replaces the VAE's."
    ),
]
Controlnet = Annotated[
    list[Path] | None,
    typer.Option(
        "--controlnet",
        metavar="PATH",
        help="A ControlNet, as a folder or a file; the bundle then takes a control picture.",
    ),
]
Vae = Annotated[
    Path | None, typer.Option("--vae", metavar="PATH", help="A VAE to use instead: a folder or a safetensors file.")
]
TokenizerFolder = Annotated[
    Path | None,
    typer.Option(
        "--tokenizer",
        metavar="FOLDER",
        help="The folder of the tokenizer. [default: the checkpoint's; for a single file, CLIP's]",
    ),
]
Config = Annotated[
    Path | None,
    typer.Option(
        "--config",
        metavar="PATH",
        help="For a single file: a folder of diffusers configurations, or the original YAML.",
    ),
]
Prediction = Annotated[
    str | None,
    typer.Option(
        "--prediction", metavar="KIND", help="What a single file predicts, if it does not say: epsilon or v_prediction."
    ),
]
Ema = Annotated[bool, typer.Option("--ema", help="Take the averaged weights of a single file that holds both.")]

Adapters = Annotated[
    list[str] | None,
    typer.Option(
        "--adapter",
        metavar="PATH[:SCALE]",
        help="A LoRA, DoRA, LoHa, LoKr, OFT, BOFT or textual inversion; repeat for several. [default scale: 1]",
    ),
]

_SIZE: Final = re.compile(r"(\d+)x(\d+)", re.IGNORECASE)


def parse_adapter(text: str) -> tuple[Path, float]:
    """`style.safetensors:0.8` -> its path and 0.8; without a scale, 1.

    Raises:
        UsageError: the scale is no finite number.
    """
    path, colon, scale = text.rpartition(":")
    if not colon or Path(text).exists():  # a name may hold a colon
        return Path(text), 1.0
    try:
        value = float(scale)
    except ValueError:
        raise UsageError(
            f"--adapter {text!r}: {scale!r} is no number, and there is no such file", hint="the form is PATH[:SCALE]"
        ) from None
    if not math.isfinite(value):
        raise UsageError(f"--adapter {text!r}: the scale is {value}, a finite number is needed")
    return Path(path), value


_BESIDE: Final[dict[str, tuple[Any, Any]]] = {
    "adapter": (Adapters, None),
    "vae": (Vae, None),
    "vae_decoder": (VaeDecoder, None),
    "controlnet": (Controlnet, None),
    "tokenizer": (TokenizerFolder, None),
    "config": (Config, None),
    "prediction": (Prediction, None),
    "ema": (Ema, False),
}
"""Parameter -> option and default, of what is given beside a checkpoint."""


def takes_companions(command: Callable[..., int]) -> Callable[..., int]:
    """`command` with the options of `_BESIDE` in place of its parameter `companions`, which is made of them."""
    parameters: list[Parameter] = []
    for own in signature(command, eval_str=True).parameters.values():
        if own.name == "companions":
            parameters += [own.replace(name=n, annotation=kind, default=d) for n, (kind, d) in _BESIDE.items()]
        else:
            parameters.append(own)

    @wraps(command)
    def run(**given: Any) -> int:
        beside = {name: given.pop(name) for name in _BESIDE}
        adapters, controlnets = beside.pop("adapter") or (), beside.pop("controlnet") or [None]
        if len(controlnets) > 1:
            what = f"--controlnet was given {len(controlnets)} times ({', '.join(map(str, controlnets))})"
            raise UsageError(what, hint="a bundle holds one ControlNet")
        found = Companions(controlnet=controlnets[0], adapters=tuple(map(parse_adapter, adapters)), **beside)
        return command(**given, companions=found)

    run.__signature__ = Signature(parameters)  # type: ignore[attr-defined]
    run.__annotations__ = {each.name: each.annotation for each in parameters}
    return run


def parse_size(text: str) -> tuple[int, int]:
    """`512x768` -> (512, 768): height, then width, in pixels.

    Raises:
        UsageError: another form, or sides that no latent has.
    """
    match = _SIZE.fullmatch(text.strip())
    if not match:
        raise UsageError(f"--size {text!r} is not HEIGHTxWIDTH in pixels", hint="for example --size 512x512")
    height, width = int(match[1]), int(match[2])
    # a recipe is checked for the same; here, so that of several sizes the last is refused before the first is made
    if any(side <= 0 or side % 8 for side in (height, width)):
        raise UsageError(f"--size {text}: both sides must be positive multiples of 8", hint="such as --size 512x512")
    return height, width
