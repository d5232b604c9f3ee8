"""The checkpoint of a bundle is found again, with what was given beside it, on any machine; and no other is taken."""

from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from diffusette.bundle.manifest_entries import AdapterEntry, Provenance, SourceEntry
from diffusette.checkpoints.checkpoint import open_checkpoint
from diffusette.stages.artifacts import Checkpoint, Companions
from diffusette.stages.cache import Cache
from diffusette.stages.errors import CheckpointError
from diffusette.validate.reference.origin import Origin, open_reference_checkpoint
from safetensors.torch import save_file

from ..adapters import ATTENTION, random_lora
from ..kinds import tiny_decoder


@pytest.fixture(scope="module")
def given(tiny_folder: Path, tmp_path_factory: pytest.TempPathFactory) -> Companions:
    from diffusers import UNet2DConditionModel

    folder = tmp_path_factory.mktemp("beside")
    unet = UNet2DConditionModel.from_pretrained(tiny_folder / "unet")
    save_file(random_lora(unet, ATTENTION, "lora_unet_"), folder / "style.safetensors")
    save_file(random_lora(unet, ATTENTION, "lora_unet_", seed=8), folder / "other.safetensors")
    tiny_decoder().save_pretrained(folder / "taesd")
    return Companions(vae_decoder=folder / "taesd", adapters=((folder / "style.safetensors", 0.6),))


def bundle_of(checkpoint: Checkpoint) -> Any:
    """As much of a bundle as is asked."""
    adapters = tuple(
        AdapterEntry(file=each.label, sha256=checkpoint.sources[each.place], scale=each.scale)
        for each in checkpoint.adapters
    )
    sources = tuple(SourceEntry(file=label, sha256=digest) for label, digest in checkpoint.sources.items())
    provenance = Provenance(checkpoint=checkpoint.digest, sources=sources, adapters=adapters, tools={})
    return SimpleNamespace(path=Path("out/ort"), manifest=SimpleNamespace(provenance=provenance))


@pytest.fixture(scope="module")
def bundle(tiny_folder: Path, given: Companions) -> Any:
    return bundle_of(open_checkpoint(tiny_folder, companions=given))


def refusal(bundle: Any, origin: Origin, cache: Cache) -> CheckpointError:
    with pytest.raises(CheckpointError) as caught:
        open_reference_checkpoint(bundle, origin, cache)
    assert caught.value.exit_code == 4
    return caught.value


def test_what_was_given_beside_it_can_be_given_again(
    bundle: Any, tiny_folder: Path, given: Companions, tmp_path: Path
) -> None:
    found = open_reference_checkpoint(bundle, Origin(str(tiny_folder), given), Cache(tmp_path))
    assert found.digest == bundle.manifest.provenance.checkpoint


def test_a_missing_adapter_is_asked_for_by_name_scale_and_digest(
    bundle: Any, tiny_folder: Path, given: Companions, tmp_path: Path
) -> None:
    problem = refusal(bundle, Origin(str(tiny_folder)), Cache(tmp_path))
    digest = bundle.manifest.provenance.adapters[0].sha256[:12]
    assert f"adapters merged then: style.safetensors at 0.6 (sha256 {digest})" in problem.what
    assert "adapters given now: none" in problem.what
    assert "vae_decoder/config.json" in problem.what
    assert "--adapter style.safetensors:0.6 --vae-decoder PATH" in problem.hint


def test_another_adapter_or_scale_is_told_from_the_one_that_was_merged(
    bundle: Any, tiny_folder: Path, given: Companions, tmp_path: Path
) -> None:
    ((place, _),) = given.adapters
    for wrong, told in (((place, 0.5), "style.safetensors at 0.5"), ((place.with_stem("other"), 0.6), "other.")):
        companions = Companions(vae_decoder=given.vae_decoder, adapters=(wrong,))
        problem = refusal(bundle, Origin(str(tiny_folder), companions), Cache(tmp_path))
        assert f"adapters given now: {told}" in problem.what
        assert "vae_decoder" not in problem.what  # that one is right


def test_another_checkpoint_is_told_by_the_files_that_differ(
    bundle: Any, tiny_copy: Path, given: Companions, tmp_path: Path
) -> None:
    weights = tiny_copy / "unet/diffusion_pytorch_model.safetensors"
    content = bytearray(weights.read_bytes())
    content[-1] ^= 1
    weights.write_bytes(content)
    problem = refusal(bundle, Origin(str(tiny_copy), given), Cache(tmp_path))
    assert "unet/diffusion_pytorch_model.safetensors has another content" in problem.what
    assert "text_encoder" not in problem.what
    assert "--reference" in problem.hint


def test_where_it_was_converted_only_what_has_moved_need_be_given(
    bundle: Any, tiny_folder: Path, given: Companions, tmp_path: Path
) -> None:
    ((place, scale),) = given.adapters
    cache, moved = Cache(tmp_path / "cache"), tmp_path / "moved.safetensors"
    cache.prepare()
    gone = Companions(vae_decoder=given.vae_decoder, adapters=((tmp_path / "gone.safetensors", scale),))
    cache.remember_source(bundle.manifest.provenance.checkpoint, tiny_folder, gone)
    assert "gone.safetensors: no such file" in refusal(bundle, Origin(), cache).what
    moved.write_bytes(place.read_bytes())
    found = open_reference_checkpoint(bundle, Origin(None, Companions(adapters=((moved, scale),))), cache)
    assert found.digest == bundle.manifest.provenance.checkpoint
