"""The tables of a `.mnn` at the real width, from those of two narrow copies."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from math import prod
from pathlib import Path
from typing import Any, Final

import numpy as np
from numpy.typing import NDArray

from ..fingerprints import Fingerprints
from ..narrowing import NotAlikeError, Width, carried
from .copies import Copies, Copy
from .flat import Values
from .half import cut_to_half
from .schema import MAINS

Array = NDArray[Any]
Operation = dict[str, Any]  # {"op": an Op's table, "pieces": the weights that it holds}
Piece = dict[str, Any]  # {"parameter": name, "axes": the order in which they are written}, or {"zeros": True}

FLOAT, INT32, HALF = 1, 3, 19  # DataType
_PAYLOADS: Final = {FLOAT: ("float32s", "<f4"), INT32: ("int32s", "<i4"), HALF: ("uint8s", "<f2")}
_LARGEST: Final = 2**30  # MNN's converter cuts integers to it
# Fields whose bytes lie in the weight file instead.
_MOVED: Final = {"Convolution2D": ("weight", "bias"), "LayerNorm": ("gamma", "beta")}
_MOVED_CODES: Final = ("buffer", "alpha", "index", "alphaFp16")


@dataclass(frozen=True)
class Converted:
    """A copy after its conversion."""

    copy: Copy
    net: Values
    weights: Path


@dataclass(frozen=True)
class _Carry:
    """Carries numbers on from two widths to the real one."""

    widths: tuple[Width, Width]
    real: int
    aliases: Mapping[int, int]

    def value(self, where: str, one: Any, two: Any) -> Any:
        """Tables, lists and numbers at the real width, in plain values."""
        if type(one) is not type(two):
            raise NotAlikeError(f"{where} is a {type(one).__name__} at one width, a {type(two).__name__} at the other")
        if isinstance(one, dict):
            if one.keys() != two.keys():
                raise NotAlikeError(f"{where} has {', '.join(sorted(one.keys() ^ two.keys()))} at one width only")
            return {key: self.value(f"{where}.{key}", one[key], two[key]) for key in one}
        if isinstance(one, np.ndarray):
            one, two = one.tolist(), two.tolist()
        if isinstance(one, list):
            if len(one) != len(two):
                raise NotAlikeError(f"{where} has {len(one)} entries at one width, {len(two)} at the other")
            return [self.value(where, a, b) for a, b in zip(one, two, strict=True)]
        if one == two and not isinstance(one, int):
            return one
        if not isinstance(one, int):
            raise NotAlikeError(f"{where} is {one!r} at one width, {two!r} at the other")
        return carried(one, two, self.widths, self.real, self.aliases)


def widened(
    plain: Sequence[Converted], formed: Sequence[Converted], widths: tuple[Width, Width], real: int, copies: Copies
) -> tuple[Values, list[Operation]]:
    """The model's table at width `real` without its operations, and these.

    A constant that is no weight has its numbers under `values`, wherever they will be written.

    Args:
        plain: two copies at `widths` in float32, where weights are recognised; `formed`: in the form asked for.
    Raises:
        NotAlikeError: what cannot be carried on, or a weight that is not a whole parameter.
    """
    carry = _Carry(widths, real, copies.aliases)
    sides = [converted.net["oplists"] for converted in formed]
    held = [_held(converted) for converted in plain]
    names = [[op.get("name") for op in converted.net["oplists"]] for converted in (*plain, *formed)]
    if held[0] != held[1] or any(side != names[0] for side in names):
        raise NotAlikeError("the copies have other operations, or hold other weights in their places")
    operations = []
    for one, two, pieces in zip(*sides, held[0], strict=True):
        where, kind = repr(one.get("name")), MAINS.get(one["main_type"], "")
        op = _equal(where, *({key: op[key] for key in op if key != "main"} for op in (one, two)))
        mains = [op["main"] for op in (one, two) if "main" in op]
        if kind == "Blob":
            op["main"] = _constant(op["name"], mains, bool(pieces), carry, formed)
        elif kind in _MOVED:
            op["main"] = _layer(kind, mains, carry, where)
        elif mains:
            op["main"] = carry.value(where, *mains)
        operations.append({"op": op, "pieces": pieces})
    _check(operations, copies)
    apart = ("oplists", "mnn_uuid")  # that one is random
    net = _equal("the model", *({k: v for k, v in c.net.items() if k not in apart} for c in formed))
    return {**net, "mnn_uuid": "0" * len(formed[0].net["mnn_uuid"])}, operations


def _equal(where: str, one: Values, two: Values) -> Values:
    """A table whose numbers are indices: they are the same at any width."""
    plain = [
        {key: value.tolist() if isinstance(value, np.ndarray) else value for key, value in table.items()}
        for table in (one, two)
    ]
    if plain[0] != plain[1]:
        raise NotAlikeError(f"{where} is wired otherwise at the other width")
    return plain[0]


def _held(converted: Converted) -> list[list[Piece]]:
    """Of each operation, the weights that it holds; none of a constant that is no weight."""
    found = []
    for op in converted.net["oplists"]:
        main, kind = op.get("main", {}), MAINS.get(op["main_type"])
        blobs: list[Array] = []
        if kind == "Blob" and main["dataType"] == FLOAT:
            blobs = [_payload(converted, main)]
        elif kind in _MOVED:
            blobs = _stored(converted, main)
        pieces = [_piece(blob, converted.copy.fingerprints, repr(op["name"])) for blob in blobs]
        found.append([] if kind == "Blob" and not any("parameter" in piece for piece in pieces) else pieces)
    return found


def _piece(values: Array, fingerprints: Fingerprints, where: str) -> Piece:
    patterns = np.ascontiguousarray(values).view(np.uint32)
    if known := fingerprints.recognise(patterns):
        return {"parameter": known[0], "axes": list(known[1])}
    if fingerprints.any_in(patterns) and patterns.size > 1:
        raise NotAlikeError(f"{where} holds a part of a parameter, or a mixture")
    return {} if patterns.any() else {"zeros": True}


def _stored(converted: Converted, main: Values) -> list[Array]:
    """What a table keeps in the weight file, as float32."""
    start, *sizes = [int(number) for number in main.get("external", (0,))]
    with converted.weights.open("rb") as weights:
        weights.seek(start)
        return [np.frombuffer(weights.read(size), np.float32) for size in sizes]


def _payload(converted: Converted, main: Values) -> Array:
    """The numbers of a constant, wherever they lie."""
    field, dtype = _PAYLOADS[main["dataType"]]
    if "external" in main:
        with converted.weights.open("rb") as weights:
            weights.seek(int(main["external"][0]))
            return np.frombuffer(weights.read(int(main["external"][1])), dtype)
    return np.ascontiguousarray(main.get(field, np.empty(0, dtype))).view(dtype)


def _layer(kind: str, mains: Sequence[Values], carry: _Carry, where: str) -> Values:
    """A table whose weights lie in the weight file: of `external` only the length is right."""
    counts = {len(main.get("external", ())) for main in mains}
    quantised = [main.get("quanParameter", {}) for main in mains]
    inside = [field for main in mains for field in _MOVED[kind] if field in main]
    inside += [field for table in quantised for field in _MOVED_CODES if field in table]
    if len(counts) != 1 or inside:
        raise NotAlikeError(f"{where} does not keep its weights in a file of their own")
    count = counts.pop()
    table: Values = carry.value(where, *({k: v for k, v in main.items() if k != "external"} for main in mains))
    return {**table, "external": [0] * count} if count else table


def _constant(
    name: str, mains: Sequence[Values], is_weight: bool, carry: _Carry, formed: Sequence[Converted]
) -> Values:
    """A constant: the graph's own as the real graph has it, others carried on. A weight is without numbers."""
    kept = ("dims", "dataFormat", "dataType")
    made: Values = carry.value(repr(name), *({k: main[k] for k in kept if k in main} for main in mains))
    kind = made["dataType"]
    if kind not in _PAYLOADS or set(mains[0]) - {*kept, _PAYLOADS[kind][0], "external"}:
        raise NotAlikeError(f"the constant {name!r} is of a type that is not expected: {kind}")
    if is_weight:
        return made
    given = [_payload(converted, main) for converted, main in zip(formed, mains, strict=True)]
    known = [converted.copy.constants.get(name) for converted in formed]
    if all(pair and _is(main, values, pair[0]) for main, values, pair in zip(mains, given, known, strict=True)):
        assert known[0] is not None
        real = known[0][1]
        made = {**made, "dims": list(real.shape)} if real.shape else made
        return {**made, "values": _as_mnn(real, kind).tolist()}
    if kind == HALF:
        raise NotAlikeError(f"{name!r} is a float that the graph does not have")
    return {**made, "values": carry.value(repr(name), *given)}


def _is(main: Values, values: Array, constant: Array) -> bool:
    """Whether a converted constant is one of the graph's."""
    if list(main.get("dims", ())) != list(constant.shape):
        return False
    expected = _as_mnn(constant, main["dataType"])
    return np.array_equal(cut_to_half(expected) if main["dataType"] == HALF else expected, values)


def _as_mnn(constant: Array, kind: int) -> Array:
    """A constant of ONNX in the order and, unless that is float16, the type in which MNN keeps it."""
    if kind == INT32:
        return np.clip(constant.reshape(-1).astype(np.int64), -_LARGEST, _LARGEST).astype(np.int32)
    return constant.reshape(-1).astype(np.float32)


def _check(operations: Sequence[Operation], copies: Copies) -> None:
    """Every parameter is somewhere, each weight as large as its operation says, and inputs are the graph's."""
    used: set[str] = set()
    for operation in operations:
        op, pieces = operation["op"], operation["pieces"]
        main, kind = op.get("main", {}), MAINS.get(op["main_type"])
        sizes: Sequence[int | None] = ()
        if kind == "Convolution2D":
            common = main["common"]
            kernel = common["kernelX"] * common["kernelY"] * common["inputCount"] // common["group"]
            sizes = (common["outputCount"] * kernel, common["outputCount"])
        elif kind == "Blob" and pieces:
            sizes = (prod(main.get("dims", ())),)
        elif kind == "Input" and list(copies.inputs.get(op["name"], ())) != main.get("dims", []):
            raise NotAlikeError(f"the input {op['name']!r} is {main.get('dims')}, not {copies.inputs.get(op['name'])}")
        for piece, size in zip(pieces, sizes or (None,) * len(pieces), strict=True):
            shape = copies.shapes[piece["parameter"]] if "parameter" in piece else ()
            if shape and size is not None and prod(shape) != size:
                raise NotAlikeError(f"{op['name']!r} has {size} numbers, and {piece['parameter']} is {list(shape)}")
            if kind in _MOVED and not piece:
                raise NotAlikeError(f"{op['name']!r} holds what is no parameter")
        used |= {piece["parameter"] for piece in pieces if "parameter" in piece}
    if missing := copies.shapes.keys() - used:
        raise NotAlikeError(f"{len(missing)} parameters are nowhere in the copies: {', '.join(sorted(missing)[:5])}")
