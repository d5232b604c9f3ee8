"""Does the ncnn that is installed read weights of few bits as they were written?

The forms are not in ncnn's documentation, and its newer ones have changed between releases without a word: a file in
the older form loads and computes NaN. These two are the oldest; a second's thousandth at load time makes sure.
"""

from __future__ import annotations

import tempfile
from functools import cache
from importlib.metadata import version
from pathlib import Path
from typing import Final

import numpy as np

from ...pipeline.errors import ModelError
from ...quantize.codes import Codes
from .codes import BOOK, CODES, encode, unit
from .layout import Blob
from .param import Layer, render
from .slots import slots_of

_COLUMNS: Final = 51  # 5 x 51: every code, and a length that needs padding
_ROWS: Final = 5


@cache
def check_forms() -> None:
    """Let ncnn load codes in both forms, once a process, and compare every value.

    Raises:
        ModelError: it reads other values.
    """
    import ncnn

    codes = Codes(np.arange(-127, 128, dtype=np.int8).reshape(_ROWS, _COLUMNS), np.full((_ROWS, 1), 0.3, np.float32))
    sides = {0: str(_COLUMNS), 1: str(_ROWS), 21: "0"}
    layers = (
        Layer("MemoryData", "int8", (), ("int8",), sides),
        Layer("Cast", "codes", ("int8",), ("codes",), {0: "3", 1: "1"}),
        Layer("MemoryData", "book", (), ("book",), sides),
    )
    with tempfile.TemporaryDirectory(prefix="diffusette.ncnn.") as folder:
        param, weights = Path(folder) / "forms.param", Path(folder) / "forms.bin"
        param.write_text(render(layers))
        with weights.open("wb") as stream:
            for slot, kind in zip(slots_of(layers), (CODES, BOOK), strict=True):
                encode(stream, Blob(slot, kind, "forms", (_ROWS, _COLUMNS)), codes)
        net = ncnn.Net()
        statuses = [net.load_param(str(param)), net.load_model(str(weights))]
        read = {}
        if not any(statuses):
            extractor = net.create_extractor()
            for name in ("codes", "book"):
                status, mat = extractor.extract(name)
                statuses.append(status)
                read[name] = np.array(mat)  # a copy
                del mat
            del extractor  # its memory belongs to the net
        net.clear()
    expected = {"codes": codes.values, "book": codes.values * unit(codes)}
    wrong = [name for name, values in expected.items() if not np.array_equal(read.get(name, np.empty(0)), values)]
    if any(statuses) or wrong:
        raise ModelError(
            f"ncnn {version('ncnn')} misreads weights of few bits: {', '.join(wrong) or f'statuses {statuses}'}",
            hint="its file format has changed: install the ncnn that the bundle's manifest names, or convert to fp16",
        )
