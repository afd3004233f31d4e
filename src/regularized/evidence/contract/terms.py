"""Checks of terms, each in the plain loop of :mod:`regularized.evidence.contract.loop`."""

import copy
import tempfile
import warnings
from collections.abc import Callable, Mapping
from pathlib import Path

import torch
import torch.distributed as dist
from torch import Tensor, nn

from regularized.evidence.contract.compiled import check_compile_step
from regularized.evidence.contract.half import check_fp16
from regularized.evidence.contract.loop import BATCH, Trained, distance, equal, train
from regularized.evidence.contract.subjects import NotApplicable, Subject, needs_gpu
from regularized.evidence.contract.trainer import TRAINER_CHECKS
from regularized.evidence.processes import run_in_processes
from regularized.mechanisms.distributed import leave_process_group
from regularized.training.objective import Objective
from regularized.training.progress import Progress
from regularized.training.step import Batch, Step

__all__ = ["CHECKS"]


def check_it_bites(subject: Subject) -> None:
    """With the technique on, training ends elsewhere than plain training.

    In the weights; or, where surgery has given them other names, in the outputs for data that training never saw.
    """
    on, plain = train(subject, subject.terms()), train(subject, subject.plain())
    if on.weights.keys() == plain.weights.keys():
        assert distance(on.weights, plain.weights) > 1e-6, "the technique does not change the weights at all"
        return
    held_out = Batch.of(subject.data(BATCH, 1))
    apart = float((_outputs(on, held_out) - _outputs(plain, held_out)).abs().max())
    assert apart > 1e-4, (
        f"the technique gives the model other parameters, but after training its outputs differ from the plain "
        f"model's by {apart:.3g} only"
    )


def _outputs(trained: Trained, batch: Batch) -> Tensor:
    trained.model.eval()
    with torch.no_grad():
        return Step(trained.model, batch, Progress(0, 1)).logits.double()


def check_deterministic(subject: Subject) -> None:
    """Two equal runs give equal weights: all randomness is seeded."""
    first, second = (train(subject, subject.terms()).weights for _ in range(2))
    assert equal(first, second), "two runs with the same seed differ"


def check_coefficient_zero(subject: Subject) -> None:
    """Coefficient 0 is plain training, bit for bit."""
    if isinstance(subject.off, NotApplicable):
        raise NotApplicable(str(subject.off))
    off, plain = train(subject, subject.off()).weights, train(subject, subject.plain()).weights
    assert equal(off, plain), f"coefficient 0 differs from plain training by {distance(off, plain):.3g}"


def check_accumulation(subject: Subject) -> None:
    """One batch of 8, two of 4 and four of 2 give the same weights up to rounding."""
    whole = train(subject, subject.terms()).weights
    for parts in (2, 4):
        split = train(subject, subject.terms(), accumulate=parts).weights
        apart = distance(whole, split)
        assert apart < 1e-4, f"{parts} accumulated parts differ from the whole batch by {apart:.3g}"


def check_two_processes(subject: Subject) -> None:
    """Two gloo processes with different data give the gradients, weights and state of one process."""
    whole = train(subject, subject.terms())
    with tempfile.TemporaryDirectory() as folder:
        run_in_processes(_worker, subject, folder)
        for rank in range(2):
            saved = torch.load(Path(folder) / f"{rank}.pt", weights_only=True)
            for ours, theirs in zip(whole.gradients, saved["gradients"], strict=True):
                worst = float((ours - theirs).abs().max())
                assert worst < 1e-5, f"rank {rank}: gradient differs from one process by {worst:.3g}"
            apart = distance(whole.weights, saved["weights"])
            assert apart < 1e-5, f"rank {rank}: weights differ from one process by {apart:.3g}"
            for name, tensor in whole.objective.state_dict().items():
                worst = float((tensor.double() - saved["state"][name].double()).abs().max()) if tensor.numel() else 0.0
                assert worst < 1e-4, f"rank {rank}: state {name!r} differs from one process by {worst:.3g}"


def _worker(rank: int, subject: Subject, folder: str) -> None:
    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=f"file://{folder}/rendezvous", rank=rank, world_size=2)
    mine = train(subject, subject.terms(), rank=rank, world=2)
    state = dict(mine.objective.state_dict())
    torch.save({"weights": mine.weights, "gradients": mine.gradients, "state": state}, Path(folder) / f"{rank}.pt")
    del mine
    leave_process_group()


def check_state_survives(subject: Subject) -> None:
    """State saved, loaded into fresh terms: every buffer is there, equal, and survives a deep copy."""
    state = train(subject, subject.terms()).objective.state_dict()
    if not state:
        raise NotApplicable("the terms keep no state")
    fresh = Objective(subject.terms())
    torch.manual_seed(0)
    model = subject.model()
    for attach in fresh.moments("attach"):
        attach(model)
    missing, unexpected = fresh.load_state_dict(state, strict=False)
    assert not [*missing, *unexpected], f"state_dict mismatch: missing {missing}, unexpected {unexpected}"
    for name, tensor in fresh.state_dict().items():
        assert torch.equal(tensor, state[name]), f"state {name!r} did not survive"
    copied = copy.deepcopy(fresh)
    assert equal(dict(copied.state_dict()), dict(fresh.state_dict())), "a deep copy differs"


def check_bf16(subject: Subject) -> None:
    """Under bfloat16 autocast the training stays finite and near the float32 one."""
    exact = train(subject, subject.terms(), epochs=1).weights
    low = train(subject, subject.terms(), epochs=1, autocast=True).weights
    for name, tensor in low.items():
        assert bool(torch.isfinite(tensor).all()), f"{name} is not finite after an epoch in bf16"
    apart = distance(exact, low)
    assert apart < 0.1, f"bf16 autocast ends {apart:.3g} away from float32 after one epoch"


def check_compile(subject: Subject) -> None:
    """``torch.compile`` takes the part whole, without a graph break, and its values and gradients stay."""
    if isinstance(subject.part, NotApplicable):
        raise NotApplicable(str(subject.part))
    torch.compiler.reset()
    results = []
    for compiled in (False, True):
        torch.manual_seed(0)
        part, arguments = subject.part()
        leaves = [a for a in arguments if isinstance(a, Tensor) and a.requires_grad]
        function = torch.compile(part, fullgraph=True, backend="aot_eager") if compiled else part
        out = function(*arguments)
        value = out.sum() if isinstance(out, Tensor) else sum(o.sum() for o in out)
        grads = torch.autograd.grad(value, leaves) if leaves else ()
        results.append((value.detach(), grads))
    torch.testing.assert_close(results[1][0], results[0][0])
    for ours, theirs in zip(results[1][1], results[0][1], strict=True):
        torch.testing.assert_close(ours, theirs)


def check_gpu(subject: Subject) -> None:
    """On a GPU, where there is one, training ends near that on the CPU."""
    needs_gpu("where the training would end in the same place")
    cpu = train(subject, subject.terms()).weights
    gpu = train(subject, subject.terms(), device="cuda").weights
    apart = distance(cpu, {name: tensor.cpu() for name, tensor in gpu.items()})
    assert apart < 1e-3, f"the GPU ends {apart:.3g} away from the CPU"


def check_attach(subject: Subject) -> None:
    """Surgery is idempotent."""
    objective, model = _after_surgery(subject)
    once = {name: p.detach().clone() for name, p in model.named_parameters()}
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        for attach in objective.moments("attach"):
            attach(model)
    assert equal(once, dict(model.named_parameters())), "attaching twice differs from attaching once"


def check_merge(subject: Subject) -> None:
    """Merging leaves a plain model with the same outputs and parameter names."""
    objective, model = _after_surgery(subject)
    merges = objective.moments("merge")
    if not merges:
        raise NotApplicable("no term has a `merge`")
    torch.manual_seed(0)
    plain_names = set(subject.model().state_dict())
    inputs = Batch.of(subject.data(BATCH, 0)).inputs
    model.eval()
    with torch.no_grad():
        before = model(inputs)
        for merge in merges:
            merge(model)
        after = model(inputs)
    assert torch.equal(before, after), "merging changed the output"
    assert set(model.state_dict()) == plain_names, "the merged model is not a plain one"


def _after_surgery(subject: Subject) -> tuple[Objective, nn.Module]:
    objective = Objective(subject.terms())
    attaches = objective.moments("attach")
    if not attaches:
        raise NotApplicable("no term has an `attach`")
    torch.manual_seed(0)
    model = subject.model()
    for attach in attaches:
        attach(model)
    return objective, model


CHECKS: Mapping[str, Callable[[Subject], None]] = {
    "it_bites": check_it_bites,
    "deterministic": check_deterministic,
    "coefficient_zero": check_coefficient_zero,
    "accumulation": check_accumulation,
    "two_processes": check_two_processes,
    "state": check_state_survives,
    **TRAINER_CHECKS,
    "bf16": check_bf16,
    "fp16": check_fp16,
    "compile": check_compile,
    "compile_step": check_compile_step,
    "gpu": check_gpu,
    "attach": check_attach,
    "merge": check_merge,
}
