import pytest
import torch
from torch import nn

from regularized.training import Batch, CrossEntropy, NonFiniteLoss, Objective, Progress, Step, Term
from regularized.training.finite import FiniteCheck


class Times(Term):
    factor = 1.0

    def forward(self, step):
        return step.logits.sum() * self.factor


def losses(objective, factor):
    objective.terms["t"].factor = factor
    batch = Batch.of((torch.ones(4, 3), torch.zeros(4, dtype=torch.long)))
    return [objective.loss(Step(nn.Linear(3, 2), batch, Progress(0, 1)), objective.counts([batch])).detach()]


@pytest.fixture
def objective():
    return Objective({"task": CrossEntropy(), "t": Times()})


def test_deferred_check_fires_before_the_next_step(objective):
    """Fails if the flag of a step is overwritten by the next one's, or the wrong term or step is named."""
    check = FiniteCheck(objective, deferred=True)
    check.watch(losses(objective, 1.0), None, 7)
    check.watch(losses(objective, torch.inf), None, 8)  # nothing is known of step 8 yet
    later = losses(objective, 1.0)
    with pytest.raises(NonFiniteLoss, match="step 8: term 't'"):
        check.watch(later, None, 9)


def test_deferred_check_fires_before_a_checkpoint(objective):
    """Fails if a checkpoint could be written of spoilt weights; and fires once."""
    check = FiniteCheck(objective, deferred=True)
    check.settle()
    check.watch(losses(objective, 1.0), torch.tensor(torch.nan), 3)
    with pytest.raises(NonFiniteLoss, match=r"step 3.*gradient"):
        check.settle()
    check.settle()


def test_immediate_check(objective):
    """Fails if the CPU looks later than it could."""
    check = FiniteCheck(objective, deferred=False)
    check.watch(losses(objective, 1.0), torch.tensor(1.0), 0)
    with pytest.raises(NonFiniteLoss, match="step 1: term 't'"):
        check.watch(losses(objective, torch.nan), None, 1)


def test_sum_that_overflows_is_no_single_terms_fault(objective):
    """Fails if terms that are finite by themselves are accused."""
    check = FiniteCheck(objective, deferred=False)
    losses(objective, 1.0)
    with pytest.raises(NonFiniteLoss, match="no single term"):
        check.watch([torch.tensor(torch.inf)], None, 1)
