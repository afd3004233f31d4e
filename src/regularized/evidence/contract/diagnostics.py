"""Checks of diagnostics, which must leave a model as they found it."""

import copy
from collections.abc import Callable, Mapping

import torch

from regularized.evidence.contract.loop import distance, equal
from regularized.evidence.contract.subjects import DiagnosticSubject, needs_gpu

__all__ = ["DIAGNOSTIC_CHECKS"]


def check_it_bites(subject: DiagnosticSubject) -> None:
    """The report on another model differs: it says something about the model."""
    reports = []
    for seed in (0, 1):
        torch.manual_seed(seed)
        reports.append(subject.report(subject.model()))
    assert not equal(*reports), "two different models get the same report"


def check_deterministic(subject: DiagnosticSubject) -> None:
    """Two reports on one model are equal, and free of autograd."""
    torch.manual_seed(0)
    model = subject.model()
    first, second = subject.report(model), subject.report(model)
    assert equal(first, second), "two reports on the same model differ"
    assert not any(tensor.requires_grad for tensor in first.values()), "the report hangs on an autograd graph"


def check_leaves_alone(subject: DiagnosticSubject) -> None:
    """Weights, buffers, gradients, modes, hooks and the global random state are afterwards what they were."""
    torch.manual_seed(0)
    model = subject.model()
    untouched = copy.deepcopy(model)
    random_state = torch.get_rng_state()
    subject.report(model)
    assert torch.equal(random_state, torch.get_rng_state()), "the report drew from the global random generator"
    assert equal(dict(model.state_dict()), dict(untouched.state_dict())), "the report changed weights or buffers"
    for (name, ours), theirs in zip(model.named_modules(), untouched.modules(), strict=True):
        assert ours.training == theirs.training, f"{name!r} was left in another mode"
        hooks = len(ours._forward_hooks) + len(ours._forward_pre_hooks) + len(ours._backward_hooks)
        assert not hooks, f"{name!r} was left with hooks"
    for (name, p), before in zip(model.named_parameters(), untouched.parameters(), strict=True):
        assert p.grad is None, f"{name!r} was left with a gradient"
        assert p.requires_grad == before.requires_grad, f"{name!r} has another requires_grad"


def check_gpu(subject: DiagnosticSubject) -> None:
    """On a GPU, where there is one, the report is near that on the CPU."""
    needs_gpu("where the report would be the same")
    torch.manual_seed(0)
    model = subject.model()
    cpu = subject.report(model)
    gpu = {name: tensor.cpu() for name, tensor in subject.report(model.to("cuda")).items()}
    apart = distance(cpu, gpu)
    assert apart < 1e-3, f"the report on a GPU differs by {apart:.3g}"


DIAGNOSTIC_CHECKS: Mapping[str, Callable[[DiagnosticSubject], None]] = {
    "it_bites": check_it_bites,
    "deterministic": check_deterministic,
    "leaves_alone": check_leaves_alone,
    "gpu": check_gpu,
}
