"""Named terms in the Hugging Face ``Trainer``.

A loss that is added in ``compute_loss`` of ``transformers.Trainer`` is wrong under gradient accumulation: a penalty on
the weights counts once for each micro-batch, so K accumulation steps make it K times as strong, and a mean over a
micro-batch weighs an incomplete one too much. :class:`TermsTrainer` gives each micro-batch its share of the one sum of
an optimizer step (see :mod:`regularized.training.objective`), and keeps transformers from dividing it again.

Needs the extra: ``pip install "regularized[huggingface]"``.
"""

import logging
from collections import deque
from collections.abc import Callable, Iterator, Mapping
from itertools import islice
from pathlib import Path
from typing import Any

import torch
from accelerate.utils import convert_to_fp32
from torch import Tensor, nn

from regularized.mechanisms.distributed import world_size
from regularized.mechanisms.surgery import check_optimizer_is_current
from regularized.mechanisms.taps import Taps
from regularized.training import checkpoint
from regularized.training.checkpoint import CheckpointError
from regularized.training.devices import average_gradients, synchronise
from regularized.training.evaluation import evaluation_loss
from regularized.training.finite import FiniteCheck
from regularized.training.objective import Objective
from regularized.training.progress import Progress
from regularized.training.randomness import generators
from regularized.training.step import INDEX_NAME, Batch, Step, call_model

try:
    import transformers
except ModuleNotFoundError as _error:
    if _error.name != "transformers":
        raise
    raise ImportError(
        'regularized.training.huggingface needs transformers: pip install "regularized[huggingface]"'
    ) from _error

__all__ = ["TermsTrainer"]

logger = logging.getLogger(__name__)

TERMS_FILE = "terms"  # .safetensors and .json, in each checkpoint


class TermsTrainer(transformers.Trainer):
    """``transformers.Trainer`` whose loss is a sum of named terms.

    Data sets yield mappings: the model's arguments, ``labels``, and ``index`` where a term remembers something for each
    sample (``dataset.add_column("index", range(len(dataset)))``, or
    :class:`~regularized.training.data.IndexedDataset`). ``index`` is kept although it is no argument of the model.
    The model is called without labels: the terms compute the loss, so that one of them is the task, for example
    ``CrossEntropy()``, for causal language models ``CrossEntropy(shift=True)``.

    Everything else is transformers' own and works as before: arguments, learning rate schedule, callbacks, evaluation,
    checkpoints. What the terms remember is saved beside the model, in ``terms.safetensors``, and comes back with
    ``train(resume_from_checkpoint=...)``. The mean of each term since the last log step is logged as ``terms/<name>``.

    It trains with one process or with DDP (``torchrun``, ``accelerate launch``). A model with buffers, of which a term
    asks for a second forward pass, needs ``ddp_broadcast_buffers=False`` there. There is no ``model_init``: terms keep
    state that belongs to one model, so a search over hyperparameters builds a new ``TermsTrainer`` for each trial.

    Args:
        model: the model; changed in place (surgery by terms, training).
        args: transformers' ``TrainingArguments``. ``per_device_train_batch_size`` is that of a micro-batch.
        terms: terms by name, see :mod:`regularized.training.terms`. Parameters of terms that need a gradient are
            trained too, with the learning rate and weight decay of ``args``.
        data_collator: see transformers.
        train_dataset: see transformers.
        eval_dataset: see transformers. ``eval_loss`` is the objective with its terms in eval mode; like transformers'
            it is a mean over batches.
        processing_class: see transformers.
        compute_metrics: see transformers.
        callbacks: see transformers; they run before the moments of the terms.
        optimizers: see transformers. An optimizer given here must hold all trainable parameters that are there after
            the terms' surgery.
        optimizer_cls_and_kwargs: see transformers; the way to choose an optimizer that is built after the surgery.
        preprocess_logits_for_metrics: see transformers.

    Attributes:
        objective: the terms and their sum.

    Raises:
        ImportError: transformers is not installed.
        ValueError: an option that would change the loss or the step behind the terms' back: label smoothing, the Liger
            kernel, ``DataParallel``, FSDP, DeepSpeed, or context and sequence parallelism.
        NonFiniteLoss: while training, a loss or a gradient was NaN or infinite (not in fp16, where that is the
            scaler's business).

    Examples:
        >>> import tempfile
        >>> from regularized.training import CrossEntropy
        >>> from regularized.noisy_labels.early_learning import EarlyLearning
        >>> config = transformers.BertConfig(vocab_size=20, hidden_size=8, num_hidden_layers=1, num_attention_heads=1,
        ...                                  intermediate_size=8, num_labels=2)
        >>> model = transformers.BertForSequenceClassification(config)
        >>> data = [{"input_ids": torch.randint(20, (5,)), "labels": i % 2, "index": i} for i in range(12)]
        >>> with tempfile.TemporaryDirectory() as folder:
        ...     trainer = TermsTrainer(
        ...         model,
        ...         transformers.TrainingArguments(
        ...             folder, max_steps=3, per_device_train_batch_size=2, gradient_accumulation_steps=2,
        ...             logging_steps=1, report_to=[], use_cpu=True, disable_tqdm=True, save_strategy="no",
        ...         ),
        ...         terms={"task": CrossEntropy(), "early_learning": EarlyLearning(num_samples=12, num_classes=2)},
        ...         train_dataset=data,
        ...         callbacks=[],
        ...     )
        ...     _ = trainer.pop_callback(transformers.PrinterCallback)
        ...     _ = trainer.train()
        >>> sorted(key for key in trainer.state.log_history[0] if key.startswith("terms/"))
        ['terms/early_learning', 'terms/task']
    """

    # The shares of the micro-batches add up to the loss of the step, so transformers must not divide them by their
    # number. Early 5.x versions know no such flag and look at `compute_loss_func` instead, which is set below.
    loss_is_scaled_for_ga = True

    objective: Objective
    model: Any  # never None here, which transformers' annotation allows

    def __init__(
        self,
        model: nn.Module,
        args: transformers.TrainingArguments,
        *,
        terms: Mapping[str, nn.Module],
        data_collator: Callable[..., Any] | None = None,
        train_dataset: Any = None,
        eval_dataset: Any = None,
        processing_class: Any = None,
        compute_metrics: Callable[..., dict[str, Any]] | None = None,
        callbacks: list[Any] | None = None,
        optimizers: tuple[Any, Any] = (None, None),
        optimizer_cls_and_kwargs: tuple[type[torch.optim.Optimizer], dict[str, Any]] | None = None,
        preprocess_logits_for_metrics: Callable[..., Any] | None = None,
    ) -> None:
        self.objective = Objective(terms)
        super().__init__(
            model=model,
            args=args,
            data_collator=data_collator,
            train_dataset=train_dataset,
            eval_dataset=eval_dataset,
            processing_class=processing_class,
            compute_metrics=compute_metrics,
            compute_loss_func=_never_called,
            callbacks=[*(callbacks or ()), _Moments(self)],
            optimizers=optimizers,
            optimizer_cls_and_kwargs=optimizer_cls_and_kwargs,
            preprocess_logits_for_metrics=preprocess_logits_for_metrics,
        )
        self._refuse_unsupported()
        self.objective.to(self.args.device)
        for attach in self.objective.moments("attach"):
            attach(model)
        if self.place_model_on_device:  # what surgery has added may be elsewhere
            self._move_model_to_device(model, self.args.device)
        self.objective.to(self.args.device)
        own = {id(p) for p in model.parameters()}
        self._term_parameters = [p for p in self.objective.parameters() if p.requires_grad and id(p) not in own]
        clips = self.args.max_grad_norm is not None and self.args.max_grad_norm > 0
        if self._term_parameters and clips and not hasattr(transformers.Trainer, "_clip_grad_norm"):
            raise ValueError(
                f"transformers {transformers.__version__} clips the gradient of the model alone, but a term has "
                'parameters of its own; update it (pip install -U "transformers>=5.24"), or set max_grad_norm=0'
            )
        if not self.label_names and self.args.label_names is None:
            # transformers looks for labels in the signature of the model; a model that leaves its loss to us has none.
            self.label_names: list[str] = ["labels"]

        self._transforms = self.objective.moments("transform")
        self._finite = FiniteCheck(self.objective, self.model, deferred=self.args.device.type != "cpu")
        self._taps: Taps | None = None
        self._fetched: list[Any] = []  # micro-batches of the next optimizer step, as the loader gave them
        self._window: deque[Batch] = deque()  # those that are still to come, ready for the model
        self._counts: dict[str, float | Tensor] = {}
        self._batch: Batch | None = None  # the micro-batch that is trained on now
        self._first = False
        self._losses: list[Tensor] = []
        self._last_step: Step | None = None
        self._epoch = 0
        self._sums: dict[str, Tensor] = {}
        self._summed = 0

    # -- the optimizer step ------------------------------------------------------------------------

    def get_batch_samples(
        self, epoch_iterator: Iterator[Any], num_batches: int, device: torch.device
    ) -> tuple[list[Any], None]:
        """Fetch the micro-batches of an optimizer step; transformers' own count of items is not needed."""
        self._fetched = list(islice(epoch_iterator, num_batches))
        return self._fetched, None

    def training_step(
        self, model: nn.Module, inputs: dict[str, Any], num_items_in_batch: Tensor | int | None = None
    ) -> Tensor:
        """Back-propagate the share of one micro-batch.

        Args:
            model: the model, in its DDP wrapper where there is one.
            inputs: the micro-batch.
            num_items_in_batch: not used; each term counts for itself.

        Returns:
            Scalar: the share; those of an optimizer step add up to its loss.
        """
        if self._fetched or not self._window:
            self._open_window(self._fetched or [inputs])
            self._fetched = []
        self._batch = self._window.popleft()
        try:
            loss: Tensor = super().training_step(model, inputs)
        finally:
            self._batch = None
        self._first = False
        self._losses.append(loss)
        if not self._window and self._term_parameters and world_size() > 1:
            average_gradients(self._term_parameters)  # they are outside the wrapper of the model
        return loss

    def compute_loss(
        self,
        model: nn.Module,
        inputs: dict[str, Any],
        return_outputs: bool = False,
        num_items_in_batch: Tensor | int | None = None,
    ) -> Any:
        """The objective: in a training step the micro-batch's share of it, elsewhere its value for this batch.

        Args:
            model: the model, in its wrapper where there is one.
            inputs: the batch.
            return_outputs: return what the model returned, too.
            num_items_in_batch: not used; each term counts for itself.
        """
        scale = float(world_size())  # DDP averages over the processes, where a sum is wanted
        if self._batch is None:
            step = self._step(model, Batch.of(inputs))
            loss = evaluation_loss(self.objective, step, scale=scale)
        else:
            step = self._last_step = self._step(model, self._batch)
            loss = self.objective.loss(step, self._counts, first=self._first, scale=scale)
        return (loss, _with_loss(step.output, loss)) if return_outputs else loss

    def _open_window(self, fetched: list[Any]) -> None:
        # Not in `get_batch_samples`: a resumed run restores the random state between the two, and transforms draw.
        batches = [Batch.of(self._prepare_inputs(raw)) for raw in fetched]
        for transform in self._transforms:
            batches = [transform(batch) for batch in batches]
        self._counts = self.objective.counts(batches, device=self.args.device)
        self._window = deque(batches)
        self._first = True
        self._losses = []

    def _step(self, wrapped: nn.Module, batch: Batch) -> Step:
        if self._taps is None:
            self._taps = Taps(self.model, self.objective.taps)
        self._taps.clear()

        def call(model: nn.Module, inputs: Any) -> Any:
            if model is self.model:
                return call_model(wrapped, inputs)
            if self.accelerator.mixed_precision == "no":
                return call_model(model, inputs)
            with self.accelerator.autocast():  # as Accelerate has done to the model itself
                return convert_to_fp32(call_model(model, inputs))

        return Step(self.model, batch, self._progress(), self._taps.states, call=call)

    def _progress(self) -> Progress:
        state = self.state
        return Progress(state.global_step, state.max_steps, self._epoch, max(state.num_train_epochs, 1))

    # -- the moments, called by the callback below -------------------------------------------------

    def _begin(self) -> None:
        synchronise(self.objective, self.args.device)  # what its terms drew at random
        self.objective.train()
        self._finite.forget()
        for moment in self.objective.moments("reset"):
            moment()
        self._sums, self._summed = {}, 0
        self._epoch = int(self.state.epoch or 0) - 1

    def _start_epoch(self) -> None:
        resumed_inside = self._epoch + 1 == int(self.state.epoch or 0) and (self.state.epoch or 0) % 1 > 0
        self._epoch += 1
        if not resumed_inside:
            for moment in self.objective.moments("epoch_start"):
                moment(self._progress())

    def _before_update(self) -> None:
        # Gradients are free of fp16's scale by now: transformers clips them, or takes their norm for the log.
        watched = getattr(self.accelerator, "scaler", None) is None
        if watched:
            self._finite.losses(self._losses, self.state.global_step)
        for moment in self.objective.moments("before_step"):
            moment(self._last_step)
        if watched:
            assert self.optimizer is not None
            parameters = [p for group in self.optimizer.param_groups for p in group["params"]]
            self._finite.gradients(parameters, self.state.global_step)

    def _after_update(self) -> None:
        if not self.accelerator.optimizer_step_was_skipped:
            for moment in self.objective.moments("after_step"):
                moment(self._last_step)
        self._last_step = None
        for parameter in self._term_parameters:  # transformers zeroes those of the model only
            parameter.grad = None
        for name, value in self.objective.values():
            self._sums[name] = self._sums[name] + value if name in self._sums else value
        self._summed += 1

    def _end(self) -> None:
        self._finite.settle()
        self._window.clear()
        if self._taps is not None:
            self._taps.remove()
            self._taps = None

    # -- optimizer, logs, data -------------------------------------------------------------------------

    def create_optimizer(self, model: nn.Module | None = None) -> torch.optim.Optimizer:
        """Build transformers' optimizer, and give it the terms' parameters and parameter groups.

        Args:
            model: not used; transformers gives it with FSDP only.

        Raises:
            ValueError: an optimizer was given that lacks parameters of the model or of a term.
        """
        built = self.optimizer is None
        optimizer: Any = super().create_optimizer()
        if built:
            groups = self.objective.own_groups(self.model)
            grouped = {id(p) for group in groups for p in group["params"]}
            for group in optimizer.param_groups:
                group["params"] = [p for p in group["params"] if id(p) not in grouped]
            rest = [p for p in self._term_parameters if id(p) not in grouped]
            for group in [{"params": rest}, *groups] if rest else groups:
                optimizer.add_param_group({"weight_decay": self.args.weight_decay, **group})
        check_optimizer_is_current(self.model, optimizer)
        check_optimizer_is_current(self.objective, optimizer)
        return optimizer  # type: ignore[no-any-return]

    def _clip_grad_norm(self, model: nn.Module) -> Any:
        if not self._term_parameters:
            return super()._clip_grad_norm(model)  # type: ignore[no-untyped-call, unused-ignore]
        everything = [*model.parameters(), *self._term_parameters]
        return self.accelerator.clip_grad_norm_(everything, self.args.max_grad_norm)

    def log(self, logs: dict[str, float], start_time: float | None = None) -> None:
        """Log as transformers does, the mean of each term since the last time included.

        Args:
            logs: values by name.
            start_time: start of the training.
        """
        if "loss" in logs and self._summed:
            means = torch.stack([value.float() for value in self._sums.values()]) / self._summed
            if world_size() > 1:
                means = self.accelerator.reduce(means, "mean")
            logs.update(zip((f"terms/{name}" for name in self._sums), means.tolist(), strict=True))
            self._sums, self._summed = {}, 0
        super().log(logs, start_time)

    def prediction_step(
        self,
        model: nn.Module,
        inputs: dict[str, Any],
        prediction_loss_only: bool,
        ignore_keys: list[str] | None = None,
    ) -> tuple[Any, Any, Any]:
        """Predict as transformers does; a batch without labels goes to the model without ``index``, too.

        Args:
            model: the model.
            inputs: the batch.
            prediction_loss_only: return the loss only.
            ignore_keys: keys of the model's output to leave out.
        """
        if any(inputs.get(name) is None for name in self.label_names):
            inputs = {name: value for name, value in inputs.items() if name != INDEX_NAME}
        result: tuple[Any, Any, Any] = super().prediction_step(model, inputs, prediction_loss_only, ignore_keys)
        return result

    def _set_signature_columns_if_needed(self) -> None:
        super()._set_signature_columns_if_needed()
        columns: Any = self._signature_columns
        if INDEX_NAME not in columns:
            columns.append(INDEX_NAME)

    # -- checkpoints -----------------------------------------------------------------------------------

    def save_model(self, output_dir: str | None = None, _internal_call: bool = False) -> None:
        """Save the model as transformers does, and what the terms remember beside it.

        Args:
            output_dir: folder; default that of the arguments.
        """
        self._finite.settle()
        super().save_model(output_dir, _internal_call)
        folder = Path(output_dir or self.args.output_dir or ".")
        folder.mkdir(parents=True, exist_ok=True)
        if self.args.should_save:
            checkpoint.write_part(folder, TERMS_FILE, self.objective.terms.state_dict())
        drawn = {name: generator.get_state() for name, generator in generators(self.objective).items()}
        if drawn:  # each process has its own
            checkpoint.write_part(folder, self._generators_file(), drawn)

    def merge(self) -> nn.Module:
        """Let every term that changed the model leave a plain one behind; training cannot go on afterwards."""
        for moment in self.objective.moments("merge"):
            moment(self.model)
        model: nn.Module = self.model
        return model

    def _generators_file(self) -> str:
        return f"{TERMS_FILE}-rank-{self.args.process_index:05d}"

    def _load_from_checkpoint(self, resume_from_checkpoint: str, model: nn.Module | None = None) -> None:
        super()._load_from_checkpoint(resume_from_checkpoint, model)
        self._load_terms(Path(resume_from_checkpoint))

    def _load_best_model(self) -> None:
        super()._load_best_model()
        assert self.state.best_model_checkpoint is not None
        self._load_terms(Path(self.state.best_model_checkpoint))

    def _load_terms(self, folder: Path) -> None:
        if not (folder / f"{TERMS_FILE}.safetensors").is_file():
            raise CheckpointError(
                f"{folder} has no {TERMS_FILE}.safetensors: it was not written by TermsTrainer. To begin with its "
                "weights but new terms, load the model from it and call train() without resume_from_checkpoint"
            )
        state = checkpoint.load(folder, TERMS_FILE)
        try:
            self.objective.terms.load_state_dict(state)
        except RuntimeError as error:
            raise CheckpointError(f"the terms in {folder} are not those of this run: {error}") from error
        own = generators(self.objective)
        if own and (folder / f"{self._generators_file()}.json").is_file():
            for name, drawn in checkpoint.load(folder, self._generators_file()).items():
                own[name].set_state(drawn)
        elif own:
            logger.warning("%s was written by fewer processes: the terms' generators here start anew", folder)

    # -- what would change the loss behind the terms' back -----------------------------------------------

    def _refuse_unsupported(self) -> None:
        parallelism = getattr(self.accelerator, "parallelism_config", None)
        sizes = [getattr(parallelism, f"{kind}_size", 1) or 1 for kind in ("cp", "sp", "tp")]
        reasons = {
            "label_smoothing_factor has no effect on terms; use CrossEntropy(label_smoothing=...)": (
                self.args.label_smoothing_factor != 0
            ),
            "use_liger_kernel fuses the model's own loss, which terms replace; leave it out": (
                getattr(self.args, "use_liger_kernel", False)
            ),
            "DataParallel over several GPUs cannot be used with terms; start with torchrun, or make one GPU visible "
            "(CUDA_VISIBLE_DEVICES=0)": self.args.n_gpu > 1,
            "FSDP and DeepSpeed are not supported by TermsTrainer; use DDP": (
                self.is_fsdp_enabled or self.is_deepspeed_enabled
            ),
            "tensor, context and sequence parallelism are not supported by TermsTrainer; use DDP": max(sizes) > 1,
        }
        for reason, found in reasons.items():
            if found:
                raise ValueError(reason)


class _Moments(transformers.TrainerCallback):
    """Tells the trainer when transformers' loop is where the terms have something to do."""

    def __init__(self, trainer: TermsTrainer) -> None:
        self._trainer = trainer

    def on_train_begin(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        self._trainer._begin()

    def on_epoch_begin(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        self._trainer._start_epoch()

    def on_pre_optimizer_step(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        self._trainer._before_update()

    def on_optimizer_step(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        self._trainer._after_update()

    def on_train_end(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        self._trainer._end()


def _never_called(outputs: Any, labels: Any, num_items_in_batch: Any = None) -> Tensor:
    """Stands where transformers looks whether a loss is scaled already; `compute_loss` does not ask it."""
    raise AssertionError("TermsTrainer computes the loss from its terms")


def _with_loss(output: Any, loss: Tensor) -> Any:
    """The output in one of the forms that transformers' evaluation takes apart."""
    if isinstance(output, Tensor):
        return {"logits": output}
    return output if isinstance(output, Mapping) else (loss, *output)
