"""Language models as judges: SmolLM2 on a laptop in minutes, and the paper's Llama-2-13B, by the same lines.

The assistant grades its own answers beside the reference (raw self-evaluation), that is averaged with MiniLM's cosine,
and the same model becomes the judge by LoRA on q, k, v, o (rank 16, alpha 16).
"""

import json
from collections.abc import Callable, Mapping
from functools import partial
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from regularized.alignment.self_judge import (
    Answer,
    Judge,
    View,
    Vocabulary,
    combined_grades,
    pearson,
    score_answers,
    spearman,
    view_of,
)
from regularized.evidence.experiment import Measurements, Unavailable, data_fingerprint
from regularized.evidence.pretrained import smollm2, smollm2_tokenizer
from regularized.evidence.requirements import need_files, need_gpu, need_package
from regularized.papers.self_judge.passages import Graded, graded, minilm
from regularized.training.progress import Progress, Schedule, linear

_FILES = {
    "self_judge/model": "Llama-2-13B in the format of Hugging Face",
    "self_judge/train.jsonl": "30,000 answers, an object a line with question, reference, answer and grade (0 to 9)",
    "self_judge/test.jsonl": "850 answers of the same form, graded by GPT-4",
}


class Assistant(NamedTuple):
    """A language model, its tokenizer, and the answers to learn from and to be asked about."""

    model: nn.Module
    encode: Callable[[str], list[int]]
    end: int
    train: list[Answer]
    test: list[Answer]
    truth: Tensor  # (n,) true grades of the test


def run(s: Mapping[str, Any], seed: int) -> Measurements:
    """Label, train by LoRA, score.

    Raises:
        Unavailable: a model, a package, data or a GPU is missing; or the arm trains nothing.
    """
    if s["judge"] != "trained" or s["labels"] != "both" or s["wrong_reference"]:
        raise Unavailable(
            "with language models there are the arms blind, no_distillation, distillation and joint_with_reference; "
            "the others are of the laptop's scale"
        )
    need_package("peft", 'pip install "regularized[peft]"')
    torch.manual_seed(seed)
    assistant = _llama2(s) if s["encoder"] == "llama2" else _smollm2(s, seed)
    return measured(assistant, s, seed)


def measured(assistant: Assistant, s: Mapping[str, Any], seed: int) -> Measurements:
    """Train the assistant as a judge of the answers, and compare its scores with the true grades."""
    from peft import LoraConfig, get_peft_model

    vocabulary = Vocabulary.of(assistant.encode, end=assistant.end)
    seen, blind = (_view(assistant, assistant.train, with_reference=with_it) for with_it in (True, False))
    test_seen, test = (_view(assistant, assistant.test, with_reference=with_it) for with_it in (True, False))
    raw = score_answers(assistant.model, test, vocabulary)
    config = LoraConfig(
        r=16, lora_alpha=16, lora_dropout=s["dropout"], target_modules=["q_proj", "k_proj", "v_proj", "o_proj"]
    )
    judge = Judge(
        get_peft_model(assistant.model, config),
        vocabulary,
        optimizer=partial(torch.optim.AdamW, lr=s["lr"]),
        alpha=s["alpha"],
        alpha_kd=s["alpha_kd"],
        schedule=_warm_up_and_decay,
        seed=seed,
    )
    # The judge that never sees a reference is one whose two views are the same.
    losses = judge.fit(blind if s["blind"] else seen, blind, epochs=s["epochs"], batch_size=s["batch"])
    scores = judge.score(test_seen if s["reference_at_test"] else test)
    return Measurements(
        metrics={
            "correlation": 100.0 * float(pearson(scores, assistant.truth)),
            "rank_correlation": 100.0 * float(spearman(scores, assistant.truth)),
            "raw_self_evaluation": 100.0 * float(pearson(raw, assistant.truth)),
        },
        curves={"loss": [(epoch + 1.0, loss) for epoch, loss in enumerate(losses)]},
        data=data_fingerprint(seen.tokens.numpy(), test.tokens.numpy()),
    )


def _view(assistant: Assistant, answers: list[Answer], *, with_reference: bool) -> View:
    return view_of(answers, assistant.encode, with_reference=with_reference, pad_id=assistant.end)


_decay: Schedule = linear(1.0, 0.0)


def _warm_up_and_decay(progress: Progress) -> float:
    """100 steps of warm-up, or a tenth of a training that has fewer than 1,000; then linear decay."""
    return min(1.0, (progress.step + 1) / min(100.0, max(1.0, progress.total_steps / 10))) * _decay(progress)


def _smollm2(s: Mapping[str, Any], seed: int) -> Assistant:
    """SmolLM2 grades answers on Python's documentation beside their reference: its labels."""
    tokenizer, model = smollm2_tokenizer(), smollm2(torch.float32)
    encode = partial(tokenizer.encode, add_special_tokens=False)
    parts = graded(s, seed)
    train, test = (_answers(parts[name]) for name in ("train", "test"))
    vocabulary = Vocabulary.of(encode, end=tokenizer.eos_token_id)
    own = score_answers(model, view_of(train, encode, with_reference=True), vocabulary)
    answer, reference = (minilm([str(getattr(one, name)) for one in train]) for name in ("answer", "reference"))
    grades = combined_grades(own, (answer * reference).sum(dim=1)).tolist()
    labelled = [
        Answer(one.key, one.question, one.answer, one.reference, grade)
        for one, grade in zip(train, grades, strict=True)
    ]
    return Assistant(model, encode, tokenizer.eos_token_id, labelled, test, parts["test"].truth.flatten())


def _answers(part: Graded) -> list[Answer]:
    return [
        Answer(f"{row}.{number}", f"Go on with this documentation: {part.questions[row]}", text, part.references[row])
        for row, mine in enumerate(part.answers)
        for number, text in enumerate(mine)
    ]


def _llama2(s: Mapping[str, Any]) -> Assistant:
    folder = need_files(_FILES) / "self_judge"
    device = need_gpu("the paper scale trains a model of 13 billion weights", gigabytes=75)
    from transformers import AutoModelForCausalLM, AutoTokenizer

    def answers(name: str, count: int) -> list[Answer]:
        lines = (folder / name).read_text(encoding="utf-8").splitlines()[:count]
        fields = ("question", "answer", "reference", "grade")
        return [Answer(str(row), *map(json.loads(line).get, fields)) for row, line in enumerate(lines)]

    tokenizer: Any = AutoTokenizer.from_pretrained(folder / "model")
    model: Any = AutoModelForCausalLM.from_pretrained(folder / "model", dtype=torch.bfloat16)
    test = answers("test.jsonl", s["test"])
    return Assistant(
        model.to(device),
        partial(tokenizer.encode, add_special_tokens=False),
        tokenizer.eos_token_id,
        answers("train.jsonl", s["train"]),
        test,
        torch.tensor([float(one.grade or 0) for one in test]),
    )
