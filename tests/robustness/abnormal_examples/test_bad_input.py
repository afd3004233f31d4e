"""Bad inputs of `abnormal_examples`: each is answered by what was given, what is allowed, and how to mend it."""

import pytest
import torch
from tests.bad_input import assert_refused, refused
from torch import nn
from torch.nn import functional as F

from regularized.robustness.abnormal_examples import AbnormalExamples, AbnormalExamplesLoss, OneStepTraining, variation
from regularized.robustness.attacks import OneStep, Threat
from regularized.training.progress import Progress
from regularized.training.step import Batch, Step

X, Y = torch.rand(6, 3, 4, 4), torch.arange(6) % 5


def _model():
    return nn.Sequential(nn.Flatten(), nn.Linear(48, 5))


def _training(threat=None, model=None, **settings):
    term = OneStepTraining(OneStep.fgsm(threat or Threat(0.1)), **settings)
    term.attach(_model() if model is None else model)
    return term


def _step(term, batch):
    return lambda: term(Step(_model(), batch, Progress(0, 1)))


@pytest.mark.parametrize(
    ("call", "error", "says"),
    [
        refused("eps of 8 for pixels in [0, 1]", lambda: Threat(8.0), UserWarning, ["radius of 8", "8 / 255"]),
        refused(
            "std that does not match the channels",
            lambda: _training(Threat.normalised(8 / 255, mean=(0.5,) * 2, std=(0.2,) * 2)).transform(Batch(X, Y)),
            ValueError,
            ["(2,)", "(6, 3, 4, 4)"],
        ),
        refused(
            "a loss before that is no loss a sample",
            lambda: AbnormalExamplesLoss()(torch.zeros(6, 5), torch.tensor(1.0), torch.zeros(6, 5), Y),
            ValueError,
            ["losses_before", "(6,)", "()", "reduction='none'"],
        ),
        refused(
            "a loss after that is no loss a sample",
            lambda: variation(torch.zeros(6, 5), torch.zeros(6), torch.zeros(6, 5), torch.zeros(())),
            ValueError,
            ["losses_after", "reduction='none'"],
        ),
        refused(
            "logits of different shapes",
            lambda: AbnormalExamplesLoss()(torch.zeros(6, 4), torch.zeros(6), torch.zeros(6, 5), Y),
            ValueError,
            ["(6, 4)", "(6, 5)"],
        ),
        refused(
            "a model in evaluation mode",
            lambda: _training(model=_model().eval()).transform(Batch(X, Y)),
            UserWarning,
            ["evaluation mode", "model.train()"],
        ),
        refused(
            "data outside the range",
            lambda: _training().transform(Batch(2 * X - 1, Y)),
            ValueError,
            ["0.0 to 1.0", "Threat.normalised"],
        ),
        refused(
            "a gradient that underflows in half precision",
            lambda: OneStep.fgsm(Threat(0.1))(
                _model().bfloat16(), X.bfloat16(), Y, loss=lambda z, y: 0.0 * F.cross_entropy(z, y, reduction="none")
            ),
            UserWarning,
            ["bfloat16", "scaled up"],
        ),
        refused(
            "a negative weight", lambda: AbnormalExamplesLoss(output_weight=-1.0), ValueError, ["output_weight", "-1"]
        ),
        refused("a negative lambda1", lambda: AbnormalExamples(weight=-0.5), ValueError, ["weight", "-0.5"]),
        refused("a negative lambda2", lambda: AbnormalExamples(loss_weight=-0.5), ValueError, ["loss_weight", "-0.5"]),
        refused("pgd in place of one step", lambda: OneStepTraining("fgsm"), TypeError, ["OneStep", "str"]),
        refused(
            "a batch that nobody attacked", _step(AbnormalExamples(), Batch(X, Y)), ValueError, ["OneStepTraining(...)"]
        ),
        refused(
            "a loss gradient without graph",
            lambda: _step(AbnormalExamples(loss_gradient=True), _training().transform(Batch(X, Y)))(),
            ValueError,
            ["keep_graph=True"],
        ),
        refused("a batch without labels", lambda: _training().transform(Batch(X)), ValueError, ["labels"]),
        refused(
            "a loop that attaches nothing",
            lambda: OneStepTraining(OneStep.fgsm(Threat(0.1))).transform(Batch(X, Y)),
            RuntimeError,
            ["attach(model)"],
        ),
        refused(
            "keyword arguments as inputs",
            lambda: _training().transform(Batch({"pixels": X}, Y)),
            TypeError,
            ["one floating-point tensor", "dict"],
        ),
    ],
)
def test_bad_input(call, error, says):
    """Fails when a bad input is taken, or refused without saying what was given and how to mend it."""
    assert_refused(call, error, says)
