"""The loop: batches in, one shared forward pass, a sum of named terms, an optimizer step. Accelerate owns devices."""

from collections.abc import Callable, Iterator, Mapping
from contextlib import AbstractContextManager, nullcontext
from functools import partial
from itertools import islice
from typing import Any, TypeAlias

import torch
import torch.distributed as dist
from accelerate.utils import convert_to_fp32
from torch import Tensor, nn

from regularized.mechanisms.distributed import all_or_none
from regularized.mechanisms.ranges import allowed, count, positive
from regularized.mechanisms.surgery import check_optimizer_is_current
from regularized.mechanisms.taps import Taps
from regularized.training.checkpoint_folder import CheckpointFolder
from regularized.training.compiled import CompiledObjective, check_traceable
from regularized.training.data import as_source
from regularized.training.devices import average_gradients, make_accelerator, synchronise
from regularized.training.finite import FiniteCheck, term_of_gradient
from regularized.training.history import History
from regularized.training.identity import schedule_name
from regularized.training.monitor import Monitor
from regularized.training.objective import Objective
from regularized.training.options import Checkpoints, Compute, Evaluation, Logging
from regularized.training.peers import Peers
from regularized.training.progress import Coefficient, Progress, Schedule, as_schedule
from regularized.training.randomness import preserved, seed_all
from regularized.training.run import Run
from regularized.training.scaling import LossScaler, check_fp16
from regularized.training.sharded import Sharded, check_declared, check_whole, clip_sharded
from regularized.training.step import Batch, Step, call_model
from regularized.training.trackers import JSONLTracker

__all__ = ["Trainer"]

OptimizerFactory: TypeAlias = Callable[[list[dict[str, Any]]], torch.optim.Optimizer]
Metrics: TypeAlias = dict[str, float]

LOGGING, COMPUTE = Logging(), Compute()
LOW = {"bf16": torch.bfloat16, "fp16": torch.float16}


class Trainer:
    """Train a model on a sum of named terms.

    Started by ``torchrun`` or ``accelerate launch`` it trains with DDP: the batch size is that of all processes
    together, each takes a contiguous part of every batch, and the result is that of one process.

    Args:
        model: the model. It is changed in place (moved to the device, surgery by terms, trained).
        terms: terms by name, see :mod:`regularized.training.terms`. Parameters of terms that need a gradient are
            trained too.
        optimizer: a factory that takes a list of parameter groups, such as ``partial(torch.optim.SGD, lr=0.1)``; or an
            optimizer, which must hold every trainable parameter that is there after the terms' surgery. One that has a
            method ``backward(closure)`` calls the closure as often as it needs the gradient of a step, at whatever
            weights (sharpness-aware ones do); each call passes over all micro-batches, the first one is recorded.
        schedule: factor on the learning rate of every parameter group, a number or a function of
            :class:`~regularized.training.progress.Progress`; default 1.
        accumulate: micro-batches in an optimizer step; default 1. The batch size of the data is that of a micro-batch.
        clip_norm: largest norm of the whole gradient, the terms' parameters included; default no clipping.
        seed: of the data order and, at the start of each :meth:`fit`, of the global random generators (in a distributed
            run plus the number of the process); default 0.
        evaluate: what is measured after each epoch: a function of the model that returns numbers by name; or an
            :class:`~regularized.training.options.Evaluation`, which also says how often, and when to stop early.
        checkpoints: where the run is written down; default nowhere.
        logging: what is recorded, and shown.
        compute: device, precision, and what concerns several processes.

    Attributes:
        model: the model, unwrapped.
        optimizer: the optimizer.
        objective: the terms and their sum.
        scaler: what scales the loss in fp16, else None; ``trainer.scaler.start_at(256.0)`` chooses its first scale,
            which is 65536 otherwise.
        history: results of the evaluations so far, each with its ``epoch`` (from 1) and ``step``: a list, which a
            notebook shows as a table.

    Raises:
        TypeError: an argument is not of the kind that is asked for.
        ValueError: an argument is outside its range; the optimizer was built before the surgery; the
            model is in shards already.

    Examples:
        >>> from functools import partial
        >>> from regularized.training import CrossEntropy, TensorData, cosine
        >>> x = torch.randn(64, 2)
        >>> data = TensorData(x, (x[:, 0] > 0).long(), batch_size=16)
        >>> trainer = Trainer(
        ...     nn.Linear(2, 2),
        ...     terms={"task": CrossEntropy()},
        ...     optimizer=partial(torch.optim.SGD, lr=0.5),
        ...     schedule=cosine(),
        ...     evaluate=lambda model: {"accuracy": float((model(x).argmax(-1) == (x[:, 0] > 0)).float().mean())},
        ... )
        >>> history = trainer.fit(data, epochs=20)
        >>> history[-1]["accuracy"] > 0.8
        True
    """

    @allowed(accumulate=count(1), clip_norm=positive(infinity=True).or_none("no clipping"))
    def __init__(
        self,
        model: nn.Module,
        *,
        terms: Mapping[str, nn.Module],
        optimizer: OptimizerFactory | torch.optim.Optimizer,
        schedule: Coefficient = 1.0,
        accumulate: int = 1,
        clip_norm: float | None = None,
        seed: int = 0,
        evaluate: Callable[[nn.Module], Metrics] | Evaluation | None = None,
        checkpoints: Checkpoints | None = None,
        logging: Logging = LOGGING,
        compute: Compute = COMPUTE,
    ) -> None:
        if callable(evaluate):
            evaluate = Evaluation(evaluate)
        _check_kinds(evaluate, checkpoints, logging, compute)
        self.accelerator = make_accelerator(compute, logging)
        self.rank, self.world = self.accelerator.process_index, self.accelerator.num_processes
        self._peers = Peers(self.rank, self.world, compute.timeout)
        self.device: torch.device = self.accelerator.device
        self.precision = compute.precision

        check_whole(model.parameters(), "the model")
        self.model: nn.Module = model.to(self.device)
        self.objective: Objective = (
            Objective(terms) if compute.compile == "no" else CompiledObjective(terms, backend=compute.compile)
        ).to(self.device)
        if compute.sharding != "no":
            _check_shardable(self.objective, optimizer)
        synchronise(self.model, self.device)  # before terms derive anything from it
        for attach in self.objective.moments("attach"):
            attach(model)
        self.model.to(self.device)
        self.objective.to(self.device)
        # One process alone has nothing to shard.
        shards = compute.sharding == "fsdp2" and self.world > 1
        self._sharded = Sharded(self.model, dict(self.objective.terms.items()), self.device) if shards else None
        # DDP's wrapper would break the graph of a compiled step, after which gradients are averaged instead.
        compiled = compute.compile != "no"
        self._wrapped = self.model if shards or compiled else self.accelerator.prepare_model(self.model)
        if compiled:
            synchronise(self.model, self.device)
        synchronise(self.objective, self.device)
        self.optimizer: torch.optim.Optimizer = self._build(optimizer)
        if self._sharded is not None and hasattr(self.optimizer, "backward"):
            raise ValueError(
                f"{type(self.optimizer).__name__} moves weights between the passes of a step, which shards do not "
                'allow; give sharding="no"'
            )
        self.scaler: LossScaler | None = LossScaler(self.device.type) if compute.precision == "fp16" else None
        if self.scaler is not None:
            check_fp16(self.model, self.optimizer)
        self._rates = [float(group["lr"]) for group in self.optimizer.param_groups]
        self._parameters = [p for group in self.optimizer.param_groups for p in group["params"]]
        own = {id(p) for p in self.model.parameters()}
        self._averaged = [p for p in self.objective.parameters() if p.requires_grad and id(p) not in own]
        if self._sharded is not None:
            self._averaged += [p for p in self._sharded.unsharded if p.requires_grad]
        elif compiled:
            self._averaged += [p for p in self.model.parameters() if p.requires_grad]
        self._clip = nn.utils.clip_grad_norm_ if self._sharded is None else clip_sharded

        self.schedule: Schedule = as_schedule(schedule, name="schedule")
        self.accumulate = accumulate
        self.clip_norm = clip_norm
        self.seed = seed
        self.evaluation = evaluate
        self.checkpoints = checkpoints
        self._stopping = None if evaluate is None else evaluate.early_stopping
        self._written = CheckpointFolder(
            checkpoints,
            model=self.model,
            terms=self.objective.terms,
            optimizer=self.optimizer,
            settings={"schedule": schedule_name(self.schedule), "clip_norm": clip_norm, "precision": compute.precision},
            stopping=self._stopping,
            scaler=self.scaler,
            rank=self.rank,
            world=self.world,
        )
        self.history: History = History()
        self._monitor = Monitor(every=logging.every, bar=logging.progress_bar, main=self.rank == 0)
        # A scaled loss makes the host wait for the device in any case.
        deferred = self.device.type != "cpu" and self.scaler is None
        self._finite = FiniteCheck(self.objective, self.model, deferred=deferred)
        self._call = call_model if self._wrapped is model and self.precision == "no" else self._call_wrapped
        self._transforms, self._before, self._after, self._epoch_start = (
            self._moments(name) for name in ("transform", "before_step", "after_step", "epoch_start")
        )

    # -- the run ----------------------------------------------------------------------------------

    @allowed(epochs=count(1), max_steps=count(1).or_none(), batches_per_epoch=count(1).or_none())
    def fit(
        self,
        data: Any,
        *,
        epochs: int,
        resume: bool = False,
        max_steps: int | None = None,
        batches_per_epoch: int | None = None,
        task: Any = None,
    ) -> History:
        """Train for a number of epochs.

        Each call is a run of its own: progress and schedules begin at 0. Model, terms and optimizer are kept.

        Args:
            data: a :class:`~regularized.training.data.TensorData`, a ``DataLoader``, or any iterable of batches; see
                :func:`~regularized.training.data.as_source`.
            epochs: epochs of the whole run.
            resume: go on from the newest intact checkpoint in the folder, exactly; begin where there is none.
            max_steps: end this call when the run has made so many optimizer steps; schedules still see the whole run.
            batches_per_epoch: (micro-)batches in an epoch; default all. Needed for data without a length.
            task: given to the terms' ``task_start`` and ``task_end`` (continual learning); default None calls neither.

        Returns:
            The results of the evaluations, ``trainer.history``.

        Raises:
            NonFiniteLoss: a loss, its gradient, a rate or a weight was NaN or infinite. On the CPU the weights are
                those of before the step; on an accelerator no checkpoint holds others.
            CheckpointError: a checkpoint is damaged or of another run; or there are some and ``resume`` is False.
            PeerError: another process failed, or does not answer.
        """
        source = as_source(data, seed=self.seed, length=batches_per_epoch)
        batches = min(len(source), batches_per_epoch or len(source))
        run = Run(source, epochs, batches, self.accumulate, self.seed)
        last = run.total_steps if max_steps is None else min(max_steps, run.total_steps)
        try:
            with self._peers.together(), self._written.held(run):
                self._begin(run, resume=resume)
                self._train(run, last, task)
        finally:
            for tracker in self.accelerator.trackers:
                tracker.finish()
            self.accelerator.trackers = []
        return self.history

    def merge(self) -> nn.Module:
        """Let every term that changed the model leave a plain one behind; training cannot go on afterwards.

        Raises:
            ValueError: the weights are in shards.
        """
        if self._sharded is not None:
            raise ValueError(
                "the weights are in shards, where terms cannot merge; in one process build the same Trainer, go to the "
                "last checkpoint by fit(..., resume=True), and merge there"
            )
        for moment in self.objective.moments("merge"):
            moment(self.model)
        return self.model

    def _train(self, run: Run, last: int, task: Any) -> None:
        with self._monitor, Taps(self.model, self.objective.taps) as self._taps:
            self._monitor.start(run.progress)
            if task is not None and run.step == 0:
                for moment in self._moments("task_start"):
                    moment(task)
            while run.step < last and not run.stopped:
                self._epoch(run, last)
            self._save(run)
            synchronise(self.model, self.device)
            if run.over and self._stopping is not None:
                self._stopping.restore(self.model)
            if run.over and task is not None:
                for moment in self._moments("task_end"):
                    moment(task)

    def _epoch(self, run: Run, last: int) -> None:
        """The rest of an epoch, from wherever it stands."""
        if run.micro == 0:
            for moment in self._epoch_start:
                moment(run.progress)
        batches = run.open(self.rank, self.world)
        while run.micro < run.batches and run.step < last:
            size = min(self.accumulate, run.batches - run.micro)
            window = list(islice(batches, size))
            if len(window) < size:
                raise ValueError(
                    f"the data ended after {run.micro + len(window)} of {run.batches} batches; "
                    "correct its length, or give fit(..., batches_per_epoch=...)"
                )
            progress = run.progress
            rate = self._step(window, progress)
            run.step, run.micro = run.step + 1, run.micro + size
            record = self._monitor.step(progress, self.objective.values(), rate)
            if record is not None:
                self.accelerator.log(record, step=run.step)
            every = None if self.checkpoints is None else self.checkpoints.every
            if every is not None and run.step % every == 0 and run.micro < run.batches:
                self._save(run)
        if run.micro == run.batches:
            run.epoch, run.micro = run.epoch + 1, 0
            self._end_of_epoch(run)

    def _step(self, window: list[Batch], progress: Progress) -> float:
        """One optimizer step; the learning rate of the first parameter group."""
        objective, on_cpu = self.objective, self.device.type == "cpu"
        if not on_cpu:
            window = [batch.map(lambda t: t.to(self.device, non_blocking=True)) for batch in window]
        sizes = [batch.whole for batch in window]
        for transform in self._transforms:
            window = [transform(batch) for batch in window]
        for batch, size in zip(window, sizes, strict=True):
            batch.whole = size
        counts = objective.counts(window, device=self.device)
        step, losses = self._backward(window, counts, progress)
        self._finite.losses(losses, progress.step)
        if self.scaler is not None and not self.scaler.unscale(self.optimizer):
            return self._leave_out(window, progress)
        norm = None if self.clip_norm is None else self._clip(self._parameters, self.clip_norm)
        factor = self.schedule(progress)
        self._finite.rate(self._rates[0], factor, progress.step)
        for group, base in zip(self.optimizer.param_groups, self._rates):
            if isinstance(group["lr"], Tensor):
                group["lr"].fill_(base * factor)
            else:
                group["lr"] = base * factor
        for moment in self._before:
            moment(step)
        self._finite.gradients(
            self._parameters,
            progress.step,
            norm=None if self._before else norm,  # these moments may have changed the gradient
            blame=lambda: self._term_of_gradient(window, progress),
        )
        self.optimizer.step()
        for moment in self._after:
            moment(step)
        self.optimizer.zero_grad()
        return self._rates[0] * factor

    def _leave_out(self, window: list[Batch], progress: Progress) -> float:
        """End an optimizer step whose scaled gradients overflowed: nothing has changed but the scale."""
        assert self.scaler is not None
        if self.scaler.is_spent:
            blame = partial(self._term_of_gradient, window, progress)
            self._finite.gradients(self._parameters, progress.step, blame=blame)
        for moment in self.objective.moments("reset"):
            moment()
        self.optimizer.zero_grad()
        return self._rates[0] * self.schedule(progress)

    def _backward(
        self, window: list[Batch], counts: Mapping[str, float | Tensor], progress: Progress
    ) -> tuple[Step, list[Tensor]]:
        """Gradients of one optimizer step; an optimizer that needs several passes has a method ``backward``."""
        backward = getattr(self.optimizer, "backward", None)
        if backward is None:
            return self._pass(window, counts, progress)
        passes: list[tuple[Step, list[Tensor]]] = []

        def closure() -> None:
            if not passes:
                passes.append(self._pass(window, counts, progress))
                return
            with self.objective.at_rest():  # the batch has been counted
                self._pass(window, counts, progress)

        backward(closure)
        return passes[0]

    def _pass(
        self, window: list[Batch], counts: Mapping[str, float | Tensor], progress: Progress
    ) -> tuple[Step, list[Tensor]]:
        """Forward and backward over the micro-batches of one optimizer step: the last of them, and all losses."""
        losses = []
        for i, batch in enumerate(window):
            self._taps.clear()
            step = Step(self.model, batch, progress, self._taps.states, call=self._call)
            with self._sync(i == len(window) - 1):
                if batch.whole is not None and batch.whole < 2 * self.world:
                    self._try_together(step, batch.whole)
                if self._sharded is not None and self._sharded.reads_weights:
                    step.output  # noqa: B018  before any loss, since it makes the weights whole
                loss = self.objective.loss(step, counts, first=i == 0, scale=float(self.world))
                # Accelerator.backward would divide by its accumulation steps, which are ours: a needless graph node.
                (loss if self.scaler is None else self.scaler.scale(loss)).backward()
            losses.append(loss.detach())
        if self._sharded is not None:
            self._sharded.reshard()
        if self.world > 1 and self._averaged:
            average_gradients(self._averaged)
        return step, losses

    @staticmethod
    def _try_together(step: Step, size: int) -> None:
        """The forward pass of a batch that leaves a process with one sample or none, which some models refuse."""
        with all_or_none(
            f"computing the outputs of a batch of {size} samples, so small a rest that some processes have one or none "
            "of it (leave it out by drop_last=True, or choose another batch size)"
        ):
            step.output  # noqa: B018

    def _term_of_gradient(self, window: list[Batch], progress: Progress) -> str | None:
        """Which term has a gradient that is not finite; without the wrapper, which would exchange it."""
        if self._sharded is not None:  # whose parameters autograd does not reach
            return None

        def steps() -> Iterator[Step]:
            for batch in window:
                self._taps.clear()
                yield Step(self.model, batch, progress, self._taps.states, call=self._autocast)

        parameters = {id(p): p for p in (*self.model.parameters(), *self.objective.parameters(), *self._parameters)}
        return term_of_gradient(self.objective, self.model, steps(), parameters.values())

    def _end_of_epoch(self, run: Run) -> None:
        evaluation = self.evaluation
        if evaluation is not None and (run.epoch % evaluation.every == 0 or run.epoch == run.epochs):
            metrics = self._evaluate(evaluation.function)
            self.history.append({"epoch": float(run.epoch), "step": float(run.step), **metrics})
            self.accelerator.log(metrics, step=run.step)
            self._monitor.evaluated(run.step, metrics)
            if self._stopping is not None:
                run.stopped = self._stopping.update(metrics, self.model)
        if run.step < run.total_steps and not run.stopped:  # the end of the run is saved by fit
            self._save(run)

    def _save(self, run: Run) -> None:
        self._finite.saved(self._parameters, run.step)
        self._written.save(run)

    def _evaluate(self, evaluate: Callable[[nn.Module], Metrics]) -> Metrics:
        synchronise(self.model, self.device)
        modes = [(module, module.training) for module in self.model.modules()]
        self.model.eval()
        try:
            with preserved(), torch.no_grad():
                metrics = {name: float(value) for name, value in evaluate(self.model).items()}
        finally:
            for module, mode in modes:
                module.training = mode
            if self._sharded is not None:
                self._sharded.reshard()
        if self.world > 1:
            values = torch.tensor(list(metrics.values()), dtype=torch.float64, device=self.device)
            dist.broadcast(values, 0)
            metrics = dict(zip(metrics, values.tolist(), strict=True))
        return metrics

    # -- devices and processes ---------------------------------------------------------------------

    def _moments(self, name: str) -> list[Callable[..., Any]]:
        found = self.objective.moments(name)
        return found if self._sharded is None else self._sharded.around(found)

    def _build(self, optimizer: OptimizerFactory | torch.optim.Optimizer) -> torch.optim.Optimizer:
        if not isinstance(optimizer, torch.optim.Optimizer):
            return optimizer(self.objective.parameter_groups(self.model))
        check_optimizer_is_current(self.model, optimizer)
        check_optimizer_is_current(self.objective, optimizer)
        return optimizer

    def _call_wrapped(self, model: nn.Module, inputs: Any) -> Any:
        """A forward pass through the wrapper, in the precision of the run."""
        return self._autocast(self._wrapped if model is self.model else model, inputs)

    def _autocast(self, model: nn.Module, inputs: Any) -> Any:
        if self.precision == "no":
            return call_model(model, inputs)
        with torch.autocast(self.device.type, LOW[self.precision]):
            return convert_to_fp32(call_model(model, inputs))

    def _sync(self, last: bool) -> AbstractContextManager[None]:
        """Gradients are exchanged with the last micro-batch only."""
        if self._sharded is not None:
            self._sharded.synchronise_gradients(last)
            return nullcontext()
        free = last or self.world == 1 or self._wrapped is self.model
        return nullcontext() if free else self.accelerator.no_sync(self._wrapped)

    # -- the start of a run ------------------------------------------------------------------------

    def _begin(self, run: Run, *, resume: bool) -> None:
        """Start afresh, or go to the newest checkpoint; open the trackers there."""
        if isinstance(self.objective, CompiledObjective):
            check_traceable()
        if not self.model.training:  # else its parts keep the modes that they have: frozen statistics, say
            self.model.train()
        self.objective.train()
        self.optimizer.zero_grad()
        self._finite.forget()
        for moment in self.objective.moments("reset"):
            moment()
        if not (resume and self._written.load(run)):
            if self._stopping is not None:
                self._stopping.reset()
            seed_all(self.seed + self.rank)
            self._finite.saved(self._parameters, run.step)
            self._written.start(run)
        self.history = run.history
        for tracker in self.accelerator.log_with:
            if isinstance(tracker, JSONLTracker):
                tracker.rewind(run.step)
        config = {"terms": ", ".join(self.objective.names), "epochs": run.epochs, "accumulate": self.accumulate}
        config |= {"precision": self.precision, "seed": self.seed, "processes": self.world}
        self.accelerator.init_trackers("regularized", config=config)


def _check_shardable(objective: Objective, optimizer: object) -> None:
    """Refuse, before any surgery, what cannot train with weights in shards."""
    check_declared(dict(objective.terms.items()))
    if isinstance(optimizer, torch.optim.Optimizer):
        raise ValueError(
            'sharding="fsdp2" replaces the parameters by shards, which an optimizer that is there already does not '
            "hold; give a factory, such as partial(torch.optim.AdamW, lr=1e-3)"
        )


def _check_kinds(evaluate: object, checkpoints: object, logging: object, compute: object) -> None:
    """Refuse what is no group of options, such as a path alone, by the name of the argument."""
    for name, given, kind in (
        ("evaluate", evaluate, Evaluation),
        ("checkpoints", checkpoints, Checkpoints),
        ("logging", logging, Logging),
        ("compute", compute, Compute),
    ):
        if not isinstance(given, kind) and (given is not None or kind in (Logging, Compute)):
            raise TypeError(
                f"{name} must be {kind.__name__}(...) of regularized.training, got {type(given).__name__} {given!r:.60}"
            )
