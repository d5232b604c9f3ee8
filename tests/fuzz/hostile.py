"""Values and bytes that no honest program writes, and honest files changed by a few of them."""

from __future__ import annotations

import copy
import json
import os
from collections.abc import Iterator
from typing import Any, Final

import hypothesis.strategies as st
from hypothesis import settings

# The suite is cheap and repeatable in this form; `DIFFUSETTE_FUZZ=100` makes it a hundred times longer, with other
# cases in each run (docs/robustness.md). What it finds becomes an `@example` or a test of its own.
TIMES: Final = float(os.environ.get("DIFFUSETTE_FUZZ", "1"))


def cases(number: int) -> settings:
    """Run a test on `number` cases, or as many times that as `DIFFUSETTE_FUZZ` says."""
    return settings(
        max_examples=max(1, round(number * TIMES)),
        derandomize=TIMES <= 1,
        database=None,
        deadline=None,  # `guard` has its own, which a busy machine does not break
        print_blob=True,
        suppress_health_check=list(_TOO_STRICT),
    )


def _health_checks() -> Iterator[Any]:
    from hypothesis import HealthCheck

    # folders are function-scoped and rewritten by each case; some files are large on purpose
    yield from (HealthCheck.function_scoped_fixture, HealthCheck.too_slow, HealthCheck.data_too_large)
    yield HealthCheck.large_base_example


_TOO_STRICT: Final = tuple(_health_checks())

_TEXTS: Final = (
    "",
    ".",
    "..",
    "/",
    "../../../../etc/passwd",
    "/dev/zero",
    "a" * 300,
    "\0",
    "nul",
    "C:\\x",
    "\ud800",
    "\u202e",
    "{{7*7}}",
    "%s%n",
    "__class__",
    "٣",
    "1e999",
    "F32",
    "NaN",
)
_NUMBERS: Final = (0, -1, 1, 2**31 - 1, 2**31, 2**32, 2**53 + 1, 2**63 - 1, 2**63, 2**64, 10**30, -(2**63))
_REALS: Final = (0.0, -0.0, 0.5, 1e308, 5e-324, float("inf"), float("-inf"), float("nan"))

scalars: Final[st.SearchStrategy[Any]] = st.one_of(
    st.none(), st.booleans(), st.sampled_from(_NUMBERS), st.integers(), st.sampled_from(_REALS),
    st.sampled_from(_TEXTS), st.text(max_size=20),
)  # fmt: skip
values: Final[st.SearchStrategy[Any]] = st.recursive(
    scalars,
    lambda inner: st.lists(inner, max_size=4) | st.dictionaries(st.text(max_size=8), inner, max_size=4),
    max_leaves=8,
)


def nested(depth: int, opening: str = "[", closing: str = "]") -> str:
    return opening * depth + closing * depth


def _places(document: Any, at: tuple[Any, ...] = ()) -> Iterator[tuple[Any, ...]]:
    """The path of every value of a JSON document."""
    if at:
        yield at
    steps = document.items() if isinstance(document, dict) else enumerate(document)
    for key, value in steps:
        if isinstance(value, dict | list):
            yield from _places(value, (*at, key))
        else:
            yield (*at, key)


@st.composite
def edited(draw: st.DrawFn, document: Any) -> Any:
    """`document` with one to three values replaced, removed, doubled or added."""
    changed = copy.deepcopy(document)
    for _ in range(draw(st.integers(1, 3))):
        places = list(_places(changed))
        if not places:
            break
        *way, last = draw(st.sampled_from(places))
        owner = changed
        for step in way:
            owner = owner[step]
        deed = draw(st.sampled_from(("replace", "replace", "replace", "remove", "add", "swap")))
        if deed == "replace":
            owner[last] = draw(values)
        elif deed == "remove":
            del owner[last]
        elif deed == "swap":
            owner[last] = copy.deepcopy(_at(changed, draw(st.sampled_from(places))))
        elif isinstance(owner, dict):
            owner[draw(st.text(max_size=8))] = draw(values)
        else:
            owner.insert(0, draw(values))
    return changed


def _at(document: Any, place: tuple[Any, ...]) -> Any:
    for step in place:
        try:
            document = document[step]
        except (KeyError, IndexError, TypeError):
            return None
    return document


def as_json(document: Any) -> bytes:
    return json.dumps(document).encode()


@st.composite
def scratched(draw: st.DrawFn, whole: bytes) -> bytes:
    """`whole` with bytes changed, cut out, doubled or cut off."""
    changed = bytearray(whole)
    for _ in range(draw(st.integers(1, 6))):
        if not changed:
            break
        place = draw(st.integers(0, len(changed) - 1))
        deed = draw(st.sampled_from(("byte", "byte", "word", "remove", "insert", "end")))
        if deed == "byte":
            changed[place] = draw(st.integers(0, 255))
        elif deed == "word":
            word = draw(st.sampled_from((0, 1, 4, 0x7FFFFFFF, 0x80000000, 0xFFFFFFFF, len(whole), len(whole) - 4)))
            changed[place : place + 4] = word.to_bytes(4, "little")
        elif deed == "remove":
            del changed[place : place + draw(st.integers(1, 16))]
        elif deed == "insert":
            changed[place:place] = draw(st.binary(min_size=1, max_size=8))
        else:
            del changed[place:]
    return bytes(changed)
