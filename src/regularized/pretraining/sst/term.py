"""Sparse spectral training of a model: which layers, which directions, when, and what the optimizer must forget.

===============  ==========================  =========================================================================
paper            here                        meaning
===============  ==========================  =========================================================================
r                ``rank``                    directions of each layer that are trained at a time
T3               ``steps_per_iteration``     optimizer steps with one set of directions: an *iteration*
T2               ``iterations_per_round``    iterations until the decomposition is renewed: a *round*
===============  ==========================  =========================================================================

After each optimizer step singular values are cut off at zero and active vectors get unit length again. At the end of an
iteration the active vectors go back among the others, a new set is drawn, the optimizer forgets what it knew of the
vectors, and the learning rate warms up. At the end of a round the weight is decomposed anew before that.
"""

import math
import warnings
import weakref
from collections.abc import Callable, Mapping, Sequence
from typing import Any, TypeVar

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel
from torch.nn.utils import parametrize
from torch.utils.hooks import RemovableHandle

from regularized.mechanisms.distributed import world_size
from regularized.mechanisms.optimizer_state import bind_at_first_step, forget
from regularized.mechanisms.ranges import Choice, allowed, count
from regularized.mechanisms.surgery import NoEffectWarning, check_called, match_modules, tied_parameters
from regularized.pretraining.sst.layer import Gradient, SpectralLinear
from regularized.pretraining.sst.sampling import RULES, Sampling, draw_directions
from regularized.training.finite import all_finite
from regularized.training.terms import Term

__all__ = ["SST"]

Optimizer = TypeVar("Optimizer", bound=torch.optim.Optimizer)


class SST(Term):
    """Pretrain with optimizer state for a few singular directions of each weight, and reach full rank all the same.

    In a loop of your own give the model, build *any* optimizer of torch but LBFGS on ``model.parameters()`` afterwards,
    and :meth:`bind` it; nothing else in the loop changes. One that is not bound is found at its first step. As a term
    of :class:`~regularized.training.trainer.Trainer` or :class:`~regularized.training.huggingface.TermsTrainer` leave
    the model out. :meth:`merge` leaves plain layers behind.

    Each chosen ``nn.Linear`` becomes a :class:`~regularized.pretraining.sst.layer.SpectralLinear` that computes the
    same. The linear part of a hyperbolic :class:`~regularized.pretraining.sst.lorentz.LorentzLinear` is an
    ``nn.Linear``, too. What a checkpoint needs is the state of the model, of the optimizer, and of this object: the
    draws depend on seed and step alone, so a resumed run ends bit for bit as the whole one, also from within an
    iteration.

    Args:
        model: the model, already of its final type and initialised; None where a loop calls :meth:`attach`.
        rank: r, directions trained at a time, from 1 to the smaller side of the smallest layer. The paper: 64 for OPT
            and LLaMA up to 1.3B, 4 to 32 % of the width in translation.
        steps_per_iteration: T3; default 200 (paper, translation and language models). None never draws again: the
            largest directions, or those drawn first, are trained for good.
        iterations_per_round: T2; default ``ceil(m / r)`` of each layer (the paper's d / r), after which a layer has had
            about m directions.
        warmup_steps: steps of each iteration over which the learning rate of all groups of the optimizer rises
            linearly to what it is; default 20 (paper). 0 switches it off.
        sampling: how directions are drawn; default ``"mixed"``, see
            :func:`~regularized.pretraining.sst.sampling.draw_directions`.
        gradient: of the vectors; default ``"enhanced"`` (paper, section 4.2), or ``"default"``.
        target_modules: layers, or modules with all layers below them, by name or by its last part, such as
            ``["attn", "up_proj"]``; default every ``nn.Linear`` (paper).
        exclude: what to leave out, likewise, such as ``["lm_head"]``; default nothing.
        seed: of the draws; default 0.

    Attributes:
        steps: optimizer steps done.
        layers: the converted layers by name.

    Raises:
        ValueError: an option is outside its range; a name matches nothing; the rank is too large for a layer; a layer
            is tied, parametrized, frozen, quantized, of a class of its own, or without values; the optimizer does not
            hold the trained factors.

    Warns:
        NoEffectWarning: there is no layer to convert.
        UserWarning: the optimizer decays unit vectors, which changes nothing.

    Examples:
        >>> model = nn.Sequential(nn.Linear(16, 16), nn.ReLU(), nn.Linear(16, 16), nn.ReLU(), nn.Linear(16, 4))
        >>> sst = SST(model, rank=2, steps_per_iteration=5, warmup_steps=1, exclude=["4"])
        >>> optimizer = sst.bind(torch.optim.AdamW(model.parameters(), lr=1e-3, weight_decay=0.0))
        >>> for x in torch.randn(12, 8, 16):
        ...     model(x).square().mean().backward()
        ...     optimizer.step()
        ...     optimizer.zero_grad()
        >>> sst.steps, sst.iteration
        (12, 2)
        >>> sst.merge(model)
        >>> model[0]
        Linear(in_features=16, out_features=16, bias=True)
    """

    contributes = False

    @allowed(
        rank=count(1),
        steps_per_iteration=count(1, "optimizer steps").or_none("the same directions for good"),
        iterations_per_round=count(1).or_none("ceil(m / rank) of each layer"),
        warmup_steps=count(0, "optimizer steps", "0 switches it off"),
        sampling=RULES,
        gradient=Choice("enhanced", "default"),
    )
    def __init__(
        self,
        model: nn.Module | None = None,
        *,
        rank: int,
        steps_per_iteration: int | None = 200,
        iterations_per_round: int | None = None,
        warmup_steps: int = 20,
        sampling: Sampling = "mixed",
        gradient: Gradient = "enhanced",
        target_modules: Sequence[str] | None = None,
        exclude: Sequence[str] = (),
        seed: int = 0,
    ) -> None:
        super().__init__()
        if steps_per_iteration is not None and warmup_steps >= steps_per_iteration:
            raise ValueError(
                f"warmup_steps must be below steps_per_iteration={steps_per_iteration}, got {warmup_steps}; a tenth of "
                "it is the paper's choice"
            )
        self.rank = rank
        self.steps_per_iteration = steps_per_iteration
        self.iterations_per_round = iterations_per_round
        self.warmup_steps = warmup_steps
        self.sampling: Sampling = sampling
        self.gradient: Gradient = gradient
        self.target_modules = target_modules
        self.exclude = exclude
        self.seed = seed
        self.steps: int = 0
        self.layers: Mapping[str, SpectralLinear] = {}
        self._rates: list[tuple[dict[str, Any], Any]] = []  # groups whose rate is lowered for this step, with the rate
        self._handles: list[RemovableHandle] = []
        self._looking: RemovableHandle | None = None  # for an optimizer that nobody has bound
        self._replaced: list[weakref.ref[Tensor]] = []  # weights that an optimizer of before may hold
        if model is not None:
            self.attach(model)

    # -- surgery -----------------------------------------------------------------------------------

    def attach(self, model: nn.Module) -> None:
        """Convert the layers, before the optimizer is built. A model that is attached already is left as it is."""
        if not self.layers:
            self._convert(model)
        if self.layers and not self._handles and self._looking is None:
            self._looking = bind_at_first_step(self)

    def _convert(self, model: nn.Module) -> None:
        if isinstance(model, DistributedDataParallel):
            raise ValueError(
                "SST must see the model before DistributedDataParallel does: SST(model, ...) first, "
                "DistributedDataParallel(model) then"
            )
        chosen = self._chosen(model)
        self._replaced = [weakref.ref(linear.weight) for linear in chosen.values()]
        layers: dict[str, SpectralLinear] = {}
        for number, (name, linear) in enumerate(chosen.items()):
            first = torch.arange(self.rank)  # of a decomposition that does not exist yet
            layer = SpectralLinear.of(linear, active=first, gradient=self.gradient, name=f"layer {name!r}")
            layer.activate(self._draw(layer, number))
            owner, _, attribute = name.rpartition(".")
            setattr(model.get_submodule(owner), attribute, layer)
            layers[name] = layer
        self.layers = layers
        if not layers:
            warnings.warn(
                f"there is no nn.Linear in {type(model).__name__}, so nothing is converted",
                NoEffectWarning,
                stacklevel=3,
            )
        self._share()
        # All processes make the same draws and steps, so that no buffer has to be sent around in each forward pass.
        buffers = {f"{name}.{part}" for name in layers for part in ("left", "right", "active")}
        ignored = set(getattr(model, "_ddp_params_and_buffers_to_ignore", ()))
        model._ddp_params_and_buffers_to_ignore = sorted(ignored | buffers)  # type: ignore[assignment]

    def _chosen(self, model: nn.Module) -> dict[str, nn.Linear]:
        """The layers, all of them looked at before any is changed."""
        left_out = set(_linears(model, self.exclude, option="exclude"))
        found: dict[str, nn.Linear] = {}
        tied = tied_parameters(model)
        for name, layer in _linears(model, self.target_modules, option="target_modules").items():
            if name in left_out:
                continue
            if parametrize.is_parametrized(layer):
                raise ValueError(f"layer {name!r} is parametrized; remove the parametrization, or exclude={[name]}")
            check_called(model, [name])
            if type(layer) is not nn.Linear:
                raise ValueError(
                    f"layer {name!r} is a {type(layer).__name__}; SST converts nn.Linear itself, no other class. "
                    f"exclude={[name]} leaves it as it is"
                )
            weight = layer.weight
            if id(weight) in tied:
                raise ValueError(
                    f"layer {name!r} shares its weight ({', '.join(tied[id(weight)])}), and would be torn from the "
                    f"others; exclude={[name]}, or untie them"
                )
            if not weight.requires_grad:
                raise ValueError(f"layer {name!r} is frozen, and SST would train it; exclude={[name]}")
            if hasattr(weight, "placements"):
                raise ValueError(
                    f"the weight of layer {name!r} is sharded (DTensor, FSDP2), and a shard has other singular vectors "
                    "than the whole; use DDP, which exchanges the active vectors alone"
                )
            if weight.is_meta:
                raise ValueError(f"layer {name!r} has no values yet (meta device); initialise the model first")
            if not weight.is_floating_point() or weight.element_size() < 2:
                raise ValueError(f"the weight of layer {name!r} is quantized ({weight.dtype}); exclude={[name]}")
            if self.rank > min(weight.shape):
                raise ValueError(
                    f"rank={self.rank} is more than the {min(weight.shape)} directions of layer {name!r} with shape "
                    f"{tuple(weight.shape)}; lower it, or exclude={[name]}"
                )
            if not all_finite([weight]):
                raise ValueError(
                    f"the weight of layer {name!r} holds values that are NaN or infinite; initialise it anew"
                )
            found[name] = layer
        return found

    def _draw(self, layer: SpectralLinear, number: int) -> Tensor:
        seed = (self.seed, self.iteration, number)
        return draw_directions(layer.values, self.rank, sampling=self.sampling, seed=seed)

    def _share(self) -> None:
        """All processes go on with the decompositions of the first: another machine's may differ in the last bits."""
        if world_size() > 1:
            for layer in self.layers.values():
                for tensor in (*layer.parameters(), *layer.buffers()):
                    dist.broadcast(tensor.detach(), 0)

    # -- in the loop -------------------------------------------------------------------------------

    @property
    def iteration(self) -> int:
        """Iterations done."""
        return 0 if self.steps_per_iteration is None else self.steps // self.steps_per_iteration

    def vectors(self) -> list[nn.Parameter]:
        """The singular vectors that are trained now; the same parameters all the time, with changing content."""
        return [vector for layer in self.layers.values() for vector in layer.vectors()]

    def groups(self, model: nn.Module, *, weight_decay: float) -> list[dict[str, Any]]:
        """Groups for an optimizer with weight decay: everything of the model decays but the unit vectors.

        A weight decays by its singular values.

        Args:
            model: the converted model.
            weight_decay: for all but the vectors.

        Examples:
            >>> model = nn.Linear(4, 4)
            >>> model = nn.Sequential(model)
            >>> sst = SST(model, rank=1)
            >>> groups = sst.groups(model, weight_decay=0.1)
            >>> [(len(group["params"]), group["weight_decay"]) for group in groups]
            [(2, 0.1), (2, 0.0)]
        """
        vectors = self.vectors()
        apart = {id(p) for p in vectors}
        others = [p for p in model.parameters() if p.requires_grad and id(p) not in apart]
        return [{"params": others, "weight_decay": weight_decay}, {"params": vectors, "weight_decay": 0.0}]

    def bind(self, optimizer: Optimizer) -> Optimizer:
        """Let each step of the optimizer be followed by the projection, and by what an iteration or round ends with.

        Args:
            optimizer: any of torch but LBFGS, built on the parameters of the converted model.

        Returns:
            The same optimizer.

        Raises:
            ValueError: it does not hold the trained factors, or is LBFGS.

        Warns:
            UserWarning: it decays the vectors.
        """
        held = {id(p): group for group in optimizer.param_groups for p in group["params"]}
        missing = [
            f"{name}.{part}"
            for name, layer in self.layers.items()
            for part, p in layer.named_parameters()
            if id(p) not in held and part != "bias"
        ]
        if missing or not self.layers:
            raise ValueError(
                f"the optimizer does not hold {len(missing)} trained factor(s) of the converted layers, such as "
                f"{missing[:3]}; build it after SST has seen the model: {type(optimizer).__name__}(model.parameters(), "
                "...)"
            )
        forget(optimizer, ())  # refuses what cannot forget
        if any(held[id(vector)].get("weight_decay") for vector in self.vectors()):
            warnings.warn(
                "the optimizer decays the singular vectors, which have unit length after each step whatever it does; "
                "the singular values carry the decay of a weight. Use sst.groups(model, weight_decay=...)",
                stacklevel=2,
            )
        for handle in self._handles:
            handle.remove()
        self._stop_looking()
        self._handles = [
            optimizer.register_step_pre_hook(lambda one, args, kwargs: self.before_optimizer(one)),
            optimizer.register_step_post_hook(lambda one, args, kwargs: self._after_optimizer(one)),
        ]
        return optimizer

    def awaited(self) -> list[Tensor]:
        """What the optimizer is known by as long as none is bound: the vectors, or the weights that they replace."""
        replaced = [weight for weight in (reference() for reference in self._replaced) if weight is not None]
        return [] if self._handles else [*self.vectors(), *replaced]

    def before_optimizer(self, optimizer: torch.optim.Optimizer) -> None:
        """Lower the rates while an iteration warms up; a bound optimizer calls it by itself."""
        self._restore_rates()
        position = self.steps if self.steps_per_iteration is None else self.steps % self.steps_per_iteration
        if position < self.warmup_steps:
            factor = (position + 1) / self.warmup_steps
            self._rates = [(group, group["lr"]) for group in optimizer.param_groups]
            for group, rate in self._rates:
                group["lr"] = rate * factor

    def _restore_rates(self) -> None:
        for group, rate in self._rates:
            group["lr"] = rate
        self._rates = []

    def _after_optimizer(self, optimizer: torch.optim.Optimizer) -> None:
        self._restore_rates()
        for layer in self.layers.values():
            layer.project()
        self.steps += 1
        if self.steps_per_iteration is not None and self.steps % self.steps_per_iteration == 0:
            self._next_iteration(optimizer)

    def _next_iteration(self, optimizer: torch.optim.Optimizer) -> None:
        renewed = False
        for name, layer in self.layers.items():
            if self.iteration % (self.iterations_per_round or math.ceil(len(layer.values) / self.rank)) == 0:
                layer.decompose(name=f"layer {name!r} after step {self.steps}")
                renewed = True
        if renewed:
            self._share()
        for number, layer in enumerate(self.layers.values()):
            layer.activate(self._draw(layer, number))
        for vector in self.vectors():
            vector.grad = None  # of other directions; who accumulates beyond a step begins anew
        forget(optimizer, self.vectors())

    def reset(self) -> None:
        """Let go of a step that was interrupted: the rates are what they were."""
        self._restore_rates()

    # -- what it leaves behind ---------------------------------------------------------------------

    def merge(self, model: nn.Module) -> None:
        """Leave plain layers, which compute bit for bit what the converted ones do in an evaluation.

        Args:
            model: the converted model; another process's copy, or one loaded from a checkpoint, serves too.
        """
        self._replace(model, SpectralLinear.merged)

    def prune(self, model: nn.Module, *, rank: int) -> None:
        """Leave two thin plain layers in place of each converted one: smaller and faster where the rank is small.

        Args:
            model: the converted model.
            rank: singular values of each weight to keep, the largest.

        Raises:
            ValueError: the rank is more than a layer has.

        Examples:
            >>> model = nn.Sequential(nn.Linear(8, 6))
            >>> sst = SST(model, rank=2)
            >>> sst.prune(model, rank=3)
            >>> sum(p.numel() for p in model.parameters())  # 3 (8 + 6) + 6
            48
        """
        self._replace(model, lambda layer: layer.low_rank(rank))

    def _replace(self, model: nn.Module, plain: Callable[[SpectralLinear], nn.Module]) -> None:
        made = {name: plain(layer) for name, layer in model.named_modules() if isinstance(layer, SpectralLinear)}
        for name, layer in made.items():
            owner, _, attribute = name.rpartition(".")
            setattr(model.get_submodule(owner), attribute, layer)
        self._stop_looking()
        for handle in self._handles:
            handle.remove()
        self._handles, self.layers = [], {}

    def _stop_looking(self) -> None:
        if self._looking is not None:
            self._looking.remove()
            self._looking = None

    # -- state -------------------------------------------------------------------------------------

    def _save_to_state_dict(self, destination: dict[str, Any], prefix: str, keep_vars: bool) -> None:
        super()._save_to_state_dict(destination, prefix, keep_vars)
        destination[prefix + "steps"] = torch.tensor(self.steps)

    def _load_from_state_dict(self, state_dict: Mapping[str, Any], prefix: str, *args: Any) -> None:
        steps, missing_keys = state_dict.get(prefix + "steps"), args[2]
        if steps is None:
            missing_keys.append(prefix + "steps")
        else:
            self.steps = int(steps)

    def extra_repr(self) -> str:
        """Settings, for ``repr``."""
        return (
            f"rank={self.rank}, steps_per_iteration={self.steps_per_iteration}, layers={len(self.layers)}, "
            f"steps={self.steps}"
        )


def _linears(model: nn.Module, names: Sequence[str] | None, *, option: str) -> dict[str, nn.Linear]:
    """Linear layers that are named, or stand below what is named; None names all."""
    every = {name: layer for name, layer in model.named_modules() if name and isinstance(layer, nn.Linear)}
    if names is None:
        return every
    found: dict[str, nn.Linear] = {}
    for above in match_modules(model, names, option=option):
        below = {name: layer for name, layer in every.items() if name == above or name.startswith(f"{above}.")}
        if not below:
            kind = type(model.get_submodule(above)).__name__
            raise ValueError(f"{option}: there is no nn.Linear in {above!r}, a {kind}; name linear layers")
        found |= below
    return {name: layer for name, layer in every.items() if name in found}
