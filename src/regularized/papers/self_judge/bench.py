"""Cost of a step of the judge beside fine-tuning on one view, and beside the lines of the official loss.

The model is a Llama of width 256 with 4 layers and 4,096 tokens in its vocabulary; 4 samples of 128 tokens in each
view, float32, AdamW.
"""

from collections.abc import Callable
from functools import partial
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from regularized.alignment.self_judge import Judge, PrivilegedView, Vocabulary
from regularized.evidence.bench import StepFunction, Workload
from regularized.evidence.bench_kit import batch, classifier_step, device, perceptron, placed, stepper
from regularized.evidence.pretrained import tiny_llama
from regularized.training.progress import Progress
from regularized.training.step import Batch, Step

BATCH, LENGTH, WORDS = 4, 128, 4096
VOCABULARY = Vocabulary(tuple(range(10, 20)), end=2)
ADAMW = partial(torch.optim.AdamW, lr=1e-4)


def _model() -> Any:
    model: Any = tiny_llama(0, vocab_size=WORDS, width=256, layers=4)
    return model.to(device())


def _tokens() -> tuple[Tensor, Tensor]:
    """Both views, (2, B, L), and grades (B,)."""
    generator = torch.Generator().manual_seed(0)
    tokens = torch.randint(20, WORDS, (2, BATCH, LENGTH), generator=generator)
    grades = torch.arange(BATCH) % 10
    tokens[..., -2], tokens[..., -1] = torch.tensor(VOCABULARY.grades)[grades], VOCABULARY.end
    return tokens.to(device()), grades.to(device())


def _labels(tokens: Tensor) -> Tensor:
    labels = tokens.clone()
    labels[..., :-2] = -100
    return labels


def _one_view(*, rows: bool) -> StepFunction:
    """Fine-tuning on one view: with the vocabulary's projection everywhere, or at the two rows that are learnt."""
    model, (tokens, _) = _model(), _tokens()
    read, labels, mask = tokens[0], _labels(tokens[0]), torch.ones_like(tokens[0])

    def loss() -> Tensor:
        if not rows:
            whole: Tensor = model(input_ids=read, attention_mask=mask, labels=labels).loss
            return whole
        logits = model(input_ids=read[:, :-1], attention_mask=mask[:, :-1], logits_to_keep=2).logits
        return F.cross_entropy(logits.flatten(0, 1), read[:, -2:].flatten())

    return stepper(loss, ADAMW(model.parameters()))


def _official() -> StepFunction:
    """Two passes with the projection everywhere, boolean masks, and the logarithm of a softmax."""
    model, (tokens, _) = _model(), _tokens()
    mask = torch.ones_like(tokens[0])

    def loss() -> Tensor:
        total: Any = 0.0
        rows = []
        for read, weight in zip(tokens, (1.0, 0.3), strict=True):
            out = model(input_ids=read, attention_mask=mask, labels=(labels := _labels(read)))
            shifted = labels[:, 1:]
            graded = (shifted != -100) & (shifted != VOCABULARY.end)
            total = total + weight * out.loss
            rows.append(out.logits[:, :-1][graded].softmax(dim=-1))
        teacher, student = rows[0].detach(), rows[1]
        divergence = (teacher * (teacher.log() - student.log())).sum() / len(teacher)
        loss: Tensor = total + 2.0 * divergence
        return loss

    return stepper(loss, ADAMW(model.parameters()))


def _judge() -> StepFunction:
    tokens, grades = _tokens()
    read = tokens[..., :-2].transpose(0, 1).contiguous()  # prompts; the grade is put behind them, the end is not read
    inputs = {"tokens": read, "mask": torch.ones_like(read, dtype=torch.bool)}
    judge, given, at = Judge(_model(), VOCABULARY, optimizer=ADAMW), Batch(inputs, grades), Progress(0, 1)

    def step() -> None:
        judge.training_step(given, progress=at)

    return step


def _hide(x: Tensor) -> Tensor:
    return torch.cat([x[:, :700], torch.zeros_like(x[:, 700:])], dim=1)


def _classifier() -> tuple[StepFunction, StepFunction]:
    x, y = batch((128, 784))
    plain, model = placed(perceptron), placed(perceptron)
    optimizer, given, at, term = ADAMW(model.parameters()), Batch(x, y), Progress(0, 1), PrivilegedView(_hide)

    def loss() -> Tensor:
        step = Step(model, given, at)
        total: Tensor = (F.cross_entropy(step.logits, y, reduction="sum") + term(step)) / len(x)
        return total

    return classifier_step(plain, x, y, ADAMW), stepper(loss, optimizer)


def _beside(plain: Callable[[], StepFunction]) -> tuple[StepFunction, StepFunction]:
    return plain(), _judge()


def workloads() -> list[Workload]:
    """Beside fine-tuning as people do it, fine-tuning that projects as little, the official lines; a classifier."""
    size = "Llama w256 L4, vocabulary 4,096, 4 x 128 tokens"
    return [
        Workload(
            f"beside fine-tuning on one view, {size}",
            partial(_beside, partial(_one_view, rows=False)),
            note="fine-tuning pays the vocabulary's projection at all 128 positions, the judge at two",
            floor=1.38,
        ),
        Workload(
            f"the same, which projects two rows as well, {size}",
            partial(_beside, partial(_one_view, rows=True)),
        ),
        Workload(
            f"beside the official loss, {size}",
            partial(_beside, _official),
            note="two passes and the projection everywhere; below 1 is faster",
            floor=0.69,
        ),
        Workload("the term, MLP 784-256-10, B128", _classifier, note="a step of 2 ms: the worst case"),
    ]
