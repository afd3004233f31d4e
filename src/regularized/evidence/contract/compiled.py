"""A step of :class:`~regularized.training.trainer.Trainer` as one graph, by ``torch.compile``: model and terms."""

import re
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from regularized.evidence.contract.loop import BATCH
from regularized.evidence.contract.subjects import NotApplicable, Subject
from regularized.evidence.contract.trainer_runs import apart, whole_run
from regularized.training.options import Compute
from regularized.training.progress import Progress
from regularized.training.terms import Term

__all__ = ["check_compile_step"]

_SAMPLES = 2 * BATCH
"""Two steps of an epoch: where a step makes its graph anew, each takes seconds."""
_PLAIN, _COMPILED = Compute(device="cpu"), Compute(device="cpu", compile="aot_eager")
_PACKAGE = Path(__file__).parents[2]


def check_compile_step(subject: Subject) -> None:
    """Compiled, a training ends where it does plainly; its steps are one graph, and the last epoch makes no other."""
    from torch._dynamo.utils import counters, graph_break_reasons

    plain = whole_run(subject, samples=_SAMPLES, compute=_PLAIN)
    torch.compiler.reset()
    counters.clear()
    graph_break_reasons.clear()
    graphs = _Graphs()
    try:
        compiled = whole_run(subject, samples=_SAMPLES, compute=_COMPILED, also={"graphs": graphs})
    except Exception as error:
        raise NotApplicable(f"torch.compile fails: {_sentence(str(error))}") from error
    worst, name = apart(plain, compiled)
    assert worst < 1e-5, f"compiled: {name!r} ends {worst:.3g} away from the plain training"
    if graph_break_reasons:
        first = graph_break_reasons[0]
        raise NotApplicable(f"the graph breaks{_place(first)}: {_sentence(first.reason)}; the numbers stay")
    if graphs.made() > graphs.before[-1]:
        raise NotApplicable(
            "a value of Python changes during the training and makes the graph anew, in the last epoch too; "
            "the numbers stay"
        )


class _Graphs(Term):
    """Counts the graphs that there are at the start of each epoch."""

    contributes = False

    def __init__(self) -> None:
        super().__init__()
        self.before: list[int] = []

    def made(self) -> int:
        """How many have been made."""
        from torch._dynamo.utils import counters

        return counters["stats"]["unique_graphs"]

    def epoch_start(self, progress: Progress) -> None:
        """Count them."""
        self.before.append(self.made())

    def forward(self, step: object) -> Tensor:
        """Zero; not asked for."""
        return torch.zeros(())


def _place(reason: Any) -> str:
    """The innermost function of this package at which a graph broke, in words."""
    for frame in reversed(reason.user_stack):
        path = Path(frame.filename)
        if path.is_relative_to(_PACKAGE) and frame.name.isidentifier():
            resumed = re.match(r"torch_dynamo_resume_in_(\w+)_at_\d+$", frame.name)
            return f" in `{resumed[1] if resumed else frame.name}` of {path.relative_to(_PACKAGE).as_posix()}"
    return ""


def _sentence(text: str) -> str:
    """The first sentence of what torch says, without its full stop."""
    return re.split(r"\n|\. ", text.strip(), maxsplit=1)[0].rstrip(".")
