"""Bad inputs of `sae_regularization`: each is answered by what was given, what is allowed, and how to mend it."""

import warnings

import pytest
import torch
from tests.bad_input import assert_refused, refused
from torch import nn

from regularized.fine_tuning.sae_regularization.autoencoder import TopKSAE
from regularized.fine_tuning.sae_regularization.judging import FeatureMask, select_features
from regularized.fine_tuning.sae_regularization.penalty import SelfReg
from regularized.fine_tuning.sae_regularization.procedure import SAETraining
from regularized.fine_tuning.sae_regularization.term import SelfRegularization
from regularized.papers.sae_regularization.contract import FEATURES, TASK, WIDTH, autoencoder, unintended
from regularized.training.step import Batch, Step


def _head_is_not_linear():
    term = SelfRegularization(autoencoder(), unintended(), layer="0")
    model = nn.Sequential(nn.Conv1d(1, 1, 3), nn.Linear(WIDTH, 2))
    term(Step(model, Batch.of(torch.zeros(2, WIDTH)), 0))


def _with(row: float):
    x = TASK.data(8, 0)["inputs"].clone()
    x[3] = row
    return x


def _untrained():
    """Embeddings of another scale than the autoencoder's."""
    select_features(autoencoder(), 100 + TASK.data(8, 0)["inputs"], lambda feature, examples: False)


def _other_autoencoder():
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        mask = select_features(autoencoder(), TASK.data(8, 0)["inputs"], lambda feature, examples: feature == 1)
    SelfReg(TopKSAE(WIDTH, FEATURES, k=2).requires_grad_(False), mask)


def bad_inputs():
    """Every line of the sheet's "bad input"."""
    mask = unintended()
    return [
        refused(
            "width of embeddings",
            lambda: SelfReg(autoencoder(), mask).clean(torch.zeros(2, 7)),
            ValueError,
            ("width 6", "(2, 7)"),
        ),
        refused("width, autoencoder", lambda: autoencoder()(torch.zeros(2, 7)), ValueError, ("width 6", "(2, 7)")),
        refused("length of mask", lambda: SelfReg(autoencoder(), mask[:-1]), ValueError, ("19 entries", "20 features")),
        refused("mask not binary", lambda: SelfReg(autoencoder(), 0.5 * mask), ValueError, ("0 and 1", "0.5")),
        refused("mask of two dimensions", lambda: FeatureMask(mask[None]), ValueError, ("(C,)", "(1, 20)")),
        refused(
            "every feature",
            lambda: SelfReg(autoencoder(), torch.ones(FEATURES)),
            ValueError,
            ("all 20 features", "nothing would be left"),
        ),
        refused(
            "empty mask",
            lambda: SelfReg(autoencoder(), torch.zeros(FEATURES)),
            UserWarning,
            ("no feature is unintended",),
        ),
        refused("beta < 0", lambda: SelfReg(autoencoder(), mask, strength=-1.0), ValueError, ("strength", "-1.0")),
        refused(
            "beta < 0, term",
            lambda: SelfRegularization(autoencoder(), mask, weight=-2.0),
            ValueError,
            ("weight", "-2.0"),
        ),
        refused("k > C", lambda: TopKSAE(4, 8, k=9), ValueError, ("k must be in [1, 8]", "9")),
        refused("k_start > C", lambda: SAETraining(TopKSAE(4, 8, k=2), k_start=9), ValueError, ("[1, 8]", "9")),
        refused("k_start < k", lambda: SAETraining(TopKSAE(4, 8, k=4), k_start=2), ValueError, ("k_start", "k=4", "2")),
        refused(
            "weight of the head", lambda: SelfReg(autoencoder(), mask)(torch.zeros(2, 7)), ValueError, ("(R, 6)", "7")
        ),
        refused("bias for weight", lambda: SelfReg(autoencoder(), mask)(torch.zeros(6)), ValueError, ("head.weight",)),
        refused("head is not linear", _head_is_not_linear, TypeError, ("'0'", "Conv1d", "linear layer")),
        refused("other embeddings", _untrained, UserWarning, ("normalised error", "0.5", "layer")),
        refused(
            "rows not finite",
            lambda: SAETraining(TopKSAE(WIDTH, 8, k=2)).fit(_with(torch.inf), epochs=1, batch_size=4),
            UserWarning,
            ("1 of 8 rows are not finite",),
        ),
        refused(
            "rows of zero norm",
            lambda: SAETraining(TopKSAE(WIDTH, 8, k=2)).fit(_with(0.0), epochs=1, batch_size=4),
            UserWarning,
            ("1 of 8 rows have zero norm",),
        ),
        refused(
            "judge returns no bool",
            lambda: select_features(
                autoencoder(None), 0 * TASK.data(8, 0)["inputs"] + 1, lambda feature, examples: "no"
            ),
            TypeError,
            ("bool", "'no'", "str"),
        ),
        refused(
            "trainable autoencoder",
            lambda: SelfReg(TopKSAE(WIDTH, FEATURES, k=2), mask),
            ValueError,
            ("trainable", "requires_grad_(False)"),
        ),
        refused("mask of another autoencoder", _other_autoencoder, ValueError, ("another autoencoder",)),
        refused(
            "unknown similarity", lambda: SelfReg(autoencoder(), mask, similarity="l1"), ValueError, ("'l1'", "cosine")
        ),
        refused("not an autoencoder", lambda: SelfReg(nn.Linear(2, 2), mask), TypeError, ("TopKSAE", "Linear")),
    ]


@pytest.mark.parametrize(("call", "error", "says"), bad_inputs())
def test_bad_input(call, error, says):
    """Fails when it is accepted, or refused in words that do not help."""
    assert_refused(call, error, says)


def test_weights_in_shards(in_shards):
    """Fails when it would train shards, of whose gradients it sees a part."""
    with pytest.raises(ValueError, match="weights of the autoencoder are in shards"):
        SAETraining(in_shards(TopKSAE(8, 32, k=2)))
