"""Two processes of :class:`~regularized.training.trainer.Trainer` end where one does: with DDP, and in shards.

The processes are started once for a subject, and train in both ways: starting them takes longer than training.
"""

import tempfile
from collections.abc import Callable, Mapping
from dataclasses import replace
from functools import lru_cache, partial
from pathlib import Path
from typing import Any, cast

import torch
import torch.distributed as dist

from regularized.evidence.contract.loop import BATCH
from regularized.evidence.contract.subjects import NotApplicable, Subject, Terms
from regularized.evidence.contract.trainer_runs import State, apart, whole_run
from regularized.evidence.processes import run_launched
from regularized.mechanisms.distributed import leave_process_group
from regularized.training.options import Compute
from regularized.training.sharded import NEEDS
from regularized.training.step import Batch, call_model

__all__ = ["check_fsdp2", "check_trainer_processes"]

_SHARDS = Compute(sharding="fsdp2")
_SAYS_NOTHING = "it does not say what it needs of weights in shards"


def check_trainer_processes(subject: Subject) -> None:
    """The Trainer in two processes, with a last batch of one sample, ends where one process does."""
    refusal = _refusal_of_nothing(subject)
    _compare(subject, "ddp", refusal)
    if refusal is not None:
        raise NotApplicable(
            f"the model takes no batch without samples ({refusal}); with one for each process they agree"
        )


def check_fsdp2(subject: Subject) -> None:
    """Two processes that hold weights, gradients and the optimizer's state in shards end where one process does.

    Where a term says nothing of shards, the reason tells what it could say.
    """
    why = _refusal_of_shards(subject.terms())
    if why is not None:
        raise NotApplicable(f"refused: {_told_what_works(subject) if why is _SAYS_NOTHING else why}")
    _compare(subject, "fsdp2", _refusal_of_nothing(subject))


def _refusal_of_shards(terms: Terms) -> str | None:
    """Why the Trainer refuses to train with weights in shards, in short; None: it does not."""
    for term in terms.values():
        if (why := getattr(term, "unsharded", None)) is not None:
            return str(why)
        if getattr(term, "sharding", None) is None:
            return _SAYS_NOTHING
    return None


def _told_what_works(subject: Subject) -> str:
    """What came of training in shards with each word for what a term needs, the one that asks least first."""
    for need in NEEDS:
        try:
            _compare(subject, need, _refusal_of_nothing(subject))
        except AssertionError:
            continue
        return f'{_SAYS_NOTHING}; with sharding = "{need}" it ends where one process does'
    return f"{_SAYS_NOTHING}; whatever it says, it fails or ends elsewhere than one process"


def _declaring(terms: Callable[[], Terms], need: str) -> Terms:
    """Terms of which those that say nothing of shards say this."""
    made = terms()
    for term in made.values():
        if getattr(term, "sharding", None) is None:
            cast(Any, term).sharding = need
    return made


def _refusal_of_nothing(subject: Subject) -> str | None:
    """What the model says to a batch without samples, which a process has where the last batch has one; None: it works.

    Such a model must refuse in all processes, or drop the last batch: that is the Trainer's business and tested there.
    """
    torch.manual_seed(0)
    model = subject.model()
    inputs = Batch.of({name: tensor[:0] for name, tensor in subject.data(BATCH, 0).items()}).inputs
    try:
        call_model(model, inputs)
    except (ValueError, RuntimeError) as error:
        return str(error)
    return None


def _compare(subject: Subject, way: str, refusal: str | None) -> None:
    whole, ranks = _trained(subject, 2 * BATCH + 1 if refusal is None else 2 * BATCH + 2)
    for rank, mine in enumerate(ranks):
        state = mine[way]
        assert not isinstance(state, str), f"rank {rank}: {state}"
        worst, name = apart(whole, state)
        assert worst < 1e-4, f"rank {rank}: {name!r} differs from one process by {worst:.3g}"


@lru_cache(maxsize=1)  # the two checks of a subject follow each other
def _trained(subject: Subject, samples: int) -> tuple[State, list[Mapping[str, State | str]]]:
    """Where one process ends; and for each of two, where it ends by each way, or why it did not."""
    whole = whole_run(subject, samples=samples)
    ways = {"ddp": Compute()}
    why = _refusal_of_shards(subject.terms())
    if why is None:
        ways["fsdp2"] = _SHARDS
    elif why is _SAYS_NOTHING:
        ways |= dict.fromkeys(NEEDS, _SHARDS)
    with tempfile.TemporaryDirectory() as folder:
        run_launched(_train_and_save, subject, samples, ways, folder)
        return whole, [torch.load(Path(folder) / f"{rank}.pt", weights_only=True) for rank in range(2)]


def _train_and_save(subject: Subject, samples: int, ways: Mapping[str, Compute], folder: str) -> None:
    ends: dict[str, Any] = {}
    plain = subject.terms
    for way, compute in ways.items():
        if way in NEEDS:
            subject = replace(subject, terms=partial(_declaring, plain, way))
        try:
            ends[way] = whole_run(subject, samples=samples, compute=compute)
        except Exception as error:
            if way == "ddp":
                raise
            ends[way] = f"{type(error).__name__}: {error}"  # which is no matter of the other way
    torch.save(ends, Path(folder) / f"{dist.get_rank()}.pt")
    leave_process_group()
