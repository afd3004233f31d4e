"""What the contract suite checks of self-regularisation: the penalty as a term, and the autoencoder's training."""

import warnings
from collections.abc import Mapping
from functools import partial

import torch
from torch import Tensor, nn

from regularized.evidence.contract import BadInput, Classification, ProcedureSubject, Subject, plain
from regularized.fine_tuning.sae_regularization.autoencoder import TopKSAE
from regularized.fine_tuning.sae_regularization.judging import FeatureMask, select_features
from regularized.fine_tuning.sae_regularization.penalty import SelfReg, Similarity
from regularized.fine_tuning.sae_regularization.procedure import SAETraining
from regularized.fine_tuning.sae_regularization.term import SelfRegularization
from regularized.training.step import Batch, Step
from regularized.training.terms import CrossEntropy

WIDTH, FEATURES, CLASSES = 6, 20, 3
TASK = Classification(WIDTH, CLASSES)


def _sae(k: int | None = 4) -> TopKSAE:
    generator = torch.Generator().manual_seed(5)
    return TopKSAE.from_tensors(
        torch.randn(FEATURES, WIDTH, generator=generator),
        encoder_bias=0.1 * torch.randn(FEATURES, generator=generator),
        decoder_bias=0.1 * torch.randn(WIDTH, generator=generator),
        k=k,
    )


def _mask() -> Tensor:
    return torch.arange(FEATURES) % 4 == 1


def _terms(similarity: Similarity = "preactivation", weight: float = 0.3) -> Mapping[str, nn.Module]:
    penalty = SelfRegularization(_sae(), _mask(), layer="head", similarity=similarity, weight=weight)
    return {"task": CrossEntropy(), "features": penalty}


class _Classifier(nn.Module):
    """A linear layer on embeddings, with a name."""

    def __init__(self) -> None:
        super().__init__()
        self.head = nn.Linear(WIDTH, CLASSES)

    def forward(self, x: Tensor) -> Tensor:
        logits: Tensor = self.head(x)
        return logits


def _part(similarity: Similarity = "preactivation") -> tuple[nn.Module, tuple[Tensor, ...]]:
    reg = SelfReg(_sae(), _mask(), strength=0.5, similarity=similarity)
    return reg, (torch.randn(CLASSES, WIDTH, requires_grad=True),)


def _training(dead_weight: float = 0.0, k_start: int | None = 8) -> SAETraining:
    sae = TopKSAE(WIDTH, FEATURES, k=2)
    with torch.no_grad():
        sae.encoder_bias[:5] = -10.0  # never active: what fine-tuning has a loss for
    return SAETraining(sae, k_start=k_start, dead_weight=dead_weight)


def _train(training: SAETraining, epochs: int) -> None:
    training.fit(TASK.data(24, 0)["inputs"], epochs=training.epoch + epochs, batch_size=4)


def _weights(training: SAETraining) -> Mapping[str, Tensor]:
    return dict(training.sae.named_parameters())


def subjects() -> list[Subject | ProcedureSubject]:
    """The official penalty and the plain product; pre-training and fine-tuning of the autoencoder."""
    return [
        Subject("preactivation", _Classifier, _terms, plain, TASK.data, off=partial(_terms, weight=0.0), part=_part),
        Subject(
            "dot",
            _Classifier,
            partial(_terms, "dot"),
            plain,
            TASK.data,
            off=partial(_terms, "dot", 0.0),
            part=partial(_part, "dot"),
        ),
        ProcedureSubject("pre-training", _training, partial(_training, k_start=2), _train, _weights),
        ProcedureSubject(
            "fine-tuning",
            partial(_training, dead_weight=0.1, k_start=None),
            partial(_training, k_start=2),
            _train,
            _weights,
        ),
    ]


def _head_is_not_linear() -> None:
    term = SelfRegularization(_sae(), _mask(), layer="0")
    model = nn.Sequential(nn.Conv1d(1, 1, 3), nn.Linear(WIDTH, 2))
    term(Step(model, Batch.of(torch.zeros(2, WIDTH)), 0))  # type: ignore[arg-type]


def _with(row: float) -> Tensor:
    x = TASK.data(8, 0)["inputs"].clone()
    x[3] = row
    return x


def _untrained() -> None:
    """Embeddings of another scale than the autoencoder's."""
    select_features(_sae(), 100 + TASK.data(8, 0)["inputs"], lambda feature, examples: False)


def _other_autoencoder() -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        mask = select_features(_sae(), TASK.data(8, 0)["inputs"], lambda feature, examples: feature == 1)
    SelfReg(TopKSAE(WIDTH, FEATURES, k=2).requires_grad_(False), mask)


def bad_inputs() -> list[BadInput]:
    """Every line of the sheet's "bad input"."""
    mask = _mask()
    return [
        BadInput(
            "width of embeddings",
            lambda: SelfReg(_sae(), mask).clean(torch.zeros(2, 7)),
            ValueError,
            ("width 6", "(2, 7)"),
        ),
        BadInput("width, autoencoder", lambda: _sae()(torch.zeros(2, 7)), ValueError, ("width 6", "(2, 7)")),
        BadInput("length of mask", lambda: SelfReg(_sae(), mask[:-1]), ValueError, ("19 entries", "20 features")),
        BadInput("mask not binary", lambda: SelfReg(_sae(), 0.5 * mask), ValueError, ("0 and 1", "0.5")),
        BadInput("mask of two dimensions", lambda: FeatureMask(mask[None]), ValueError, ("(C,)", "(1, 20)")),
        BadInput(
            "every feature",
            lambda: SelfReg(_sae(), torch.ones(FEATURES)),
            ValueError,
            ("all 20 features", "nothing would be left"),
        ),
        BadInput(
            "empty mask", lambda: SelfReg(_sae(), torch.zeros(FEATURES)), UserWarning, ("no feature is unintended",)
        ),
        BadInput("beta < 0", lambda: SelfReg(_sae(), mask, strength=-1.0), ValueError, ("strength", "-1.0")),
        BadInput(
            "beta < 0, term", lambda: SelfRegularization(_sae(), mask, weight=-2.0), ValueError, ("weight", "-2.0")
        ),
        BadInput("k > C", lambda: TopKSAE(4, 8, k=9), ValueError, ("k must be in [1, 8]", "9")),
        BadInput("k_start > C", lambda: SAETraining(TopKSAE(4, 8, k=2), k_start=9), ValueError, ("[1, 8]", "9")),
        BadInput(
            "k_start < k", lambda: SAETraining(TopKSAE(4, 8, k=4), k_start=2), ValueError, ("k_start", "k=4", "2")
        ),
        BadInput("weight of the head", lambda: SelfReg(_sae(), mask)(torch.zeros(2, 7)), ValueError, ("(R, 6)", "7")),
        BadInput("bias for weight", lambda: SelfReg(_sae(), mask)(torch.zeros(6)), ValueError, ("head.weight",)),
        BadInput("head is not linear", _head_is_not_linear, TypeError, ("'0'", "Conv1d", "linear layer")),
        BadInput("other embeddings", _untrained, UserWarning, ("normalised error", "0.5", "layer")),
        BadInput(
            "rows not finite",
            lambda: SAETraining(TopKSAE(WIDTH, 8, k=2)).fit(_with(torch.inf), epochs=1, batch_size=4),
            UserWarning,
            ("1 of 8 rows are not finite",),
        ),
        BadInput(
            "rows of zero norm",
            lambda: SAETraining(TopKSAE(WIDTH, 8, k=2)).fit(_with(0.0), epochs=1, batch_size=4),
            UserWarning,
            ("1 of 8 rows have zero norm",),
        ),
        BadInput(
            "judge returns no bool",
            lambda: select_features(_sae(None), 0 * TASK.data(8, 0)["inputs"] + 1, lambda feature, examples: "no"),  # type: ignore[arg-type]
            TypeError,
            ("bool", "'no'", "str"),
        ),
        BadInput(
            "trainable autoencoder",
            lambda: SelfReg(TopKSAE(WIDTH, FEATURES, k=2), mask),
            ValueError,
            ("trainable", "requires_grad_(False)"),
        ),
        BadInput("mask of another autoencoder", _other_autoencoder, ValueError, ("another autoencoder",)),
        BadInput("unknown similarity", lambda: SelfReg(_sae(), mask, similarity="l1"), ValueError, ("'l1'", "cosine")),  # type: ignore[arg-type]
        BadInput("not an autoencoder", lambda: SelfReg(nn.Linear(2, 2), mask), TypeError, ("TopKSAE", "Linear")),  # type: ignore[arg-type]
    ]
