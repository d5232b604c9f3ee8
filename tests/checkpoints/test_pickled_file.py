"""Checkpoints that torch.save wrote: read by offset, and nothing in them is run."""

from __future__ import annotations

import time
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from diffusette.checkpoints.checkpoint import DEMO_FOLDER, open_checkpoint
from diffusette.checkpoints.pickled_file import read_pickled
from diffusette.checkpoints.safetensors_file import read_tensor
from diffusette.stages.artifacts import Companions
from diffusette.stages.errors import CheckpointError
from safetensors.torch import save_file

from ..adapters import ATTENTION, random_lora
from ..ldm import ldm_tensors, ldm_vae, original_pipeline, with_ema, write_ldm
from ..models import malicious_pickle

GIVEN = Companions(tokenizer=DEMO_FOLDER / "tokenizer")


def test_tensors_read_by_offset_are_those_that_torch_saved(tmp_path: Path) -> None:
    saved: dict[str, Any] = {
        "float": torch.randn(3, 4),
        "half": torch.randn(5).half(),
        "bf16": torch.randn(2, 2).bfloat16(),
        "whole": torch.arange(7),
        "scalar": torch.tensor(3.5),
        "transposed": torch.randn(3, 5).t(),
        "slice": torch.randn(10, 2)[4:7],
    }
    torch.save({"state_dict": saved, "global_step": 1}, tmp_path / "x.ckpt")
    found = read_pickled(tmp_path / "x.ckpt")
    assert set(found) == set(saved)
    for name, values in saved.items():
        np.testing.assert_array_equal(
            read_tensor(found[name]).astype(np.float64), values.double().numpy(), err_msg=name
        )


def test_a_pickle_is_read_whatever_its_name_says(tmp_path: Path) -> None:
    torch.save({"weight": torch.full((2, 3), 7.0)}, tmp_path / "x.safetensors")
    np.testing.assert_array_equal(read_tensor(read_pickled(tmp_path / "x.safetensors")["weight"]), np.full((2, 3), 7.0))


def test_the_child_needs_no_folder_to_write_to(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """torch asks for one as it is imported, unless the process that started it has found one already."""
    monkeypatch.delenv("TORCHINDUCTOR_CACHE_DIR", raising=False)
    torch.save({"weight": torch.ones(2)}, tmp_path / "x.ckpt")
    assert set(read_pickled(tmp_path / "x.ckpt")) == {"weight"}
    assert [file.name for file in tmp_path.iterdir()] == ["x.ckpt"]


def test_a_ckpt_is_the_checkpoint_that_its_safetensors_copy_is(tmp_path: Path) -> None:
    tensors = with_ema(ldm_tensors(original_pipeline("sd1")), lambda values: values * 2)
    write_ldm(tmp_path / "model.safetensors", tensors)
    write_ldm(tmp_path / "model.ckpt", tensors)
    save, pickled = (open_checkpoint(tmp_path / f"model.{end}", companions=GIVEN) for end in ("safetensors", "ckpt"))
    assert {n: part.digest for n, part in save.components.items()} == {
        n: part.digest for n, part in pickled.components.items()
    }
    assert save.digest == pickled.digest


def test_nan_in_a_ckpt_is_found(tmp_path: Path) -> None:
    tensors = ldm_tensors(original_pipeline("sd1"))
    tensors["model.diffusion_model.out.2.bias"][0] = float("nan")
    with pytest.raises(CheckpointError, match=r"conv_out\.bias.*holds 1 NaN"):
        open_checkpoint(write_ldm(tmp_path / "model.ckpt", tensors), companions=GIVEN)


def test_vae_and_adapter_may_be_pickles_of_tensors_too(tiny_folder: Path, tmp_path: Path) -> None:
    from diffusers import UNet2DConditionModel

    pipeline = original_pipeline("sd1")
    write_ldm(tmp_path / "model.safetensors", ldm_tensors(pipeline))
    write_ldm(tmp_path / "vae.pt", ldm_vae(pipeline.vae, prefix=""))
    found = open_checkpoint(
        tmp_path / "model.safetensors", companions=Companions(tokenizer=GIVEN.tokenizer, vae=tmp_path / "vae.pt")
    )
    assert "vae/vae.pt" in found.sources
    state = random_lora(UNet2DConditionModel.from_pretrained(tiny_folder / "unet"), ATTENTION, "lora_unet_")
    torch.save(state, tmp_path / "lora.pt")
    save_file(state, tmp_path / "lora.safetensors")
    one, other = (
        open_checkpoint(tiny_folder, companions=Companions(adapters=((tmp_path / f"lora.{end}", 1.0),)))
        for end in ("pt", "safetensors")
    )
    assert one.components["unet"].digest == other.components["unet"].digest


@pytest.mark.parametrize("name", ["model.ckpt", "model.pt", "model.safetensors"])
def test_code_is_refused_by_its_name_and_not_run(name: str, tmp_path: Path) -> None:
    malicious_pickle(tmp_path / name, tmp_path / "ran")
    started = time.perf_counter()
    with pytest.raises(CheckpointError) as caught:
        open_checkpoint(tmp_path / name)
    assert time.perf_counter() - started < 5
    assert caught.value.exit_code == 4
    assert not (tmp_path / "ran").exists()
    if name != "model.ckpt":  # that one is a bare pickle, no archive of torch
        assert "runs code: it calls posix.mkdir" in caught.value.what


def test_names_hidden_from_the_first_look_are_refused_by_torch(tmp_path: Path) -> None:
    import pickle
    import zipfile

    file = tmp_path / "hidden.ckpt"
    torch.save({"a": torch.zeros(2)}, file)

    class Hidden:
        def __reduce__(self) -> Any:
            import os

            return os.mkdir, (str(tmp_path / "ran"),)

    # protocol 4 names functions by two texts on the stack; a third text between them misleads who only lists opcodes
    structure = pickle.dumps(Hidden(), protocol=4).replace(b"\x93", b"\x8c\x01ab0\x93".replace(b"ab0", b"a0"))
    with zipfile.ZipFile(file) as old, zipfile.ZipFile(tmp_path / "new.ckpt", "w") as new:
        for entry in old.namelist():
            new.writestr(entry, structure if entry.endswith("data.pkl") else old.read(entry))
    with pytest.raises(CheckpointError):
        read_pickled(tmp_path / "new.ckpt")
    assert not (tmp_path / "ran").exists()


def test_a_cut_or_foreign_archive_is_refused(tmp_path: Path) -> None:
    import zipfile

    torch.save({"a": torch.zeros(2000)}, tmp_path / "x.ckpt")
    whole = (tmp_path / "x.ckpt").read_bytes()
    (tmp_path / "cut.ckpt").write_bytes(whole[: len(whole) // 2])
    with zipfile.ZipFile(tmp_path / "foreign.ckpt", "w") as archive:
        archive.writestr("readme.txt", "hello")
    for name, message in (("cut", "or damaged"), ("foreign", "torch.save did not write")):
        with pytest.raises(CheckpointError, match=message):
            read_pickled(tmp_path / f"{name}.ckpt")


def test_tensors_of_no_checkpoint_are_called_what_they_are(tmp_path: Path) -> None:
    torch.save({"lora_unet_mid_block.lora_down.weight": torch.zeros(2)}, tmp_path / "lora.pt")
    with pytest.raises(CheckpointError, match="a LoRA"):
        open_checkpoint(tmp_path / "lora.pt")
