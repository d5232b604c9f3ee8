"""Opens models of the template target in a child process: it is no entry of the registry's table."""

from __future__ import annotations

from typing import Any

from diffusette.runtimes.example.target import ExampleTarget
from diffusette.runtimes.protocol import Session
from diffusette.stages.artifacts import TargetModel
from pydantic import TypeAdapter


def open_model(argument: Any, threads: int) -> Session:
    return ExampleTarget().open(TypeAdapter(TargetModel).validate_python(argument), threads=threads)
