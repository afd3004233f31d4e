"""Bad inputs of the distillation: each is answered by what was given, what is allowed, and how to mend it."""

import math
from functools import partial

import pytest
import torch
from tests.bad_input import assert_refused, refused
from tests.unlearning.score_forgetting.teachers import SCHEDULE, DropoutNet, gaussians, small_teacher
from torch import nn

from regularized.training.finite import NonFiniteLoss
from regularized.unlearning.score_forgetting import (
    ConditionalDiffusion,
    LabelSampler,
    NoiseSchedule,
    OneStepGenerator,
    ScoreForgettingDistillation,
    eps_matching_loss,
    sid_generator_loss,
)


def _distillation(teacher=None, **settings):
    known = {"forget": 0, "override": 1}
    return ScoreForgettingDistillation(small_teacher() if teacher is None else teacher, **{**known, **settings})


class _Answers(nn.Module):
    """A network of one weight that answers as it is told."""

    def __init__(self, answer):
        super().__init__()
        self.weight = nn.Parameter(torch.ones(()))
        self.answer = answer

    def forward(self, x_t, t, labels):
        return self.answer(x_t, labels) * self.weight


class _Unlabelled(nn.Module):
    def forward(self, x_t, t):
        return x_t


def _answering(answer, prediction="eps", shape=(2,)):
    def call():
        teacher = ConditionalDiffusion(_Answers(answer), shape=shape, num_classes=3, prediction=prediction)
        _distillation(teacher.eval().requires_grad_(False))

    return call


def _unlabelled():
    _distillation(ConditionalDiffusion(_Unlabelled(), shape=(2,), num_classes=3).eval())


def _not_frozen(training, trained):
    teacher = ConditionalDiffusion(DropoutNet().double(), shape=(4,), num_classes=3)
    _distillation(teacher.train(training).requires_grad_(trained))


def _broken(part, *, label, **settings):
    """A step after a weight of one class of one network became NaN."""
    sfd = _distillation(gaussians(), forget_weight=1.0, **settings)
    network = sfd.fake.network if part == "fake" else sfd.generator.diffusion.network
    with torch.no_grad():
        network.mean[label] = math.nan
    sfd.step(8)


def _broken_generator_term():
    """Only the generator's loss is infinite: the teacher's answer for the override is."""
    sfd = _distillation(gaussians(), frequencies=[1.0, 0.0, 1.0])
    with torch.no_grad():
        sfd.teacher.network.mean[1] = math.inf
    sfd.step(8)


def _loaded(other):
    first, second = _distillation(small_teacher()), other()
    second.load_state_dict(first.state_dict())


def bad_inputs():
    """Every line of the sheet's "bad input", and what a user meets besides."""
    return [
        refused("override is forget", lambda: _distillation(override=0), ValueError, ("another class", "0 for both")),
        refused(
            "forget outside", lambda: _distillation(forget=3), ValueError, ("forget", "[0, 2]", "a label", "got 3")
        ),
        refused("override outside", lambda: _distillation(override=-1), ValueError, ("override", "[0, 2]", "got -1")),
        refused("no override, one class left", lambda: LabelSampler(2, forget=0), ValueError, ("1 would", "override=")),
        refused("nothing left", lambda: LabelSampler(1, forget=0), ValueError, ("of 1 classes 0",)),
        refused("nothing to override", lambda: _distillation(forget=None), ValueError, ("override=1", "forget=None")),
        refused("teacher without labels", _unlabelled, TypeError, ("network(x_t, t, labels)", "module around it")),
        refused("label is dropped", _answering(lambda x, c: x), ValueError, ("same for every label", "guidance")),
        refused(
            "estimate is not finite",
            _answering(lambda x, c: x * math.inf),
            ValueError,
            ("not finite at step 38", "prediction='eps'", "prediction="),
        ),
        refused(
            "declared eps, is not",
            _answering(lambda x, c: 0.1 * torch.ones_like(x) * c[:, None]),
            UserWarning,
            ("prediction='eps'", "should be the noise", "'x0' or 'v'"),
        ),
        refused(
            "declared v, is eps",
            _answering(lambda x, c: x + 1e-3 * c[:, None], "v"),
            UserWarning,
            ("prediction='v'", "should not be the noise", "'eps'"),
        ),
        refused(
            "another shape",
            _answering(lambda x, c: torch.cat([x, x], dim=1)),
            ValueError,
            ("(16, 2)", "(16, 4)", "learned variance"),
        ),
        refused("unknown prediction", _answering(lambda x, c: x, "score"), ValueError, ("'eps', 'x0' or 'v'",)),
        refused("t_init outside", lambda: _distillation(t_init=1000), ValueError, ("t_init", "[0, 999]", "1000")),
        refused("t_range outside", lambda: _distillation(t_range=(38, 1001)), ValueError, ("1000", "(38, 1001)")),
        refused("t_range upside down", lambda: _distillation(t_range=(9, 9)), ValueError, ("below", "(9, 9)")),
        refused("in train mode", lambda: _not_frozen(True, False), UserWarning, ("training mode", "eval()")),
        refused("needs gradient", lambda: _not_frozen(False, True), UserWarning, ("need a gradient", "requires_grad_")),
        refused(
            "fake kept term",
            lambda: _broken("fake", label=slice(1, 3)),
            NonFiniteLoss,
            ("the fake score's loss of the kept samples", "steps 38 to 711"),
        ),
        refused(
            "fake forgotten term",
            lambda: _broken("fake", label=0),
            NonFiniteLoss,
            ("the fake score's loss of the forgotten samples", "steps 38 to 711", "narrow t_range"),
        ),
        refused(
            "generator forgotten term",
            _broken_generator_term,
            NonFiniteLoss,
            ("the generator's loss of the forgotten samples", "steps 38 to 711"),
        ),
        refused(
            "generator kept term",
            lambda: _broken_generator_kept(),
            NonFiniteLoss,
            ("the generator's loss of the kept samples",),
        ),
        refused("no weight", lambda: _distillation(kept_weight=0.0, forget_weight=0.0), ValueError, ("both weights",)),
        refused("negative weight", lambda: _distillation(forget_weight=-1.0), ValueError, ("forget_weight", ">= 0")),
        refused("share", lambda: _distillation(forget_share=0.0), ValueError, ("forget_share", "(0, 1]")),
        refused("clip", lambda: _distillation(clip=0.0), ValueError, ("clip", "positive", "None")),
        refused("batch", lambda: _distillation().step(0), ValueError, ("batch_size", "at least 1")),
        refused("no step left", lambda: _distillation().fit(steps=0), ValueError, ("steps", ">= 1", "steps done")),
        refused("frequencies of others", lambda: _distillation(frequencies=[1.0, 1.0]), ValueError, ("(3,)", "(2,)")),
        refused("frequencies", lambda: _distillation(frequencies=[1.0, 0.0, 0.0]), ValueError, ("positive", "kept")),
        refused("another seed", lambda: _loaded(partial(_distillation, seed=1)), ValueError, ("another seed",)),
        refused(
            "another teacher",
            lambda: _loaded(lambda: _distillation(small_teacher(seed=1))),
            ValueError,
            ("another teacher",),
        ),
        refused("betas", lambda: NoiseSchedule(torch.linspace(1e-4, 0.02, 9)), ValueError, ("products of 1 - beta",)),
        refused("beta", lambda: NoiseSchedule.linear(beta_end=1.0), ValueError, ("beta_end", "(0, 1)")),
        refused(
            "many steps",
            lambda: gaussians().sample(torch.tensor([0]), steps=1001),
            ValueError,
            ("steps", "[1, 1000]", "1001"),
        ),
        refused(
            "shapes of the loss",
            lambda: sid_generator_loss(torch.zeros(2, 3), torch.zeros(2, 3), torch.zeros(2, 1)),
            ValueError,
            ("(2, 3) and (2, 3) and (2, 1)",),
        ),
        refused(
            "shapes of the noise",
            lambda: eps_matching_loss(torch.zeros(2, 3), torch.zeros(2, 1)),
            ValueError,
            ("(2, 3) and (2, 1)",),
        ),
        refused(
            "step of the generator", lambda: OneStepGenerator(gaussians(), t_init=-1), ValueError, ("t_init", "-1")
        ),
    ]


def _broken_generator_kept():
    sfd = _distillation(gaussians(), forget_weight=0.0)
    with torch.no_grad():
        sfd.teacher.network.mean[2] = math.inf
    sfd.step(64)


@pytest.mark.filterwarnings("ignore:with prediction")
@pytest.mark.parametrize(("call", "error", "says"), bad_inputs())
def test_bad_input(call, error, says):
    """Fails when it is accepted, or refused in words that do not help."""
    assert_refused(call, error, says)


def test_weights_stay_where_a_term_is_not_finite():
    """Fails when an update was made before anybody looked."""
    sfd = _distillation(gaussians())
    with torch.no_grad():
        sfd.teacher.network.mean[1] = math.inf
    before = sfd.generator.diffusion.network.mean.clone()
    with pytest.raises(NonFiniteLoss):
        sfd.step(64)
    assert torch.equal(before, sfd.generator.diffusion.network.mean)


def test_a_good_teacher_is_not_warned_of(recwarn):
    """Fails when the probe of the prediction warns of a network that says the noise."""
    _distillation(gaussians())
    assert not recwarn.list
    assert len(SCHEDULE) == 1000
