"""Tokenizers of strangers: read by a native library, which panics in places."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
from diffusette.checkpoints.checkpoint import DEMO_FOLDER
from diffusette.checkpoints.tokenizer import write_tokenizer
from diffusette.runtimes.txt2img.tokenizer import PromptTokenizer
from hypothesis import given

from .guard import answer
from .hostile import as_json, cases, edited, nested, scratched, values

SOURCE = DEMO_FOLDER / "tokenizer"


@pytest.fixture(scope="module")
def written(tmp_path_factory: pytest.TempPathFactory) -> Any:
    """What a bundle carries, with a small vocabulary, so that a change rarely hits one of hundreds of words."""
    folder = tmp_path_factory.mktemp("tokenizer")
    write_tokenizer(SOURCE, folder)
    content = json.loads((folder / "tokenizer.json").read_bytes())
    vocabulary = content["model"]["vocab"]
    content["model"]["vocab"] = {word: number for word, number in vocabulary.items() if len(word) < 2 or number > 670}
    content["model"]["merges"] = content["model"]["merges"][:3]
    return content


def use(folder: Path, pad_id: int) -> None:
    PromptTokenizer(folder, 77, pad_id)("a red star, naïve ☃ " * 20)


def test_a_bundles_tokenizer_of_any_content(written: Any, tmp_path: Path) -> None:
    @cases(300)
    @given(document=edited(written) | values)
    def any_content(document: Any) -> None:
        (tmp_path / "tokenizer.json").write_bytes(as_json(document))
        answer(lambda: use(tmp_path, 680), tmp_path)

    any_content()


def test_a_bundles_tokenizer_of_any_bytes(written: Any, tmp_path: Path) -> None:
    @cases(100)
    @given(content=scratched(as_json(written)))
    def any_bytes(content: bytes) -> None:
        (tmp_path / "tokenizer.json").write_bytes(content)
        answer(lambda: use(tmp_path, 680), tmp_path)

    any_bytes()
    (tmp_path / "tokenizer.json").write_text(nested(10**5))
    assert answer(lambda: use(tmp_path, 680), tmp_path) is not None


@pytest.mark.parametrize("name", sorted(file.name for file in SOURCE.iterdir() if file.suffix == ".json"))
def test_a_checkpoints_tokenizer_of_any_content(name: str, tmp_path: Path) -> None:
    folder = Path(shutil.copytree(SOURCE, tmp_path / "tokenizer"))
    (tmp_path / "into").mkdir()
    write_tokenizer(folder, tmp_path / "into")  # imports what it needs: no matter of a case
    whole = json.loads((folder / name).read_bytes())

    @cases(25)
    @given(document=edited(whole) | values)
    def any_content(document: Any) -> None:
        (folder / name).write_bytes(as_json(document))
        answer(lambda: write_tokenizer(folder, tmp_path / "into"), tmp_path)

    any_content()
