"""SaRA: fine-tune a large pretrained model in place, through the weights that do nothing yet.

Weights whose absolute value lies below a threshold hardly matter to a large pretrained model. Only these are trained,
without added modules; everything else keeps its bits. A nuclear-norm penalty keeps each matrix of trained values low in
rank, and halfway the selection is repeated, so that training goes on with what is still small.

    Hu, Zhang, Yi, Huang, Wang, Ma, "SaRA: High-Efficient Diffusion Model Fine-tuning with Progressive Sparse Low-Rank
    Adaptation", ICLR 2025, arXiv 2409.06633. Official code: github.com/sjtuplayer/SaRA at ea21192 (no licence).

===========  ==========================  =====================================================================
paper        here                        meaning
===========  ==========================  =====================================================================
theta_t      ``threshold``               weights of smaller absolute value are trained, > 0
M            ``SparseEntries.index``     positions of the trained entries
P * M        ``SparseEntries.values``    their values, the leaf that the optimizer trains
lambda       ``lambda_rank``             coefficient of the nuclear norm, >= 0
T            ``total_steps``             optimizer steps; the second selection is after ``reselect_at * T``
===========  ==========================  =====================================================================

Paper and code differ, in two optimizers of the repository. We follow the paper, and the dense ``adamw2.py`` where it is
silent: the penalty acts (in ``adamw.py`` it reaches parameters that are not trained), training starts from the weights
themselves (``adamw.py``: from their absolute values), the second selection keeps the optimizer's moments and costs no
step. As in the code, one matrix is penalised a step, drawn among those with both sides above 64, and biases and
normalisation weights are selected like all others.
"""

import math
import warnings
import weakref
from collections.abc import Collection, Iterable, Mapping
from typing import Any, Literal, TypeAlias, TypeVar

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel
from torch.optim.optimizer import register_optimizer_step_pre_hook
from torch.utils.hooks import RemovableHandle

from regularized.fine_tuning.sara.adapter import SparseAdapter
from regularized.fine_tuning.sara.entries import Segment, SparseEntries, master_dtype
from regularized.fine_tuning.sara.penalty import Polar, nuclear_norm, polar_factor
from regularized.fine_tuning.sara.selection import (
    FRACTION,
    below,
    check_selection,
    magnitude_threshold,
    trainable_parameters,
)
from regularized.mechanisms.distributed import world_size
from regularized.mechanisms.ranges import Choice, allowed, at_least, between, count, positive
from regularized.training.progress import Coefficient, Progress, as_schedule
from regularized.training.randomness import mix
from regularized.training.step import Step
from regularized.training.terms import Term

__all__ = ["SaRA", "suggested_learning_rate"]

Of: TypeAlias = Literal["values", "delta"]
Optimizer = TypeVar("Optimizer", bound=torch.optim.Optimizer)

_SMALLEST_SIDE = 64  # matrices must be larger on both sides to be penalised (official code)


@allowed(threshold=positive())
def suggested_learning_rate(threshold: float) -> float:
    """The authors' rule ``1e-3 exp(-350 threshold)``: the larger the weights, the smaller the steps.

    It was fitted on Stable Diffusion 1.5 and knows nothing of the scale of other models: there, tune.

    Args:
        threshold: largest absolute value of trained weights, > 0.

    Raises:
        ValueError: ``threshold`` is not positive.

    Warns:
        UserWarning: the rate is below 1e-6, a sign that the rule does not fit the model.

    Examples:
        >>> round(suggested_learning_rate(2e-3), 6)
        0.000497
    """
    rate = 1e-3 * math.exp(-350 * threshold)
    if rate < 1e-6:
        warnings.warn(
            f"the rule gives a learning rate of {rate:.2g} for a threshold of {threshold:g}, with which nothing will "
            "move; it was fitted on thresholds from 2e-4 to 1e-2 of Stable Diffusion. Tune the rate instead",
            stacklevel=3,
        )
    return rate


class SaRA(Term):
    """Train the weights of smallest magnitude of a pretrained model, in place, at the memory of those weights.

    In a loop of your own give the model, build *any* optimizer on :meth:`parameters`, and :meth:`bind` it; nothing else
    in the loop changes. As a term of :class:`~regularized.training.trainer.Trainer` or
    :class:`~regularized.training.huggingface.TermsTrainer` give neither model nor number of steps.

    What is not trained has no gradient beyond the moment in which its tensor's is computed, and no optimizer state; its
    bits never change. The model keeps its parameters, their names, and its ``state_dict`` at all times; evaluation
    needs nothing. Memory beside the model: 13 bytes a trained weight (value, start, position, a flag), its gradient,
    and what the optimizer needs for it. Trained weights of half precision are kept in float32 too. With several
    processes the trained gradients alone are exchanged.

    Not for small models: they have too few idle weights, and training the *largest* ones kept and learned more in our
    measurements. The paper itself warns of models far below 100M parameters.

    Args:
        model: the pretrained model, already of its final type; None where a loop calls :meth:`attach`. Parameters with
            ``requires_grad=False`` are left out.
        threshold: weights of smaller absolute value are trained. The authors' values for Stable Diffusion 1.5: 2e-3
            (50M weights), 8e-4 (20M), 2e-4 (5M). Infinity trains everything.
        fraction: or: the share of weights to train, in (0, 1), the smallest over all tensors together.
        total_steps: T, optimizer steps of the whole training; a loop that attaches this object knows it.
        reselect_at: share of T after which the selection is repeated among what is trained, in [0, 1); default 0.5
            (paper, section 4.3). 0 never does.
        lambda_rank: coefficient of the nuclear norm, a number >= 0 or a schedule; default 5e-3 (paper, appendix K; the
            README has 5e-4, the code 0). Added to the gradient just before the optimizer's step, after any clipping.
        rank_of: what is penalised: the trained ``"values"`` (default, official code) or their ``"delta"`` from the
            pretrained ones.
        polar: how the gradient of the norm is computed, see :func:`~regularized.fine_tuning.sara.polar_factor`;
            default ``"svd"``.
        include: patterns of parameter names to train, such as ``["*attn*"]``; default all.
        exclude: patterns to leave out, such as ``["*.bias", "*norm*"]``; default none, as in the official code.
        seed: of the sequence of penalised matrices; the step decides the rest, so that a resumed run goes on with the
            same ones and all processes agree. Default 0.

    Attributes:
        threshold: the threshold, also where a fraction was given.
        steps: optimizer steps done.
        penalised: nuclear norm of the last penalised matrix, a tensor; None before.

    Raises:
        ValueError: a setting is outside its range; nothing or everything lies below the threshold; no matrix can be
            penalised; a pattern matches nothing; weights are quantized, sharded or on the meta device.
        RuntimeError: the optimizer stepped without having been bound; or one steps that was built on the model's own
            parameters, which get no gradient; or its state is of another selection.

    Examples:
        >>> model = nn.Sequential(nn.Linear(80, 80), nn.ReLU(), nn.Linear(80, 3))
        >>> sara = SaRA(model, fraction=0.1, total_steps=4)
        >>> optimizer = sara.bind(torch.optim.AdamW(sara.parameters(), lr=1e-3))
        >>> for x in torch.randn(4, 16, 80):
        ...     model(x).square().mean().backward()
        ...     optimizer.step()
        ...     optimizer.zero_grad()
        >>> adapter = sara.adapter()  # what was learned, for a small file
        >>> sara.finalize()  # a plain model again
        >>> adapter.num_entries == round(0.1 * 6723)
        True
    """

    unsharded = "it chooses entries of the weights when it is attached, before they are in shards"

    contributes = False

    @allowed(
        threshold=positive(remedy="no weight is below it", infinity=True).or_none(),
        fraction=FRACTION.or_none(),
        total_steps=count(1).or_none(),
        reselect_at=between(0.0, 1.0, "[)", "a share of total_steps", "0 is never"),
        lambda_rank=at_least(0.0).or_schedule(),
        rank_of=Choice("values", "delta"),
        polar=Choice("svd", "newton_schulz"),
    )
    def __init__(
        self,
        model: nn.Module | None = None,
        *,
        threshold: float | None = None,
        fraction: float | None = None,
        total_steps: int | None = None,
        reselect_at: float = 0.5,
        lambda_rank: Coefficient = 5e-3,
        rank_of: Of = "values",
        polar: Polar = "svd",
        include: Iterable[str] = ("*",),
        exclude: Iterable[str] = (),
        seed: int = 0,
    ) -> None:
        super().__init__()
        if (threshold is None) == (fraction is None):
            raise ValueError("give either threshold=... or fraction=..., for example fraction=0.1")
        self._lambda = as_schedule(lambda_rank, name="lambda_rank")
        self.threshold: float = math.nan if threshold is None else float(threshold)
        self.fraction = fraction
        self.total_steps = total_steps
        self.reselect_at = reselect_at
        self.lambda_rank = lambda_rank
        self.rank_of: Of = rank_of
        self.polar: Polar = polar
        self.include: tuple[str, ...] = tuple(include)
        self.exclude: tuple[str, ...] = tuple(exclude)
        self.seed = seed
        self.steps: int = 0
        self.penalised: Tensor | None = None
        self.entries: nn.ModuleList = nn.ModuleList()
        self._plain: list[tuple[nn.Parameter, bool]] = []  # parameters with the requires_grad that they had
        self._handles: list[RemovableHandle] = []
        self._looking: RemovableHandle | None = None  # for the optimizer that steps first
        self._binds_itself = False  # a loop owns the optimizer
        self._gradients_ready = False
        if model is not None:
            self._check_total_steps()
            self._select(model)
            self._looking = _look_at_first_step(self)

    # -- selection ---------------------------------------------------------------------------------

    def attach(self, model: nn.Module) -> None:
        """Select, in a loop that owns the optimizer; the optimizer is recognised at its first step.

        A model that is attached already is left as it is.
        """
        if len(self.entries) == 0:
            self._select(model)
        self._binds_itself = True
        if not self._handles and self._looking is None:
            self._looking = _look_at_first_step(self)

    @torch.no_grad()
    def _select(self, model: nn.Module) -> None:
        if isinstance(model, DistributedDataParallel):
            raise ValueError(
                "SaRA must see the model before DistributedDataParallel does, which otherwise exchanges dense "
                "gradients: SaRA(model, ...) first, DistributedDataParallel(model) then"
            )
        parameters = trainable_parameters(model, include=self.include, exclude=self.exclude)
        if world_size() > 1:  # the selection must be the same everywhere
            for tensor in model.parameters():
                dist.broadcast(tensor, 0)
        if self.fraction is not None:
            self.threshold = magnitude_threshold(parameters.values(), self.fraction)
        counts = {name: int(self._below(p).sum().item()) for name, p in parameters.items()}
        check_selection(parameters, sum(counts.values()), self.threshold)
        late = None
        if world_size() > 1:
            late = min((name for name in parameters if counts[name]), key=lambda name: parameters[name].numel())
        # Parameters without a small weight have a place too, so that the form of the state is that of the model.
        groups: dict[tuple[torch.device, torch.dtype], dict[str, nn.Parameter]] = {}
        for name, p in parameters.items():
            groups.setdefault((p.device, master_dtype(p.dtype)), {})[name] = p
        self._plain = [(p, p.requires_grad) for p in model.parameters()]
        for p, _ in self._plain:
            p.requires_grad_(False)
        for (_, dtype), group in groups.items():
            self.entries.append(SparseEntries(group, self._below, dtype=dtype, late=late if late in group else None))
        if not callable(self.lambda_rank) and self.lambda_rank > 0 and not self._matrices():
            self._undo()
            raise ValueError(
                f"lambda_rank={self.lambda_rank:g}, but no trained matrix has both sides above {_SMALLEST_SIDE}, so "
                "that the penalty has nothing to act on; use lambda_rank=0"
            )
        if late is not None:
            # DDP would exchange dense gradients, and find none. It keeps one parameter, since it refuses to have none.
            ignored = set(getattr(model, "_ddp_params_and_buffers_to_ignore", ()))
            names = {name for name, p in model.named_parameters(remove_duplicate=False) if p is not parameters[late]}
            model._ddp_params_and_buffers_to_ignore = sorted(ignored | names)  # type: ignore[assignment]

    def _below(self, values: Tensor) -> Tensor:
        return below(values, self.threshold)

    def _check_total_steps(self) -> None:
        if self.total_steps is None and self.reselect_at > 0:
            raise ValueError(
                f"the second selection comes after {self.reselect_at:g} of the training, so total_steps=... is needed; "
                "or reselect_at=0 for none"
            )

    # -- in the loop -------------------------------------------------------------------------------

    def bind(self, optimizer: Optimizer) -> Optimizer:
        """Let the optimizer take the penalty along, write into the model, and go through the second selection.

        Args:
            optimizer: any optimizer built on :meth:`parameters`, with or without further parameters. Closures, as LBFGS
                wants them, are fine.

        Returns:
            The same optimizer.

        Raises:
            ValueError: it does not hold the trained entries.
        """
        held = {id(p) for group in optimizer.param_groups for p in group["params"]}
        if any(id(p) not in held for p in self.parameters()) or not self._vectors:
            raise ValueError(
                "the optimizer does not hold SaRA's trained entries; build it on them: "
                f"{type(optimizer).__name__}(sara.parameters(), ...). One that was built on model.parameters() would "
                "change nothing"
            )
        for handle in self._handles:
            handle.remove()
        self._handles = [
            optimizer.register_step_pre_hook(self._before_optimizer),
            optimizer.register_step_post_hook(self._after_optimizer),
        ]
        return optimizer

    @property
    def _vectors(self) -> list[SparseEntries]:
        return [part for part in self.entries if isinstance(part, SparseEntries)]

    def param_groups(self, model: nn.Module) -> list[dict[str, Any]]:
        """The trained entries, with the optimizer's own settings."""
        return [{"params": list(self.parameters())}]

    def reset(self) -> None:
        """The model gets the trained entries as they are now: others may have set them, such as the first process."""
        self._gradients_ready = False
        for part in self._vectors:
            part.write()

    def before_step(self, step: Step | None = None) -> None:
        """Complete the gradient: exchange it between processes, add that of the penalty. Once a step.

        A bound optimizer calls it by itself.
        """
        if self.total_steps is None and step is not None:
            self.total_steps = step.progress.total_steps or None
        if self._gradients_ready:
            return
        for part in self._vectors:
            part.collect()
            if world_size() > 1:
                dist.all_reduce(part.gradient())
                part.gradient().div_(world_size())
        weight = self._lambda(Progress(self.steps, self.total_steps or 0))
        if weight:
            self._penalise(weight)
        self._gradients_ready = True

    @torch.no_grad()
    def _penalise(self, weight: float) -> None:
        matrices = self._matrices()
        if not matrices:
            return
        part, segment = matrices[mix(self.seed, self.steps) % len(matrices)]
        values = part.values.detach()[segment.live]
        if self.rank_of == "delta":
            values = values - part.base[part.live][segment.live]
        matrix = part.dense(segment, values)
        polar = polar_factor(matrix, method=self.polar)
        self.penalised = (matrix * polar).sum()  # <A, U V^T> is the norm
        part.gradient()[segment.live].add_(part.pick(segment, polar), alpha=weight)

    def _matrices(self) -> list[tuple[SparseEntries, Segment]]:
        """Matrices that can be penalised: large enough, with entries that are still trained."""
        return [
            (part, segment)
            for part in self._vectors
            for segment in part.segments
            if segment.parameter.ndim == 2
            and min(segment.parameter.shape) > _SMALLEST_SIDE
            and segment.live.stop > segment.live.start
        ]

    def _before_optimizer(
        self, optimizer: torch.optim.Optimizer, args: tuple[Any, ...], kwargs: dict[str, Any]
    ) -> tuple[tuple[Any, ...], dict[str, Any]] | None:
        self._check_total_steps()
        self._check_state(optimizer)
        closure = args[1] if len(args) > 1 else kwargs.get("closure")  # args begins with the optimizer itself
        if closure is None:
            self.before_step()
            return None

        def completed() -> Any:
            for part in self._vectors:  # an optimizer that evaluates repeatedly has moved the entries meanwhile
                part.write()
            self._gradients_ready = False
            loss = closure()
            self.before_step()
            return loss

        if len(args) > 1:
            return (args[0], completed, *args[2:]), kwargs
        return args, {**kwargs, "closure": completed}

    def _check_not_the_models(self, held: Collection[int]) -> None:
        """Refuse an optimizer that was built on ``model.parameters()``: it would step, and change nothing."""
        if any(id(segment.parameter) in held for part in self._vectors for segment in part.segments):
            raise RuntimeError(
                "this optimizer was built on the model's parameters, which get no gradient here, so that nothing would "
                "change. Train with one that is built on SaRA's entries: optimizer = sara.bind(AdamW("
                "sara.parameters(), ...)); in transformers' Trainer give optimizers=(optimizer, None)"
            )

    def _check_state(self, optimizer: torch.optim.Optimizer) -> None:
        """Refuse moments of another selection, as a resumed run has whose entries were selected anew."""
        for part in self._vectors:
            for value in optimizer.state.get(part.values, {}).values():
                if isinstance(value, Tensor) and value.ndim == 1 and len(value) != len(part.values):
                    raise RuntimeError(
                        f"the optimizer's state is of {len(value)} trained entries, and SaRA has {len(part.values)}: "
                        "load sara.load_state_dict(...) of the same moment, then the optimizer's state. In "
                        "transformers' Trainer give callbacks=[SaraCallback(sara)] of "
                        "regularized.fine_tuning.sara.huggingface, which keeps it with each checkpoint"
                    )

    def _after_optimizer(self, optimizer: torch.optim.Optimizer, args: Any, kwargs: Any) -> None:
        self._stop_looking()
        for part in self._vectors:
            part.write()
            part.values.grad = None  # a loop may zero the gradients of the model alone, as transformers' does
        self._gradients_ready = False
        self.steps += 1
        if self.total_steps is not None and self.steps == int(self.total_steps * self.reselect_at + 1e-9):
            self._reselect(optimizer)

    @torch.no_grad()
    def _reselect(self, optimizer: torch.optim.Optimizer) -> None:
        """Go on with the entries that are still small; the optimizer keeps what it knows of them."""
        still = [self._below(part.values) for part in self._vectors]
        if not any(bool(mask.any()) for mask in still):
            warnings.warn(
                f"after {self.steps} steps no trained weight is below the threshold {self.threshold:.4g} any more; the "
                "first selection is kept",
                stacklevel=2,
            )
            return
        for part, mask in zip(self._vectors, still, strict=True):
            state = optimizer.state.get(part.values, {})
            for name, value in state.items():
                if isinstance(value, Tensor) and value.shape == part.values.shape:
                    state[name] = value[mask]
            part.keep(mask)

    # -- what has been learned ---------------------------------------------------------------------

    @property
    def num_trainable(self) -> int:
        """Number of weights that are trained now."""
        return sum(part.values.numel() for part in self._vectors)

    @torch.no_grad()
    def share_still_small(self) -> float:
        """Share of the first selection that is still below the threshold. For use after training."""
        small = sum(int(self._below(part.current()).sum()) for part in self._vectors)
        return small / sum(len(part.index) for part in self._vectors)

    def nuclear_norms(self) -> dict[str, float]:
        """Nuclear norm of the trained values of each matrix that can be penalised. For use after training."""
        return {
            segment.name: float(nuclear_norm(part.dense(segment, part.values.detach()[segment.live])))
            for part, segment in self._matrices()
        }

    def suggested_lr(self) -> float:
        """The authors' learning rate for this threshold, see :func:`suggested_learning_rate`."""
        return suggested_learning_rate(self.threshold)

    def adapter(self) -> SparseAdapter:
        """What was learned, to save, to scale, to add to another adapter, or to take out of the model again."""
        return SparseAdapter.of(self._vectors, threshold=self.threshold)

    def finalize(self) -> None:
        """Leave a plain model: hooks go, every parameter requires a gradient as it did before."""
        for part in self._vectors:
            part.write()
        self._undo()

    def merge(self, model: nn.Module) -> None:
        """:meth:`finalize`, for a loop; the trained weights are in the model already."""
        self.finalize()

    def _undo(self) -> None:
        for part in self._vectors:
            part.release()
        self._stop_looking()
        for handle in self._handles:
            handle.remove()
        self._handles = []
        for parameter, required in self._plain:
            parameter.requires_grad_(required)
            parameter.grad = None

    def _stop_looking(self) -> None:
        if self._looking is not None:
            self._looking.remove()
            self._looking = None

    # -- state -------------------------------------------------------------------------------------

    def _save_to_state_dict(self, destination: dict[str, Any], prefix: str, keep_vars: bool) -> None:
        super()._save_to_state_dict(destination, prefix, keep_vars)
        destination[prefix + "steps"] = torch.tensor(self.steps)
        destination[prefix + "threshold"] = torch.tensor(self.threshold, dtype=torch.float64)

    def _load_from_state_dict(self, state_dict: Mapping[str, Any], prefix: str, *args: Any) -> None:
        own = {name: state_dict.get(prefix + name) for name in ("steps", "threshold")}
        missing_keys = args[2]
        missing_keys += [prefix + name for name, value in own.items() if value is None]
        if own["steps"] is not None:
            self.steps = int(own["steps"])
        if own["threshold"] is not None:
            self.threshold = float(own["threshold"])
        self._gradients_ready = False

    def extra_repr(self) -> str:
        """Settings, for ``repr``."""
        return f"threshold={self.threshold:.4g}, num_trainable={self.num_trainable}, steps={self.steps}"


def _look_at_first_step(sara: SaRA) -> RemovableHandle:
    """Nobody shows its optimizer; torch shows every one that is about to step. Until the right one has stepped."""
    ask = weakref.ref(sara)

    def look(optimizer: torch.optim.Optimizer, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        one = ask()
        if one is None:
            return None
        held = {id(p) for group in optimizer.param_groups for p in group["params"]}
        if not any(id(p) in held for p in one.parameters()):
            one._check_not_the_models(held)
            return None  # the optimizer of something else
        if one._handles or not one._binds_itself:
            return None
        one.bind(optimizer)  # this step's own hooks may be past: what a step needs before it is done here
        return one._before_optimizer(optimizer, args, kwargs)

    return register_optimizer_step_pre_hook(look)
