"""Bad inputs of `amft`: each is answered by what was given, what is allowed, and how to mend it."""

from functools import partial

import pytest
import torch
from tests.bad_input import assert_refused, refused
from torch import nn

from regularized.alignment.amft import (
    AMFT,
    PPO,
    MetaWeightController,
    PointsGame,
    ScheduledWeight,
    mean_entropy,
    meta_gradient,
)
from regularized.training.data import TensorData
from regularized.training.progress import Progress


def backward(controller=None, **changes):
    """A step on two quadratics of one weight; returns nothing."""
    w = nn.Parameter(torch.tensor([1.0]))
    given = {
        "sft": w.square().sum(),
        "rl": (w - 2.0).square().sum(),
        "params": [w],
        "entropy": 1.0,
        "val_loss": lambda: (w - 3.0).square().sum(),
        "lr": 0.1,
    }
    controller = MetaWeightController(entropy_lr=0.0) if controller is None else controller
    controller.backward(**given | changes)


def aimed(**options):
    controller = MetaWeightController(**options)
    controller.set_target_entropy(1.0)
    return controller


def _same_loss():
    w = nn.Parameter(torch.tensor([1.0]))
    loss = w.square().sum()
    MetaWeightController(entropy_lr=0.0).backward(
        sft=loss, rl=(w - 2.0).square().sum(), params=[w], val_loss=lambda: loss, lr=0.1
    )


def training(**options):
    settings = {
        "reward": lambda prompts, answers: torch.zeros(len(answers)),
        "optimizer": partial(torch.optim.SGD, lr=0.1),
        "end": 3,
        "length": 2,
        "warmup": 0,
        "controller": MetaWeightController(entropy_lr=0.0),
    }
    return AMFT(nn.Sequential(nn.Embedding(4, 4), nn.Linear(4, 4)), **settings | options)


PAIR = torch.zeros(4, 2, dtype=torch.int64), torch.full((4, 2), 3)


def fit(data=PAIR, validation=(PAIR[0] + 1, PAIR[1]), **options):
    training(**options).fit([data], validation=validation, epochs=1)


def _other_state():
    controller = MetaWeightController(0.9, entropy_lr=1.0, bounds=(0.0, 1.0))
    controller.set_target_entropy(5.0)
    controller.update(entropy=0.0)
    MetaWeightController(bounds=(0.1, 0.2)).load_state_dict(controller.state_dict() | {"steps": 1})


W = nn.Parameter(torch.tensor([1.0]))

ROWS = [
    refused("no target entropy", lambda: backward(MetaWeightController()), RuntimeError, ("target", "mean_entropy")),
    refused("no entropy", lambda: backward(aimed(), entropy=None), ValueError, ("token_entropy", "entropy_lr=0")),
    refused(
        "an entropy that is NaN", lambda: backward(aimed(), entropy=torch.nan), ValueError, ("entropy", "log_softmax")
    ),
    refused(
        "a target that is NaN",
        lambda: MetaWeightController().set_target_entropy(torch.tensor(torch.nan)),
        ValueError,
        ("nan", "log_softmax"),
    ),
    refused(
        "a loss without gradient",
        lambda: backward(sft=torch.tensor(1.0)),
        ValueError,
        ("sft has no gradient", "detached"),
    ),
    refused(
        "a loss of other parameters",
        lambda: backward(rl=nn.Parameter(torch.ones(1)).sum()),
        ValueError,
        ("rl has no gradient", "params others"),
    ),
    refused(
        "a loss is missing",
        lambda: ScheduledWeight(0.5).backward(sft=W.sum(), rl=None, params=[W]),
        ValueError,
        ("rl",),
    ),
    refused("a held-out loss that is trained on", _same_loss, ValueError, ("val_loss", "held-out")),
    refused(
        "held-out answers that are trained on",
        lambda: fit(validation=PAIR),
        UserWarning,
        ("those that are trained on", "hold some out"),
    ),
    refused("no held-out loss", lambda: backward(val_loss=None), ValueError, ("step 0", "val_loss", "meta_lr=0")),
    refused("no held-out data", lambda: fit(validation=None), ValueError, ("val_loss", "meta_lr=0")),
    refused("no learning rate", lambda: backward(lr=None), ValueError, ("give lr", "param_groups")),
    refused(
        "a learning rate of 0, not normalised",
        lambda: backward(MetaWeightController(entropy_lr=0.0, normalize="none"), lr=0.0),
        UserWarning,
        ("learning rate", "cannot move", "cosine"),
    ),
    refused(
        "bounds out of order", lambda: MetaWeightController(bounds=(0.9, 0.1)), ValueError, ("(0.9, 0.1)", "order")
    ),
    refused("bounds outside of [0, 1]", lambda: MetaWeightController(bounds=(0.0, 1.5)), ValueError, ("1.5", "[0, 1]")),
    refused(
        "an unknown scale", lambda: MetaWeightController(normalize="l2"), ValueError, ("normalize", "cosine", "'l2'")
    ),
    refused("a weight above 1", lambda: MetaWeightController(1.5), ValueError, ("init", "[0, 1]")),
    refused("no steps", lambda: MetaWeightController(every=0), ValueError, ("every", "at least 1")),
    refused("a share above 1", lambda: ScheduledWeight(2.0), ValueError, ("share", "[0, 1]")),
    refused(
        "a schedule that leaves [0, 1]",
        lambda: ScheduledWeight(lambda progress: 2.0).needs(Progress(0, 1)),
        ValueError,
        ("share", "got 2.0"),
    ),
    refused("the state of other bounds", _other_state, ValueError, ("mu is 1", "(0.1, 0.2)")),
    refused("gradients of another number", lambda: meta_gradient([], [W], [W]), ValueError, ("0, 1 and 1",)),
    refused("answers in one dimension", lambda: fit((PAIR[0], PAIR[1][:, 0])), ValueError, ("(B, T)", "(4,)")),
    refused("no answers", lambda: fit(PAIR[0]), ValueError, ("prompts", "answers", "NoneType")),
    refused(
        "rewards of another shape",
        lambda: fit(reward=lambda prompts, answers: torch.zeros(3, 1)),
        ValueError,
        ("one number for each of 32", "(3, 1)"),
    ),
    refused("one answer and no critic", lambda: training(rollouts=1), ValueError, ("rollouts >= 2", "Critic")),
    refused("a clip of 0", lambda: PPO(clip=0.0), ValueError, ("PPO.clip", "positive")),
    refused("no batch for the target", lambda: mean_entropy(nn.Linear(1, 1), [], end=0), ValueError, ("no batch",)),
    refused("targets of three digits", lambda: PointsGame(targets=(100,)), ValueError, ("two digits", "100")),
    refused("a target that no hand makes", lambda: PointsGame(2, targets=(97,)), ValueError, ("none of [97]",)),
    refused(
        "a prompt without an answer",
        lambda: (g := PointsGame(3)).demonstrate(g.prompts(torch.tensor([[1, 1, 1, 24]])), torch.Generator()),
        ValueError,
        ("without a right answer", "hands"),
    ),
]


@pytest.mark.parametrize(("call", "error", "says"), ROWS)
def test_bad_input(call, error, says):
    """Fails when one of them passes silently, or its message lacks what mends it."""
    assert_refused(call, error, says)


def test_losses_that_share_no_parameter():
    """Fails when a parameter of one loss alone is refused, or loses its share of the gradient."""
    first, second = nn.Parameter(torch.tensor(1.0)), nn.Parameter(torch.tensor(1.0))
    for meta_lr in (0.0, 0.05):
        controller = MetaWeightController(0.25, entropy_lr=0.0, meta_lr=meta_lr)
        controller.backward(
            sft=2.0 * first, rl=4.0 * second, params=[first, second], val_loss=lambda: first.square(), lr=0.1
        )
        mu = controller.mu.item()
        assert (first.grad.item(), second.grad.item()) == pytest.approx((2.0 * mu, 4.0 * (1.0 - mu)))


def test_data_may_be_a_source():
    """Fails when held-out data that are not one pair are not taken, or looked at batch by batch."""
    run = training(controller=MetaWeightController(entropy_lr=0.0, every=1))
    run.fit([PAIR] * 3, validation=TensorData(PAIR[0] + 1, PAIR[1], batch_size=2), epochs=1)
    assert run.looks == 3
