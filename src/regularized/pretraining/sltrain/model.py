"""SLTrain on a whole model: its linear layers replaced before training, and plain ones in their place afterwards."""

from collections.abc import Iterator, Mapping, Sequence

import torch
from torch import Tensor, nn
from torch.nn.utils import parametrize

from regularized.mechanisms.surgery import check_called, tied_parameters
from regularized.pretraining.sltrain.layer import SparseLowRankLinear, num_entries

__all__ = ["convert", "init_from_dense", "merge", "sparse_low_rank_layers"]

_INCLUDE = ("attn", "attention", "mlp")


def convert(
    model: nn.Module,
    *,
    rank: int,
    density: float = 0.03,
    alpha: float = 16.0,
    trained_scale: bool = False,
    include: Sequence[str] = _INCLUDE,
    exclude: Sequence[str] = (),
    generator: torch.Generator | None = None,
) -> list[str]:
    """Replace linear layers of a model by :class:`SparseLowRankLinear`, in place, with a start of their own.

    Before training, and before the optimizer is built. Module names stay; a layer's ``weight`` becomes ``left``,
    ``right``, ``values`` and ``positions``. Device, type and mode stay, the meta device included: there draw with
    ``reset_parameters`` once there is memory, or load a state.

    Args:
        model: any model.
        rank: see :class:`SparseLowRankLinear`.
        density: see :class:`SparseLowRankLinear`.
        alpha: see :class:`SparseLowRankLinear`.
        trained_scale: see :class:`SparseLowRankLinear`.
        include: parts of names: every ``nn.Linear`` whose dotted name contains one of them. Default ``"attn"``,
            ``"attention"`` and ``"mlp"``, as in the authors' scripts: embeddings, norms and the head stay dense.
            ``[""]`` takes all.
        exclude: parts of names to leave out; default none.
        generator: see :class:`SparseLowRankLinear`; layers draw from it one after another.

    Returns:
        Names of the layers.

    Raises:
        ValueError: nothing matches; a setting is out of its range; a weight is shared with another module; a layer is
            frozen, has a gradient (training has begun), a parametrization, a forward pass of its own, or is read by its
            owner instead of being called. The model is as it was.

    Examples:
        >>> model = nn.ModuleDict({"mlp": nn.Linear(64, 64), "head": nn.Linear(64, 10)})
        >>> convert(model, rank=8, generator=torch.Generator().manual_seed(0))
        ['mlp']
        >>> model["mlp"]
        SparseLowRankLinear(in_features=64, out_features=64, bias=True, rank=8, density=0.03, alpha=16)
        >>> _ = merge(model)
        >>> model["mlp"]
        Linear(in_features=64, out_features=64, bias=True)
    """
    for option, parts in (("include", include), ("exclude", exclude)):
        if isinstance(parts, str):
            raise ValueError(f"{option} must be a list of parts of names, got the string {parts!r}; write [{parts!r}]")
    linears = {name: m for name, m in model.named_modules() if isinstance(m, nn.Linear) and name}
    chosen = {
        name: linear
        for name, linear in linears.items()
        if any(part in name for part in include) and not any(part in name for part in exclude)
    }
    if not chosen:
        raise ValueError(
            f"no nn.Linear has a name with one of {list(include)}"
            + (f" and none of {list(exclude)}" if exclude else "")
            + f"; there are {list(linears)[:20] or 'none'}"
        )
    _check_convertible(model, chosen)
    for name, linear in chosen.items():
        num_entries(linear.out_features, linear.in_features, rank=rank, density=density, name=name)
    for name, linear in chosen.items():
        layer = SparseLowRankLinear(
            linear.in_features,
            linear.out_features,
            linear.bias is not None,
            rank=rank,
            density=density,
            alpha=alpha,
            trained_scale=trained_scale,
            generator=generator,
            device=linear.weight.device,
            dtype=linear.weight.dtype,
            name=name,
        )
        model.set_submodule(name, layer.train(linear.training))
    return list(chosen)


def merge(model: nn.Module) -> list[str]:
    """Replace every :class:`SparseLowRankLinear` by a plain ``nn.Linear`` that does the same, in place.

    Args:
        model: a converted model.

    Returns:
        Names of the layers.

    Examples:
        >>> model = nn.Sequential(nn.Linear(64, 64), nn.ReLU())
        >>> _ = convert(model, rank=8, include=[""])
        >>> merge(model), model[0]
        (['0'], Linear(in_features=64, out_features=64, bias=True))
    """
    layers = dict(sparse_low_rank_layers(model))
    for name, layer in layers.items():
        model.set_submodule(name, layer.to_linear())
    return list(layers)


def init_from_dense(model: nn.Module, state_dict: Mapping[str, Tensor]) -> dict[str, float]:
    """Load the state of the dense model into a converted one, as near as its layers come: see ``set_weight``.

    SLTrain trains from scratch. How much of a dense weight is lost is returned, and it is much unless the weight is
    nearly of low rank: train on, and compare.

    Args:
        model: converted.
        state_dict: of the model before it was converted, or of a trained one of its kind.

    Returns:
        By layer, what is missing of its weight (Frobenius norm over the weight's).

    Raises:
        ValueError: a tensor is missing, unknown, or of another shape; the model is as it was.

    Examples:
        >>> model = nn.Sequential(nn.Linear(64, 64), nn.ReLU(), nn.Linear(64, 10))
        >>> dense = model.state_dict()
        >>> _ = convert(model, rank=16, density=0.03, include=["0"])
        >>> lost = init_from_dense(model, dense)
        >>> 0 < lost["0"] < 1
        True
    """
    layers = {f"{name}.weight": layer for name, layer in sparse_low_rank_layers(model)}
    factors = {
        f"{name}.{part}"
        for name, layer in sparse_low_rank_layers(model)
        for part in ("left", "right", "values", "positions", "trained_scale")
        if getattr(layer, part) is not None
    }
    wanted = {name: tuple(t.shape) for name, t in model.state_dict().items() if name not in factors}
    wanted |= {name: layer.shape for name, layer in layers.items()}
    given = {name: tuple(t.shape) for name, t in state_dict.items()}
    if wanted != given:
        wrong = [name for name in wanted.keys() & given.keys() if wanted[name] != given[name]]
        raise ValueError(
            "the state is not that of the model before it was converted: missing "
            f"{sorted(wanted.keys() - given.keys())}, unknown {sorted(given.keys() - wanted.keys())}, of another shape "
            f"{sorted(wrong)}"
        )
    model.load_state_dict({k: v for k, v in state_dict.items() if k not in layers}, strict=False)
    return {name.removesuffix(".weight"): layer.set_weight(state_dict[name]) for name, layer in layers.items()}


def sparse_low_rank_layers(model: nn.Module) -> Iterator[tuple[str, SparseLowRankLinear]]:
    """Layers that were converted, by name."""
    for name, module in model.named_modules():
        if isinstance(module, SparseLowRankLinear):
            yield name, module


def _check_convertible(model: nn.Module, chosen: Mapping[str, nn.Linear]) -> None:
    shared = tied_parameters(model)
    for name, linear in chosen.items():
        if owners := shared.get(id(linear.weight)):
            raise ValueError(
                f"the weight of {name!r} is shared ({' = '.join(owners)}), and a sparse plus low-rank weight cannot be "
                "shared with a dense one: untie them before, or leave the layer out with exclude"
            )
        if parametrize.is_parametrized(linear) or type(linear).forward is not nn.Linear.forward:
            raise ValueError(
                f"layer {name!r} is a {type(linear).__name__} with a weight or a forward pass of its own, which would "
                "be lost; leave it out with exclude"
            )
        if linear.weight.grad is not None:
            raise ValueError(
                f"the weight of {name!r} has a gradient already: an optimizer built before would go on training what "
                "is no longer in the model. Convert first, then build the optimizer"
            )
        if not linear.weight.requires_grad:
            raise ValueError(
                f"the weight of {name!r} is frozen; converting trains a new one. Leave it out with exclude"
            )
    check_called(model, chosen)
