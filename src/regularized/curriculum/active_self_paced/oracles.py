"""Where labels come from: a function, a CSV file that a person fills, or a prompt in the terminal.

An oracle is any callable ``oracle(positions) -> classes``.
"""

import csv
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TextIO, TypeAlias

__all__ = ["AnswersPending", "CSVOracle", "Oracle", "PromptOracle"]

Oracle: TypeAlias = Callable[[Sequence[int]], Sequence[int]]


class AnswersPending(RuntimeError):
    """The annotator has not answered yet; the message says what to fill in. Call again afterwards."""


class CSVOracle:
    """Questions in a CSV file with the columns ``sample,label``; a person fills in the labels.

    A call writes the questions that are not in the file yet, with an empty label, and raises
    :class:`AnswersPending` until all of its samples have one. Answers stay in the file, so nothing is asked twice.

    Args:
        path: the file; made at the first question.
        classes: names of the classes, in order; a label is a name or a number. None takes numbers only.

    Raises:
        ValueError: at a call, the file has other columns, or a label is neither a name nor a number.

    Examples:
        >>> import tempfile
        >>> path = Path(tempfile.mkdtemp()) / "questions.csv"
        >>> oracle = CSVOracle(path, classes=["cat", "dog"])
        >>> try:
        ...     oracle([7])
        ... except AnswersPending:
        ...     _ = path.write_text("sample,label\\n7,dog\\n")
        >>> oracle([7])
        [1]
    """

    def __init__(self, path: Path | str, *, classes: Sequence[str] | None = None) -> None:
        self.path: Path = Path(path)
        self.classes = classes

    def __call__(self, samples: Sequence[int]) -> list[int]:
        """Classes of the samples, in their order."""
        answers = self._read()
        new = [sample for sample in samples if sample not in answers]
        if new:
            with self.path.open("a" if answers else "w", newline="", encoding="utf-8") as file:
                writer = csv.writer(file)
                if not answers:
                    writer.writerow(["sample", "label"])
                writer.writerows([sample, ""] for sample in new)
        open_questions = [sample for sample in samples if not answers.get(sample, "").strip()]
        if open_questions:
            names = " with " + ", ".join(self.classes) if self.classes else ""
            raise AnswersPending(
                f"{len(open_questions)} of {len(samples)} samples have no label in {self.path}: fill in the second "
                f"column{names}, save, and run again"
            )
        return [self._class(sample, answers[sample]) for sample in samples]

    def _read(self) -> dict[int, str]:
        if not self.path.exists():
            return {}
        with self.path.open(newline="", encoding="utf-8-sig") as file:
            reader = csv.DictReader(file)
            if reader.fieldnames is None or not {"sample", "label"} <= set(reader.fieldnames):
                raise ValueError(f"{self.path} needs the columns sample,label; it has {reader.fieldnames}")
            answers = {}
            for number, row in enumerate(reader, start=2):
                try:
                    answers[int(row["sample"])] = row["label"] or ""
                except (TypeError, ValueError):
                    raise ValueError(f"{self.path}, line {number}: sample {row['sample']!r} is not a number") from None
        # A person's editor may leave the last line without an end; the next question must not be glued to it.
        if not self.path.read_text(encoding="utf-8-sig").endswith("\n"):
            with self.path.open("a", encoding="utf-8") as file:
                file.write("\n")
        return answers

    def _class(self, sample: int, label: str) -> int:
        return _parse(label, self.classes, f"{self.path}: label {label!r} of sample {sample}")


class PromptOracle:
    """Asks in the terminal, one sample at a time; a wrong answer is asked again.

    Args:
        show: ``show(position) -> str``, what the person sees of a sample: a file name, a text, a link.
        classes: names of the classes, in order.
        stdin: where answers are read; default the terminal.
        stdout: where questions go; default standard error.

    Raises:
        AnswersPending: at a call, the input ended before the last answer.

    Examples:
        >>> import io
        >>> oracle = PromptOracle(str, ["cat", "dog"], stdin=io.StringIO("bird\\ndog\\n"), stdout=io.StringIO())
        >>> oracle([3])
        [1]
    """

    def __init__(
        self,
        show: Callable[[int], str],
        classes: Sequence[str],
        *,
        stdin: TextIO | None = None,
        stdout: TextIO | None = None,
    ) -> None:
        self.show = show
        self.classes = classes
        self.stdin = stdin
        self.stdout = stdout

    def __call__(self, samples: Sequence[int]) -> list[int]:
        """Classes of the samples, in their order.

        Raises:
            AnswersPending: the input ended before the last answer.
        """
        out = self.stdout or sys.stderr
        choices = ", ".join(f"{number} {name}" for number, name in enumerate(self.classes))
        answers: list[int] = []
        for position, sample in enumerate(samples, start=1):
            while True:
                print(f"[{position}/{len(samples)}] {self.show(sample)}\n{choices}: ", end="", file=out, flush=True)
                line = (self.stdin or sys.stdin).readline()
                if not line:
                    raise AnswersPending(f"the input ended after {len(answers)} of {len(samples)} answers")
                try:
                    answers.append(_parse(line, self.classes, repr(line.strip())))
                except ValueError as error:
                    print(error, file=out)
                else:
                    break
        return answers


def _parse(label: str, classes: Sequence[str] | None, what: str) -> int:
    text = label.strip()
    if classes is not None and text in classes:
        return list(classes).index(text)
    try:
        number = int(text)
    except ValueError:
        raise ValueError(f"{what} is not {'one of ' + ', '.join(classes) if classes else 'a number'}") from None
    if number < 0 or (classes is not None and number > len(classes)):
        raise ValueError(f"{what} is not a class; there are {len(classes) if classes else 'numbers from 0'}")
    return number
