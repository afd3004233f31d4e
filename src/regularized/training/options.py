"""Options of a training that belong together: what is evaluated, written down, told, and where it is computed."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Literal

from torch import nn

from regularized.mechanisms.ranges import Choice, check_fields, count, positive
from regularized.training.stopping import EarlyStopping

if TYPE_CHECKING:
    from accelerate.tracking import GeneralTracker

__all__ = ["Checkpoints", "Compute", "Evaluation", "Logging"]


@dataclass(frozen=True, slots=True)
class Evaluation:
    """What is measured at the ends of epochs, and what follows from it.

    Args:
        function: called as ``function(model)`` in eval mode without gradients; returns numbers by name. What it draws
            at random leaves no trace in the training. In a distributed run every process calls it on its copy of the
            model, and the first one's numbers count.
        every: epochs between two evaluations; default 1. The last epoch is always evaluated.
        early_stopping: when to stop; default None, at the end.

    Raises:
        ValueError: ``every`` < 1.

    Examples:
        >>> Evaluation(lambda model: {"accuracy": 0.5}, every=5).every
        5
    """

    function: Callable[[nn.Module], dict[str, float]]
    every: int = 1
    early_stopping: EarlyStopping | None = None

    def __post_init__(self) -> None:
        check_fields(self, every=count(1))


@dataclass(frozen=True, slots=True)
class Checkpoints:
    """Where a run is written down, so that it can go on after an interruption.

    One is written before the first step, which is deleted with the next, at the end of each epoch, and of the run.

    Args:
        folder: for one run at a time. In a distributed run all processes must see it.
        every: optimizer steps between two more; default None, none between.
        keep: how many are kept, at least 1; default 3.

    Raises:
        ValueError: a number < 1.

    Examples:
        >>> Checkpoints("runs/a", every=100)
        Checkpoints(folder='runs/a', every=100, keep=3)
    """

    folder: Path | str
    every: int | None = None
    keep: int = 3

    def __post_init__(self) -> None:
        check_fields(self, every=count(1).or_none("none between"), keep=count(1))


@dataclass(frozen=True, slots=True)
class Logging:
    """What a person sees of a run.

    Args:
        every: optimizer steps between two records; terms are averaged over them, and read from the device only then.
            Default 50; 0 records nothing.
        trackers: ``"jsonl"``, ``"tensorboard"``, another name that Accelerate knows, or a ``GeneralTracker``.
        folder: of the trackers that write files.
        progress_bar: default None shows one where standard error is a terminal.

    Raises:
        ValueError: ``every`` < 0.

    Examples:
        >>> Logging(every=10, trackers=["jsonl"], folder="runs/a").every
        10
    """

    every: int = 50
    trackers: "Sequence[str | GeneralTracker]" = ()
    folder: Path | str | None = None
    progress_bar: bool | None = None

    def __post_init__(self) -> None:
        check_fields(self, every=count(0, remedy="0 records nothing"))


@dataclass(frozen=True, slots=True)
class Compute:
    """Where a training is computed, in which precision, and how its processes deal with each other.

    Args:
        device: ``"auto"``, what Accelerate finds; or ``"cpu"``.
        precision: ``"no"``, or ``"bf16"`` for forward passes in bfloat16 autocast whose outputs are float32 again
            (terms compute in float32; tapped hidden states stay bfloat16). ``"fp16"`` is the same in float16, with a
            loss that is scaled: a step whose gradients overflow is left out in all processes. Its terms see no
            ``before_step`` and ``after_step``, but a ``reset``. Default ``"no"``.
        sharding: ``"fsdp2"`` keeps weights, gradients and the optimizer's state of several processes in shards, by
            torch's ``fully_shard``; for what terms must declare see :mod:`regularized.training.sharded`. Default
            ``"no"``, DDP.
        find_unused_parameters: DDP's option for models of which a forward pass may leave out parameters; default False.
        timeout: seconds that a process waits for the others before it stops and names the one that is missing; default
            None, that of the process group: torch's own are half an hour, and ten minutes on NCCL.
        compile: a backend of ``torch.compile``, by which model and terms become one graph, forward and backward:
            ``"inductor"`` makes kernels; ``"aot_eager"`` makes none, and shows in seconds whether a graph can be made.
            The first step is computed without. A term that breaks the graph is computed between its pieces. Default
            ``"no"``.

    Raises:
        ValueError: an unknown device, precision, sharding or backend, ``compile`` together with ``sharding``, or a
            time that is not positive.

    Examples:
        >>> Compute(device="cpu").precision
        'no'
    """

    device: Literal["auto", "cpu"] = "auto"
    precision: Literal["no", "bf16", "fp16"] = "no"
    sharding: Literal["no", "fsdp2"] = "no"
    find_unused_parameters: bool = False
    timeout: float | None = None
    compile: Literal["no", "inductor", "aot_eager"] = "no"

    def __post_init__(self) -> None:
        check_fields(
            self,
            device=Choice("auto", "cpu"),
            precision=Choice("no", "bf16", "fp16"),
            sharding=Choice("no", "fsdp2"),
            timeout=positive("a number of seconds").or_none("torch's own"),
            compile=Choice("no", "inductor", "aot_eager"),
        )
        if self.compile != "no" and self.sharding != "no":
            raise ValueError(
                f"compile={self.compile!r} and sharding={self.sharding!r} exclude each other: shards are gathered by "
                'hooks around each block, at which the graph of a step would break; give one of them as "no"'
            )
