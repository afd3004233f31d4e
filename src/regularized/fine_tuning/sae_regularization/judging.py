"""Which features of a sparse autoencoder a task must not use: judged by a function or by a language model.

Wu et al. 2025 (arXiv 2502.14133), section on interpretation. For each feature the texts that activate it most are
shown; a summary is written; a judge answers Yes, Probably, Maybe or No to "can this feature serve the task". Unintended
is what can be interpreted and is answered neither Yes nor Probably. What cannot be interpreted stays allowed.

The prompts are our own; the authors' ask the same in other words. Every answer is kept beside the mask, so that a
reader can see why a feature was taken out.
"""

import hashlib
import re
import warnings
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any, NamedTuple, Protocol

import torch
from torch import Tensor

from regularized.fine_tuning.sae_regularization.autoencoder import TopKSAE, usable_rows
from regularized.mechanisms.sealed_files import load_sealed, save_sealed

__all__ = [
    "Example",
    "FeatureMask",
    "Judge",
    "Judgement",
    "LanguageModelJudge",
    "parse_answer",
    "select_features",
    "top_examples",
]

ANSWERS = ("yes", "probably", "maybe", "no")
_FORMAT = 2


class Example(NamedTuple):
    """One of the rows that activate a feature most.

    Attributes:
        row: its position in the embeddings.
        activation: the feature's pre-activation, above 0.
        item: what the row was made from (a text, an image), where it was given.
    """

    row: int
    activation: float
    item: Any = None


@dataclass(frozen=True, slots=True)
class Judgement:
    """What a judge says of one feature.

    Args:
        unintended: whether the task must not use it.
        answer: the judge's word, where it has one; ``"cannot tell"`` for a feature that could not be interpreted.
        summary: what the feature stands for, where the judge says so.
    """

    unintended: bool
    answer: str = ""
    summary: str = ""


class Judge(Protocol):
    """Anything that judges features: a function, or :class:`LanguageModelJudge`.

    A judge may have an attribute ``provenance``, a mapping of what it was (model, task, prompt), which is kept with the
    mask.
    """

    def __call__(self, feature: int, examples: Sequence[Example], /) -> bool | Judgement:
        """Whether a feature is unintended, from the rows that activate it most, strongest first."""
        ...


@torch.no_grad()
def top_examples(sae: TopKSAE, activations: Tensor, *, count: int = 8, batch_size: int = 4096) -> tuple[Tensor, Tensor]:
    """The rows that activate each feature most, found in one pass, with one read of the device by the caller.

    Args:
        sae: the autoencoder.
        activations: (N, d) embeddings.
        count: m, rows for each feature.
        batch_size: rows at a time; memory is (batch_size + m) x C.

    Returns:
        (C, m) pre-activations, falling; 0 or below means that no further row activates the feature; and (C, m) rows.

    Examples:
        >>> sae = TopKSAE.from_tensors(torch.eye(2))
        >>> values, rows = top_examples(sae, torch.tensor([[1.0, 0.0], [3.0, -1.0], [2.0, 5.0]]), count=2)
        >>> rows.tolist()
        [[1, 2], [2, 0]]
    """
    best = torch.full((sae.num_features, 0), 0.0, device=sae.encoder.device)
    rows = torch.zeros((sae.num_features, 0), dtype=torch.int64, device=best.device)
    start = 0
    for part in torch.split(activations, batch_size):
        here = sae.preactivations(part.to(best.device)).T.float()
        numbers = torch.arange(start, start + len(part), device=best.device).expand(sae.num_features, -1)
        both, both_rows = torch.cat([best, here], dim=1), torch.cat([rows, numbers], dim=1)
        best, order = both.topk(min(count, both.shape[1]), dim=1)
        rows = both_rows.gather(1, order)
        start += len(part)
    return best, rows


@dataclass(frozen=True)
class FeatureMask:
    """Which features are unintended, and why.

    Args:
        mask: (C,) bool, True for a feature that the task must not use.
        judgements: for each judged feature what was said.
        provenance: where the mask comes from: judge, model, task, prompt, rows, fingerprint of the autoencoder.

    Raises:
        ValueError: the mask is no (C,) tensor of zeros and ones.

    Examples:
        >>> FeatureMask(torch.tensor([1, 0, 0])).features
        [0]
    """

    mask: Tensor
    judgements: Mapping[int, Judgement] = field(default_factory=dict)
    provenance: Mapping[str, Any] = field(default_factory=dict)

    def __post_init__(self) -> None:
        object.__setattr__(self, "mask", binary_mask(self.mask))

    @property
    def features(self) -> list[int]:
        """Numbers of the unintended features."""
        numbers: list[int] = self.mask.nonzero().flatten().tolist()
        return numbers

    def save(self, folder: str | Path) -> None:
        """Write ``mask.safetensors`` and ``mask.json`` (judgements and provenance) into a folder."""
        judgements = {str(number): asdict(said) for number, said in self.judgements.items()}
        text = {"provenance": dict(self.provenance), "judgements": judgements}
        save_sealed(folder, "mask", {"mask": self.mask.to(torch.uint8)}, text, version=_FORMAT)

    @classmethod
    def load(cls, folder: str | Path) -> "FeatureMask":
        """A mask that :meth:`save` wrote.

        Raises:
            FileNotFoundError: a file is missing.
            ValueError: the files are damaged, or were written by another version.
        """
        text, tensors = load_sealed(folder, "mask", version=_FORMAT)
        try:
            judgements = {int(number): Judgement(**said) for number, said in text["judgements"].items()}
            return cls(tensors["mask"].bool(), judgements, text["provenance"])
        except (KeyError, TypeError, AttributeError) as error:
            raise ValueError(f"the files in {folder} are not those of a mask of features: {error}") from error


def select_features(
    sae: TopKSAE,
    activations: Tensor,
    judge: Judge,
    *,
    items: Sequence[Any] | None = None,
    count: int = 8,
) -> FeatureMask:
    """Ask a judge about every feature that is active on the data.

    Args:
        sae: the autoencoder; its parameters are not changed.
        activations: (N, d) embeddings; rows that are not finite are left out.
        judge: called as ``judge(feature, examples)``; returns whether the feature is unintended, as a bool or a
            :class:`Judgement`.
        items: N texts, images, or whatever the judge wants to see of a row; default nothing.
        count: rows shown for each feature, at most; only such with a positive activation. Default 8.

    Returns:
        The mask with all judgements. A feature that no row activates is not judged and stays allowed.

    Raises:
        TypeError: the judge returned neither a bool nor a Judgement.
        ValueError: wrong shapes, or ``items`` of another length.

    Warns:
        UserWarning: the autoencoder does not reconstruct these embeddings (normalised error above 0.5); rows were left
            out.

    Examples:
        >>> sae = TopKSAE.from_tensors(torch.eye(2), k=2)
        >>> chosen = select_features(sae, torch.tensor([[1.0, 0.0], [0.0, 2.0]]), lambda j, examples: j == 1)
        >>> chosen.features
        [1]
    """
    if items is not None and len(items) != len(activations):
        raise ValueError(f"items must be as many as the rows, got {len(items)} and {len(activations)}")
    usable = usable_rows(activations)
    if items is not None and usable is not activations:
        kept = torch.isfinite(activations).all(dim=1).tolist()
        items = [item for item, keep in zip(items, kept, strict=True) if keep]
    sae.check(usable)
    values, rows = (t.tolist() for t in top_examples(sae, usable, count=count))
    mask = torch.zeros(sae.num_features, dtype=torch.bool)
    judgements = {}
    for feature in range(sae.num_features):
        examples = [
            Example(row, value, None if items is None else items[row])
            for value, row in zip(values[feature], rows[feature], strict=True)
            if value > 0
        ]
        if not examples:
            continue
        said = judge(feature, examples)
        if isinstance(said, bool):
            said = Judgement(said)
        if not isinstance(said, Judgement):
            raise TypeError(
                f"the judge must return a bool (is the feature unintended?) or a Judgement, got {said!r} of type "
                f"{type(said).__name__} for feature {feature}"
            )
        judgements[feature] = said
        mask[feature] = said.unintended
    provenance = {
        "judge": getattr(judge, "__qualname__", type(judge).__qualname__),
        "rows": len(usable),
        "examples": count,
        "sae": fingerprint(sae),
        **getattr(judge, "provenance", {}),
    }
    return FeatureMask(mask, judgements, provenance)


_SUMMARY = """\
A unit of a neural network reacts to one concept, topic, style or text pattern. These texts excite it most, the \
strongest first. Say in one sentence, as precisely as you can, what it reacts to. Look hardest at what comes last in \
each text. Do not list the texts. If most of them have nothing in common, answer: Cannot tell.

{examples}
What it reacts to:"""

_QUESTION = """\
Task: {task}
Guideline: {guideline}

A text feature stands for: {summary}
Texts that show it:
{examples}
May the task use this feature, by the guideline? Give one sentence of reasons, then end with a line of exactly this \
form, with one of the four words:
Final decision: [[Yes/Probably/Maybe/No]]"""


class LanguageModelJudge:
    """Judges features with a language model that the user brings.

    Two questions a feature: what it stands for (skipped features answer "cannot tell" and stay allowed), and whether
    the task may use it. With 65,536 features and GPT-4o-mini the authors report less than ten dollars and an hour.

    Small models judge badly, and a wrong Yes keeps a shortcut in: read ``FeatureMask.judgements`` before you train.

    Args:
        generate: prompt to text, such as ``lambda text: pipe(text)[0]["generated_text"]`` around a transformers
            pipeline with ``return_full_text=False``, or a call of an OpenAI-compatible client. Use temperature near 0
            (official 1e-4).
        task: what the classifier is for, in a sentence.
        guideline: what it may and may not look at.
        count: texts shown, at most; default 4 (official).
        width: characters shown of each text, the last ones; default 400.
        model: name of the model, for the provenance of the mask.

    Raises:
        ValueError: an empty task or guideline; an answer with none of the four words, twice in a row.

    Examples:
        >>> def generate(prompt):
        ...     return "About cooking." if prompt.endswith("reacts to:") else "Off topic. Final decision: [[No]]"
        >>> judge = LanguageModelJudge(generate, task="Find toxic texts.", guideline="Judge the tone alone.")
        >>> judge(7, [Example(0, 2.5, "boil the eggs")])
        Judgement(unintended=True, answer='no', summary='About cooking.')
    """

    def __init__(
        self,
        generate: Callable[[str], str],
        *,
        task: str,
        guideline: str,
        count: int = 4,
        width: int = 400,
        model: str = "",
    ) -> None:
        for name, value in (("task", task), ("guideline", guideline)):
            if not value.strip():
                raise ValueError(f"{name} must say something: the model judges features by it")
        self.generate = generate
        self.task = task
        self.guideline = guideline
        self.count = count
        self.width = width
        self.model = model

    @property
    def provenance(self) -> dict[str, Any]:
        """What the mask's file says of this judge."""
        prompt = hashlib.sha256((_SUMMARY + _QUESTION).encode()).hexdigest()[:16]
        return {"model": self.model, "task": self.task, "guideline": self.guideline, "prompt": prompt}

    def __call__(self, feature: int, examples: Sequence[Example]) -> Judgement:
        """Ask for a summary, then for the decision."""
        if any(example.item is None for example in examples):
            raise ValueError(
                f"feature {feature} comes without texts, and a language model must read some; give "
                "select_features(..., items=texts)"
            )
        shown = "".join(f"- {str(e.item)[-self.width :]}\n" for e in examples[: self.count])
        summary = self.generate(_SUMMARY.format(examples=shown)).strip()
        if not summary or "cannot tell" in summary.lower():
            return Judgement(False, "cannot tell", summary)
        question = _QUESTION.format(task=self.task, guideline=self.guideline, summary=summary, examples=shown)
        answer = parse_answer(self.generate(question)) or parse_answer(self.generate(question))
        if answer is None:
            raise ValueError(
                f"the language model answered none of {', '.join(ANSWERS)} for feature {feature}, in two tries; use a "
                "model that follows instructions, or allow it more tokens"
            )
        return Judgement(answer not in ("yes", "probably"), answer, summary)


def parse_answer(text: str) -> str | None:
    """The decision in a language model's answer: the last one in double brackets, else after "decision:", else alone.

    Args:
        text: the answer.

    Returns:
        ``"yes"``, ``"probably"``, ``"maybe"`` or ``"no"``; None where there is none, or the form was copied unfilled.

    Examples:
        >>> parse_answer("It names a tone. Final decision: [[ Probably ]]"), parse_answer("**No.**")
        ('probably', 'no')
        >>> parse_answer("Final decision: [[Yes/Probably/Maybe/No]]") is None
        True
    """
    lower = text.lower()
    bracketed = re.findall(r"\[\[\W*([a-z]+)\W*\]\]", lower)
    decided = re.findall(r"decision\W+([a-z]+)(?![a-z/]|\s*/)", lower)
    alone = re.findall(r"^\W*([a-z]+)\W*$", lower)
    for found in (bracketed, decided, alone):
        words = [word for word in found if word in ANSWERS]
        if words:
            return str(words[-1])
    return None


def fingerprint(sae: TopKSAE) -> str:
    """Short hash of an autoencoder's weights, by which a mask knows whose features it numbers."""
    digest = hashlib.sha256()
    for tensor in (sae.encoder, sae.encoder_bias, sae.directions, sae.decoder_bias):
        digest.update(tensor.detach().float().cpu().contiguous().view(torch.uint8).numpy().tobytes())
    return digest.hexdigest()[:16]


def binary_mask(mask: Any) -> Tensor:
    """A (C,) bool tensor of zeros and ones, bools, or nothing else.

    Raises:
        ValueError: another shape, or other values.
    """
    given = torch.as_tensor(mask)
    if given.ndim != 1:
        raise ValueError(f"a mask of features must have shape (C,), got {tuple(given.shape)}")
    other = given[(given != 0) & (given != 1)]
    if len(other):
        raise ValueError(f"a mask of features must hold 0 and 1 (or bool), got values such as {other[:3].tolist()}")
    return given.bool()


def warn_if_empty(mask: Tensor) -> None:
    """Tell that a mask takes nothing out."""
    if not bool(mask.any()):
        warnings.warn(
            "no feature is unintended: nothing is removed and the penalty is 0. Did the judge say so of all features?",
            stacklevel=3,
        )
