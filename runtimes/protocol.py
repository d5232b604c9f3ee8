"""The one protocol behind which every runtime lives."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from pathlib import Path
from types import TracebackType
from typing import TYPE_CHECKING, Any, ClassVar, Protocol, Self

from numpy.typing import NDArray

from ..quantize.plan import Plan
from ..stages.artifacts import Checkpoint, ComponentSource, TargetModel, TensorSpec
from .arithmetic import FLOAT32, PROVEN, Arithmetic

if TYPE_CHECKING:
    from ..stages.stage import Runner

Array = NDArray[Any]
Feeds = Mapping[str, Array]


class Closing:
    """What holds native memory until it is closed, at the latest at the end of a `with` block."""

    def close(self) -> None:
        raise NotImplementedError

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()


class Session(Protocol):
    """A loaded model. Close it, or use it in a `with` block, to free the native memory."""

    @property
    def inputs(self) -> tuple[TensorSpec, ...]: ...

    @property
    def outputs(self) -> tuple[TensorSpec, ...]: ...

    def run(self, feeds: Feeds) -> dict[str, Array]:
        """Run once. `feeds` holds exactly the inputs, in their dtypes and shapes; so does the result."""
        ...

    def close(self) -> None: ...

    def __enter__(self) -> Self: ...

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None: ...


class Target(Protocol):
    """A runtime: what it can hold, how a component becomes its model, how that model is run.

    A class that derives from it takes over the usual answers, which are those that have a value or a body here.
    """

    name: ClassVar[str]
    precisions: ClassVar[tuple[str, ...]]  # schemes that this runtime really executes, proven by tests
    # how activations of 8 bits are rounded, the default first: "static" over calibrated ranges, "dynamic" as they come
    activations: ClassVar[tuple[str, ...]] = ()
    mixes_floats: ClassVar[bool] = True  # whether float16 and float32 weights may stand side by side in one model
    mixes_activations: ClassVar[bool] = True  # whether layers with activations of 8 bits may stand beside others
    arithmetics: ClassVar[tuple[Arithmetic, ...]]  # in which an app may run it; float32 first
    low_rank: ClassVar[bool] = False  # whether its schemes of float activations run with a low-rank branch
    # how many input channels, each with its whole kernel, a group of weights holds a multiple of; 0: any weights
    group_channels: ClassVar[int] = 0
    families: ClassVar[tuple[str, ...]] = ("sd1", "sd2", "sdxl")
    tools: ClassVar[tuple[str, ...]]  # distributions that have a part in its files; their versions are in the manifest
    min_runtime: ClassVar[str]  # oldest runtime version that loads what `build` writes

    def require(self) -> None:
        """Raise `MissingTool` unless all that `open` needs is installed: the runtime. Imports nothing heavy."""
        ...

    def require_build(self) -> None:
        """Raise `MissingTool` unless all that `build` needs is installed as well. Imports nothing heavy."""
        ...

    def version(self) -> str:
        """Version of the installed runtime."""
        ...

    def build(self, source: ComponentSource, size: tuple[int, int], plan: Plan, run: Runner) -> TargetModel:
        """Turn a checkpoint component into this runtime's model, for pictures of `size` (height, width) pixels.

        Every step goes through `run`, so that it is cached, isolated in a child process and measured. Integer codes
        are those of `quantize.quantized.quantized_weights`; the model's `precision` is the plan's label.
        """
        ...

    def assets(self, checkpoint: Checkpoint, size: tuple[int, int]) -> Mapping[str, bytes]:
        """Further files of a bundle, path -> content, that make it at home with this runtime's other users."""
        return {}

    def choices(self, models: Iterable[TargetModel]) -> tuple[Arithmetic, ...]:
        """Of `arithmetics`, those that an app may choose for a bundle of `models`, float32 or what is nearest first."""
        return self.arithmetics

    def probe_model(self, model: TargetModel, w: Array, into: Path) -> TargetModel:
        """A model that multiplies its only input with the constant `w`, float32 [K, N], written to `into`.

        Its products are computed as those of `model` are: `validate.machine_stages.ProbeArithmetic` tells how.
        """
        ...

    def proven_in(self, model: TargetModel) -> str:
        """Name of the arithmetic in which `model` is compared with PyTorch on the machine that built it."""
        return FLOAT32

    def unfit(self, model: TargetModel) -> Mapping[str, str]:
        """Arithmetics that `model` must not be run in, as far as its graph tells: name -> why."""
        return {}

    def open(self, model: TargetModel, *, threads: int, arithmetic: str = PROVEN) -> Session:
        """Load `model` in this process, with the options of one of `arithmetics`.

        Callers want `isolation.open_isolated` instead: native code may crash.
        """
        ...
