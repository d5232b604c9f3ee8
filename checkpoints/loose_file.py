"""What was handed in instead of a diffusers folder: named, so that the refusal is of use."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Final, NoReturn

from ..stages.artifacts import StoredTensor, with_role
from ..stages.errors import CheckpointError
from ..stages.plain_file import open_plain
from .diffusers_folder import INDEX, read_json
from .families import Headers, refuse_unsupported
from .file_kind import FOLDER, describe_foreign
from .pickled_file import is_pickled, read_pickled, spelled_in
from .safetensors_file import read_header

LDM_UNET: Final = "model.diffusion_model."  # where the original code keeps the UNet
_WEIGHT_SUFFIXES = (".safetensors", ".ckpt", ".pt", ".pth", ".bin", ".gguf", ".onnx")


def is_single_file(path: Path) -> bool:
    """Whether `path` is one file with a whole checkpoint of the original code. Reads its header.

    Raises:
        CheckpointError: it is a pickle that would run code, or is damaged.
    """
    if not path.is_file():
        return False
    if is_pickled(path):
        return any(name.startswith(LDM_UNET) for name in spelled_in(path))
    return (
        describe_foreign(path) is None
        and _looks_like_safetensors(path)
        and any(name.startswith(LDM_UNET) for name in read_header(path))
    )


def refuse_loose(path: Path) -> NoReturn:
    """Say what `path`, which is no diffusers folder, is instead. Reads headers only.

    Raises:
        CheckpointError: always.
    """
    if path.is_dir():
        _refuse_folder(path)
    if path.exists():
        _refuse_file(path)
    raise CheckpointError(
        f"{path}: no such file or folder", hint="nothing is downloaded for you: fetch the checkpoint first"
    )


def _refuse_folder(folder: Path) -> NoReturn:
    if (folder / "config.json").is_file():
        config = read_json(folder / "config.json")
        refuse_unsupported(Headers(configs={"": config}), str(folder))
    for file in sorted(folder.iterdir()):
        if file.suffix in _WEIGHT_SUFFIXES and file.is_file():
            _refuse_file(file)
    # the second is where the hub's cache keeps a repository's files
    inside = sorted((*folder.glob(f"*/{INDEX}"), *folder.glob(f"snapshots/*/{INDEX}")))
    hint = f"did you mean {inside[0].parent}?" if inside else FOLDER
    parts = [file.parent.name for file in sorted(folder.glob("*/config.json"))]
    if with_role("denoiser", parts) and not inside:
        raise CheckpointError(
            f"{folder}: {', '.join(parts)} of a diffusers folder, without its {INDEX}",
            hint=f"download {INDEX} too: it says what belongs together",
        )
    raise CheckpointError(f"{folder}: not a checkpoint: no {INDEX} in it", hint=hint)


def _refuse_file(file: Path) -> NoReturn:
    if is_pickled(file):
        refuse_unsupported(Headers(tensors={"": dict.fromkeys(spelled_in(file), ())}), str(file))
        _refuse_tensors(file, read_pickled(file))
    foreign = describe_foreign(file)
    if foreign is not None:
        raise CheckpointError(f"{file}: {foreign.what}, not a checkpoint that can be opened", hint=foreign.hint)
    if not _looks_like_safetensors(file):
        raise CheckpointError(f"{file}: not a checkpoint: neither safetensors nor any format known here", hint=FOLDER)
    _refuse_tensors(file, read_header(file))


def _refuse_tensors(file: Path, tensors: Mapping[str, StoredTensor]) -> NoReturn:
    shapes = {tensor.name: tensor.shape for tensor in tensors.values()}
    refuse_unsupported(Headers(tensors={"": shapes}), str(file))
    shown = ", ".join(list(shapes)[:3])
    raise CheckpointError(f"{file}: {len(shapes)} tensors of no known model ({shown}, ...)", hint=FOLDER)


def _looks_like_safetensors(file: Path) -> bool:
    with open_plain(file) as stream:
        head = stream.read(9)
    return file.suffix == ".safetensors" or head[8:] == b"{"
