"""What the contract suite checks of self-regularisation: the penalty as a term, and the autoencoder's training."""

from collections.abc import Mapping
from functools import partial

import torch
from torch import Tensor, nn

from regularized.evidence.contract import Classification, ProcedureSubject, Subject, plain
from regularized.fine_tuning.sae_regularization.autoencoder import TopKSAE
from regularized.fine_tuning.sae_regularization.penalty import SelfReg, Similarity
from regularized.fine_tuning.sae_regularization.procedure import SAETraining
from regularized.fine_tuning.sae_regularization.term import SelfRegularization
from regularized.training.terms import CrossEntropy

WIDTH, FEATURES, CLASSES = 6, 20, 3
TASK = Classification(WIDTH, CLASSES)


def autoencoder(k: int | None = 4) -> TopKSAE:
    """20 features of embeddings of width 6, pretrained by nobody."""
    generator = torch.Generator().manual_seed(5)
    return TopKSAE.from_tensors(
        torch.randn(FEATURES, WIDTH, generator=generator),
        encoder_bias=0.1 * torch.randn(FEATURES, generator=generator),
        decoder_bias=0.1 * torch.randn(WIDTH, generator=generator),
        k=k,
    )


def unintended() -> Tensor:
    """Every fourth feature."""
    return torch.arange(FEATURES) % 4 == 1


def _terms(similarity: Similarity = "preactivation", weight: float = 0.3) -> Mapping[str, nn.Module]:
    penalty = SelfRegularization(autoencoder(), unintended(), layer="head", similarity=similarity, weight=weight)
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
    reg = SelfReg(autoencoder(), unintended(), strength=0.5, similarity=similarity)
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
