"""Where a run stands, and how it is written down and picked up again."""

import logging
import shutil
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn

from regularized.training import checkpoint
from regularized.training.checkpoint import CheckpointError
from regularized.training.data import Source
from regularized.training.progress import Progress
from regularized.training.randomness import generators, rng_state, set_rng_state
from regularized.training.step import Batch
from regularized.training.stopping import EarlyStopping

__all__ = ["Checkpoints", "Run"]

logger = logging.getLogger(__name__)


class Run:
    """The position of one ``fit`` in its data.

    Args:
        source: the batches.
        epochs: epochs of the whole run.
        batches: micro-batches in an epoch.
        accumulate: micro-batches in an optimizer step; the last step of an epoch may have fewer.
        seed: what the order of the data was seeded with; kept to recognise the run.

    Examples:
        >>> from regularized.training.data import TensorData
        >>> run = Run(TensorData(torch.zeros(10, 2), batch_size=2), epochs=3, batches=5, accumulate=2, seed=0)
        >>> run.total_steps  # the third step of an epoch has one batch
        9
    """

    def __init__(self, source: Source, epochs: int, batches: int, accumulate: int, seed: int) -> None:
        self.source = source
        self.epochs = epochs
        self.batches = batches
        self.accumulate = accumulate
        self.seed = seed
        self.total_steps = epochs * -(-batches // accumulate)
        self.step = 0  # optimizer steps done
        self.epoch = 0  # epochs done
        self.micro = 0  # micro-batches done in the present epoch
        self.stopped = False  # by early stopping
        self.history: list[dict[str, float]] = []
        self.epoch_rng: dict[str, Any] = {}  # random state at the start of the epoch, when its order was drawn

    @property
    def progress(self) -> Progress:
        """Position of the next optimizer step."""
        return Progress(self.step, self.total_steps, self.epoch, self.epochs)

    @property
    def over(self) -> bool:
        """Whether nothing is left to do."""
        return self.stopped or self.step >= self.total_steps

    def open(self, rank: int, world: int) -> Iterator[Batch]:
        """The batches that are left of the present epoch."""
        if self.micro == 0:
            self.epoch_rng = rng_state()
            return self.source.batches(self.epoch, rank=rank, world=world)
        # In the middle of an epoch the data must be drawn as at its start, and the training go on as if it had been.
        now = rng_state()
        set_rng_state(self.epoch_rng)
        batches = self.source.batches(self.epoch, start=self.micro, rank=rank, world=world)
        set_rng_state(now)
        return batches

    def state_dict(self) -> dict[str, Any]:
        """All but the random state, which every process has for itself."""
        source = self.source.state_dict() if hasattr(self.source, "state_dict") else {}
        names = ("step", "epoch", "micro", "stopped", "history", "epochs", "batches", "accumulate", "seed")
        return {"source": source, **{name: getattr(self, name) for name in names}}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Go to the position of a checkpoint.

        Raises:
            CheckpointError: it was made with other batches.
        """
        for name in ("batches", "accumulate", "seed"):
            if state[name] != getattr(self, name):
                raise CheckpointError(
                    f"the checkpoint was made with {name}={state[name]}, this run has {getattr(self, name)}: its "
                    "position means something else here. Use the same data, batch size, accumulation and seed, or "
                    "start anew in another folder"
                )
        if state["epochs"] != self.epochs:
            logger.warning(
                "the checkpoint is of a run of %d epochs, this one has %d: schedules change from here on",
                state["epochs"],
                self.epochs,
            )
        for name in ("step", "epoch", "micro", "stopped", "history"):
            setattr(self, name, state[name])
        if state["source"] and hasattr(self.source, "load_state_dict"):
            self.source.load_state_dict(state["source"])


class Checkpoints:
    """Writes everything that a run needs to go on, and reads it back.

    Args:
        folder: where; None writes nothing.
        keep: how many are kept.
        model: the user's model.
        terms: the terms.
        optimizer: the optimizer.
        stopping: early stopping, if any.
        rank: number of this process.
        world: number of processes.

    Examples:
        >>> import tempfile
        >>> from regularized.training.data import TensorData
        >>> model = nn.Linear(2, 2)
        >>> written = Checkpoints(
        ...     Path(tempfile.mkdtemp()), keep=3, model=model, terms=nn.Module(), stopping=None, rank=0, world=1,
        ...     optimizer=torch.optim.SGD(model.parameters(), lr=0.1),
        ... )
        >>> run = Run(TensorData(torch.zeros(4, 2), batch_size=2), epochs=1, batches=2, accumulate=1, seed=0)
        >>> run.step = 1
        >>> written.save(run)
        >>> run.step = 0
        >>> written.load(run), run.step
        (True, 1)
    """

    def __init__(
        self,
        folder: Path | None,
        *,
        keep: int,
        model: nn.Module,
        terms: nn.Module,
        optimizer: torch.optim.Optimizer,
        stopping: EarlyStopping | None,
        rank: int,
        world: int,
    ) -> None:
        self.folder = folder
        self._keep = keep
        self._modules = {"model": model, "terms": terms}
        self._optimizer = optimizer
        self._stopping = stopping
        self._rank, self._world = rank, world
        self._saved = -1

    def start(self) -> None:
        """Make sure that a new run does not mix with an old one.

        Raises:
            CheckpointError: there are checkpoints already.
        """
        self._saved = -1
        if self.folder is not None and checkpoint.checkpoints(self.folder):
            raise CheckpointError(
                f"{self.folder} already holds checkpoints of a run; go on with fit(..., resume=True), or give another "
                "checkpoint_dir"
            )

    def save(self, run: Run) -> None:
        """Write a checkpoint of the present position, unless it is there."""
        if self.folder is None or self._saved == run.step:
            return
        partial = self.folder / f".partial-step-{run.step:08d}"
        if self._rank == 0:
            self.folder.mkdir(parents=True, exist_ok=True)
            for left_over in self.folder.glob(".partial-step-*"):
                shutil.rmtree(left_over)
            partial.mkdir()
        self._wait()
        own = {"rng": rng_state(), "epoch_rng": run.epoch_rng, "generators": self._generators()}
        checkpoint.write_part(partial, f"rank-{self._rank:05d}", own)
        if self._rank == 0:
            for name, module in self._modules.items():
                checkpoint.write_part(partial, name, module.state_dict())
            training = {
                "run": run.state_dict(),
                "optimizer": self._optimizer.state_dict(),
                "stopping": None if self._stopping is None else self._stopping.state_dict(),
            }
            checkpoint.write_part(partial, "training", training)
        self._wait()
        if self._rank == 0:
            checkpoint.publish(partial, self.folder / f"step-{run.step:08d}", keep=self._keep)
        self._wait()
        self._saved = run.step

    def load(self, run: Run) -> bool:
        """Go to the newest intact checkpoint; False where there is none.

        Everything is read and compared before anything is changed.

        Raises:
            CheckpointError: all are damaged, or it does not fit model, terms, optimizer or data.
        """
        path = self._newest()
        if path is None:
            return False
        states = {name: checkpoint.load(path, name) for name in self._modules}
        training = checkpoint.load(path, "training")
        for name, module in self._modules.items():
            _compare(name, module, states[name], path)
        checkpoint.compare_optimizer(self._optimizer, training["optimizer"])
        run.load_state_dict(training["run"])
        for name, module in self._modules.items():
            module.load_state_dict(states[name])
        checkpoint.load_optimizer(self._optimizer, training["optimizer"])
        if self._stopping is not None and training["stopping"] is not None:
            self._stopping.load_state_dict(training["stopping"])
        self._load_randomness(run, path)
        self._saved = run.step
        logger.info("resumed from %s: step %d of %d", path, run.step, run.total_steps)
        return True

    def _load_randomness(self, run: Run, path: Path) -> None:
        name = f"rank-{self._rank:05d}"
        if not (path / f"{name}.json").is_file():
            logger.warning("%s was written by fewer processes: the random state of this one starts anew", path)
            run.epoch_rng = rng_state()
            return
        own = checkpoint.load(path, name)
        run.epoch_rng = own["epoch_rng"]
        for key, generator in self._all_generators():
            if key in own["generators"]:
                generator.set_state(own["generators"][key])
        set_rng_state(own["rng"])

    def _all_generators(self) -> Iterator[tuple[str, torch.Generator]]:
        for part, module in self._modules.items():
            for name, generator in generators(module).items():
                yield f"{part}.{name}", generator

    def _generators(self) -> dict[str, Tensor]:
        return {name: generator.get_state() for name, generator in self._all_generators()}

    def _newest(self) -> Path | None:
        if self.folder is None:
            raise ValueError("resume=True needs checkpoint_dir=...")
        if self._world == 1:
            return checkpoint.latest(self.folder)
        path = checkpoint.latest(self.folder) if self._rank == 0 else None
        step = torch.tensor([-1 if path is None else int(path.name.removeprefix("step-"))])
        device = next((p.device for p in self._modules["model"].parameters()), torch.device("cpu"))
        step = step.to(device)
        dist.broadcast(step, 0)
        return None if step.item() < 0 else self.folder / f"step-{int(step.item()):08d}"

    def _wait(self) -> None:
        if self._world > 1:
            dist.barrier()


def _compare(name: str, module: nn.Module, state: Mapping[str, Any], path: Path) -> None:
    own = module.state_dict()
    if missing := sorted(own.keys() - state.keys()):
        raise CheckpointError(f"checkpoint {path} is of another {name}: it lacks {missing[:3]} ({len(missing)} in all)")
    if unknown := sorted(state.keys() - own.keys()):
        raise CheckpointError(
            f"checkpoint {path} is of another {name}: {unknown[:3]} ({len(unknown)} in all) are not in this one"
        )
    for key, value in own.items():
        if isinstance(value, Tensor) and isinstance(state[key], Tensor) and value.shape != state[key].shape:
            raise CheckpointError(
                f"checkpoint {path} is of another {name}: {key} has shape {tuple(state[key].shape)} there and "
                f"{tuple(value.shape)} here"
            )
