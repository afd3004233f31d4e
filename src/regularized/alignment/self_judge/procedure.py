"""A judge of a causal language model: it learns from both views of graded answers, and scores one."""

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, TypeAlias

import torch
from torch import Tensor, nn

from regularized.alignment.self_judge.grades import digit_token_ids, expected_score
from regularized.alignment.self_judge.loss import ALPHA, ALPHA_KD, views_loss
from regularized.alignment.self_judge.views import RESPONSE, View
from regularized.mechanisms.ranges import allowed, count
from regularized.training.data import TensorData
from regularized.training.optimizers import Optimizers
from regularized.training.procedure import Epochs, Part, fit_epochs
from regularized.training.progress import Coefficient, Progress
from regularized.training.state import restore, state_of
from regularized.training.step import Batch

__all__ = ["Judge", "LastLogits", "Vocabulary", "last_logits", "score_answers"]

LastLogits: TypeAlias = Callable[[nn.Module, Tensor, Tensor, int], Tensor]
"""(model, tokens (B, L), mask (B, L), k) to the logits (B, k, V) of the last k positions."""


@dataclass(frozen=True, slots=True)
class Vocabulary:
    """The tokens that a judge needs to know.

    Args:
        grades: tokens of the grades 0 ... 9, see :func:`~regularized.alignment.self_judge.grades.digit_token_ids`.
        end: token that ends a sequence.

    Raises:
        ValueError: not ten different tokens.

    Examples:
        >>> Vocabulary(tuple(range(48, 58)), end=2).end
        2
    """

    grades: tuple[int, ...]
    end: int

    def __post_init__(self) -> None:
        if len(self.grades) != 10 or len({*self.grades, self.end}) != 11:
            raise ValueError(
                f"the grades 0 to 9 and the end need a token each, all different; got {list(self.grades)} and "
                f"{self.end}; digit_token_ids finds those of a tokenizer"
            )

    @classmethod
    def of(cls, encode: Callable[[str], Sequence[int]], *, end: int) -> "Vocabulary":
        """The tokens of a tokenizer, behind the prompt of :func:`~regularized.alignment.self_judge.views.prompt`.

        Args:
            encode: text to token ids, without special tokens.
            end: token that ends a sequence: ``tokenizer.eos_token_id``.

        Raises:
            ValueError: a digit is not a token of its own.
        """
        return cls(digit_token_ids(encode, after=RESPONSE), end)


def last_logits(model: nn.Module, tokens: Tensor, mask: Tensor, k: int) -> Tensor:
    """Logits of the last ``k`` positions of a causal language model of transformers, the others not computed.

    Positions are counted from the first token that is not padding, so a text scores alike in every batch.

    Args:
        model: as transformers has them, or wrapped by PEFT.
        tokens: (B, L), padded at the left.
        mask: (B, L) bool.
        k: how many.

    Returns:
        (B, k, V).
    """
    positions = (mask.cumsum(dim=1) - 1).clamp(min=0)
    output = model(input_ids=tokens, attention_mask=mask.long(), position_ids=positions, logits_to_keep=k)
    logits: Tensor = output.logits
    return logits


class Judge:
    """Self-J: train a language model to grade answers without a reference, taught by its own view of the reference.

    A step is one forward and backward pass over both views, padded to one length, with the vocabulary's projection at
    the two positions that are learnt: the grade and the end.

    The adapter is yours: wrap the model by PEFT before it comes here, and give the optimizer to what it trains. In the
    paper: rank 16, alpha 16, dropout 0.05 on q, k, v, o; AdamW at 3e-4, 100 steps of warm-up and linear decay, batch
    128, two epochs.

    Args:
        model: a causal language model.
        vocabulary: its tokens of the grades, and of the end.
        optimizer: factory, called with the parameters that need a gradient.
        alpha: of the student's own cross-entropy; default 0.3 (official code).
        alpha_kd: of the divergence; default 2 (official code).
        schedule: factor on the rate, see :class:`~regularized.training.optimizers.Optimizers`; default 1.
        logits: how the model is called; default :func:`last_logits`, the way of transformers.
        seed: of the order of samples, and of dropout; default 0.

    Raises:
        ValueError: a coefficient is out of range; in :meth:`fit`: the views do not fit, or have no grades.

    Examples:
        >>> from functools import partial
        >>> from regularized.alignment.self_judge import Answer, view_of
        >>> class Bag(nn.Module):  # the mean of what was read so far
        ...     def __init__(self):
        ...         super().__init__()
        ...         self.read, self.say = nn.Embedding(256, 16), nn.Linear(16, 256)
        ...
        ...     def forward(self, tokens, mask):
        ...         seen = (self.read(tokens) * mask[..., None]).cumsum(1)
        ...         return self.say(seen / mask.cumsum(1).clamp(min=1)[..., None])
        >>> encode = lambda text: list(text.encode())
        >>> graded = [Answer(str(n), f"{n} + 1?", str(n + n % 2), str(n + 1), 9 * (n % 2)) for n in range(8)]
        >>> seen, blind = (view_of(graded, encode, with_reference=with_it) for with_it in (True, False))
        >>> judge = Judge(
        ...     Bag(),
        ...     Vocabulary.of(encode, end=2),
        ...     optimizer=partial(torch.optim.AdamW, lr=1e-2),
        ...     logits=lambda model, tokens, mask, k: model(tokens, mask)[:, -k:],
        ... )
        >>> losses = judge.fit(seen, blind, epochs=3, batch_size=4)
        >>> len(losses), judge.score(blind).shape
        (3, torch.Size([8]))
    """

    @allowed(alpha=ALPHA, alpha_kd=ALPHA_KD)
    def __init__(
        self,
        model: nn.Module,
        vocabulary: Vocabulary,
        *,
        optimizer: Callable[[Iterable[nn.Parameter]], torch.optim.Optimizer],
        alpha: float = 0.3,
        alpha_kd: float = 2.0,
        schedule: Coefficient = 1.0,
        logits: LastLogits = last_logits,
        seed: int = 0,
    ) -> None:
        trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
        self.model = model
        self.vocabulary = vocabulary
        self.alpha = alpha
        self.alpha_kd = alpha_kd
        self.optimizers = Optimizers([optimizer(trained)], schedule=schedule, names=["the judge"])
        self.epochs = Epochs(seed)
        self._logits = logits
        # Behind the prompt: the grade, which is one of ten, then the end, which is always the same.
        self._grades = torch.tensor(vocabulary.grades)

    def training_step(self, batch: Batch, *, progress: Progress) -> Tensor:
        """One step.

        Args:
            batch: ``inputs`` with ``tokens`` and ``mask``, (B, 2, L) for both views, and the grades as ``targets``.
            progress: position in the training.

        Returns:
            The loss, without a graph.
        """
        tokens, mask = batch.inputs["tokens"], batch.inputs["mask"]
        assert batch.targets is not None
        digits = self._grades.to(tokens.device)[batch.targets]
        # Views one after the other: a sequence of 2 B; the grade's token stands behind the prompt, as it will be read.
        read = torch.cat([tokens.transpose(0, 1).flatten(0, 1), digits.repeat(2)[:, None]], dim=1)
        seen = torch.cat([mask.transpose(0, 1).flatten(0, 1), mask.new_ones(len(read), 1)], dim=1)
        z1, z2 = self._logits(self.model, read, seen, 2).transpose(0, 1).chunk(2, dim=1)  # (2, B, V): grade, end
        targets = torch.cat([digits, torch.full_like(digits, self.vocabulary.end)])
        loss = views_loss(
            z1.flatten(0, 1),
            z2.flatten(0, 1),
            targets,
            graded=slice(len(digits)),
            alpha=self.alpha,
            alpha_kd=self.alpha_kd,
        )
        self.optimizers.minimise(loss, progress=progress)
        return loss.detach()

    @allowed(batch_size=count(1))
    def fit(
        self, with_reference: View, without_reference: View, *, epochs: int = 2, batch_size: int = 128
    ) -> list[float]:
        """Train until so many epochs are done in all.

        Args:
            with_reference: the teacher's view, with grades.
            without_reference: the student's, of the same samples in any order.
            epochs: in all; default 2 (official code).
            batch_size: samples in a step; default 128 (official code).

        Returns:
            Mean loss of each epoch that was trained now.

        Raises:
            ValueError: the views are not of the same samples, or have no grades.
        """
        blind = without_reference.aligned_with(with_reference)
        if with_reference.grades is None:
            raise ValueError("there are no grades to learn from; give each Answer one, see combined_grades")
        tokens, mask = _one_length([with_reference, blind])
        source = TensorData(
            {"tokens": tokens, "mask": mask}, with_reference.grades, batch_size=batch_size, seed=self.epochs.seed
        )
        device = next(self.model.parameters()).device
        self.model.train()
        part = Part(source.to(device), self.training_step)
        return fit_epochs(self, [part], until=epochs, record=lambda means: float(means[0]))

    def score(self, view: View, *, batch_size: int = 32) -> Tensor:
        """The expected grade of each answer, see :func:`score_answers`."""
        return score_answers(self.model, view, self.vocabulary, logits=self._logits, batch_size=batch_size)

    def state_dict(self) -> dict[str, Any]:
        """Model, optimizer, and position."""
        return state_of(self, "model", "optimizers", "epochs")

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Put back a state of :meth:`state_dict`."""
        restore(self, state, "model", "optimizers", "epochs")


@torch.no_grad()
@allowed(batch_size=count(1))
def score_answers(
    model: nn.Module,
    view: View,
    vocabulary: Vocabulary,
    *,
    logits: LastLogits = last_logits,
    batch_size: int = 32,
) -> Tensor:
    """The expected grade that a language model gives each answer, in evaluation mode; the model stays in its mode.

    Of the assistant itself, on the view with the reference, it is the *self-evaluation* that labels are made of.

    Args:
        model: a causal language model.
        view: the answers, with or without reference.
        vocabulary: the model's tokens of the grades.
        logits: how the model is called.
        batch_size: answers at a time; default 32.

    Returns:
        (n,) in [0, 9], on the CPU.

    Examples:
        >>> from regularized.alignment.self_judge import Answer, view_of
        >>> encode = lambda text: list(text.encode())
        >>> view = view_of([Answer("1", "2 + 2?", "5")], encode, with_reference=False)
        >>> untrained = nn.Embedding(256, 256)
        >>> _ = nn.init.zeros_(untrained.weight)
        >>> by_last_token = lambda model, tokens, mask, k: model(tokens)[:, -k:]
        >>> score_answers(untrained, view, Vocabulary.of(encode, end=2), logits=by_last_token)
        tensor([4.5000])
    """
    device = next(model.parameters()).device
    training = model.training
    model.eval()
    try:
        found = [
            expected_score(logits(model, tokens.to(device), mask.to(device), 1)[:, -1], vocabulary.grades).cpu()
            for tokens, mask in zip(view.tokens.split(batch_size), view.mask.split(batch_size), strict=True)
        ]
    finally:
        model.train(training)
    return torch.cat(found)


def _one_length(views: Sequence[View]) -> tuple[Tensor, Tensor]:
    """Tokens and masks of both views, (n, 2, L), the shorter padded at the left."""
    longest = max(view.tokens.shape[1] for view in views)
    pads = [longest - view.tokens.shape[1] for view in views]
    tokens = [nn.functional.pad(view.tokens, (pad, 0)) for view, pad in zip(views, pads, strict=True)]
    masks = [nn.functional.pad(view.mask, (pad, 0)) for view, pad in zip(views, pads, strict=True)]
    return torch.stack(tokens, dim=1), torch.stack(masks, dim=1)
