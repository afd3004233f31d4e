"""A run that is interrupted inside a step, and goes on in the same Trainer, as in a notebook."""

from functools import partial

import pytest
import torch
from torch import nn

from regularized import LfUTerm, NestedWidth
from regularized.evidence.contract.loop import EPOCHS
from regularized.evidence.contract.subjects import Subject
from regularized.evidence.contract.trainer_runs import interrupted_run, whole_run
from regularized.training import CrossEntropy, Term


class Drawing(Term):
    """Draws from a generator of its own, counts its steps, and keeps a hook open within each."""

    def __init__(self, *, forgets: bool) -> None:
        super().__init__()
        self.noise = torch.Generator().manual_seed(3)
        self.register_buffer("calls", torch.zeros(()))
        self._open = False
        if not forgets:
            self.reset = None

    def transform(self, batch):
        self._factor = 2.0 if self._open else 1.0
        self._open = True
        return batch

    def forward(self, step):
        self.calls += 1
        return self._factor * (step.logits * torch.rand(step.logits.shape, generator=self.noise)).sum()

    def after_step(self, step):
        self._open = False

    def reset(self):
        self._open = False


def _model():
    return nn.Sequential(nn.Linear(4, 8), nn.BatchNorm1d(8), nn.Dropout(0.3), nn.Linear(8, 3))


def _data(samples, seed):
    x = torch.randn(samples, 4, generator=torch.Generator().manual_seed(seed))
    return {"inputs": x, "targets": x[:, :3].argmax(1), "index": torch.arange(samples)}


def _subject(term, model=_model):
    terms = lambda: {"task": CrossEntropy(), "other": term()}  # noqa: E731
    return Subject("subject", model=model, terms=terms, plain=lambda: {"task": CrossEntropy()}, data=_data)


def _drawing(forgets):
    return _subject(partial(Drawing, forgets=forgets))


def _mlp():
    return nn.Sequential(nn.Linear(4, 16), nn.Tanh(), nn.Linear(16, 3))


HOLDING = {
    "widths": _subject(partial(NestedWidth, "2", sigma=5.0), _mlp),
    "passes": _subject(partial(LfUTerm, layers=["1"]), _mlp),
}


def _differs(subject, folder, **where):
    expected, got = whole_run(subject), interrupted_run(subject, folder, **where)
    assert expected.keys() == got.keys()
    return [name for name, tensor in expected.items() if not torch.equal(tensor, got[name])]


@pytest.mark.parametrize("at", [0, 2, 4])  # of three steps an epoch: before the first checkpoint, and after it
@pytest.mark.parametrize("moment", ["transform", "forward", "before_step", "after_step"])
def test_the_same_trainer_goes_on_exactly(moment, at, tmp_path):
    """Fails if weights, statistics, generators or what a term has open are those of the interrupted step; before the
    first checkpoint there was nothing to go back to."""
    assert _differs(_drawing(True), tmp_path, moment=moment, at=at) == []


@pytest.mark.parametrize("moment", ["forward", "before_step"])
@pytest.mark.parametrize("name", HOLDING)
def test_terms_that_hold_something_during_a_step_let_go(name, moment, tmp_path):
    """Fails if NestedWidth keeps the width of the interrupted step, or LfU its passes and hooks."""
    assert _differs(HOLDING[name], tmp_path, moment=moment, at=4) == []


def test_a_term_that_does_not_let_go_is_found(tmp_path):
    """Fails if the comparison could not see what it is there for."""
    assert _differs(_drawing(False), tmp_path, moment="forward", at=4) != []
    with pytest.raises(ValueError, match=f"the run has {EPOCHS * 3} steps"):
        interrupted_run(_drawing(True), tmp_path / "other", moment="forward", at=99)
