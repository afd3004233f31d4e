"""What would train silently, and not for what was meant: an error or a warning each, with the remedy."""

import warnings
from functools import partial

import pytest
import torch
from torch import nn

from regularized import EarlyLearning, EarlyLearningLoss, ProgressiveDistillation
from regularized.training import Batch, CrossEntropy, Loss, Objective, Progress, Ridge, Step, TensorData, Term, Trainer

X, Y = torch.randn(8, 3), torch.arange(8) % 2


def train(terms, *, data=None, model=None):
    """One epoch, with every warning an error that the caller may expect."""
    model = model or nn.Linear(3, 2)
    trainer = Trainer(model, terms=terms, optimizer=partial(torch.optim.SGD, lr=0.1))
    return trainer.fit(data or TensorData(X, Y, batch_size=4), epochs=1)


@pytest.mark.parametrize(
    ("loss", "remedy"),
    [
        (nn.CrossEntropyLoss(), r"give CrossEntropy\(\) of regularized.training"),
        (nn.MSELoss(), r"give Loss\(nn.MSELoss\(reduction='none'\)\)"),
        (EarlyLearningLoss(8, 2), r"give EarlyLearning\(...\) of regularized.noisy_labels"),
    ],
)
def test_a_loss_is_no_term(loss, remedy):
    """Fails when it is found out by "missing 1 required positional argument" in the middle of the first step."""
    with pytest.raises(TypeError, match=remedy):
        Objective({"task": loss})


def test_two_tasks():
    """Fails when labels count twice without a word, or the remedy does not name the terms."""
    with pytest.warns(UserWarning, match=r"'task' \(CrossEntropy\) and 'kd' \(ProgressiveDistillation\) are each"):
        Objective({"task": CrossEntropy(), "kd": ProgressiveDistillation(8, 2)})


class OnlyLogits(Term):
    """A penalty on outputs."""

    def forward(self, step):
        return step.logits.square().sum()


@pytest.mark.parametrize(
    "terms",
    [
        lambda: {"decay": Ridge(weight=0.1)},
        lambda: {"elr": EarlyLearning(8, 2)},
        lambda: {"small": OnlyLogits(), "decay": Ridge(weight=0.1)},
    ],
)
def test_no_task(terms):
    """Fails when penalties alone are trained on labelled data, and nobody says that the labels are not looked at."""
    with pytest.warns(UserWarning, match="looks at the targets of the batch") as told:
        train(terms())
    assert len(told) == 1, "once a training, not once a step"
    assert 'Add the task, such as {"task": CrossEntropy(), ...}' in str(told[0].message)


def test_no_term_looks_at_the_batch():
    """Fails when weights are trained towards zero, whatever the data are."""
    with pytest.warns(UserWarning, match="looks at the batch"):
        train({"decay": Ridge(weight=0.1)}, data=TensorData(X, batch_size=4))


class Copies(nn.Module):
    """Logits for each token."""

    def __init__(self):
        super().__init__()
        self.table = nn.Embedding(5, 5)

    def forward(self, input_ids):
        return self.table(input_ids)


class CopiesForCausalLM(Copies):
    """The same under the name that transformers gives to causal language models."""


def text(labels):
    ids = torch.randint(5, (4, 6), generator=torch.Generator().manual_seed(0))
    return [{"input_ids": ids, "labels": labels(ids)}]


def test_an_unshifted_language_model():
    """Fails when a causal language model is taught to repeat each token, with a loss that falls nicely."""
    same = text(lambda ids: ids.clone())
    with pytest.raises(ValueError, match=r"give CrossEntropy\(shift=True\)"):
        train({"task": CrossEntropy()}, data=same, model=CopiesForCausalLM())
    with pytest.raises(ValueError, match="shift=True"):  # the padding is left out
        train(
            {"task": CrossEntropy()}, data=text(lambda ids: ids.masked_fill(ids == 0, -100)), model=CopiesForCausalLM()
        )
    with pytest.warns(UserWarning, match="learns to copy"):
        train({"task": CrossEntropy()}, data=same, model=Copies())


@pytest.mark.parametrize(
    ("terms", "options"),
    [
        (lambda: {"task": CrossEntropy()}, {}),
        (lambda: {"task": Loss(lambda z, y: z.square().sum(1) * y)}, {}),
        (lambda: {"one": Loss(lambda z, y: y * z[:, 0]), "two": Loss(lambda z, y: y * z[:, 1])}, {}),
        (lambda: {"kd": ProgressiveDistillation(8, 2), "elr": EarlyLearning(8, 2)}, {}),
        (lambda: {"small": OnlyLogits()}, {"data": TensorData(X, batch_size=4)}),  # without labels
        (
            lambda: {"task": CrossEntropy(shift=True)},
            {"data": text(lambda ids: ids.clone()), "model": CopiesForCausalLM()},
        ),
        (lambda: {"task": CrossEntropy()}, {"data": text(lambda ids: ids.roll(-1, 1)), "model": CopiesForCausalLM()}),
    ],
)
def test_what_is_meant_trains_without_a_word(terms, options):
    """Fails when an objective that is right is warned of."""
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        train(terms(), **options)


def test_the_first_step_leaves_the_batch_as_it_was():
    """Fails when the batch that is watched stays in the step, or is not equal to the one that it stands for."""
    batch = Batch(X, Y, torch.arange(8), {"more": X}, 8)
    seen = []

    class Looks(Term):
        def forward(self, step):
            seen.append((step.batch.size, step.targets is Y, step.index is batch.index, step.batch.extras["more"] is X))
            return step.logits.sum()

    step = Step(nn.Linear(3, 2), batch, Progress(0, 1))
    objective = Objective({"task": Looks()})
    objective.loss(step, objective.counts([batch]))
    assert seen == [(8, True, True, True)]
    assert step.batch is batch
