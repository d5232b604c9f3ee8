"""Words of textual inversions: rows in the text encoder, tokens in the tokenizer, as diffusers does it."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from diffusers import StableDiffusionPipeline
from diffusette.checkpoints.checkpoint import open_checkpoint
from diffusette.checkpoints.tokenizer import write_tokenizer
from diffusette.checkpoints.weights import Weights
from diffusette.export.modules import load
from diffusette.runtimes.txt2img.tokenizer import PromptTokenizer
from diffusette.stages.artifacts import Checkpoint, Companions
from diffusette.stages.errors import CheckpointError
from safetensors.torch import save_file

from ..ldm import ldm_tensors, original_pipeline, write_ldm

PROMPTS = ("a <star-toy> on red", "<star-toy>", "a red star", "blurry", "blurry <star-toy>, blue")


def opened(folder: Path, *places: Path, scale: float = 1.0) -> Checkpoint:
    given = Companions(adapters=tuple((place, scale) for place in places))
    return open_checkpoint(folder, companions=given, survey=False)


@pytest.fixture(scope="module")
def words(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    """One word of one vector in diffusers' key, and one of three in A1111's, named by its file."""
    folder = tmp_path_factory.mktemp("words")
    torch.manual_seed(2)
    save_file({"<star-toy>": torch.randn(32)}, folder / "learned_embeds.safetensors")
    save_file({"emb_params": torch.randn(3, 32)}, folder / "blurry.safetensors")
    return folder / "learned_embeds.safetensors", folder / "blurry.safetensors"


def test_prompts_with_new_words_are_encoded_as_diffusers_does(
    tiny_folder: Path, words: tuple[Path, Path], tmp_path: Path
) -> None:
    live: Any = StableDiffusionPipeline.from_pretrained(tiny_folder, safety_checker=None)
    live.load_textual_inversion(words[0])
    live.load_textual_inversion(words[1], token="blurry")
    found = opened(tiny_folder, *words)
    assert found.words == ("<star-toy>", "blurry", "blurry_1", "blurry_2")
    facts = write_tokenizer(found.tokenizer, tmp_path, found.words)
    tokenizer = PromptTokenizer(tmp_path, facts["max_tokens"], facts["pad_id"])
    encoder = load(found.components["text_encoder"])
    for prompt in PROMPTS:
        ids = torch.from_numpy(tokenizer(prompt).ids)
        spelled = live.maybe_convert_prompt(prompt, live.tokenizer)
        expected = live.tokenizer(spelled, padding="max_length", max_length=77, return_tensors="pt").input_ids
        assert ids.tolist() == expected.tolist(), prompt
        with torch.no_grad():
            states = live.text_encoder(expected).last_hidden_state
            torch.testing.assert_close(encoder(ids), states, rtol=1e-5, atol=1e-5)


def test_the_digest_of_the_text_encoder_covers_new_words(tiny_folder: Path, words: tuple[Path, Path]) -> None:
    plain, more = (
        open_checkpoint(tiny_folder, companions=Companions(adapters=adapters)).components
        for adapters in ((), ((words[0], 1.0),))
    )
    assert plain["text_encoder"].digest != more["text_encoder"].digest
    assert plain["unet"].digest == more["unet"].digest


def test_a1111s_pt_is_read_whatever_token_it_was_trained_in_the_place_of(tiny_folder: Path, tmp_path: Path) -> None:
    """As Stable Diffusion's web interface saves one; the token beside the vectors made it "no adapter known here"."""
    vectors = torch.randn(3, 32)
    state = {"string_to_token": {"*": torch.tensor(265)}, "string_to_param": {"*": torch.nn.Parameter(vectors)}}
    torch.save({**state, "name": "gritty", "step": 5000, "sd_checkpoint": "x"}, tmp_path / "gritty.pt")
    found = opened(tiny_folder, tmp_path / "gritty.pt")
    assert found.words == ("gritty", "gritty_1", "gritty_2")
    rows = Weights(found.components["text_encoder"]).read("embeddings.token_embedding.weight")[-3:]
    torch.testing.assert_close(torch.from_numpy(rows), vectors)


def test_sdxls_words_have_vectors_for_both_encoders(tmp_path: Path) -> None:
    file = write_ldm(tmp_path / "model.safetensors", ldm_tensors(original_pipeline("sdxl")))
    save_file({"clip_l": torch.randn(2, 64), "clip_g": torch.randn(2, 128)}, tmp_path / "toy.safetensors")
    save_file({"clip_l": torch.randn(2, 64)}, tmp_path / "half.safetensors")
    from diffusette.checkpoints.checkpoint import DEMO_FOLDER

    def components(name: str) -> Checkpoint:
        given = Companions(tokenizer=DEMO_FOLDER / "tokenizer", adapters=((tmp_path / name, 1.0),))
        return open_checkpoint(file, companions=given, survey=False)

    found = components("toy.safetensors")
    assert found.words == ("toy", "toy_1")
    assert {found.components[n].config["vocab_size"] for n in ("text_encoder", "text_encoder_2")} == {683}
    with pytest.raises(CheckpointError, match="the checkpoint has text_encoder, text_encoder_2"):
        components("half.safetensors")


def test_what_cannot_be_added_is_refused(tiny_folder: Path, words: tuple[Path, Path], tmp_path: Path) -> None:
    save_file({"emb_params": torch.zeros(1, 768)}, tmp_path / "wide.safetensors")
    save_file({"emb_params": torch.zeros(1, 32)}, tmp_path / "two words.safetensors")
    save_file({"emb_params": torch.zeros(1, 32)}, tmp_path / "a.safetensors")
    for place, message in (
        (tmp_path / "wide.safetensors", "vectors of 768"),
        (tmp_path / "two words.safetensors", "has a space"),
    ):
        with pytest.raises(CheckpointError, match=message):
            opened(tiny_folder, place)
    with pytest.raises(CheckpointError, match="is added twice"):
        opened(tiny_folder, words[0], words[0])
    with pytest.raises(CheckpointError, match="no scale"):
        opened(tiny_folder, words[0], scale=0.5)
    taken = opened(tiny_folder, tmp_path / "a.safetensors")
    with pytest.raises(CheckpointError, match="is a token already"):
        write_tokenizer(taken.tokenizer, tmp_path, taken.words)
