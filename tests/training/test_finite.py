import pytest
import torch
from torch import nn

from regularized.training import Batch, CrossEntropy, NonFiniteLoss, Objective, Progress, Step, Term
from regularized.training.finite import FiniteCheck, term_of_gradient


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


def make(objective, *, deferred):
    return FiniteCheck(objective, nn.Linear(2, 2), deferred=deferred)


def watch(check, seen, step, gradient=0.0):
    """Both checks of a step, with a gradient of this value."""
    parameter = nn.Parameter(torch.zeros(2))
    parameter.grad = torch.tensor([0.0, gradient])
    check.losses(seen, step)
    check.gradients([parameter], step)


def test_deferred_check_fires_before_the_next_step(objective):
    """Fails if the flag of a step is overwritten by the next one's, or the wrong term or step is named."""
    check = make(objective, deferred=True)
    watch(check, losses(objective, 1.0), 7)
    watch(check, losses(objective, torch.inf), 8)  # nothing is known of step 8 yet
    later = losses(objective, 1.0)
    with pytest.raises(NonFiniteLoss, match="step 8: term 't'"):
        watch(check, later, 9)


def test_deferred_check_fires_before_a_checkpoint(objective):
    """Fails if a checkpoint could be written of spoilt weights; and fires once."""
    check = make(objective, deferred=True)
    check.settle()
    watch(check, losses(objective, 1.0), 3, torch.nan)
    with pytest.raises(NonFiniteLoss, match=r"step 3.*gradient"):
        check.settle()
    check.settle()


def test_immediate_check(objective):
    """Fails if the CPU looks later than it could."""
    check = make(objective, deferred=False)
    watch(check, losses(objective, 1.0), 0)
    with pytest.raises(NonFiniteLoss, match="step 1: term 't'"):
        check.losses(losses(objective, torch.nan), 1)
    with pytest.raises(NonFiniteLoss, match="step 2: the gradient"):
        watch(check, losses(objective, 1.0), 2, torch.inf)


def test_sum_that_overflows_is_no_single_terms_fault(objective):
    """Fails if terms that are finite by themselves are accused."""
    check = make(objective, deferred=False)
    losses(objective, 1.0)
    with pytest.raises(NonFiniteLoss, match="no single term"):
        check.losses([torch.tensor(torch.inf)], 1)


@pytest.mark.parametrize("deferred", [False, True])
@pytest.mark.parametrize("value", [1e30, -3e38])
def test_a_large_gradient_is_a_number(objective, deferred, value):
    """Fails if the square of a finite gradient overflows in its norm and stops a run that could go on."""
    check = make(objective, deferred=deferred)
    watch(check, losses(objective, 1.0), 0, value)
    check.settle()


@pytest.mark.parametrize("deferred", [False, True])
def test_empty_and_sparse_gradients_are_looked_at(objective, deferred):
    """Fails if a parameter without entries, or a sparse gradient, is not understood, or a NaN in it is overlooked."""
    empty, embedding = nn.Parameter(torch.zeros(0, 3)), nn.Embedding(4, 2, sparse=True)
    empty.grad = torch.zeros(0, 3)
    embedding(torch.tensor([1, 3])).sum().backward()
    check = make(objective, deferred=deferred)

    def look(step):
        check.losses(losses(objective, 1.0), step)
        check.gradients([empty, embedding.weight, nn.Parameter(torch.zeros(1))], step)
        check.settle()

    look(0)
    embedding.weight.grad = embedding.weight.grad * torch.nan
    with pytest.raises(NonFiniteLoss, match="step 1: the gradient"):
        look(1)


def test_weights_are_looked_at_before_they_are_saved(objective):
    """Fails if a weight that overflowed in the optimizer is written down, or another is named."""
    model = nn.Linear(2, 2)
    check = FiniteCheck(objective, model, deferred=False)
    check.saved(list(model.parameters()), 4)
    with torch.no_grad():
        model.bias[1] = torch.inf
    with pytest.raises(NonFiniteLoss, match=r"after 4 optimizer steps: parameter 'bias'.*no checkpoint"):
        check.saved(list(model.parameters()), 4)


def test_search_for_the_term_leaves_no_trace():
    """Fails if looking for the guilty term changes what terms remember, running statistics or random numbers."""

    class Counts(Term):
        def __init__(self):
            super().__init__()
            self.register_buffer("calls", torch.zeros(()))
            self.noise = torch.Generator().manual_seed(0)

        def forward(self, step):
            self.calls += 1
            return (step.logits * torch.rand((), generator=self.noise)).sum()

    class Root(Term):
        per_step = True

        def forward(self, step):
            return (step.model[0].weight * 0).square().sum().sqrt()

    model = nn.Sequential(nn.Linear(3, 2), nn.BatchNorm1d(2), nn.Dropout(0.5))
    objective = Objective({"count": Counts(), "root": Root(), "more": Root()})
    batch = Batch.of(torch.randn(4, 3))
    objective.loss(Step(model, batch, Progress(0, 1)), objective.counts([batch]))
    before = {k: v.clone() for k, v in (*model.state_dict().items(), *objective.state_dict().items())}
    drawn = torch.get_rng_state(), objective.terms["count"].noise.get_state()
    steps = [Step(model, batch, Progress(0, 1)) for _ in range(2)]
    assert term_of_gradient(objective, model, steps, model.parameters()) == "root"
    for name, tensor in (*model.state_dict().items(), *objective.state_dict().items()):
        assert torch.equal(tensor, before[name]), name
    assert torch.equal(drawn[0], torch.get_rng_state())
    assert torch.equal(drawn[1], objective.terms["count"].noise.get_state())
