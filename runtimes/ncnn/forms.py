"""Does the ncnn that is installed read weights of few bits, and multiply them, as they were written?

The forms are not in ncnn's documentation, and its newer ones have changed between releases without a word: a file in
the older form loads and computes NaN. These two are the oldest; a second's thousandth at load time makes sure.
"""

from __future__ import annotations

import tempfile
from collections.abc import Mapping, Sequence
from functools import cache
from importlib.metadata import version
from pathlib import Path
from typing import Any, Final

import numpy as np
from numpy.typing import NDArray

from ...quantize.codes import Codes
from ...stages.errors import ModelError
from . import products
from .arithmetic import SELF_TESTS, net_with
from .codes import BOOK, CODES, INPUT_MULTIPLIER, MULTIPLIERS, UNIT, encode, unit
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
    codes = Codes(np.arange(-127, 128, dtype=np.int8).reshape(_ROWS, _COLUMNS), np.full((_ROWS, 1), 0.3, np.float32))
    sides = {0: str(_COLUMNS), 1: str(_ROWS), 21: "0"}
    layers = (
        Layer("MemoryData", "int8", (), ("int8",), sides),
        Layer("Cast", "codes", ("int8",), ("codes",), {0: "3", 1: "1"}),
        Layer("MemoryData", "book", (), ("book",), sides),
    )
    expected = {"codes": codes.values, "book": codes.values * unit(codes)}
    _compare(layers, [(CODES, codes), (BOOK, codes)], {}, expected, "misreads weights of few bits")


@cache
def check_products() -> None:
    """Let ncnn multiply integers whose products are known, once a process.

    Raises:
        ModelError: it gets something else.
    """
    codes = Codes(np.array([[127, -3], [5, 64]], np.int8), np.array([[0.5], [0.25]], np.float32))
    x = np.array([[127, 1], [-2, 127]], np.float32)  # each row and the whole reach 127: rounding changes nothing
    layers = (
        Layer("Input", "rows", (), ("rows",), {}),
        Layer(
            "Gemm", "g", ("rows",), ("g",), {3: "1", 5: "1", 6: "1", 8: "2", 9: "2", 10: "-1", products.GEMM_TERM: "2"}
        ),
        Layer("Input", "image", (), ("image",), {}),
        Layer("Convolution", "c", ("image",), ("c",), {0: "2", 1: "1", 6: "4", products.CONVOLUTION_TERM: "2"}),
    )
    sums = x @ codes.values.T.astype(np.float32)
    image = np.ascontiguousarray(x.T)[:, None]  # [channels, 1, 2]: the rows, as positions of a picture
    expected = {"g": sums * unit(codes), "c": (sums * codes.scales[:, 0]).T[:, None]}
    contents = [(CODES, codes), (UNIT, codes), (CODES, codes), (MULTIPLIERS, codes), (INPUT_MULTIPLIER, codes)]
    _compare(layers, contents, {"rows": x, "image": image}, expected, "multiplies integers otherwise than it did")


def _compare(
    layers: Sequence[Layer],
    contents: Sequence[tuple[str, Codes]],
    feeds: Mapping[str, NDArray[np.float32]],
    expected: Mapping[str, NDArray[Any]],
    complaint: str,
) -> None:
    """Write `layers` with `contents` in their slots and compare what ncnn makes of `feeds`."""
    import ncnn

    with tempfile.TemporaryDirectory(prefix="diffusette.ncnn.") as folder:
        param, weights = Path(folder) / "forms.param", Path(folder) / "forms.bin"
        param.write_text(render(layers))
        with weights.open("wb") as stream:
            for slot, (kind, codes) in zip(slots_of(layers), contents, strict=True):
                encode(stream, Blob(slot, kind, "forms", codes.values.shape), codes, entering=(-127.0, 127.0))
        net = net_with(SELF_TESTS, threads=1)
        statuses = [net.load_param(str(param)), net.load_model(str(weights))]
        read = {}
        if not any(statuses):
            extractor = net.create_extractor()
            for name, array in feeds.items():
                statuses.append(extractor.input(name, ncnn.Mat(array).clone()))
            for name in expected:
                status, mat = extractor.extract(name)
                statuses.append(status)
                read[name] = np.array(mat)  # a copy
                del mat
            del extractor  # its memory belongs to the net
        net.clear()
    wrong = [name for name, values in expected.items() if not _equal(read.get(name), values)]
    if any(statuses) or wrong:
        raise ModelError(
            f"ncnn {version('ncnn')} {complaint}: {', '.join(wrong) or f'statuses {statuses}'}",
            hint="its file format has changed: install the ncnn that the bundle's manifest names, or convert to fp16",
        )


def _equal(read: NDArray[Any] | None, values: NDArray[Any]) -> bool:
    """To the last bits of float32, in which products are scaled."""
    return read is not None and read.shape == values.shape and np.allclose(read, values, rtol=1e-6, atol=0)
