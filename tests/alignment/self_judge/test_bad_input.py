"""Bad inputs of `self_judge`: each is answered by what was given, what is allowed, and how to mend it."""

import math
from functools import partial

import pytest
import torch
from tests.bad_input import assert_refused, refused
from torch import nn

from regularized.alignment.self_judge import (
    Answer,
    Judge,
    PrivilegedDistillation,
    PrivilegedView,
    SelectiveGate,
    View,
    Vocabulary,
    best_of_n,
    checked_grades,
    combined_grades,
    digit_token_ids,
    expected_score,
    pearson,
    prompt,
    select_instructions,
    view_of,
)
from regularized.training import Batch, Progress, Step

EOS = 2


def encode(text):
    return list(text.encode())


def view(keys, grades=None):
    n = len(keys)
    return View(keys, torch.ones(n, 4, dtype=torch.long), torch.ones(n, 4, dtype=torch.bool), grades)


def loss(labels_ref, labels_noref, **options):
    t1, t2 = torch.tensor(labels_ref), torch.tensor(labels_noref)
    criterion = PrivilegedDistillation(eos_id=EOS, **options)
    return criterion(torch.zeros(*t1.shape, 12), torch.zeros(*t2.shape, 12), t1, t2)


def _two_pieces():
    digit_token_ids(lambda text: [7, 7 + int(text)] if text.isdigit() else [7])


def _no_grades():
    judge = Judge(nn.Linear(1, 1), Vocabulary(tuple(range(3, 13)), EOS), optimizer=partial(torch.optim.SGD, lr=0.1))
    judge.fit(view(("a",)), view(("a",)))


def _sequence_in_a_term():
    step = Step(nn.Linear(3, 4), Batch(torch.ones(2, 5, 3), torch.zeros(2, 5, dtype=torch.long)), Progress(0, 1))
    PrivilegedView(lambda x: x)(step)


TWO = torch.tensor([3, 4])
CASES = [
    refused("digits of several tokens", _two_pieces, ValueError, ["one token each", "'3': [7, 10]", "line break"]),
    refused(
        "digits that collide", lambda: digit_token_ids(lambda _: [5]), ValueError, ["all different", "'0': [5]", "'9'"]
    ),
    refused("no digits in the vocabulary", lambda: Vocabulary((1, 2), EOS), ValueError, ["0 to 9", "digit_token_ids"]),
    refused(
        "keys of the views differ",
        lambda: view(("a", "b")).aligned_with(view(("a", "c"))),
        ValueError,
        ["same keys", "['b', 'c']"],
    ),
    refused(
        "a key twice", lambda: view(("a", "a")).aligned_with(view(("a", "b"))), ValueError, ["same keys, each once"]
    ),
    refused(
        "a key twice among answers",
        lambda: view_of([Answer("a", "q", "y")] * 2, encode, with_reference=False),
        ValueError,
        ["1 different keys"],
    ),
    refused(
        "grades of the views differ",
        lambda: view(("a", "b"), TWO).aligned_with(view(("a", "b"), TWO + 1)),
        ValueError,
        ["'a'", "grade 3", "4"],
    ),
    refused("targets of the views differ", lambda: loss([[-100, 5, 2]], [[-100, 6, 2]]), ValueError, ["5", "6", "id"]),
    refused(
        "masks of unequal size",
        lambda: loss([[-100, 5, 2], [-100, 5, 2]], [[-100, 5, 2]]),
        ValueError,
        ["4", "2", "same samples"],
    ),
    refused(
        "no target left",
        lambda: loss([[-100, 5, 2], [-100, -100, 2]], [[-100, 5, 2], [-100, -100, 2]]),
        ValueError,
        ["sample 1", "no grade", "cut"],
    ),
    refused(
        "a prompt that would lose its grade",
        lambda: view_of([Answer("long one", "q" * 50, "y")], encode, with_reference=False, max_length=60),
        ValueError,
        ["'long one'", "60", "max_length"],
    ),
    refused("labels above 9", lambda: checked_grades(torch.tensor([1, 12])), ValueError, ["0 to 9", "12", "row 1"]),
    refused("labels below 0", lambda: checked_grades(torch.tensor([-1, 2])), ValueError, ["0 to 9", "-1"]),
    refused("fractional labels", lambda: checked_grades(torch.tensor([4.5, 2])), ValueError, ["whole", "4.5"]),
    refused("labels that are no number", lambda: checked_grades(torch.tensor([math.nan, 2])), ValueError, ["nan"]),
    refused("constant labels", lambda: checked_grades(torch.tensor([4, 4])), UserWarning, ["all 2", "correlation"]),
    refused(
        "a grade outside 0 to 9 in an answer",
        lambda: Answer("a", "q", "y", grade=10),
        ValueError,
        ["[0, 9]", "10"],
    ),
    refused("a fractional grade", lambda: Answer("a", "q", "y", grade=4.5), ValueError, ["whole", "4.5"]),
    refused("a view whose parts do not fit", lambda: view(("a", "b"), TWO[:1]), ValueError, ["2 answers", "(1,)"]),
    refused(
        "grades for some only",
        lambda: view_of([Answer("a", "q", "y", grade=1), Answer("b", "q", "y")], encode, with_reference=False),
        ValueError,
        ["1 of 2"],
    ),
    refused(
        "constant scores", lambda: pearson(torch.zeros(3), torch.arange(3.0)), UserWarning, ["correlation", "equal"]
    ),
    refused("one score", lambda: pearson(torch.zeros(1), torch.zeros(1)), ValueError, ["two or more"]),
    refused("a threshold above all scores", lambda: SelectiveGate(9.5), UserWarning, ["9.5", "coverage 0"]),
    refused("a threshold below all scores", lambda: SelectiveGate(-1.0), UserWarning, ["-1", "coverage 1"]),
    refused("a threshold that is no number", lambda: SelectiveGate(math.nan), ValueError, ["finite", "calibrate"]),
    refused("a coverage of 0", lambda: SelectiveGate.calibrate(TWO.float(), coverage=0.0), ValueError, ["(0, 1]"]),
    refused("no aim of a gate", lambda: SelectiveGate.calibrate(TWO.float()), ValueError, ["coverage", "one of them"]),
    refused(
        "a quality that is not reached",
        lambda: SelectiveGate.calibrate(TWO.float(), torch.zeros(2), least_quality=0.5),
        ValueError,
        ["0.5", "reaches 0"],
    ),
    refused(
        "quality without quality",
        lambda: SelectiveGate.calibrate(TWO.float(), least_quality=0.5),
        ValueError,
        ["needs the quality"],
    ),
    refused("scores that are not finite", lambda: best_of_n(torch.tensor([[math.nan, 1.0]])), ValueError, ["NaN"]),
    refused("answers of no question", lambda: best_of_n(torch.zeros(3)), ValueError, ["(Q, n)", "(3,)"]),
    refused("keep nothing", lambda: select_instructions(torch.zeros(3), keep=0), ValueError, ["at least 1", "0"]),
    refused(
        "groups that do not fit",
        lambda: select_instructions(torch.zeros(3), keep=1, groups=["a"]),
        ValueError,
        ["3 scores", "1 groups"],
    ),
    refused(
        "a cosine of no unit vectors",
        lambda: combined_grades(TWO.float(), torch.tensor([0.3, 2.0])),
        ValueError,
        ["cosine", "[-1, 1]"],
    ),
    refused(
        "no grade among the likely tokens",
        lambda: expected_score(torch.arange(30.0), range(10), top_k=5),
        ValueError,
        ["1 of 1", "top_k"],
    ),
    refused("tokens that do not fit", lambda: expected_score(torch.zeros(30), range(9)), ValueError, ["10 values"]),
    refused("no reference", lambda: prompt(Answer("k", "q", "y"), with_reference=True), ValueError, ["'k'"]),
    refused("no answers", lambda: view_of([], encode, with_reference=False), ValueError, ["no answer"]),
    refused("no grades to learn from", _no_grades, ValueError, ["no grades", "combined_grades"]),
    refused("a negative coefficient", lambda: PrivilegedDistillation(alpha_kd=-1.0), ValueError, ["alpha_kd", ">= 0"]),
    refused("a negative coefficient of a term", lambda: PrivilegedView(abs, alpha=-1.0), ValueError, ["alpha", "0.3"]),
    refused("sequences in a term", _sequence_in_a_term, ValueError, ["(B, C)", "Judge"]),
    refused(
        "labels of one view only",
        lambda: PrivilegedDistillation()(torch.zeros(1, 3, 4), torch.zeros(1, 3, 4), torch.zeros(1, 3)),
        ValueError,
        ["labels_noref"],
    ),
    refused(
        "labels that do not fit",
        lambda: PrivilegedDistillation()(torch.zeros(3, 4), torch.zeros(3, 4), torch.zeros(2)),
        ValueError,
        ["labels (B,)", "(2,)"],
    ),
]


@pytest.mark.parametrize(("call", "error", "says"), CASES)
def test_refused(call, error, says):
    """Fails when a bad input gets through, or its message does not say what to do."""
    assert_refused(call, error, says)
