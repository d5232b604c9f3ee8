"""The tokenizer of a bundle gives CLIPTokenizer's ids, and names the text that it cut."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Final

import numpy as np
import pytest
from diffusette.bundle.manifest_entries import FileEntry, TokenizerEntry
from diffusette.checkpoints.tokenizer import write_tokenizer
from diffusette.runtimes.txt2img.tokenizer import PromptTokenizer
from diffusette.stages.errors import BundleError, CheckpointError, UsageError
from transformers import CLIPTokenizer

DEMO: Final = Path(__file__).resolve().parents[3] / "demo/tokenizer"

PROMPTS: Final = {
    "empty": "",
    "plain": "a red circle",
    "upper case": "A RED Circle",
    "whitespace": "  a\t red\n circle  \u00a0\u2003",
    "accents": "café naïve ÅÉ İstanbul ẞ",
    "combining accents": "e\u0301 é cafe\u0301",
    "emoji": "🦊 fox 🎉👩‍👩‍👧",
    "other scripts": "日本語 текст عربي",
    "special tokens": "a <|endoftext|> b <|startoftext|>",
    "contractions": "it's they're 12345 !!! ... </w>",
    "75 tokens": "a " * 75,
    "76 tokens": "a " * 76,
    "long": "a red circle, " * 40,
    "long accents": "café 🦊 " * 40,
    "one long word": "x" * 300,
}


@pytest.fixture(scope="module")
def written(tmp_path_factory: pytest.TempPathFactory) -> PromptTokenizer:
    folder = tmp_path_factory.mktemp("tokenizer")
    facts = write_tokenizer(DEMO, folder)
    return PromptTokenizer(folder, facts["max_tokens"], facts["pad_id"])


@pytest.fixture(scope="module")
def reference() -> CLIPTokenizer:
    return CLIPTokenizer.from_pretrained(DEMO)


@pytest.mark.parametrize("name", PROMPTS)
def test_ids_and_removed_text_are_those_of_the_reference(
    name: str, written: PromptTokenizer, reference: CLIPTokenizer
) -> None:
    prompt = PROMPTS[name]
    expected = reference(prompt, padding="max_length", max_length=77, truncation=True, return_tensors="np").input_ids
    whole = reference(prompt, padding="longest", return_tensors="np").input_ids
    # as in StableDiffusionPipeline.encode_prompt
    cut = whole.shape[-1] >= expected.shape[-1] and not np.array_equal(whole, expected)
    removed = reference.batch_decode(whole[:, 76:-1]) if cut else [""]
    tokenized = written(prompt)
    assert tokenized.ids.dtype == np.int64
    assert np.array_equal(tokenized.ids, expected)
    assert [tokenized.removed] == removed
    assert (str(removed) in tokenized.warning) if cut else (tokenized.warning == "")


def test_padding_is_what_the_text_encoder_was_trained_with(tmp_path: Path) -> None:
    write_tokenizer(DEMO, tmp_path)
    assert PromptTokenizer(tmp_path, 10, 0)("a").ids[0, 3:].tolist() == [0] * 7


def test_both_forms_of_a_tokenizer_give_the_same_bytes(tmp_path: Path) -> None:
    source = tmp_path / "source"
    shutil.copytree(DEMO, source, ignore=shutil.ignore_patterns("tokenizer.json"))
    results = []
    for name, folder in (("a", DEMO), ("b", source), ("c", source)):
        (tmp_path / name).mkdir()
        facts = write_tokenizer(folder, tmp_path / name)
        results.append((facts, (tmp_path / name / "tokenizer.json").read_bytes()))
    assert results[0] == results[1] == results[2]
    facts = results[0][0]
    assert {name: facts[name] for name in ("max_tokens", "pad_id", "bos_id", "eos_id")} == {
        "max_tokens": 77, "pad_id": 680, "bos_id": 679, "eos_id": 680,
    }  # fmt: skip


def test_a_manifest_takes_what_is_said_about_the_tokenizer(tmp_path: Path) -> None:
    facts = write_tokenizer(DEMO, tmp_path)
    assert facts.pop("files") == [file.name for file in tmp_path.iterdir()]
    written = FileEntry(path="tokenizer/tokenizer.json", sha256="0" * 64, bytes=1)
    assert TokenizerEntry(files=(written,), **facts).max_tokens == 77


def test_a_folder_without_a_tokenizer_is_refused(tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match=r"vocab\.json"):
        write_tokenizer(tmp_path, tmp_path)


def test_a_length_that_nobody_states_is_refused(tmp_path: Path) -> None:
    source = tmp_path / "source"
    shutil.copytree(DEMO, source)
    config = json.loads((source / "tokenizer_config.json").read_text())
    del config["model_max_length"]
    (source / "tokenizer_config.json").write_text(json.dumps(config))
    with pytest.raises(CheckpointError, match="model_max_length"):
        write_tokenizer(source, tmp_path)


@pytest.mark.parametrize("content", [None, b"{", b"\xff\xfe", b'{"version": "1.0"}'])
def test_a_damaged_tokenizer_is_refused(content: bytes | None, tmp_path: Path) -> None:
    if content is not None:
        (tmp_path / "tokenizer.json").write_bytes(content)
    with pytest.raises(BundleError, match=r"tokenizer\.json"):
        PromptTokenizer(tmp_path, 77, 0)


def test_a_pad_id_outside_of_the_vocabulary_is_refused() -> None:
    with pytest.raises(BundleError, match="49407"):
        PromptTokenizer(DEMO, 77, 49407)


def test_a_prompt_that_is_no_text_is_refused(written: PromptTokenizer) -> None:
    with pytest.raises(UsageError, match="position 2"):
        written("a \udc80")
