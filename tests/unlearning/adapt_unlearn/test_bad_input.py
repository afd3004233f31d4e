"""Bad inputs of `adapt_unlearn`: each is answered by what was given, what is allowed, and how to mend it."""

import copy

import pytest
import torch
from tests.bad_input import assert_refused, refused
from torch import nn

from regularized.mechanisms.ema import EMA
from regularized.training.progress import Progress
from regularized.training.step import Batch, Step
from regularized.unlearning.adapt_unlearn import (
    GAN,
    AdaptThenUnlearn,
    ElasticAnchor,
    Feedback,
    GANSettings,
    Repulsion,
    collect_feedback,
    generator_fisher,
    percent_unlearned,
)


def repelled(reference, **options):
    model = nn.Linear(2, 3)
    repulsion = Repulsion([reference], **options)
    repulsion.attach(model)
    return repulsion


def at_the_reference(**options):
    model = nn.Linear(2, 3)
    Repulsion([copy.deepcopy(model)], **options).attach(model)


def work(feedback=None, generator=None, **options):
    feedback = Feedback(torch.zeros(3, 1), torch.zeros(3, 1)) if feedback is None else feedback
    generator = nn.Linear(2, 1) if generator is None else generator
    return AdaptThenUnlearn(generator, nn.Linear(1, 1), feedback, latents=2, **{"anchor": 1.0, **options})


def judged(oracle):
    collect_feedback(nn.Linear(2, 1), oracle, latents=2, samples=10)


def _same_network():
    net = nn.Linear(2, 2)
    GAN(net, net, latents=2)


def _other_model():
    repulsion = repelled(nn.Linear(2, 3))
    repulsion.attach(nn.Sequential(nn.Linear(2, 3)))


def _other_state():
    state = work().state_dict()
    AdaptThenUnlearn(
        nn.Linear(2, 2), nn.Linear(2, 1), Feedback(torch.zeros(1, 2), torch.zeros(1, 2)), latents=2, anchor=1.0
    ).load_state_dict(state)


STEP = Step(nn.Identity(), Batch(torch.zeros(1, 1)), Progress(0, 1))

ROWS = [
    refused(
        "a reference of other shapes",
        lambda: repelled(nn.Linear(2, 4)),
        ValueError,
        ("weight (4, 2) (here (3, 2))", "bias (4,) (here (3,))", "same network"),
    ),
    refused(
        "a reference of other names",
        lambda: repelled({"fc.weight": torch.zeros(3, 2)}),
        ValueError,
        ("weight is missing (here (3, 2))", "bias is missing"),
    ),
    refused(
        "the inverse at the reference",
        lambda: at_the_reference(kind="inverse", distance="sum"),
        ValueError,
        ("distance is zero", "before the adaptation"),
    ),
    refused("a relative distance of zero", at_the_reference, ValueError, ("distance is zero",)),
    refused("a negative weight", lambda: Repulsion(weight=-0.1), ValueError, ("weight", "-0.1", "attract")),
    refused("a negative alpha", lambda: Repulsion(alpha=-1.0), ValueError, ("alpha", "positive", "-1.0")),
    refused("an unknown kind", lambda: Repulsion(kind="exp"), ValueError, ("'exponential'", "'exp'")),
    refused("an unknown distance", lambda: Repulsion(distance="mean"), ValueError, ("'relative'", "'mean'")),
    refused(
        "the unbounded form without a cap",
        lambda: Repulsion(kind="negative_square"),
        UserWarning,
        ("unbounded below", "cap=10"),
    ),
    refused("no reference", lambda: repelled_by_nothing(), RuntimeError, ("no reference",)),
    refused("a term of no model", lambda: Repulsion().before_step(STEP), RuntimeError, ("no model yet", "attach")),
    refused("another model", _other_model, ValueError, ("belongs to ['weight', 'bias']", "another one")),
    refused(
        "feedback without negatives",
        lambda: Feedback(torch.zeros(3, 1), torch.zeros(0, 1)),
        ValueError,
        ("no negatives", "oracle"),
    ),
    refused(
        "feedback without positives",
        lambda: judged(lambda x: torch.ones(len(x), dtype=torch.bool)),
        ValueError,
        ("no positives", "everything"),
    ),
    refused(
        "an oracle that answers by logits",
        lambda: judged(lambda x: torch.randn(len(x), 10)),
        TypeError,
        ("booleans", "float32", "argmax"),
    ),
    refused("an oracle that answers by a list", lambda: judged(lambda x: [True] * len(x)), TypeError, ("a list",)),
    refused(
        "an oracle that answers by a column",
        lambda: judged(lambda x: x > 0.0),
        ValueError,
        ("(10,)", "(10, 1)", "squeeze"),
    ),
    refused(
        "the averaged generator",
        lambda: work(generator=EMA(nn.Linear(2, 1), decay=0.9)),
        ValueError,
        ("requires a gradient", "averaged copy (EMA)"),
    ),
    refused(
        "a frozen generator",
        lambda: work(generator=nn.Linear(2, 1).requires_grad_(False)),
        ValueError,
        ("no parameter of Linear requires a gradient", "frozen"),
    ),
    refused("one network for both", _same_network, ValueError, ("generator and discriminator", "same object")),
    refused("a negative anchor", lambda: work(anchor=-1.0), ValueError, ("anchor", "-1.0")),
    refused("no adaptation", lambda: work(adaptations=0), ValueError, ("adaptations", "at least 1")),
    refused("an empty part", lambda: work(subset=0.0), ValueError, ("subset", "(0, 1]")),
    refused("a negative R1", lambda: GANSettings(r1=-1.0), ValueError, ("GANSettings.r1", ">= 0")),
    refused("R1 never", lambda: GANSettings(r1_every=0), ValueError, ("GANSettings.r1_every", "at least 1")),
    refused(
        "a saturated discriminator",
        lambda: generator_fisher(nn.Linear(1, 1), Constant(), torch.ones(2, 1)),
        ValueError,
        ("zero for every weight", "saturated"),
    ),
    refused(
        "no latent",
        lambda: generator_fisher(nn.Linear(1, 1), nn.Linear(1, 1), torch.ones(0, 1)),
        ValueError,
        ("at least one latent",),
    ),
    refused(
        "importance of another model",
        lambda: ElasticAnchor({"fc": torch.ones(1)}, weight=1.0).attach(nn.Linear(1, 1)),
        ValueError,
        ("['fc']", "['weight', 'bias']", "generator_fisher"),
    ),
    refused(
        "no sample to train on",
        lambda: GAN(nn.Linear(1, 1), nn.Linear(1, 1), latents=1).fit(torch.zeros(0, 1), steps=1),
        ValueError,
        ("no sample",),
    ),
    refused(
        "nothing unwanted before", lambda: percent_unlearned(0.0, 0.0), ValueError, ("before", "nothing to unlearn")
    ),
    refused("a state of another generator", _other_state, ValueError, ("does not fit",)),
]


class Constant(nn.Module):
    """Scores that depend on nothing."""

    def forward(self, x):
        return 0.0 * x


def repelled_by_nothing():
    repulsion = Repulsion()
    repulsion.attach(nn.Linear(1, 1))
    repulsion.start()


@pytest.mark.parametrize(("call", "error", "says"), ROWS)
def test_bad_input(call, error, says):
    """Fails when one of them passes silently, or its message lacks what mends it."""
    assert_refused(call, error, says)
