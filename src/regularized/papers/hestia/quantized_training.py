"""From full precision to ternary weights, one arm's way: what the small models and the large one share."""

from collections.abc import Callable, Mapping
from importlib import import_module
from typing import Any, NamedTuple

from torch import nn
from torch.optim import AdamW, Optimizer

from regularized.compression.hestia.layer import Annealer, anneal_weights, soft_evaluation
from regularized.compression.hestia.schedule import Annealing, temperature_factors
from regularized.evidence.requirements import need_package

__all__ = ["Training", "quantized_training"]


class Training(NamedTuple):
    """What a loop needs to end with ternary weights.

    Attributes:
        optimizer: of all that is trained.
        after_step: to be called with the number of steps done.
        in_the_last_step: computes something with the weights of the last step's forward pass; afterwards all are hard.
    """

    optimizer: Optimizer
    after_step: Callable[[int], None]
    in_the_last_step: Callable[[Callable[[], float]], float]


def quantized_training(
    model: nn.Module, s: Mapping[str, Any], *, traces: Mapping[str, float], head: str, group_size: int, **adamw: Any
) -> Training:
    """The arm's way from full precision to ternary weights.

    Args:
        model: in full precision.
        s: settings.
        traces: of the layers that are quantized.
        head: the layer that is not.
        group_size: weights that share a scale.
        adamw: options of AdamW beside the rate.
    """
    if s["quantizer"] == "parq":
        return Training(_parq(model, s, list(traces), group_size, adamw), lambda steps: None, lambda compute: compute())
    anneal_weights(model, group_size=group_size, exclude=[head])
    annealer = Annealer(
        model,
        total_steps=s["steps"],
        annealing=Annealing(compress=s["compress"], temperature=s["temperature"], factor_on=s["factor_on"]),
        factors=temperature_factors(traces, alpha=s["alpha"]) if s["alpha"] else None,
    )
    annealer.step(0)

    def in_the_last_step(compute: Callable[[], float]) -> float:
        annealer.step(s["steps"] - 1)
        with soft_evaluation(model):
            result = compute()
        annealer.finish()
        return result

    return Training(AdamW(model.parameters(), lr=s["lr"], **adamw), annealer.step, in_the_last_step)


def _parq(
    model: nn.Module, s: Mapping[str, Any], layers: list[str], group_size: int, adamw: Mapping[str, Any]
) -> Optimizer:
    """torchao's PARQ: piecewise-affine proximal maps that grow steeper over the training, hard in the last step."""
    need_package("torchao", "pip install --no-deps torchao==0.18.0")
    parq = import_module("torchao.prototype.parq")
    chosen = [model.get_submodule(name).weight for name in layers]
    others = [p for p in model.parameters() if all(p is not q for q in chosen)]
    quantized: dict[str, Any] = {"params": chosen, "quant_bits": 0}  # 0 bits: its word for ternary
    if group_size > 0:
        quantized["quant_block_size"] = group_size
    optimizer: Optimizer = parq.QuantOptimizer(
        AdamW([{"params": others}, quantized], lr=s["lr"], **adamw),
        parq.TernaryUnifQuantizer(),
        parq.ProxPARQ(anneal_start=0, anneal_end=s["steps"] - 1),
        quant_period=1,
        quant_per_channel=True,
    )
    return optimizer
