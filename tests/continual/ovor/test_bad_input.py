"""Bad inputs of `ovor`: each is answered by what was given, what is allowed, and how to mend it."""

import pytest
import torch
from tests.bad_input import assert_refused, refused
from tests.continual.ovor.vit import DIM, Attention, Vit
from torch import nn

from regularized.continual.ovor import (
    EnergyQuantile,
    HeadPhase,
    OnePrompt,
    OutlierSampler,
    PrefixAttention,
    TaskCrossEntropy,
    VirtualOutlierRegularizer,
    extract_features,
    kth_squared_distance,
    outlier_loss,
)
from regularized.continual.tasks import Task
from regularized.training.progress import Progress
from regularized.training.step import Batch, Step

SAMPLER = OutlierSampler(k=3, select=4, noises=5, per_class=3)


def fit(*, features=None, labels=(0, 1), classes=(0, 1), thresholds=None, sampler=SAMPLER, batch_size=128, scale=1.0):
    torch.manual_seed(0)
    x = torch.randn(20, 4) if features is None else features
    head = nn.Linear(4, 3)
    with torch.no_grad():
        head.weight.mul_(scale)
    vor = VirtualOutlierRegularizer(thresholds=thresholds, sampler=sampler)
    y = torch.tensor(labels).repeat(10)
    vor.fit_head(head, x, y, classes=classes, epochs=1, batch_size=batch_size)


def value(labels, *, begin=True, columns=4):
    loss = TaskCrossEntropy(4)
    if begin:
        loss.task_start(Task(0, (0, 1), None))
        loss.task_end(Task(0, (0, 1), None))
        loss.task_start(Task(1, (2, 3), None))
    y = torch.tensor(labels)
    loss(Step(nn.Identity(), Batch(torch.ones(len(y), columns), y), Progress(0, 1)))


def _twice():
    loss = TaskCrossEntropy(4)
    for number in range(2):
        loss.task_start(Task(number, (0, 1), None))
        loss.task_end(Task(number, (0, 1), None))


class Relative(Attention):
    def forward(self, x, rope=None):
        return super().forward(x)


class Logits(Vit):
    forward_head = None

    def __init__(self):
        super().__init__()
        del self.head

    def __getattribute__(self, name):
        if name == "forward_head":
            raise AttributeError(name)
        return super().__getattribute__(name)

    def forward(self, x):
        return {"logits": x}


def _causal():
    PrefixAttention(Attention(), nn.Parameter(torch.rand(2, DIM)))(torch.zeros(1, 2, DIM), is_causal=True)


def _prompted_twice():
    vit = Vit()
    OnePrompt(vit, 3, layers={0: 2})
    OnePrompt(vit, 3, layers={0: 2})


def _unlabelled():
    model = OnePrompt(Vit(), 3, layers={0: 2})
    extract_features(model, [Batch(torch.zeros(2, 4, 3))])


ROWS = [
    refused(
        "thresholds in the wrong order",
        lambda: VirtualOutlierRegularizer(thresholds=(-3.0, -15.0)),
        ValueError,
        ("in-distribution energies must lie below outlier energies", "-3.0", "-15.0"),
    ),
    refused(
        "as many neighbours as features",
        lambda: fit(sampler=OutlierSampler(k=20)),
        ValueError,
        ("k must be below", "k=20 and 20 features", "lower k"),
    ),
    refused(
        "fewer outliers than batches",
        lambda: fit(sampler=OutlierSampler(k=3, per_class=1), batch_size=2),
        UserWarning,
        ("2 outliers for 10 batches", "per_class"),
    ),
    refused("labels of other classes", lambda: fit(labels=(0, 2)), ValueError, ("label 2", "[0, 1]")),
    refused("a class named twice", lambda: fit(classes=(0, 1, 1)), ValueError, ("named twice", "(0, 1, 1)")),
    refused("a class in two tasks", _twice, ValueError, ("class 0 of task 1", "disjoint")),
    refused(
        "the backbone is not frozen",
        lambda: fit(features=torch.randn(20, 4, requires_grad=True)),
        ValueError,
        ("backbone is not frozen", "extract_features"),
    ),
    refused(
        "an odd prompt",
        lambda: OnePrompt(Vit(), 3, layers={0: 3}),
        ValueError,
        ("even", "halved", "{0: 3}"),
    ),
    refused(
        "an odd prompt of one attention",
        lambda: PrefixAttention(Attention(), nn.Parameter(torch.rand(3, DIM))),
        ValueError,
        ("L even", "(3, 12)"),
    ),
    refused(
        "thresholds that do not match the logits",
        lambda: fit(thresholds=(-40.0, -30.0)),
        UserWarning,
        ("do not match the logit scale", "tau_id is -40", "quartiles", "EnergyQuantile"),
    ),
    refused("no such layer", lambda: OnePrompt(Vit(), 3), ValueError, ("0 to 1", "4: 40")),
    refused("no attention", lambda: OnePrompt(nn.Linear(2, 2), 3), TypeError, ("Linear", "qkv", "nothing to prompt")),
    refused("prompts already", _prompted_twice, TypeError, ("has prompts already", "blocks.0.attn")),
    refused(
        "an attention of another kind",
        lambda: PrefixAttention(nn.MultiheadAttention(4, 2), nn.Parameter(torch.rand(2, 4))),
        TypeError,
        ("MultiheadAttention", "qkv and proj"),
    ),
    refused(
        "rotary positions",
        lambda: PrefixAttention(Relative(), nn.Parameter(torch.rand(2, DIM))),
        TypeError,
        ("positions inside its attention", "rope"),
    ),
    refused("causal attention", _causal, TypeError, ("causal",)),
    refused(
        "logits for features",
        lambda: OnePrompt(Logits(), 3, layers={0: 2})(torch.zeros(1, 4, 3)),
        TypeError,
        ("Logits returns dict", "without its head"),
    ),
    refused("no targets", _unlabelled, ValueError, ("must have targets", "no targets")),
    refused(
        "no batch", lambda: extract_features(OnePrompt(Vit(), 3, layers={0: 2}), []), ValueError, ("gave no batch",)
    ),
    refused(
        "no such head",
        lambda: HeadPhase(VirtualOutlierRegularizer(), epochs=1, head="fc").attach(Vit()),
        AttributeError,
        ("fc",),
    ),
    refused(
        "no thresholds yet",
        lambda: VirtualOutlierRegularizer().loss(torch.zeros(1, 2), torch.zeros(1, 2)),
        RuntimeError,
        ("no thresholds yet", "set_thresholds"),
    ),
    refused(
        "energies of no outlier",
        lambda: outlier_loss(torch.zeros(2, 3), torch.zeros(0, 3), tau_id=-2.0, tau_ood=-1.0),
        ValueError,
        ("neither empty", "(0, 3)"),
    ),
    refused(
        "more neighbours than points",
        lambda: kth_squared_distance(torch.zeros(1, 2), torch.eye(2), 3),
        ValueError,
        ("k must be in [1, 2]", "3"),
    ),
    refused("no task", lambda: value([0], begin=False), RuntimeError, ("no task has begun", "fit(..., task=task)")),
    refused("a label of an earlier task", lambda: value([2, 0]), ValueError, ("label 0", "earlier task", "[2, 3]")),
    refused("a head of another size", lambda: value([2], columns=7), ValueError, ("7 columns", "given 4")),
    refused("a negative weight", lambda: VirtualOutlierRegularizer(weight=-1.0), ValueError, ("weight", "-1")),
    refused("an unknown place", lambda: OutlierSampler(around="middle"), ValueError, ("'boundary' or 'origin'",)),
    refused("no noise", lambda: OutlierSampler(sigma=0.0), ValueError, ("sigma", "scale of the features")),
    refused("a quantile above 1", lambda: EnergyQuantile(quantile=25.0), ValueError, ("quantile", "[0, 1]", "25")),
]


@pytest.mark.parametrize(("call", "error", "says"), ROWS)
def test_bad_input(call, error, says):
    """Fails when one of them passes silently, or its message lacks what mends it."""
    assert_refused(call, error, says)


def test_thresholds_that_match_are_silent(recwarn):
    """Fails when the warning cries wolf."""
    fit(thresholds=(-6.0, -1.0))
    assert not recwarn.list
