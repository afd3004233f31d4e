"""Dynamic pruning of a network: the layers put in, their loss, and what they save.

:mod:`regularized.compression.dynamic_pruning.masks` has the paper and its symbols.
"""

import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import replace
from functools import partial
from typing import Any, Literal, TypeAlias, cast

import torch
from torch import Tensor, nn

from regularized.compression.dynamic_pruning.groups import FilterGroup, Survey, find_groups
from regularized.compression.dynamic_pruning.layer import DynamicConv2d, MaskPredictor, Pass, Record
from regularized.compression.dynamic_pruning.loss import mask_agreement, mask_loss
from regularized.compression.dynamic_pruning.masks import MASS, PRUNE_RATIO, mass_mask, top_mask
from regularized.compression.dynamic_pruning.operations import Operations, convolution_macs
from regularized.mechanisms.ranges import Choice, allowed, count, positive
from regularized.mechanisms.surgery import close_names
from regularized.training.data import as_source
from regularized.training.progress import Coefficient, Progress, as_schedule, piecewise
from regularized.training.step import Step, call_model
from regularized.training.terms import Term

__all__ = ["DynamicPruning", "dynamic_layers", "pruning_param_groups"]

Mode: TypeAlias = Literal["decoupled", "joint"]
Target: TypeAlias = Callable[[Tensor], Tensor]
Predictor: TypeAlias = Callable[[int, int], nn.Module]

PREDICTOR_LR = 0.1
"""Learning rate of the predictors, by SGD with momentum 0.9; of the official script."""

COOL_DOWN = piecewise({0.5: 0.0})
"""Weight of the mask loss: 1 in the first half of the training, 0 in the second; of the official code."""


class DynamicPruning(Term):
    """Prune a network dynamically: in a loop of your own, or as a term beside ``CrossEntropy``.

    Start from a trained network. Its convolutions get predictors and are masked from then on, in training and in
    evaluation; the network's own forward pass stays what it was. In a loop of your own give it the network, and add
    :meth:`mask_loss` to the loss; as a term it finds the network itself. The predictors are parameters of the network:
    its ``state_dict`` holds everything.

    Args:
        network: a trained convolutional network, changed in place; None as a term.
        mass: share of each layer's activation mass that the kept filters hold, in (0, 1]; the official scripts use 0.8
            to 1. -1 switches everything off.
        prune_ratio: instead of ``mass``: share of the filters that goes, in [0, 1), the same for all images; -1 off.
        mode: ``"decoupled"`` (default, official script): the mask loss trains the predictors alone; ``"joint"``: the
            network, too.
        layers: names of the convolutions to prune; default all that :func:`find_groups` finds. For a network that
            cannot be traced, groups by hand: ``[FilterGroup("conv1", norm="bn1", activation=F.relu)]``.
        predictor: makes a predictor of (channels, filters); default :class:`MaskPredictor`, the official one.
        min_keep: the target keeps at least so many filters; default 1. Official code: 0.
        predictor_lr: learning rate of the predictors; default 0.1 (official script, for SGD). With Adam take its own.
        weight: coefficient of the mask loss, a number or a schedule; default 1 in the first half of the training and 0
            in the second (official code).

    Attributes:
        left_out: why the other convolutions are not pruned, by name.

    Raises:
        ValueError: a setting is outside its range; neither or both of ``mass`` and ``prune_ratio``; the network has
            nothing to prune, cannot be traced, or is pruned already with other settings; there is no such layer, or it
            is no convolution, or it cannot be pruned.

    Warns:
        UserWarning: a layer has no activation, or is depthwise behind a pruned one.

    Examples:
        >>> net = nn.Sequential(
        ...     nn.Conv2d(1, 8, 3), nn.BatchNorm2d(8), nn.ReLU(), nn.Conv2d(8, 16, 3), nn.ReLU(), nn.Flatten(),
        ...     nn.Linear(256, 10),
        ... )
        >>> x, y = torch.randn(20, 1, 8, 8), torch.arange(20) % 10
        >>> pruning = DynamicPruning(net, mass=0.7)
        >>> 0.0 < pruning.estimate([(x, y)]).reduction < 1.0  # before any training
        True
        >>> optimizer = torch.optim.SGD(pruning_param_groups(net, lr=0.01, weight_decay=5e-4), momentum=0.9)
        >>> for epoch in range(2):
        ...     pruning.begin_epoch(epoch, 2)
        ...     loss = nn.functional.cross_entropy(net(x), y) + pruning.mask_loss()
        ...     loss.backward()
        ...     optimizer.step()
        ...     optimizer.zero_grad()
        >>> pruning.measure([(x, y)]).macs.shape
        torch.Size([20])
    """

    sharding = "forward"

    @allowed(
        mode=Choice("decoupled", "joint"),
        min_keep=count(0),
        predictor_lr=positive(),
    )
    def __init__(
        self,
        network: nn.Module | None = None,
        *,
        mass: float | None = None,
        prune_ratio: float | None = None,
        mode: Mode = "decoupled",
        layers: Sequence[str | FilterGroup] | None = None,
        predictor: Predictor = MaskPredictor,
        min_keep: int = 1,
        predictor_lr: float = PREDICTOR_LR,
        weight: Coefficient = COOL_DOWN,
    ) -> None:
        super().__init__(weight=weight)
        self.target: Target | None = _target(mass, prune_ratio, min_keep)
        self.mode: Mode = mode
        self.layers: tuple[str | FilterGroup, ...] | None = None if layers is None else tuple(layers)
        self.predictor: Predictor = predictor
        self.min_keep: int = min_keep
        self.predictor_lr: float = predictor_lr
        self.left_out: Mapping[str, str] = {}
        self.state: Pass = Pass()
        self._epoch_weight: float = as_schedule(weight)(Progress(0, 1))
        # Not as submodules: they are the network's.
        self._network: tuple[nn.Module, ...] = ()
        self._layers: dict[str, DynamicConv2d] = {}
        if isinstance(layers, str):
            raise ValueError(f"layers must be a list of names, got the string {layers!r}; write [{layers!r}]")
        if network is not None:
            self.attach(network)

    def attach(self, model: nn.Module) -> None:
        """Put the layers into the network; where it has them already, take them over."""
        self._network = (model,)
        if self.target is None:
            return
        present = dynamic_layers(model)
        if present:
            self._adopt(present)
            return
        groups, self.left_out = _chosen(model, self.layers)
        for group in groups:
            self._layers[group.conv] = _install(
                model, group, self.predictor, target=self.target, decoupled=self.mode == "decoupled", state=self.state
            )
        self.state.follow(model)

    def remove(self) -> None:
        """Take everything out: the dense network, as it has been trained in the meantime, under its old names."""
        for name, layer in self._layers.items():
            network = self._network[0]
            network.set_submodule(name, layer.conv)
            if layer.group.norm is not None:
                network.set_submodule(layer.group.norm, layer.norm)
        self._layers = {}
        self.state.leave()

    def begin_epoch(self, epoch: int, epochs: int) -> None:
        """In a loop of your own, at the start of each epoch: the weight of the mask loss follows its schedule.

        Args:
            epoch: counted from 0.
            epochs: of the whole training.
        """
        self.epoch_start(Progress(epoch, epochs, epoch, epochs))

    def epoch_start(self, progress: Progress) -> None:
        """Whether this epoch needs targets at all: once the weight is 0 they are not computed."""
        self._epoch_weight = as_schedule(self.weight)(progress)
        self.state.learning = self._epoch_weight != 0.0

    def mask_loss(self) -> Tensor:
        """In a loop of your own: what the predictors add to the loss of the latest forward pass; a scalar.

        The mean over the batch, times the weight of this epoch; 0 once that is 0.

        Raises:
            RuntimeError: there was no forward pass in training mode with gradients.
        """
        if not self.state.learning or not self._layers:
            return torch.zeros(())
        return self._epoch_weight * self._latest_loss()

    def forward(self, step: Step) -> Tensor:
        """Sum of the mask loss over the batch; 0 in ``eval()`` mode, and once the weight is 0.

        Raises:
            RuntimeError: another term has sent further batches through the network before this one.
        """
        output = step.output
        if not self.training or not self.state.learning or not self._layers:
            return step.logits.new_zeros(())
        if id(output) in self.state.outputs and id(output) != self.state.outputs[-1]:
            raise RuntimeError(
                "another term has made a forward pass of its own after that of the batch, so the masks are no longer "
                "those of the batch; name the term of DynamicPruning before it"
            )
        self.state.outputs.clear()
        return self._latest_loss() * step.batch.size

    def param_groups(self, model: nn.Module) -> list[dict[str, Any]]:
        """The predictors: with their own learning rate, and without weight decay."""
        return pruning_param_groups(model, lr=0.0, predictor_lr=self.predictor_lr)[1:]

    def check_optimizer(self, optimizer: torch.optim.Optimizer) -> None:
        """Warn where an optimizer decays the weights of the predictors.

        Args:
            optimizer: that of the training.

        Warns:
            UserWarning: it does.
        """
        own = {id(p) for p in _predictor_parameters(self._layers.values())}
        for group in optimizer.param_groups:
            inside = sum(id(p) in own for p in group["params"])
            if inside and group.get("weight_decay", 0.0):
                warnings.warn(
                    f"{inside} parameters of mask predictors have the weight decay {group['weight_decay']}, which "
                    "pulls all masks towards one half; build the optimizer of pruning_param_groups(network, ...)",
                    stacklevel=2,
                )

    def reset(self) -> None:
        """Let go of what an interrupted step left behind."""
        self.state.forget()

    def estimate(self, data: Any, *, mass: float | None = None) -> Operations:
        """What pruning will save, before any training: the dense network with its own targets as masks.

        Args:
            data: batches, see :func:`~regularized.training.data.as_source`; a few hundred images are enough.
            mass: another share than the one that is set, to choose it by what it saves.
        """
        target = self._present_target() if mass is None else _target(mass, None, self.min_keep)
        if target is None:
            raise ValueError("pruning is switched off: there is nothing to estimate")
        return self._watch(data, masking=False, target=target)

    def measure(self, data: Any) -> Operations:
        """What is saved now, with the predicted masks.

        Args:
            data: batches, see :func:`~regularized.training.data.as_source`.

        Warns:
            UserWarning: a layer keeps no filter at all for more than 1 % of the images.
        """
        found = self._watch(data, masking=True, target=self._present_target())
        if empty := found.empty_layers():
            named = ", ".join(f"{name!r} ({share:.0%})" for name, share in empty.items())
            warnings.warn(
                f"layers without a single filter, for so many of the images: {named}. Raise mass, train the predictors "
                "longer, or leave these layers out",
                stacklevel=2,
            )
        return found

    @contextmanager
    def dense(self) -> Iterator[None]:
        """Inside, no filter is switched off."""
        before, self.state.masking = self.state.masking, False
        try:
            yield
        finally:
            self.state.masking = before

    def _adopt(self, present: Mapping[str, DynamicConv2d]) -> None:
        first = next(iter(present.values()))
        asked = (_described(self.target), self.mode == "decoupled")
        if (_described(first.target), first.decoupled) != asked:
            raise ValueError(
                f"the network is pruned already, with {_described(first.target)}; call remove() of what pruned it first"
            )
        self._layers = dict(present)
        self.state = first.state

    def _present_target(self) -> Target:
        if not self._layers or self.target is None:
            raise ValueError("nothing is pruned: give DynamicPruning a network, and a mass or prune_ratio that is on")
        return self.target

    def _latest_loss(self) -> Tensor:
        records = [r for r in self.state.records if r.logits is not None and r.wanted is not None]
        if not records:
            raise RuntimeError(
                "there are no masks to learn from: call the network in training mode, with gradients, before "
                "mask_loss()"
            )
        return mask_loss([cast(Tensor, r.logits) for r in records], [cast(Tensor, r.wanted) for r in records])

    @torch.no_grad()
    def _watch(self, data: Any, *, masking: bool, target: Target) -> Operations:
        (network,) = self._network
        modes = [(module, module.training) for module in network.modules()]
        state, layers = self.state, self._layers.values()
        before = (state.masking, state.watching, [layer.target for layer in layers])
        state.masking, state.watching = masking, True
        kept: dict[str, list[Tensor]] = {name: [] for name in self._layers}
        macs: list[Tensor] = []
        agreements: list[Tensor] = []
        dense = 0
        try:
            network.eval()
            for layer in layers:
                layer.target = target
            for batch in as_source(data, seed=0).batches(0):
                call_model(network, batch.inputs)
                if not masking:
                    for record in state.records:
                        record.kept = cast(Tensor, record.wanted)
                given, dense = self._macs(state.records)
                macs.append(given.cpu())
                for record in state.records:
                    kept[record.name].append(record.kept.cpu())
                agreements.append(
                    mask_agreement([r.kept for r in state.records], [cast(Tensor, r.wanted) for r in state.records])
                )
        finally:
            state.masking, state.watching = before[:2]
            for layer, old in zip(layers, before[2]):
                layer.target = old
            for module, mode in modes:
                module.training = mode
            state.forget()
        return Operations(
            dense,
            torch.cat(macs),
            {name: torch.cat(parts) for name, parts in kept.items()},
            float(torch.stack(agreements).mean()) if masking else None,
        )

    def _macs(self, records: Sequence[Record]) -> tuple[Tensor, int]:
        """Multiplications of each image in the latest pass, (B,), and with all filters."""
        kept = {record.name: record.kept for record in records}
        macs, dense = torch.zeros((), dtype=torch.int64), 0
        for record in records:
            layer = self._layers[record.name]
            conv = layer.conv
            taps = record.positions * conv.kernel_size[0] * conv.kernel_size[1]
            everything = record.kept.new_ones(len(record.kept), conv.in_channels)
            given = everything if layer.group.source is None else kept[layer.group.source]
            macs = macs.to(record.kept.device) + convolution_macs(record.kept, given, taps=taps, groups=conv.groups)
            dense += conv.out_channels * (conv.in_channels // conv.groups) * taps
        return macs, dense

    def extra_repr(self) -> str:
        """Settings, for ``repr``."""
        return f"{_described(self.target)}, mode={self.mode!r}, layers={list(self._layers)}"


def dynamic_layers(model: nn.Module) -> dict[str, DynamicConv2d]:
    """The dynamically pruned layers of a network by name, in the order of its modules.

    Examples:
        >>> dynamic_layers(nn.Sequential(nn.Conv2d(1, 2, 3)))
        {}
    """
    return {name: layer for name, layer in model.named_modules() if isinstance(layer, DynamicConv2d)}


def pruning_param_groups(
    model: nn.Module, *, lr: float, predictor_lr: float = PREDICTOR_LR, weight_decay: float = 0.0
) -> list[dict[str, Any]]:
    """Parameter groups for an optimizer: the network, and the predictors without weight decay.

    Args:
        model: a network after :class:`DynamicPruning`.
        lr: learning rate of the network; the official script takes 0.01.
        predictor_lr: learning rate of the predictors; default 0.1 (official script).
        weight_decay: of the network; the official script takes 5e-4.

    Returns:
        Two groups; the second is empty where nothing is pruned, and then left out.

    Examples:
        >>> net = nn.Sequential(nn.Conv2d(1, 2, 3), nn.ReLU(), nn.Flatten(), nn.Linear(2, 2))
        >>> _ = DynamicPruning(net, mass=0.9)
        >>> [(len(group["params"]), group["lr"]) for group in pruning_param_groups(net, lr=0.01)]
        [(4, 0.01), (2, 0.1)]
    """
    own = _predictor_parameters(dynamic_layers(model).values())
    chosen = {id(p) for p in own}
    rest = [p for p in model.parameters() if id(p) not in chosen]
    groups: list[dict[str, Any]] = [{"params": rest, "lr": lr, "weight_decay": weight_decay}]
    return [*groups, {"params": own, "lr": predictor_lr, "weight_decay": 0.0}] if own else groups


def _predictor_parameters(layers: Any) -> list[nn.Parameter]:
    return [p for layer in layers for p in layer.predictor.parameters()]


def _target(mass: float | None, prune_ratio: float | None, min_keep: int) -> Target | None:
    """The function from strengths to wanted filters; None where pruning is off."""
    if (mass is None) == (prune_ratio is None):
        raise ValueError(
            f"give one of mass (the share of the activation mass that is kept) and prune_ratio (the share of the "
            f"filters that goes); got mass={mass!r} and prune_ratio={prune_ratio!r}"
        )
    if mass is not None:
        if mass == -1:
            return None
        MASS("mass", mass)
        return partial(mass_mask, mass=mass, min_keep=min_keep)
    assert prune_ratio is not None
    if prune_ratio == -1:
        return None
    PRUNE_RATIO("prune_ratio", prune_ratio)
    return partial(top_mask, prune_ratio=prune_ratio, min_keep=min_keep)


def _described(target: Target | None) -> str:
    if target is None:
        return "off"
    return ", ".join(f"{key}={value}" for key, value in cast("partial[Tensor]", target).keywords.items())


def _chosen(
    model: nn.Module, layers: Sequence[str | FilterGroup] | None
) -> tuple[list[FilterGroup], Mapping[str, str]]:
    """The groups to prune, with sources among themselves only; and why the other convolutions are not."""
    by_hand = [layer for layer in layers or () if isinstance(layer, FilterGroup)]
    named = [layer for layer in layers or () if isinstance(layer, str)]
    modules = dict(model.named_modules())
    parts = [part for group in by_hand for part in (group.norm, group.output) if part is not None]
    for name in (*named, *(group.conv for group in by_hand), *parts):
        if name not in modules:
            raise ValueError(f"layers: the network has no layer {name!r}; {close_names([name], modules)}")
        if name not in parts and not isinstance(modules[name], nn.Conv2d):
            raise ValueError(
                f"layers: {name!r} is a {type(modules[name]).__name__}; filters of nn.Conv2d can be pruned, no others"
            )
    survey = find_groups(model) if layers is None or named else Survey({}, {}, frozenset())
    for name in named:
        if name not in survey.groups:
            raise ValueError(f"layers: {name!r} cannot be pruned: {survey.left_out.get(name, 'it is never called')}")
    found = list(survey.groups.values()) if layers is None else [*(survey.groups[name] for name in named), *by_hand]
    if not found:
        reasons = "".join(f"; {name!r}: {why}" for name, why in survey.left_out.items())
        raise ValueError(f"{type(model).__name__} has no convolution that can be pruned{reasons}")
    _warn(found, modules, survey.summed)
    inside = {group.conv for group in found}
    groups = [group if group.source in inside else replace(group, source=None) for group in found]
    return groups, survey.left_out


def _warn(groups: Sequence[FilterGroup], modules: Mapping[str, nn.Module], summed: frozenset[str]) -> None:
    raw = [g.conv for g in groups if g.activation is None and g.output is None and g.conv not in summed]
    if raw:
        warnings.warn(
            f"no activation follows {raw}: their filters are judged by the largest magnitude of their raw output",
            stacklevel=5,
        )
    twice = [
        group.conv
        for group in groups
        if group.source is not None
        and 1 < cast(nn.Conv2d, modules[group.conv]).groups == modules[group.conv].in_channels
    ]
    if twice:
        warnings.warn(
            f"{twice} are depthwise, and their channels are pruned already: masks of their own prune twice; leave "
            "these layers out to prune once",
            stacklevel=5,
        )


def _install(
    model: nn.Module, group: FilterGroup, predictor: Predictor, *, target: Target, decoupled: bool, state: Pass
) -> DynamicConv2d:
    conv = cast(nn.Conv2d, model.get_submodule(group.conv))
    if isinstance(conv.weight, nn.parameter.UninitializedParameter):
        raise ValueError(f"layer {group.conv!r} is lazy and has no weight yet; run one batch through the model first")
    norm = None if group.norm is None else model.get_submodule(group.norm)
    if norm is not None and not isinstance(norm, nn.BatchNorm2d):
        raise ValueError(
            f"layers: the norm {group.norm!r} of {group.conv!r} is a {type(norm).__name__}, which needs all filters; "
            "nn.BatchNorm2d belongs to a group, no other"
        )
    own = predictor(conv.in_channels, conv.out_channels).to(conv.weight.device, conv.weight.dtype)
    layer = DynamicConv2d(conv, norm, own, group=group, target=target, decoupled=decoupled, state=state)
    layer.train(conv.training)
    if group.output is not None:
        state.handles.append(model.get_submodule(group.output).register_forward_hook(layer.mask_output))
    model.set_submodule(group.conv, layer)
    if group.norm is not None:
        model.set_submodule(group.norm, nn.Identity())
    return layer
