"""Golden vectors of shengliu66/ELR at 934af53 against the public API."""

from collections.abc import Callable

import numpy as np
import torch
from numpy.typing import NDArray
from torch import nn

from regularized.evidence.conformance import Case, UnknownCase
from regularized.mechanisms.ema import EMA, ramped_decay, running_mean_decay
from regularized.mechanisms.mixup import Mix
from regularized.noisy_labels.early_learning.loss import EarlyLearningLoss
from regularized.noisy_labels.early_learning.plus_loss import EarlyLearningPlusLoss
from regularized.training.progress import Progress, gaussian_ramp

TOLERANCE = 1e-12
"""The sheet's: relative, double precision."""

Outputs = dict[str, NDArray[np.float64]]


def compute(case: Case) -> Outputs:
    """Outputs of a case, by the kind that its keys show.

    Raises:
        UnknownCase: the keys fit neither ELR, nor ELR+, nor the averaged weights.
    """
    kinds: dict[tuple[str, ...], Callable[[Case], Outputs]] = {
        ("in/index", "in/logits", "in/labels"): _elr,
        ("in/index", "in/logits_mixed", "in/logits_ema_clean", "in/labels"): _elr_plus,
        ("in/weights", "in/ema0", "in/step"): _average,
    }
    for keys, kind in kinds.items():
        if case.has(*keys):
            return kind(case)
    raise UnknownCase(case)


def _elr(case: Case) -> Outputs:
    """Successive calls of the loss; the history is read after each."""
    steps = case.inputs["logits"]
    criterion = EarlyLearningLoss(
        int(case.number("num_examples", case.inputs["index"].max() + 1)),
        int(case.number("num_classes", steps.shape[-1])),
        strength=case.number("lam"),
        momentum=case.number("beta"),
        eps=case.number("clamp", 1e-4),
    ).double()
    losses, gradients, histories = [], [], []
    for z, y, i in zip(steps, case.inputs["labels"], case.inputs["index"], strict=True):
        logits = torch.tensor(z, requires_grad=True)
        loss = criterion(logits, torch.tensor(y), torch.tensor(i))
        (gradient,) = torch.autograd.grad(loss, logits)
        losses.append(loss.detach().numpy())
        gradients.append(gradient.numpy())
        histories.append(criterion.history.numpy().copy())
    return {"loss": np.stack(losses), "grad_logits": np.stack(gradients), "target": np.stack(histories)}


def _elr_plus(case: Case) -> Outputs:
    """Successive calls of the loss of one network, with the teacher's logits and the mixing given."""
    steps = case.inputs["logits_mixed"]
    calls, batch, classes = steps.shape
    criterion = EarlyLearningPlusLoss(
        int(case.number("num_examples", case.inputs["index"].max() + 1)),
        int(case.number("num_classes", classes)),
        momentum=case.number("beta"),
        eps=case.number("clamp", 1e-4),
        # The official code refines the labels when there are exactly 100 classes.
        refine_labels=bool(case.number("refine_labels", float(classes == 100))),
    ).double()
    ramp = gaussian_ramp(steps=int(case.number("coef_step", 0)))
    partners = case.inputs.get("perm", np.tile(np.arange(batch), (calls, 1)))
    shares = case.inputs.get("mix_lam", np.ones(calls))
    numbers = case.inputs.get("step", np.arange(1, calls + 1))
    losses, gradients, rows, ramps = [], [], [], []
    for n in range(calls):
        logits = torch.tensor(steps[n], requires_grad=True)
        index, mix = torch.tensor(case.inputs["index"][n]), Mix(float(shares[n]), torch.tensor(partners[n]))
        factor = ramp(Progress(int(numbers[n]), 0))
        loss = criterion(
            logits,
            torch.tensor(case.inputs["labels"][n]),
            index,
            teacher_logits=torch.tensor(case.inputs["logits_ema_clean"][n]),
            mix=mix,
            strength=case.number("lam") * factor,
        )
        (gradient,) = torch.autograd.grad(loss, logits)
        losses.append(loss.detach().numpy())
        gradients.append(gradient.numpy())
        rows.append(mix(criterion.history[index]).numpy())
        ramps.append(factor)
    return {
        "loss": np.stack(losses),
        "grad_logits": np.stack(gradients),
        "q": np.stack(rows),
        "history_last": criterion.history.numpy(),
        "ramp": np.array(ramps),
    }


class _Weights(nn.Module):
    """A model that is nothing but its weights."""

    def __init__(self, values: NDArray[np.float64]) -> None:
        super().__init__()
        self.values = nn.Parameter(torch.tensor(values))


def _average(case: Case) -> Outputs:
    """Averaged weights at given numbers of the step."""
    value = case.number("ema_alpha")
    ramped = bool(case.number("ramp", 0))
    decay = ramped_decay(value, steps=int(case.number("ema_step"))) if ramped else running_mean_decay(value)
    average = EMA(_Weights(case.inputs["ema0"]), decay=decay, buffers="own")
    averages = []
    for weights, step in zip(case.inputs["weights"], case.inputs["step"], strict=True):
        average.updates = int(step) - 1
        average.update(_Weights(weights))
        averages.append(average.module.get_parameter("values").detach().numpy().copy())
    return {"ema": np.stack(averages)}
