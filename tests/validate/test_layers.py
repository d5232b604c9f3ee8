"""From a runtime's graph to the module that is wrong, over a numpy model of four modules."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from diffusette.runtimes.protocol import Array, Closing, Feeds
from diffusette.runtimes.taps import Node, Wiring, needed_feeds
from diffusette.stages.errors import ModelError
from diffusette.validate.layers.examine import Layer, Reference, Subject, examine, force, layers_of
from diffusette.validate.layers.pieces import Piece, groups_of, pieces_of
from diffusette.validate.layers.points import Point
from diffusette.validate.layers.report import ComponentLayers, Range, layers_json, layers_table
from diffusette.validate.layers.segments import Segment, reshaped, segments_of, taps_of

RNG = np.random.default_rng(3)
FIRST, SECOND = (RNG.normal(size=(8, 8)).astype(np.float32) for _ in range(2))

# first -> act -> second -> + x, as in a residual block
NODES = (
    Node("MatMul", "block.first", ("x",), ("f",)),
    Node("Tanh", "block.act", ("f",), ("t",)),
    Node("MatMul", "block.second", ("t",), ("s",)),
    Node("Add", "block", ("s", "x"), ("y",)),
)
WIRING = Wiring(
    NODES,
    {"f": ("block.first:out",), "t": ("block.second:in",), "s": ("block.second:out",), "y": ("block:out", ":out")},
)
POINTS = (
    Point(0, "block.first", "Linear", (1, 8), ("block.first:out", "block.act:in")),
    Point(1, "block.act", "Tanh", (1, 8), ("block.act:out", "block.second:in")),
    Point(2, "block.second", "Linear", (1, 8), ("block.second:out",)),
    Point(3, "block", "Block", (1, 8), ("block:out", ":out")),
)
Functions = dict[str, Callable[..., Array]]
SOUND: Functions = {
    "f": lambda x: x @ FIRST,
    "t": np.tanh,
    "s": lambda t: t @ SECOND,
    "y": lambda s, x: s + x,
}


class NumpyTaps(Closing):
    """Satisfies `TapSession`."""

    def __init__(self, functions: Functions) -> None:
        self.functions = functions
        self.partial_runs = 0

    def run(self, feeds: Feeds, wanted: Mapping[str, int]) -> Iterator[tuple[str, Array]]:
        self.partial_runs += 1
        makers = {node.outputs[0]: node.inputs for node in NODES}

        def value(name: str, top: bool) -> Array:
            if name in feeds and not top:
                return feeds[name]
            return np.asarray(self.functions[name](*(value(each, False) for each in makers[name])), np.float32)

        assert set(wanted.values()) <= {X.nbytes}
        for tensor in wanted:
            assert needed_feeds(tensor, makers, feeds) <= set(feeds)
            yield tensor, value(tensor, True)

    def close(self) -> None:
        """Nothing to free."""


X = RNG.normal(size=(1, 8)).astype(np.float32)


def reference() -> Reference:
    values = [value for _, value in NumpyTaps(SOUND).run({"x": X}, dict.fromkeys("ftsy", X.nbytes))]
    return lambda point: values[point]


def examined(functions: Functions, own: Path, most: int = 25, full: Reference | None = None) -> tuple[Layer, ...]:
    taps = taps_of(WIRING, POINTS)
    segments = segments_of(WIRING, taps, ["x"])
    large = dict.fromkeys(taps, 2**25)  # so that a piece holds as few as `most` allows
    found = []
    at = {tensor: point.index for tensor, point in taps.items()}
    with NumpyTaps(functions) as session:
        subject = Subject(session, {"x": X}, at, False, frozenset())
        for piece in pieces_of(segments, large, forced=2 if full else 1, most=most):
            found.append(examine(subject, [piece], reference=reference(), full=full, own=own))
    return layers_of(segments, found)


def component(layers: tuple[Layer, ...], **more: Any) -> ComponentLayers:
    facts = {"ranges": (), "least_db": 100.0, "partial_runs": 2, "peak_mib": 1.0} | more
    return ComponentLayers("unet", "fp32", "a probe", layers, **facts)


def test_a_segment_is_the_work_of_one_module() -> None:
    segments = segments_of(WIRING, taps_of(WIRING, POINTS), ["x"])
    assert [(each.tensor, each.module, each.feeds) for each in segments] == [
        ("f", "block.first", ("x",)),
        ("t", "block.act", ("f",)),
        ("s", "block.second", ("t",)),
        ("y", "block", ("s", "x")),
    ]


def test_a_graph_whose_output_is_no_modules_is_refused() -> None:
    with pytest.raises(ModelError, match="not the output of a PyTorch module"):
        taps_of(Wiring(NODES, {"f": ("block.first:out",)}), POINTS)


def test_a_tap_may_have_another_shape_than_pytorchs_but_not_other_numbers(tmp_path: Path) -> None:
    # as SDXL's six time ids, which PyTorch embeds one a row and the exporter lays end to end
    tall = replace(POINTS[0], shape=(2, 4))
    stated = replace(WIRING, shapes={"f": (1, 8), "t": (1, 9), "y": (1, 8)})
    taps = taps_of(stated, (tall, *POINTS[1:]))
    assert set(taps) == {"f", "s", "y"}
    shapes = reshaped(stated, taps)
    assert shapes == {"f": (1, 8)}
    segments = segments_of(stated, taps, ["x"])
    values = reference()
    at = {tensor: point.index for tensor, point in taps.items()}
    with NumpyTaps(SOUND) as session:
        subject = Subject(session, {"x": X}, at, batchless=False, flat=(), shapes=shapes)
        found = force(
            subject,
            Piece(segments, carried=False),
            lambda point: values(point).reshape(2, 4) if point == 0 else values(point),
        )
    assert [layer.made_db for layer in found] == [999.0] * 3


@pytest.mark.parametrize("most", [2, 5, 25])
def test_a_sound_model_names_no_module(tmp_path: Path, most: int) -> None:
    found = component(examined(SOUND, tmp_path, most))
    assert found.first_bad is None
    assert found.left is None
    assert all(layer.made_db == layer.carried_db == 999 for layer in found.layers)


@pytest.mark.parametrize("most", [2, 5, 25])
@pytest.mark.parametrize(
    ("tensor", "wrong", "module"),
    [
        ("f", lambda x: x @ FIRST * np.float32(1.1), "block.first"),
        ("t", lambda f: np.tanh(f) + np.float32(1e-3), "block.act"),
        ("s", lambda t: t @ SECOND[:, ::-1], "block.second"),
        ("y", lambda s, x: s, "block"),
        ("s", lambda t: t @ SECOND * np.float32(np.nan), "block.second"),
    ],
)
def test_the_wrong_module_is_the_only_one_named(
    tmp_path: Path, tensor: str, wrong: Callable[..., Array], module: str, most: int
) -> None:
    found = component(examined(SOUND | {tensor: wrong}, tmp_path, most))
    assert [layer.module for layer in found.bad] == [module]
    assert found.left is not None
    assert found.left.module == module
    carried = [layer.carried_db or 0 for layer in found.layers]
    assert carried[-1] < 100, "what was done wrong is carried to the end"
    said = layers_json([found])
    assert said["first_bad"]["module"] == module
    assert said["first_bad"]["try"]
    assert [row["ok"] for row in said["layers"]].count(False) == 1


@pytest.mark.parametrize(("factor", "named"), [(1.01, []), (1.1, ["block.first"])])
def test_a_module_that_rounds_its_input_may_be_further_off_but_not_wrong(
    tmp_path: Path, factor: float, named: list[str]
) -> None:
    taps = taps_of(WIRING, POINTS)
    segments = segments_of(WIRING, taps, ["x"], {"block.first"})
    assert [segment.needed_db for segment in segments] == [25.0, 85.0, 85.0, 85.0]
    at = {tensor: point.index for tensor, point in taps.items()}
    with NumpyTaps(SOUND | {"f": lambda x: x @ FIRST * np.float32(factor)}) as session:
        subject = Subject(session, {"x": X}, at, batchless=False, flat=())
        found = component(force(subject, Piece(segments, carried=False), reference()))
    assert [layer.module for layer in found.bad] == named
    assert [row["needed_db"] for row in found.to_json()] == [25.0, 85.0, 85.0, 85.0]


def test_lost_bits_are_told_from_wrong_work(tmp_path: Path) -> None:
    exact = reference()

    def finer(point: int) -> Array:
        return exact(point) * np.float32(1.001) if point == 0 else exact(point)

    layers = examined(SOUND, tmp_path, full=finer)
    assert component(layers).first_bad is None
    lost = {layer.module: layer.lost_db for layer in layers}
    assert lost["block.first"] == pytest.approx(60, abs=1)
    assert lost["block.second"] == 999
    assert component(layers).worst()[0].module in ("block.first", "block.act")


def test_layers_that_are_wrong_come_in_the_order_of_execution() -> None:
    one = Layer("a", "Conv2d", "t0", 0, made_db=30.0, carried_db=30.0)
    layers = (replace(one, made_db=130.0), one, replace(one, module="b", made_db=10.0))
    found = component(layers)
    assert found.first_bad is one
    assert [layer.module for layer in found.worst()] == ["a", "b", "a"]
    assert found.worst()[0] is one


def test_an_error_of_the_whole_without_a_wrong_module_is_said() -> None:
    good = Layer("a", "Conv2d", "t0", 0, made_db=130.0, carried_db=130.0)
    caption = layers_table(component((good,), whole_db=40.0)).caption
    assert "40.0 of 100 dB" in str(caption)
    assert "joins operations across modules" in str(caption)


def test_ranges_tell_what_comes_near_float16() -> None:
    ranges = (Range("a", "Linear", 10.0, "p"), Range("b", "Linear", 60000.0, "p"), Range("c", "Linear", np.inf, "p"))
    found = component((), ranges=ranges)
    assert [(each.module, each.near) for each in found.largest()] == [("c", True), ("b", True), ("a", False)]


def chain(count: int) -> tuple[Segment, ...]:
    return tuple(Segment(f"t{n}", n, "m", "Op", (f"t{n - 1}" if n else "x",)) for n in range(count))


@pytest.mark.parametrize("streamed", [False, True])
@pytest.mark.parametrize("forced", [1, 2])
def test_pieces_hold_every_segment_twice_in_few_runs_of_few_bytes(forced: int, streamed: bool) -> None:
    segments = chain(2000)
    size = {f"t{n}": 2**20 * (1 + n % 90) for n in range(2000)}
    pieces = pieces_of(segments, size, forced=forced, streamed=streamed)
    carried, fed = ([piece for piece in pieces if piece.carried is each] for each in (True, False))
    assert len(carried) + forced * len(fed) <= 25
    assert tuple(segment for piece in carried for segment in piece.segments) == segments
    assert sorted((segment for piece in fed for segment in piece.segments), key=lambda s: s.point) == list(segments)
    held = [sum(size.get(name, 0) for name in (*piece.tensors, *(() if streamed else piece.feeds))) for piece in pieces]
    passes = 1 + (1 if streamed else 2) * forced  # each tensor is made in every pass, and fed in all but one
    least = passes * sum(size.values()) / 25
    assert max(held) <= 1.25 * least


def test_neighbouring_pieces_share_the_points_that_lie_on_the_disk() -> None:
    size = [2**20 * (1 + n % 90) for n in range(2000)]
    names = {f"t{n}": each for n, each in enumerate(size)}
    at = {f"t{n}": n for n in range(2000)}
    pieces = pieces_of(chain(2000), names)
    groups = groups_of(pieces, lambda piece: piece.points(at), size, 2**35)
    assert [piece for group in groups for piece in group] == list(pieces)
    fetched = sum(size[n] for group in groups for n in set().union(*(piece.points(at) for piece in group)))
    assert fetched < 1.5 * sum(size), "PyTorch runs again for each group"
    for group in groups:
        assert sum(size[n] for n in set().union(*(piece.points(at) for piece in group))) <= 2**35


def test_a_small_model_is_not_divided() -> None:
    pieces = pieces_of(chain(50), {f"t{n}": 2**10 for n in range(50)})
    assert [(piece.carried, len(piece.segments)) for piece in pieces] == [(True, 50), (False, 50)]


def test_a_carried_piece_leaves_what_later_ones_start_from() -> None:
    a, b, c = (Segment(name, n, "m", "Op", feeds) for n, (name, feeds) in enumerate(FEEDS.items()))
    pieces = [piece for piece in pieces_of((a, b, c), dict.fromkeys("abc", 2**25), most=6) if piece.carried]
    assert [(piece.tensors, piece.keep) for piece in pieces] == [(("a",), {"a"}), (("b",), {"b"}), (("c",), set())]
    assert pieces[1].points({"a": 7, "b": 8}) == {8}
    assert replace(pieces[1], carried=False).points({"a": 7, "b": 8}) == {7, 8}


FEEDS = {"a": ("x",), "b": ("a",), "c": ("a", "b")}
