"""Search: practitioners' questions lead to the paper that answers them.

The questions were written from the papers' sheets and the issues, without looking at the cards.
"""

from dataclasses import dataclass

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from regularized.papers.card import Card
from regularized.papers.catalogue import load_catalogue
from regularized.papers.search import explain, fields, search

# A person's question, and the papers of which one must be among the first three.
QUESTIONS = {
    "my labels are wrong": {"early_learning"},
    "annotators disagree": {"early_learning", "nested_dropout", "active_self_paced"},
    "the crowd workers who labelled my images made mistakes": {"early_learning"},
    "which training samples are mislabelled?": {"early_learning"},
    "co-teaching with two networks": {"nested_dropout"},
    "pretrain a convnet when only few images have labels": {"selfie"},
    "catastrophic forgetting": {"rehearsal_free", "ovor", "lfu"},
    "new classes arrive and old data may not be kept": {"rehearsal_free", "ovor"},
    "prompt tuning of a frozen vision transformer for class-incremental learning": {"ovor"},
    "make my model smaller": {"cast", "hestia", "dynamic_pruning"},
    "my model is too big": {"cast", "hestia", "generalized_gaussian", "dynamic_pruning"},
    "fit pretraining on one GPU": {"sltrain", "sst"},
    "train in 8 bit": {"low_precision"},
    "skip filters at inference": {"dynamic_pruning"},
    "compress the weights on disk": {"generalized_gaussian"},
    "2:4 semi-structured sparsity": {"cast"},
    "quantize a language model to 1.58 bits": {"hestia"},
    "train in fp8": {"low_precision"},
    "skip channels per input at inference to save FLOPs": {"dynamic_pruning"},
    "fewer solver steps": {"ode_regularization"},
    "neural ode is slow": {"ode_regularization"},
    "not enough labels": {"active_self_paced", "t_jepa", "score_forgetting", "random_teacher"},
    "which samples should I ask the annotator about?": {"active_self_paced"},
    "order the training samples": {"ranking_curriculum", "active_self_paced"},
    "curriculum for a neural re-ranker on top of BM25": {"ranking_curriculum"},
    "my network is overconfident": {"ps_kd"},
    "calibrated probabilities without a teacher": {"ps_kd"},
    "my model overfits": {"weight_compander", "generalized_gaussian", "ps_kd", "noise_mask", "infinite_compute"},
    "how to choose the regularization strength automatically": {"inexact_bilevel"},
    "bilevel hyperparameter learning with conjugate gradients": {"inexact_bilevel"},
    "unroll ISTA into a network for compressed sensing": {"deep_unfolding"},
    "when should I stop training": {"generalization_dynamics"},
    "sudden generalization long after memorization in modular arithmetic": {"grokking"},
    "my transformer does not generalise to new combinations of known words": {"homomorphism_error"},
    "make a GAN stop generating a face attribute": {"adapt_unlearn"},
    "remove a concept from a diffusion model": {"score_forgetting", "sara"},
    "prove that noise cannot flip the label": {"certified_training"},
    "self-supervised learning on tables": {"t_jepa"},
    "pretrain on my spreadsheet": {"t_jepa"},
    "masked autoencoder with harder masks": {"hard_patches"},
    "only 5 percent of my images are labelled, the rest has no labels": {"selfie"},
    "multispectral images with missing channels": {"channel_vit"},
    "some sensors are missing at test time": {"channel_vit"},
    "LoRA with singular value decomposition": {"sorsa", "svfit"},
    "fine-tune only the singular values": {"svfit", "sorsa"},
    "prompt robust fine-tuning of CLIP on few examples": {"glad"},
    "fine-tuned language model forgets what it knew": {"lfu", "sara", "self_judge"},
    "balance SFT and RL": {"amft"},
    "self-rewarding DPO gets worse every round": {"cream"},
    "llm judges its own answers": {"self_judge", "cream"},
    "certified robustness with interval bound propagation": {"certified_training"},
    "single-step adversarial training collapses to zero PGD accuracy": {"abnormal_examples"},
    "PGD accuracy suddenly drops to zero": {"abnormal_examples"},
    "the simulator differs from the real environment": {"robust_policy"},
    "dynamics shift after deployment": {"robust_policy"},
    "pretrain a transformer with less GPU memory": {"sltrain", "sst"},
    "I have more compute than data": {"infinite_compute"},
    "remove spurious features from an LLM classifier": {"sae_regularization"},
    "identify people across unlabelled videos": {"identity_seeking"},
    "find the same person in another camera": {"identity_seeking"},
    "video and audio of two speakers in one clip": {"dreamid_omni"},
    "distil from an untrained teacher": {"random_teacher"},
    "heavy-tailed prior on weights": {"generalized_gaussian"},
}


def missing() -> set[str]:
    """Papers that the catalogue must have for these questions."""
    return {slug for slugs in QUESTIONS.values() for slug in slugs} - {entry.slug for entry in load_catalogue()}


def test_questions_ask_for_papers_that_exist():
    """Fails when a paper is renamed and its questions would pass or fail for nothing."""
    assert not missing()
    assert len(QUESTIONS) >= 30


@pytest.mark.parametrize("question", QUESTIONS)
def test_first_three(question):
    """Fails when weights, stop words or stemming are broken, or when a card does not say what its paper is for."""
    found = [entry.slug for entry in search(question, load_catalogue(), limit=3)]
    assert QUESTIONS[question] & set(found), f"{question!r} leads to {found}"


@pytest.mark.parametrize("entry", load_catalogue(), ids=lambda entry: entry.slug)
def test_a_paper_finds_itself(entry):
    """Fails when a field is not indexed: slug, title, problem and own phrases must lead to the card."""
    for text in (entry.slug, entry.card.title, entry.card.problem):
        assert search(text, load_catalogue())[0] is entry, text
    for phrase in entry.card.searches:
        assert entry in search(phrase, load_catalogue(), limit=8), phrase


def test_order_words_and_spelling():
    """Fails without OR between words, their share, neighbours, stop words, stemming, spelling, or prefixes."""
    catalogue = load_catalogue()

    def first(query: str) -> str:
        return search(query, catalogue)[0].slug

    assert first("noisy labels xylophone") == first("noisy labels")
    assert first("how to choose the regularization strength automatically") == "inexact_bilevel"
    assert search("what is it that I want with labels when they are there?", catalogue) == search("labels", catalogue)
    assert "compression" in search("make my model smaller", catalogue)[0].card.families  # not "a smaller adapter"
    assert first("mislabeled sample") == first("mislabeled samples")
    assert search("catastrofic forgeting", catalogue)[:2] == search("catastrophic forgetting", catalogue)[:2]
    assert search("quantiz", catalogue)[0].slug in {"hestia", "low_precision"}


def test_limits_and_nothing():
    """Fails when an empty question lists nothing, an unanswerable one lists everything, or a bad limit is accepted."""
    catalogue = load_catalogue()
    assert search("  ", catalogue) == list(catalogue)
    assert search("🤷", catalogue) == []
    assert len(search("", catalogue, limit=2)) == 2
    assert search("labels", []) == []
    with pytest.raises(ValueError, match="limit must be at least 1, got 0"):
        search("labels", catalogue, limit=0)


@given(st.text(max_size=60))
@settings(max_examples=150)
def test_any_text_is_a_question(text):
    """Fails when text reaches FTS5 as syntax."""
    found = search(text, load_catalogue())
    assert len(found) == len(set(found))


@pytest.mark.parametrize(
    "text",
    [
        '"',
        "'",
        '"" OR',
        "NEAR(labels, 2)",
        "title: x",
        "labels*",
        "-labels",
        "(",
        "a AND NOT b",
        "x\0y",
        "*",
        "^labels",
        "_",
    ],
)
def test_operators_mean_nothing(text):
    """The same for what FTS5 would take for operators."""
    assert isinstance(search(text, load_catalogue()), list)


@dataclass(frozen=True)
class Listed:
    """A card of the catalogue, with or without code."""

    card: Card
    implemented: bool


def test_what_runs_comes_first_unless_another_fits_far_better():
    """Fails when a person with a problem is led to papers without code, or a title is not found because of it."""
    catalogue = load_catalogue()
    labels = [entry for entry in catalogue if "noisy_labels" in entry.card.families][:2]
    other = next(entry for entry in catalogue if "noisy_labels" not in entry.card.families)
    for runs in (0, 1):
        entries = [Listed(entry.card, i == runs) for i, entry in enumerate(labels)]
        assert search("label noise", entries)[0] is entries[runs]
    far = [Listed(labels[0].card, False), Listed(other.card, True)]
    assert search(labels[0].card.title, far)[0] is far[0]


def test_why_a_paper_was_found():
    """Fails when the reason names a field that lacks the word, a word that was not asked for, or none."""
    catalogue = load_catalogue()
    found = search("mislabelled xylophone", catalogue)[0]
    why = explain("mislabelled xylophone", found, catalogue)
    words, _, field = why.partition(": ")
    assert words == "mislabelled"
    assert "mislabel" in fields(found.card)[field].lower()
    assert explain("", found, catalogue) == ""
    assert explain("qzxv", found, catalogue) == ""
    assert explain("annotat", search("annotat", catalogue)[0], catalogue).startswith("annotat: ")
