"""CAST as a whole: the dense teacher, the scales, the groups for the optimizer, and the final cut.

:mod:`regularized.compression.cast.optimizer` has the paper and its symbols.
"""

import copy
import warnings
import weakref
from collections.abc import Iterable, Mapping
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim.optimizer import register_optimizer_step_pre_hook

from regularized.compression.cast.layer import fold_scales, scale_weights
from regularized.compression.cast.loss import distillation_loss
from regularized.compression.cast.optimizer import SparseAdamW
from regularized.compression.cast.pattern import Pattern, check_pattern, semi_structured_mask
from regularized.mechanisms.frozen import Frozen, check_apart
from regularized.mechanisms.ranges import allowed, count, share
from regularized.mechanisms.surgery import match_modules, tied_parameters
from regularized.training.identity import fingerprint
from regularized.training.progress import Coefficient
from regularized.training.step import Batch, Step
from regularized.training.terms import Term

__all__ = ["CAST"]

_CLIFF = 0.01  # of the kept weights' mean size: what may be left of the others when they are cut


class CAST(Term):
    """Train a pretrained model on until it has an exact N:M pattern, with its dense start as teacher.

    In a loop of your own give the model, build :class:`SparseAdamW` on :meth:`param_groups`, and take the loss from
    :func:`~regularized.compression.cast.distillation_loss` with :attr:`teacher`. As a term of
    :class:`~regularized.training.Trainer` or :class:`~regularized.training.huggingface.TermsTrainer` give no model; it
    is the whole loss, in place of the task's cross-entropy. At the end :meth:`finalize` leaves a plain model.

    An optimizer that is not :class:`SparseAdamW` would decay nothing, and the cut would then destroy the model; so one
    that steps these weights is refused at its first step.

    Not for small models or little time: there, cutting first and training what is left does as well (see the page).
    Memory beside the model's and Adam's: the teacher, without gradients, and a byte a weight for the masks. Time: the
    teacher's forward pass, about a third of a step; ``eta=0`` does without both.

    Args:
        model: the pretrained model, changed in place; None where a loop calls :meth:`attach`.
        pattern: (N, M); default (2, 4) (paper), which sparse tensor cores run.
        scale_groups: n, blocks of columns with a factor for each output; default 2 (paper, LLaMA). 0 does without.
        eta: the teacher's share of the loss, in [0, 1]; default 1/3 (paper, LLaMA).
        target_modules: names of layers, or ends of names such as ``"q_proj"``; default every ``nn.Linear`` whose weight
            no other module shares, but the model's ``lm_head`` or what its ``get_output_embeddings`` returns.
        teacher: a network to distil from; default a copy of the model as it is when it is attached.
        shift: the labels are the next token's, as causal language models have them; default False.
        ignore_index: label of tokens that do not count; default -100, as in torch.
        weight: coefficient of the whole loss; default 1.

    Attributes:
        teacher: the frozen teacher, None with ``eta=0``. It is no part of the ``state_dict``; its checksum is, so that
            a run does not go on with another one.
        names: dotted names of the layers that get the pattern.

    Raises:
        ValueError: a setting outside its range; nothing matches; a layer is not linear, shares its weight, or does not
            divide into groups; the teacher shares memory with the model; a state of another teacher or pattern.
        RuntimeError: another optimizer steps the weights; :meth:`finalize` a second time, or training after it.

    Examples:
        >>> model = nn.Sequential(nn.Linear(8, 16), nn.ReLU(), nn.Linear(16, 4))
        >>> cast = CAST(model)
        >>> optimizer = SparseAdamW(cast.param_groups(), lr=1e-2, l1=1e-1, total_steps=100)
        >>> schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, 100)
        >>> x = torch.randn(64, 8)
        >>> y = x[:, :4].argmax(1)
        >>> for _ in range(100):
        ...     distillation_loss(model(x), cast.teacher(x), y, eta=cast.eta).loss.backward()
        ...     optimizer.step()
        ...     schedule.step()
        ...     optimizer.zero_grad()
        >>> cast.residual() < 0.01
        True
        >>> cast.finalize()
        >>> from regularized.compression.cast import follows_pattern
        >>> follows_pattern(model[0].weight), type(model[0]).__name__
        (True, 'Linear')
    """

    @allowed(
        scale_groups=count(0, remedy="0 is no scaling"),
        eta=share("the teacher's share", "the paper uses 1/3"),
    )
    def __init__(
        self,
        model: nn.Module | None = None,
        *,
        pattern: Pattern = (2, 4),
        scale_groups: int = 2,
        eta: float = 1 / 3,
        target_modules: Iterable[str] | None = None,
        teacher: nn.Module | None = None,
        shift: bool = False,
        ignore_index: int = -100,
        weight: Coefficient = 1.0,
    ) -> None:
        super().__init__(weight=weight)
        check_pattern(pattern)
        self.pattern: Pattern = (pattern[0], pattern[1])
        self.scale_groups = scale_groups
        self.eta = eta
        self.target_modules: list[str] | None = _listed(target_modules)
        self.shift = shift
        self.ignore_index = ignore_index
        self.names: list[str] = []
        self._given = teacher
        # In tuples, since torch would make a submodule's weights a part of the state.
        self._teacher: tuple[Frozen, ...] = ()
        self._model: tuple[nn.Module, ...] = ()
        self._checksum = ""
        self._finalized = False
        if model is not None:
            self.attach(model)

    # -- surgery -------------------------------------------------------------------------------------

    def attach(self, model: nn.Module) -> None:
        """Copy the dense model as the teacher, and give the layers their scales. A second call changes nothing.

        Raises:
            ValueError: the model does not fit, see the class; it is left as it was.
            RuntimeError: after :meth:`finalize`.
        """
        self._refuse_finalized()
        if self._model:
            return
        names = _layers(model, self.target_modules)
        for name in names:
            semi_structured_mask(model.get_parameter(f"{name}.weight")[:1], self.pattern, name=name)  # raises
        if self.eta > 0:  # before the scales: the teacher is the plain model
            teacher = copy.deepcopy(model) if self._given is None else self._given
            check_apart(model, teacher, names=("model", "teacher"))
            self._teacher = (Frozen(teacher),)
            self._checksum = fingerprint(teacher.parameters())
        if self.scale_groups:
            scale_weights(model, names, groups=self.scale_groups)
        self.names = names
        self._model = (model,)
        _watch(self)

    def param_groups(self, model: nn.Module | None = None) -> list[dict[str, Any]]:
        """Two groups for :class:`SparseAdamW`: the weights that get the pattern, and all else that is trained.

        Args:
            model: the model that was attached; loops name it, and it may be left out.

        Raises:
            RuntimeError: no model is attached, or :meth:`finalize` was called.
        """
        attached = self._ready()
        weights = list(self.weights().values())
        chosen = {id(weight) for weight in weights}
        rest = [p for p in attached.parameters() if p.requires_grad and id(p) not in chosen]
        return [{"params": weights, "pattern": self.pattern}, {"params": rest}]

    @property
    def teacher(self) -> Frozen | None:
        """The frozen dense teacher; None with ``eta=0``, or before a model is attached."""
        return self._teacher[0] if self._teacher else None

    def weights(self) -> dict[str, nn.Parameter]:
        """The weights that get the pattern, by the names of their layers; none before a model is attached."""
        return {name: model.get_parameter(f"{name}.weight") for model in self._model for name in self.names}

    def masks(self) -> dict[str, Tensor]:
        """(R, C) bool mask of each layer, of the weights as they are now; True stays."""
        return {name: semi_structured_mask(w, self.pattern, name=name) for name, w in self.weights().items()}

    @torch.no_grad()
    def residual(self) -> float:
        """Mean size of the weights that the cut would take, over that of those that stay: near 0 at a good end."""
        taken, kept, n, m = 0.0, 0.0, *self.pattern
        for name, weight in self.weights().items():
            size, mask = weight.abs(), semi_structured_mask(weight, self.pattern, name=name)
            kept += float(size[mask].sum())
            taken += float(size[~mask].sum())
        return (taken / (m - n)) / (kept / n) if kept else 0.0

    # -- in the loop ---------------------------------------------------------------------------------

    def _labels(self, targets: Tensor) -> Tensor:
        return targets[:, 1:] if self.shift else targets

    def count(self, batch: Batch) -> int | Tensor:
        """Number of labels that count."""
        if batch.targets is None:
            raise ValueError("CAST needs targets; yield (x, y), or a mapping with `targets` or `labels`")
        return (self._labels(batch.targets) != self.ignore_index).sum()

    def forward(self, step: Step) -> Tensor:
        """Sum of the loss over the labels that count.

        Raises:
            RuntimeError: no model is attached, or :meth:`finalize` was called.
        """
        self._ready()
        logits, taught = step.logits, None
        if self.teacher is not None:
            taught = _logits(step.forward(step.inputs, model=self.teacher, grad=False))
        if self.shift:
            logits, taught = logits[:, :-1], None if taught is None else taught[:, :-1]
        return distillation_loss(
            logits,
            taught,
            self._labels(step.targets),
            eta=self.eta,
            ignore_index=self.ignore_index,
            reduction="sum",
        ).loss

    # -- the end -------------------------------------------------------------------------------------

    @torch.no_grad()
    def finalize(self) -> None:
        """Cut the weights outside the pattern, fold the scales in, and let go of the teacher: a plain sparse model.

        The model's outputs change by what is cut, see :meth:`residual`.

        Raises:
            RuntimeError: the second time, or without a model.

        Warns:
            UserWarning: what is cut is more than a hundredth of what stays: the decay was too weak or too short.
        """
        model = self._ready()
        left = self.residual()
        if left > _CLIFF:
            warnings.warn(
                f"the weights that are cut still have {left:.3g} of the mean size of those that stay, so that the "
                "model loses what they did; train with a larger l1, with more steps or a higher rate (see "
                "decay_budget), and let the rate fall towards the end",
                stacklevel=2,
            )
        for weight, mask in zip(self.weights().values(), self.masks().values(), strict=True):
            weight.masked_fill_(~mask, 0.0)  # a product would leave zeros of both signs
        fold_scales(model)
        self._teacher, self._given = (), None
        self._finalized = True

    def merge(self, model: nn.Module) -> None:
        """:meth:`finalize`, for a loop."""
        self.finalize()

    def _ready(self) -> nn.Module:
        """The model, while it is in training."""
        self._refuse_finalized()
        if not self._model:
            raise RuntimeError("CAST has no model yet; give it one, CAST(model), or call attach(model)")
        return self._model[0]

    def _refuse_finalized(self) -> None:
        if self._finalized:
            raise RuntimeError(
                "finalize() was called: the model is plain and sparse, and training on would fill its zeros again. To "
                "train what is left, use regularized.mechanisms.pruning.pruned with the masks of the weights"
            )

    def _check_optimizer(self, optimizer: torch.optim.Optimizer) -> None:
        """Refuse an optimizer that would train the weights without pulling them to their pattern."""
        own = {id(weight) for weight in self.weights().values()}
        groups = [group for group in optimizer.param_groups if any(id(p) in own for p in group["params"])]
        if not groups:
            return
        if not isinstance(optimizer, SparseAdamW):
            if self._finalized or any(isinstance(part, SparseAdamW) for part in vars(optimizer).values()):
                return  # training under a mask, or one that wraps ours
            raise RuntimeError(
                f"{type(optimizer).__name__} trains weights that CAST is to make sparse, but does not pull them to "
                "their pattern, so that the final cut would destroy the model; use "
                "SparseAdamW(cast.param_groups(), lr=..., l1=..., total_steps=...)"
            )
        self._refuse_finalized()
        for group in groups:
            if group["pattern"] is None or tuple(group["pattern"]) != self.pattern:
                raise RuntimeError(
                    f"SparseAdamW holds weights of CAST in a group with pattern={group['pattern']} instead of "
                    f"{self.pattern}; build it on cast.param_groups()"
                )

    # -- state ---------------------------------------------------------------------------------------

    def _apply(self, fn: Any, recurse: bool = True) -> "CAST":
        for module in (self, *self._teacher):
            nn.Module._apply(module, fn, recurse)
        return self

    def _save_to_state_dict(self, destination: dict[str, Any], prefix: str, keep_vars: bool) -> None:
        super()._save_to_state_dict(destination, prefix, keep_vars)
        destination[prefix + "teacher"] = torch.tensor(list(bytes.fromhex(self._checksum)), dtype=torch.uint8)
        destination[prefix + "pattern"] = torch.tensor(self.pattern)

    def _load_from_state_dict(self, state_dict: Mapping[str, Any], prefix: str, *args: Any) -> None:
        saved = {name: state_dict.get(prefix + name) for name in ("teacher", "pattern")}
        missing_keys = args[2]
        missing_keys += [prefix + name for name, value in saved.items() if value is None]
        if saved["pattern"] is not None and tuple(saved["pattern"].tolist()) != self.pattern:
            raise ValueError(
                f"the state is of a run with pattern {tuple(saved['pattern'].tolist())}, not {self.pattern}"
            )
        if saved["teacher"] is not None and bytes(saved["teacher"].tolist()).hex() != self._checksum:
            raise ValueError(
                "the state is of a run with another teacher; build CAST on the pretrained model that the run began "
                "with, then load the states of model and optimizer"
            )

    def extra_repr(self) -> str:
        """Settings, for ``repr``."""
        return f"pattern={self.pattern}, scale_groups={self.scale_groups}, eta={self.eta:.3g}, layers={len(self.names)}"


def _watch(cast: CAST) -> None:
    """Let the term see every optimizer that is about to step, for as long as the term lives."""
    ask = weakref.ref(cast)

    def look(optimizer: torch.optim.Optimizer, args: Any, kwargs: Any) -> None:
        one = ask()
        if one is not None:
            one._check_optimizer(optimizer)

    weakref.finalize(cast, register_optimizer_step_pre_hook(look).remove)


def _listed(names: Iterable[str] | None) -> list[str] | None:
    return names if names is None or isinstance(names, str) else list(names)  # type: ignore[return-value]


def _layers(model: nn.Module, target_modules: Iterable[str] | None) -> list[str]:
    """Names of the layers that get the pattern."""
    tied = {owner for owners in tied_parameters(model).values() for owner in owners}
    chosen = match_modules(model, target_modules)
    if target_modules is None:
        ask = getattr(model, "get_output_embeddings", None)
        head = ask() if callable(ask) else None
        chosen = {
            name: module
            for name, module in chosen.items()
            if module is not head and name.rpartition(".")[2] != "lm_head" and f"{name}.weight" not in tied
        }
    if not chosen:
        raise ValueError(
            f"{type(model).__name__} has no linear layer to make sparse: target_modules is {target_modules!r}"
        )
    for name, module in chosen.items():
        if not isinstance(module, nn.Linear):
            raise ValueError(f"{name} is a {type(module).__name__}, not nn.Linear; leave it out of target_modules")
        if f"{name}.weight" in tied:
            raise ValueError(
                f"{name} shares its weight with another module, which would become sparse, too; leave it out"
            )
    return list(chosen)


def _logits(output: Any) -> Tensor:
    logits = output if isinstance(output, Tensor) else getattr(output, "logits", None)
    if not isinstance(logits, Tensor):
        raise TypeError(f"the teacher returned {type(output).__name__}; a tensor or an object with `logits` is needed")
    return logits
