"""The checkpoints of a run in their folder: everything that it needs to go on, written, recognised and read back."""

import logging
import shutil
from collections.abc import Iterator, Mapping
from contextlib import AbstractContextManager, ExitStack, contextmanager, nullcontext
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from safetensors import SafetensorError
from torch import Tensor, nn

from regularized.mechanisms.distributed import all_or_none
from regularized.training import checkpoint
from regularized.training.checkpoint import CheckpointError
from regularized.training.folder_lock import locked
from regularized.training.identity import changed_settings, differences, optimizer_settings
from regularized.training.options import Checkpoints
from regularized.training.randomness import generators, rng_state, set_rng_state
from regularized.training.run import Run
from regularized.training.scaling import LossScaler
from regularized.training.sharded import gathered, placed
from regularized.training.stopping import EarlyStopping

__all__ = ["CheckpointFolder"]

logger = logging.getLogger(__name__)


class CheckpointFolder:
    """Writes everything that a run needs to go on, and reads it back.

    Args:
        options: where, and how many; None writes nothing.
        model: the user's model.
        terms: the terms.
        optimizer: the optimizer, before its first step.
        settings: plain values that may change from one call to the next, by name; a change is told.
        stopping: early stopping, if any.
        scaler: of the loss in half precision, if any.
        rank: number of this process.
        world: number of processes.

    Examples:
        >>> import tempfile
        >>> from regularized.training.data import TensorData
        >>> model = nn.Linear(2, 2)
        >>> written = CheckpointFolder(
        ...     Checkpoints(tempfile.mkdtemp()), model=model, terms=nn.Module(), settings={}, stopping=None,
        ...     optimizer=torch.optim.SGD(model.parameters(), lr=0.1), rank=0, world=1,
        ... )
        >>> run = Run(TensorData(torch.zeros(4, 2), batch_size=2), epochs=1, batches=2, accumulate=1, seed=0)
        >>> with written.held(run):
        ...     run.step = 1
        ...     written.save(run)
        ...     run.step = 0
        ...     written.load(run), run.step
        (True, 1)
    """

    def __init__(
        self,
        options: Checkpoints | None,
        *,
        model: nn.Module,
        terms: nn.Module,
        optimizer: torch.optim.Optimizer,
        settings: Mapping[str, Any],
        stopping: EarlyStopping | None,
        rank: int,
        world: int,
        scaler: LossScaler | None = None,
    ) -> None:
        self.folder: Path | None = None if options is None else Path(options.folder)
        self._keep = 0 if options is None else options.keep
        self._modules = {"model": model, "terms": terms}
        self._optimizer = optimizer
        # Training changes the rate, and what some optimizers count in their groups.
        self._asked = optimizer_settings(optimizer)
        self._given = [{k: v for k, v in group.items() if k != "params"} for group in optimizer.param_groups]
        self._settings = dict(settings)
        self._stopping = stopping
        self._scaler = scaler
        self._rank, self._world = rank, world
        self._data: dict[str, Any] = {}
        self._saved = -1

    @contextmanager
    def held(self, run: Run) -> Iterator[None]:
        """For the time of a run: the folder is this run's alone, and its data is looked at.

        Raises:
            CheckpointError: another process has the folder.
        """
        self._saved = -1
        if self.folder is None:
            yield
            return
        self._data = run.identity()
        with ExitStack() as stack:
            with self._together("opening the folder of checkpoints"):
                if self._rank == 0:
                    stack.enter_context(locked(self.folder))
            yield

    def start(self, run: Run) -> None:
        """Make sure that a new run does not mix with an old one, and write down where it starts.

        Raises:
            CheckpointError: there are checkpoints already.
        """
        if self.folder is None:
            return
        with self._together("starting a run"):
            there = checkpoint.checkpoints(self.folder) if self._rank == 0 else []
            if any(checkpoint.step_of(path) > 0 for path in there):
                raise CheckpointError(
                    f"{self.folder} already holds checkpoints of a run; go on with fit(..., resume=True), or give "
                    "another folder"
                )
        self.save(run)

    def save(self, run: Run) -> None:
        """Write a checkpoint of the present position, unless it is there.

        Raises:
            CheckpointError: it cannot be written.
        """
        if self.folder is None or self._saved == run.step:
            return
        final = self.folder / checkpoint.name_of(run.step)
        partial = self.folder / f".partial-{final.name}"
        try:
            with self._together("writing a checkpoint"), _naming(final):
                if self._rank == 0:
                    for left_over in self.folder.glob(".partial-step-*"):
                        shutil.rmtree(left_over)
                    partial.mkdir()
            with self._together("writing a checkpoint"), _naming(final):
                self._write(run, partial)
            with self._together("writing a checkpoint"), _naming(final):
                if self._rank == 0:
                    checkpoint.publish(partial, final, keep=self._keep)
        except CheckpointError:
            if self._rank == 0:
                shutil.rmtree(partial, ignore_errors=True)
            raise
        self._saved = run.step

    def _write(self, run: Run, partial: Path) -> None:
        states = {name: gathered(module.state_dict()) for name, module in self._modules.items()}  # by all processes
        optimizer = gathered(self._optimizer.state_dict())
        own = {"rng": rng_state(), "epoch_rng": run.epoch_rng, "generators": self._generators()}
        checkpoint.write_part(partial, f"rank-{self._rank:05d}", own)
        if self._rank == 0:
            for name, state in states.items():
                checkpoint.write_part(partial, name, state)
            training = {
                "run": run.state_dict(),
                "optimizer": optimizer,
                "stopping": None if self._stopping is None else self._stopping.state_dict(),
                "scaler": None if self._scaler is None else self._scaler.state_dict(),
                "identity": {"optimizer": self._asked, "data": self._data, "settings": self._settings},
            }
            checkpoint.write_part(partial, "training", training)

    def load(self, run: Run) -> bool:
        """Go to the newest intact checkpoint; False where there is none.

        Everything is read and compared before anything is changed.

        Raises:
            CheckpointError: all are damaged, or it does not fit model, terms, optimizer or data.
        """
        path = self._newest()
        if path is None:
            return False
        fits = True
        with self._together("reading a checkpoint"):
            states = {name: checkpoint.load(path, name) for name in self._modules}
            training = checkpoint.load(path, "training")
            own = self._own_part(path)
            try:
                self._recognise(run, states, training, path)
            except CheckpointError as error:
                if checkpoint.step_of(path) > 0:
                    raise
                fits = False
                logger.warning("%s. No step was made from there: this run starts anew", error)
        if not fits:
            return False
        self._warn_of_changes(training["identity"])
        run.load_state_dict(training["run"])
        for name, module in self._modules.items():
            here = module.state_dict()
            module.load_state_dict({key: placed(value, here[key]) for key, value in states[name].items()})
        self._place(training["optimizer"]["state"])
        checkpoint.load_optimizer(self._optimizer, training["optimizer"])
        self._ask_again(training["identity"]["optimizer"])
        if self._stopping is not None:
            self._stopping.reset()
            if training["stopping"] is not None:
                self._stopping.load_state_dict(training["stopping"])
        if self._scaler is not None and (scaled := training.get("scaler")) is not None:
            self._scaler.load_state_dict(scaled)
        self._load_randomness(run, own, path)
        self._saved = run.step
        logger.info("resumed from %s: step %d of %d", path, run.step, run.total_steps)
        return True

    # -- is it this run? ---------------------------------------------------------------------------

    def _recognise(self, run: Run, states: Mapping[str, Any], training: Mapping[str, Any], path: Path) -> None:
        """Refuse a checkpoint of another model, other terms, another optimizer or other data."""
        for name, module in self._modules.items():
            _compare(name, module, states[name], path)
        run.check(training["run"])
        identity = training["identity"]
        there, here = (
            {"class": asked["class"], "tensors in each group": [len(group["params"]) for group in groups]}
            for asked, groups in (
                (identity["optimizer"], training["optimizer"]["param_groups"]),
                (self._asked, self._optimizer.param_groups),
            )
        )
        if words := differences(there, here):
            raise CheckpointError(
                f"checkpoint {path} has another optimizer or other parameter groups: {'; '.join(words)}. Build model, "
                "terms and optimizer as in the interrupted run, or start anew in another folder"
            )
        if words := differences(identity["data"], self._data):
            raise CheckpointError(
                f"checkpoint {path} was made with other data: {'; '.join(words)}. Its position means something else "
                "here. Give the data of the interrupted run, or start anew in another folder"
            )

    def _warn_of_changes(self, identity: Mapping[str, Any]) -> None:
        changed = [
            f"{key} of parameter group {number} is {before} there and {now} here"
            for number, key, before, now in changed_settings(identity["optimizer"]["groups"], self._asked["groups"])
        ]
        changed += differences(identity["settings"], self._settings)
        if changed:
            logger.warning(
                "the checkpoint was made with other settings; those of this run count from here on: %s",
                "; ".join(changed),
            )

    def _ask_again(self, there: Mapping[str, Any]) -> None:
        """Put those hyperparameters back that this run asks for and the checkpoint did not."""
        for number, key, _, _ in changed_settings(there["groups"], self._asked["groups"]):
            self._optimizer.param_groups[number][key] = self._given[number][key]

    def _place(self, state: Mapping[int, dict[str, Any]]) -> None:
        """Cut the optimizer's state into shards, where the parameters are in shards."""
        parameters = [p for group in self._optimizer.param_groups for p in group["params"]]
        for number, entries in state.items():
            for key, value in entries.items():
                entries[key] = placed(value, parameters[number])

    # -- random state and processes ----------------------------------------------------------------

    def _own_part(self, path: Path) -> dict[str, Any] | None:
        name = f"rank-{self._rank:05d}"
        return checkpoint.load(path, name) if (path / f"{name}.json").is_file() else None

    def _load_randomness(self, run: Run, own: Mapping[str, Any] | None, path: Path) -> None:
        if own is None:
            logger.warning("%s was written by fewer processes: the random state of this one starts anew", path)
            run.epoch_rng = rng_state()
            return
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
            raise ValueError("resume=True needs a folder: Trainer(..., checkpoints=Checkpoints(folder))")
        found: list[str | None] = [None]
        with self._together("looking for a checkpoint"):
            if self._rank == 0 and (path := checkpoint.latest(self.folder)) is not None:
                found = [path.name]
        if self._world > 1:  # all go where the first one goes
            dist.broadcast_object_list(found, 0)
        return None if found[0] is None else self.folder / found[0]

    def _together(self, doing: str) -> AbstractContextManager[None]:
        return all_or_none(doing, CheckpointError) if self._world > 1 else nullcontext()


@contextmanager
def _naming(final: Path) -> Iterator[None]:
    """An error of the file system says which checkpoint it befell, and what to do."""
    try:
        yield
    except (OSError, SafetensorError) as error:
        raise CheckpointError(
            f"checkpoint {final} could not be written: {error}. Those before it are intact: make room, or mend what is "
            "named, and go on with fit(..., resume=True)"
        ) from error


def _compare(name: str, module: nn.Module, state: Mapping[str, Any], path: Path) -> None:
    own = module.state_dict()
    if missing := sorted(own.keys() - state.keys()):
        raise CheckpointError(f"checkpoint {path} is of another {name}: it lacks {missing[:3]} ({len(missing)} in all)")
    if unknown := sorted(state.keys() - own.keys()):
        raise CheckpointError(
            f"checkpoint {path} is of another {name}: {unknown[:3]} ({len(unknown)} in all) are not in this one"
        )
    for key, value in own.items():
        if not (isinstance(value, Tensor) and isinstance(state[key], Tensor)):
            continue
        if value.shape != state[key].shape:
            raise CheckpointError(
                f"checkpoint {path} is of another {name}: {key} has shape {tuple(state[key].shape)} there and "
                f"{tuple(value.shape)} here"
            )
        if value.dtype != state[key].dtype:
            raise CheckpointError(
                f"checkpoint {path} is of another {name}: {key} is {state[key].dtype} there and {value.dtype} here; "
                f"its values would be rounded. Build the {name} in the type of the interrupted run"
            )
