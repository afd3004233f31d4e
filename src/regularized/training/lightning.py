"""Named terms in PyTorch Lightning.

Lightning's automatic optimization hands over one micro-batch at a time and divides its loss by
``accumulate_grad_batches``. An exact loss needs the counts of all micro-batches of an optimizer step *before* the first
backward pass, and a penalty on the weights must count once, so :class:`TermsModule` optimizes manually: it collects
``accumulate`` batches (the last step of an epoch may have fewer), and then does the whole optimizer step.

Needs the extra: ``pip install "regularized[lightning]"``.
"""

import logging
import math
from collections.abc import Callable, Mapping
from contextlib import AbstractContextManager, nullcontext
from typing import Any, TypeAlias

import torch
import torch.distributed as dist
from torch import Tensor, nn

from regularized.mechanisms.distributed import rank, world_size
from regularized.mechanisms.ranges import allowed, count, positive
from regularized.mechanisms.taps import Taps
from regularized.training.evaluation import evaluation_loss
from regularized.training.finite import FiniteCheck
from regularized.training.objective import Objective
from regularized.training.progress import Coefficient, Progress, Schedule, as_schedule
from regularized.training.randomness import generators
from regularized.training.step import Batch, Step, call_model

try:
    import pytorch_lightning as pl
    from pytorch_lightning.core.optimizer import LightningOptimizer
    from pytorch_lightning.strategies import DDPStrategy, ParallelStrategy, SingleDeviceStrategy
except ModuleNotFoundError as _error:
    if _error.name != "pytorch_lightning":
        raise
    raise ImportError(
        'regularized.training.lightning needs pytorch_lightning: pip install "regularized[lightning]"'
    ) from _error

__all__ = ["TermsModule"]

logger = logging.getLogger(__name__)

OptimizerFactory: TypeAlias = Callable[[list[dict[str, Any]]], torch.optim.Optimizer]
GENERATORS_KEY = "regularized_generators"


class TermsModule(pl.LightningModule):
    """A ``LightningModule`` whose loss is a sum of named terms.

    Batches are what :meth:`~regularized.training.step.Batch.of` sorts: ``(x, y)``, ``(x, y, index)``, or a mapping.
    Wrap the data set with :class:`~regularized.training.data.IndexedDataset` where a term remembers something for each
    sample.

    Model and terms are submodules: Lightning moves, saves and restores both. Logged at each batch are ``loss`` and
    ``terms/<name>`` of the last optimizer step, and ``val_loss`` (``test_loss``), the objective with its terms in eval
    mode. Subclass it to add metrics, for example in ``validation_step``.

    Three options of Lightning's ``Trainer`` belong to the module here, because Lightning refuses them together with
    manual optimization: ``accumulate_grad_batches`` is ``accumulate``, ``gradient_clip_val`` is ``clip_norm``, and
    learning rate schedulers are ``schedule``. The horizontal axis of loggers counts batches, ``trainer.global_step``
    counts optimizer steps.

    With DDP, a term that has parameters of its own or whose coefficient is 0 for a time needs
    ``strategy="ddp_find_unused_parameters_true"``. FSDP, DeepSpeed and 16-bit float precision (``"16-mixed"``; use
    ``"bf16-mixed"``) are refused.

    ``ModelCheckpoint(every_n_train_steps=...)`` warns that a manually optimized model is saved *after* its optimizer
    step: that is what is wanted here.

    What Lightning cannot do: it saves no state of the global random generators, and resumes in the middle of an epoch
    only with a data loader that has ``state_dict``. For exact interruption anywhere use
    :class:`~regularized.training.trainer.Trainer`.

    Args:
        model: the model; changed in place (surgery by terms at once, training).
        terms: terms by name, see :mod:`regularized.training.terms`. Parameters of terms that need a gradient are
            trained too.
        optimizer: a factory that takes a list of parameter groups, such as ``partial(torch.optim.SGD, lr=0.1)``.
        schedule: factor on the learning rate of every parameter group, a number or a function of
            :class:`~regularized.training.progress.Progress`; default 1.
        accumulate: batches of the data loader in an optimizer step; default 1.
        clip_norm: largest norm of the whole gradient, the terms' parameters included; default no clipping.

    Attributes:
        model: the model.
        objective: the terms and their sum.

    Raises:
        ImportError: pytorch_lightning is not installed.
        TypeError: ``optimizer`` is a built optimizer.
        ValueError: an argument is outside its range; at ``fit``, an unsupported strategy or precision, or a run without
            an end (schedules need one).
        NonFiniteLoss: while training, a loss, a gradient or a learning rate was NaN or infinite.

    Examples:
        >>> from functools import partial
        >>> from torch.utils.data import DataLoader, TensorDataset
        >>> from regularized.training import CrossEntropy, IndexedDataset, cosine
        >>> from regularized.noisy_labels.early_learning import EarlyLearning
        >>> data = IndexedDataset(TensorDataset(torch.randn(40, 6), torch.randint(3, (40,))))
        >>> module = TermsModule(
        ...     nn.Linear(6, 3),
        ...     terms={"task": CrossEntropy(), "early_learning": EarlyLearning(num_samples=40, num_classes=3)},
        ...     optimizer=partial(torch.optim.SGD, lr=0.1),
        ...     schedule=cosine(),
        ...     accumulate=2,
        ... )
        >>> trainer = pl.Trainer(max_epochs=2, accelerator="cpu", logger=False, enable_checkpointing=False,
        ...                      enable_progress_bar=False, enable_model_summary=False)
        >>> trainer.fit(module, DataLoader(data, batch_size=8, shuffle=True))
        >>> trainer.global_step, sorted(trainer.callback_metrics)
        (6, ['loss', 'terms/early_learning', 'terms/task'])
    """

    @allowed(accumulate=count(1), clip_norm=positive(infinity=True).or_none("no clipping"))
    def __init__(
        self,
        model: nn.Module,
        *,
        terms: Mapping[str, nn.Module],
        optimizer: OptimizerFactory,
        schedule: Coefficient = 1.0,
        accumulate: int = 1,
        clip_norm: float | None = None,
    ) -> None:
        super().__init__()
        if isinstance(optimizer, torch.optim.Optimizer):
            raise TypeError(
                "optimizer must be a factory, so that it is built after the terms have changed the model: "
                f"partial(torch.optim.{type(optimizer).__name__}, lr=...); got a built one"
            )
        self.automatic_optimization = False
        self.model = model
        self.objective: Objective = Objective(terms)
        # At once, not in a hook: a checkpoint can only be loaded into the model that it was made of.
        for attach in self.objective.moments("attach"):
            attach(model)
        self.accumulate = accumulate
        self.clip_norm = clip_norm
        self.schedule: Schedule = as_schedule(schedule, name="schedule")
        self._factory = optimizer
        self._rates: list[float] = []
        self._optimized: list[nn.Parameter] = []
        self._taps: Taps | None = None
        self._finite: FiniteCheck | None = None
        self._window: list[Any] = []  # batches of the optimizer step that is being collected
        self._seen: dict[str, Tensor] = {}  # the last optimizer step, for the logs

    def forward(self, *inputs: Any) -> Any:
        """What the model returns."""
        return self.model(*inputs)

    def configure_optimizers(self) -> torch.optim.Optimizer:
        """Build the optimizer over the parameters of model and terms, after the surgery."""
        optimizer = self._factory(self.objective.parameter_groups(self.model))
        self._rates = [float(group["lr"]) for group in optimizer.param_groups]
        self._optimized = [p for group in optimizer.param_groups for p in group["params"]]
        return optimizer

    # -- the optimizer step ------------------------------------------------------------------------

    def training_step(self, batch: Any, batch_idx: int) -> Tensor | None:
        """Collect a batch; with the last one of an optimizer step, make the step.

        Args:
            batch: the batch, on the device.
            batch_idx: not used.

        Returns:
            The loss of the optimizer step, a detached scalar; None where none was made.
        """
        self._window.append(batch)
        loss = None
        if len(self._window) == self.accumulate or self.trainer.is_last_batch:
            window = [Batch.of(raw) for raw in self._window]
            self._window.clear()
            loss = self._optimize(window)
        # Also between optimizer steps: Lightning looks at fixed numbers of *batches* for something to log.
        for name, value in self._seen.items():
            self.log(name, value, prog_bar=name == "loss", batch_size=1, sync_dist=world_size() > 1)
        return loss

    def _optimize(self, window: list[Batch]) -> Tensor:
        progress, objective = self._progress(), self.objective
        optimizer = self.optimizers()
        assert isinstance(optimizer, LightningOptimizer)  # one factory, one optimizer
        assert self._finite is not None, "on_fit_start was not called: train with a Lightning Trainer"
        for transform in objective.moments("transform"):
            window = [transform(batch) for batch in window]
        counts = objective.counts(window, device=self.device)
        losses = []
        for i, batch in enumerate(window):
            step = self._step(batch, progress)
            with self._sync(i == len(window) - 1):
                loss = objective.loss(step, counts, first=i == 0, scale=float(world_size()))
                self.manual_backward(loss)
            losses.append(loss.detach())
        self._finite.losses(losses, progress.step)
        norm = None if self.clip_norm is None else nn.utils.clip_grad_norm_(self._optimized, self.clip_norm)
        factor = self.schedule(progress)
        self._finite.rate(self._rates[0], factor, progress.step)
        for group, base in zip(optimizer.param_groups, self._rates):
            if isinstance(group["lr"], Tensor):
                group["lr"].fill_(base * factor)
            else:
                group["lr"] = base * factor
        before = objective.moments("before_step")
        for moment in before:
            moment(step)
        # These moments may have changed the gradient since its norm was taken.
        self._finite.gradients(self._optimized, progress.step, norm=None if before else norm)
        optimizer.step()
        for moment in objective.moments("after_step"):
            moment(step)
        optimizer.zero_grad()
        total = torch.stack(losses).sum()
        self._seen = {"loss": total, **{f"terms/{name}": value for name, value in objective.values()}}
        return total

    def _step(self, batch: Batch, progress: Progress) -> Step:
        if self._taps is None:
            self._taps = Taps(self.model, self.objective.taps)
        self._taps.clear()
        return Step(self.model, batch, progress, self._taps.states)

    def _sync(self, last: bool) -> AbstractContextManager[None]:
        """Gradients are exchanged with the last micro-batch only."""
        strategy = self.trainer.strategy
        return strategy.block_backward_sync() if not last and isinstance(strategy, ParallelStrategy) else nullcontext()

    def _progress(self) -> Progress:
        """Position of the next optimizer step.

        Raises:
            ValueError: the run has no end.
        """
        trainer = self.trainer
        an_epoch = trainer.num_training_batches
        if an_epoch != math.inf:
            an_epoch = math.ceil(an_epoch / self.accumulate)
        epochs = trainer.max_epochs if trainer.max_epochs is not None and trainer.max_epochs >= 0 else math.inf
        total = min(
            an_epoch * epochs if an_epoch and epochs else 0, trainer.max_steps if trainer.max_steps >= 0 else math.inf
        )
        if total == math.inf:
            raise ValueError(
                "schedules need the length of the run: give Trainer max_steps, or max_epochs together with a data "
                "loader that has a length (or limit_train_batches)"
            )
        return Progress(
            trainer.global_step,
            int(total),
            trainer.current_epoch,
            int(min(epochs, max(math.ceil(total / an_epoch), 1) if an_epoch else 1)),
        )

    # -- evaluation --------------------------------------------------------------------------------

    def validation_step(self, batch: Any, batch_idx: int, dataloader_idx: int = 0) -> Tensor:
        """Log ``val_loss`` of a batch.

        Args:
            batch: the batch, on the device.
            batch_idx: not used.
            dataloader_idx: not used.

        Returns:
            The loss, a scalar.
        """
        return self._evaluate(batch, "val_loss")

    def test_step(self, batch: Any, batch_idx: int, dataloader_idx: int = 0) -> Tensor:
        """Log ``test_loss`` of a batch.

        Args:
            batch: the batch, on the device.
            batch_idx: not used.
            dataloader_idx: not used.

        Returns:
            The loss, a scalar.
        """
        return self._evaluate(batch, "test_loss")

    def predict_step(self, batch: Any, batch_idx: int, dataloader_idx: int = 0) -> Any:
        """What the model returns for the inputs of a batch.

        Args:
            batch: the batch, on the device; targets and index are ignored.
            batch_idx: not used.
            dataloader_idx: not used.
        """
        return call_model(self.model, Batch.of(batch).inputs)

    def _evaluate(self, raw: Any, name: str) -> Tensor:
        batch = Batch.of(raw)
        fitting = self.trainer.state.fn == "fit" and not self.trainer.sanity_checking
        progress = self._progress() if fitting else Progress(self.trainer.global_step, 0)
        loss = evaluation_loss(self.objective, self._step(batch, progress), scale=float(world_size()))
        self.log(name, loss, prog_bar=True, batch_size=batch.size, sync_dist=world_size() > 1)
        return loss

    # -- the run -----------------------------------------------------------------------------------

    def on_fit_start(self) -> None:
        """Refuse what would not be exact."""
        strategy = self.trainer.strategy
        if not isinstance(strategy, DDPStrategy | SingleDeviceStrategy):
            raise ValueError(
                f"TermsModule trains on one device or with DDP, got {type(strategy).__name__}; "
                'use Trainer(strategy="ddp")'
            )
        if getattr(self.trainer.precision_plugin, "scaler", None) is not None:
            raise ValueError(
                f"TermsModule cannot train with precision={self.trainer.precision!r}: Lightning unscales gradients "
                'after they were clipped and shown to the terms. Use "bf16-mixed" or "32-true"'
            )
        self._finite = FiniteCheck(self.objective, self.model, deferred=self.device.type != "cpu")
        for moment in self.objective.moments("reset"):
            moment()
        self._seen = {}

    def on_train_batch_start(self, batch: Any, batch_idx: int) -> None:
        """Call the terms' ``epoch_start`` before the first batch of an epoch.

        Not in ``on_train_epoch_start``: Lightning leaves that out after a checkpoint that was saved with the last batch
        of an epoch.

        Args:
            batch: not used.
            batch_idx: number of the batch in its epoch.
        """
        if batch_idx == 0:
            self._window.clear()
            for moment in self.objective.moments("epoch_start"):
                moment(self._progress())

    def teardown(self, stage: str) -> None:
        """Take the hooks off the model."""
        self._window.clear()
        if self._taps is not None:
            self._taps.remove()
            self._taps = None

    def on_train_end(self) -> None:
        """Look at the last losses, where that was deferred."""
        if self._finite is not None:
            self._finite.settle()

    def merge(self) -> nn.Module:
        """Let every term that changed the model leave a plain one behind; training cannot go on afterwards."""
        for moment in self.objective.moments("merge"):
            moment(self.model)
        return self.model

    def on_save_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        """Add the state of the terms' generators, of every process; refuse to save a loss that was not finite.

        Args:
            checkpoint: what Lightning will save.
        """
        if self._finite is not None:
            self._finite.settle()
        if self._window:
            logger.warning(
                "this checkpoint is inside an optimizer step: %d batch(es) are collected but not trained on, and will "
                "be missing from a run that is resumed from it",
                len(self._window),
            )
        drawn = {name: generator.get_state() for name, generator in generators(self.objective).items()}
        if drawn:
            checkpoint[GENERATORS_KEY] = {name: self._gather(state) for name, state in drawn.items()}

    def on_load_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        """Restore the terms' generators.

        Args:
            checkpoint: what Lightning has loaded.
        """
        own = generators(self.objective)
        for name, states in checkpoint.get(GENERATORS_KEY, {}).items():
            if rank() < len(states):
                own[name].set_state(states[rank()].cpu())
            else:
                logger.warning("the checkpoint is of fewer processes: generator %s starts anew here", name)

    def _gather(self, state: Tensor) -> Tensor:
        """(processes, ...) states of a generator."""
        if world_size() == 1:
            return state.unsqueeze(0)
        parts = [torch.empty_like(state, device=self.device) for _ in range(world_size())]
        dist.all_gather(parts, state.to(self.device))
        return torch.stack(parts).cpu()
