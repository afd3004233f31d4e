"""The experiment's world: grades are what they are said to be; a language model goes the same way."""

from importlib.util import find_spec

import pytest
import torch

from regularized.alignment.self_judge import Answer
from regularized.evidence.experiment import Unavailable, resolve, run_arm
from regularized.evidence.pretrained import tiny_llama
from regularized.papers.self_judge import experiment, language
from regularized.papers.self_judge.passages import graded, hashed

SMOKE = resolve(experiment, "distillation", "smoke")


def pieces(text):
    words = text.split()
    return [words[start : start + 7] for start in range(0, len(words), 7)]


def test_the_true_grade_counts_the_pieces_of_the_own_passage():
    """Fails when a grade is not 3 for each piece that stands where it does in a perfect answer to the question."""
    part, checked = graded(SMOKE | {"train_answers": 6, "train": 80}, 3)["train"], 0
    assert set(part.truth.unique().tolist()) == {0.0, 3.0, 6.0, 9.0}
    for row, answers in zip(part.truth.tolist(), part.answers, strict=True):
        if 9.0 in row:
            perfect = pieces(answers[row.index(9.0)])
            for grade, answer in zip(row, answers, strict=True):
                assert grade == 3 * sum(one == other for one, other in zip(pieces(answer), perfect, strict=True))
                checked += 1
    assert checked > 100


def test_seeds_share_no_passage():
    """Fails when two seeds of the evidence, or two parts of one, see the same passage."""
    parts = [part for seed in (0, 1) for part in graded(SMOKE, seed).values()]
    texts = [text for part in parts for text in zip(part.questions, part.references, strict=True)]
    assert len(set(texts)) >= len(texts) - 2  # the documentation repeats itself here and there


def test_the_view_without_reference_does_not_see_it():
    """Fails when columns of the reference are left in the student's view, or zeros are put into the teacher's."""
    parts = experiment.embedded(SMOKE, 0)
    blind = experiment._seen(parts["test"], SMOKE, torch.Generator().manual_seed(0))
    other = parts["test"]._replace(reference=parts["test"].reference.flip(0))
    moved = experiment._seen(other, SMOKE, torch.Generator().manual_seed(0))
    assert torch.equal(blind.noref, moved.noref)
    assert not torch.equal(blind.ref, moved.ref)


def test_arms_have_the_same_data():
    """Fails when an arm draws other labels' noise than the arm that it is compared with."""
    prints = {run_arm(experiment, arm, 5, "smoke").data for arm in ("no_distillation", "distillation", "blind")}
    assert len(prints) == 1


def test_hashed_words():
    """Fails when vectors are not of length 1, or the hash changes between processes."""
    vectors = hashed(["one two", "two one", "three"])
    torch.testing.assert_close(vectors.norm(dim=1), torch.ones(3))
    assert torch.equal(vectors[0], vectors[1])
    assert vectors[0].nonzero().flatten().tolist() == [102, 113]


@pytest.mark.skipif(find_spec("peft") is None, reason="language models become judges by PEFT's LoRA")
def test_a_language_model_becomes_the_judge():
    """Fails when the scales of language models cannot run: labels, LoRA, both views, scores."""

    def encode(text):
        return list(text[-200:].encode())

    train, test = (
        [Answer(str(n), "?", "good" if n % 2 else "bad", "good", 9 * (n % 2)) for n in range(count)] for count in (8, 6)
    )
    truth = torch.tensor([float(one.grade) for one in test])
    assistant = language.Assistant(tiny_llama(0), encode, 2, train, test, truth)
    s = resolve(experiment, "distillation", "smollm2", {"lr": 1e-2})
    found = language.measured(assistant, s, seed=0)
    losses = [loss for _, loss in found.curves["loss"]]
    assert losses[-1] < losses[0]
    assert -100.0 <= found.metrics["correlation"] <= 100.0


def test_scales_of_language_models_say_what_they_lack():
    """Fails when an arm runs there as if it were another, or the paper's scale begins without its data."""
    for arm in ("chance", "similarity_labels", "wrong_reference"):
        with pytest.raises(Unavailable, match="laptop"):
            run_arm(experiment, arm, 0, "smollm2")
    if find_spec("peft") is not None:
        with pytest.raises(Unavailable, match="Llama-2-13B"):
            run_arm(experiment, "distillation", 0, "paper")
