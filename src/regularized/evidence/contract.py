"""One contract for every technique: what a paper offers to be checked, and the checks.

A paper's ``contract.py`` returns *subjects*, the smallest settings in which its terms train, and its *bad inputs*.
Each check takes a subject and raises ``AssertionError`` with what went wrong; third parties can run them on their own
terms::

    for name, check in CHECKS.items():
        check(my_subject)

The first check is that the technique changes training at all: without it the others could pass by doing nothing.
"""

import copy
import tempfile
import warnings
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any, TypeAlias

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

from regularized.evidence.processes import run_in_processes
from regularized.mechanisms.distributed import leave_process_group
from regularized.mechanisms.taps import Taps
from regularized.training.objective import Objective
from regularized.training.progress import Progress
from regularized.training.step import Batch, Step, call_model

__all__ = [
    "CHECKS",
    "DIAGNOSTIC_CHECKS",
    "PROCEDURE_CHECKS",
    "BadInput",
    "DiagnosticSubject",
    "ProcedureSubject",
    "Subject",
    "check_bad_input",
]

Terms: TypeAlias = Mapping[str, nn.Module]

SAMPLES, BATCH, EPOCHS = 24, 8, 3
_SGD = partial(torch.optim.SGD, lr=0.1, momentum=0.9)


@dataclass(frozen=True, slots=True)
class Subject:
    """The smallest setting in which a technique's terms train.

    Everything here must be a function at the top of a module: the two-process check sends it to other processes.

    Args:
        name: what it is, for test ids.
        model: builds the plain model; a seed is set before each call.
        terms: the terms with the technique switched on.
        plain: the terms of plain training.
        data: ``data(n, seed)`` gives a dictionary with ``inputs``, ``targets`` and ``index`` of n samples; ``index``
            is 0 ... n - 1.
        off: the terms with the technique's coefficient 0, which must equal plain training bit for bit; None where a
            zero coefficient is not defined.
        part: builds the plain part (a loss, a layer) and example arguments, for ``torch.compile``; None where the
            technique is not a differentiable function.
        optimizer: factory called with parameter groups; default SGD with momentum.
    """

    name: str
    model: Callable[[], nn.Module]
    terms: Callable[[], Terms]
    plain: Callable[[], Terms]
    data: Callable[[int, int], Mapping[str, Tensor]]
    off: Callable[[], Terms] | None = None
    part: Callable[[], tuple[Callable[..., Any], tuple[Any, ...]]] | None = None
    optimizer: Callable[..., torch.optim.Optimizer] = _SGD


@dataclass(frozen=True, slots=True)
class ProcedureSubject:
    """The smallest setting of a whole procedure (several networks or phases).

    Args:
        name: what it is, for test ids.
        build: builds the procedure, fresh; a seed is set before each call.
        train: ``train(procedure, epochs)`` trains for so many further epochs.
        weights: what the procedure has learned, by name.
    """

    name: str
    build: Callable[[], Any]
    train: Callable[[Any, int], None]
    weights: Callable[[Any], Mapping[str, Tensor]]


@dataclass(frozen=True, slots=True)
class DiagnosticSubject:
    """The smallest setting of a diagnostic: something that looks at a model and must not touch it.

    Args:
        name: what it is, for test ids.
        model: builds the model that is looked at; a seed is set before each call.
        report: ``report(model)`` gives the findings as tensors by name, on the model's device or the CPU.
    """

    name: str
    model: Callable[[], nn.Module]
    report: Callable[[nn.Module], Mapping[str, Tensor]]


@dataclass(frozen=True, slots=True)
class BadInput:
    """One line of a sheet's "bad input", and the error or warning that answers it.

    Args:
        line: the line, shortened.
        call: does the wrong thing.
        error: exception or warning class.
        says: words that its message must contain.
    """

    line: str
    call: Callable[[], Any]
    error: type[Exception]
    says: tuple[str, ...]


# -- a loop as small as it gets, so that the checks do not depend on the one they check ---------


def _train(
    subject: Subject,
    terms: Terms,
    *,
    accumulate: int = 1,
    epochs: int = EPOCHS,
    device: str = "cpu",
    autocast: bool = False,
    rank: int = 0,
    world: int = 1,
) -> tuple[dict[str, Tensor], list[Tensor], Objective]:
    """Train and return the final weights, the gradients of the last step, and the objective."""
    torch.manual_seed(0)
    model = subject.model()
    objective = Objective(terms)
    for attach in objective.moments("attach"):
        attach(model)
    model.to(device)
    objective.to(device)
    optimizer = subject.optimizer(objective.parameter_groups(model))
    trained = [p for group in optimizer.param_groups for p in group["params"]]
    wrapped: nn.Module = DistributedDataParallel(model) if world > 1 else model
    taps = Taps(model, objective.taps)

    def call(target: nn.Module, inputs: Any) -> Any:
        return call_model(wrapped if target is model else target, inputs)

    data = {name: tensor.to(device) for name, tensor in subject.data(SAMPLES, 0).items()}
    steps_an_epoch = SAMPLES // BATCH
    gradients: list[Tensor] = []
    for epoch in range(epochs):
        start = Progress(epoch * steps_an_epoch, epochs * steps_an_epoch, epoch, epochs)
        for moment in objective.moments("epoch_start"):
            moment(start)
        for i in range(steps_an_epoch):
            progress = Progress(start.step + i, start.total_steps, epoch, epochs)
            whole = torch.arange(i * BATCH, (i + 1) * BATCH, device=device)
            mine = whole.chunk(world)[rank].chunk(accumulate)
            window = [Batch.of({name: tensor[rows] for name, tensor in data.items()}) for rows in mine]
            for transform in objective.moments("transform"):
                window = [transform(batch) for batch in window]
            counts = objective.counts(window, device=torch.device(device))
            for m, batch in enumerate(window):
                taps.clear()
                step = Step(model, batch, progress, taps.states, call=call)
                with torch.autocast(torch.device(device).type, torch.bfloat16, enabled=autocast):
                    loss = objective.loss(step, counts, first=m == 0, scale=float(world))
                loss.backward()
            if world > 1:  # what a term trains itself is outside the wrapped model
                own = {id(p) for p in model.parameters()}
                for p in objective.parameters():
                    if p.grad is not None and id(p) not in own:
                        dist.all_reduce(p.grad)
                        p.grad /= world
            for moment in objective.moments("before_step"):
                moment(step)
            gradients = [p.grad.clone() for p in trained if p.grad is not None]
            optimizer.step()
            for moment in objective.moments("after_step"):
                moment(step)
            optimizer.zero_grad()
    taps.remove()
    return {name: p.detach().clone() for name, p in model.named_parameters()}, gradients, objective


def _distance(a: Mapping[str, Tensor], b: Mapping[str, Tensor]) -> float:
    assert a.keys() == b.keys(), f"parameters differ: {sorted(a.keys() ^ b.keys())}"
    return max(float((a[name].detach().double() - b[name].detach().double()).abs().max()) for name in a)


def _equal(a: Mapping[str, Tensor], b: Mapping[str, Tensor]) -> bool:
    return a.keys() == b.keys() and all(torch.equal(a[name], b[name]) for name in a)


# -- checks of terms ----------------------------------------------------------------------------


def check_it_bites(subject: Subject) -> None:
    """With the technique on, training ends elsewhere than plain training."""
    on, _, _ = _train(subject, subject.terms())
    plain, _, _ = _train(subject, subject.plain())
    if on.keys() == plain.keys():
        assert _distance(on, plain) > 1e-6, "the technique does not change the weights at all"


def check_deterministic(subject: Subject) -> None:
    """Two equal runs give equal weights: all randomness is seeded."""
    first, _, _ = _train(subject, subject.terms())
    second, _, _ = _train(subject, subject.terms())
    assert _equal(first, second), "two runs with the same seed differ"


def check_coefficient_zero(subject: Subject) -> None:
    """Coefficient 0 is plain training, bit for bit."""
    if subject.off is None:
        return
    off, _, _ = _train(subject, subject.off())
    plain, _, _ = _train(subject, subject.plain())
    assert _equal(off, plain), f"coefficient 0 differs from plain training by {_distance(off, plain):.3g}"


def check_accumulation(subject: Subject) -> None:
    """One batch of 8, two of 4 and four of 2 give the same weights up to rounding."""
    whole, _, _ = _train(subject, subject.terms())
    for parts in (2, 4):
        split, _, _ = _train(subject, subject.terms(), accumulate=parts)
        distance = _distance(whole, split)
        assert distance < 1e-4, f"{parts} accumulated parts differ from the whole batch by {distance:.3g}"


def check_two_processes(subject: Subject) -> None:
    """Two gloo processes with different data give the gradients, weights and state of one process."""
    whole, gradients, objective = _train(subject, subject.terms())
    with tempfile.TemporaryDirectory() as folder:
        run_in_processes(_worker, subject, folder)
        for rank in range(2):
            saved = torch.load(Path(folder) / f"{rank}.pt", weights_only=True)
            for ours, theirs in zip(gradients, saved["gradients"], strict=True):
                worst = float((ours - theirs).abs().max())
                assert worst < 1e-5, f"rank {rank}: gradient differs from one process by {worst:.3g}"
            distance = _distance(whole, saved["weights"])
            assert distance < 1e-5, f"rank {rank}: weights differ from one process by {distance:.3g}"
            for name, tensor in objective.state_dict().items():
                worst = float((tensor.double() - saved["state"][name].double()).abs().max()) if tensor.numel() else 0.0
                assert worst < 1e-4, f"rank {rank}: state {name!r} differs from one process by {worst:.3g}"


def _worker(rank: int, subject: Subject, folder: str) -> None:
    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=f"file://{folder}/rendezvous", rank=rank, world_size=2)
    weights, gradients, objective = _train(subject, subject.terms(), rank=rank, world=2)
    saved = {"weights": weights, "gradients": gradients, "state": dict(objective.state_dict())}
    torch.save(saved, Path(folder) / f"{rank}.pt")
    del objective
    leave_process_group()


def check_state_survives(subject: Subject) -> None:
    """State saved, loaded into fresh terms: every buffer is there, equal, and moves with ``.to()``."""
    _, _, objective = _train(subject, subject.terms())
    state = objective.state_dict()
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
    assert _equal(dict(copied.state_dict()), dict(fresh.state_dict())), "a deep copy differs"


def check_resume(subject: Subject) -> None:
    """Interrupted in the middle of an epoch and resumed from its checkpoint, the Trainer ends bit for bit the same."""
    from regularized.training.data import TensorData
    from regularized.training.trainer import Trainer

    def build(folder: Path | None) -> tuple[nn.Module, Trainer, TensorData]:
        torch.manual_seed(0)
        model = subject.model()
        tensors = subject.data(SAMPLES, 0)
        data = TensorData(tensors["inputs"], tensors["targets"], batch_size=BATCH, seed=3)
        trainer = Trainer(
            model,
            terms=subject.terms(),
            optimizer=subject.optimizer,
            checkpoint_dir=folder,
            checkpoint_every=1 if folder else None,
        )
        return model, trainer, data

    whole, trainer, data = build(None)
    trainer.fit(data, epochs=EPOCHS)
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        _, first, data = build(folder)
        first.fit(data, epochs=EPOCHS, max_steps=SAMPLES // BATCH + 1)
        resumed, second, data = build(folder)
        second.fit(data, epochs=EPOCHS, resume=True)
    distance = _distance(dict(whole.named_parameters()), dict(resumed.named_parameters()))
    assert distance == 0.0, f"the resumed run differs by {distance:.3g}"


def check_bf16(subject: Subject) -> None:
    """Under bfloat16 autocast the training stays finite and near the float32 one."""
    exact, _, _ = _train(subject, subject.terms(), epochs=1)
    low, _, _ = _train(subject, subject.terms(), epochs=1, autocast=True)
    for name, tensor in low.items():
        assert bool(torch.isfinite(tensor).all()), f"{name} is not finite after an epoch in bf16"
    distance = _distance(exact, low)
    assert distance < 0.1, f"bf16 autocast ends {distance:.3g} away from float32 after one epoch"


def check_compile(subject: Subject) -> None:
    """``torch.compile`` takes the part whole, without a graph break, and its values and gradients stay."""
    if subject.part is None:
        return
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
    if not torch.cuda.is_available():
        return
    cpu, _, _ = _train(subject, subject.terms())
    gpu, _, _ = _train(subject, subject.terms(), device="cuda")
    distance = _distance(cpu, {name: tensor.cpu() for name, tensor in gpu.items()})
    assert distance < 1e-3, f"the GPU ends {distance:.3g} away from the CPU"


def check_attach(subject: Subject) -> None:
    """Surgery is idempotent, and merging leaves a plain model with the same outputs and parameter names."""
    objective = Objective(subject.terms())
    attaches, merges = objective.moments("attach"), objective.moments("merge")
    if not attaches:
        return
    torch.manual_seed(0)
    model = subject.model()
    plain_names = set(model.state_dict())
    for attach in attaches:
        attach(model)
    once = {name: p.detach().clone() for name, p in model.named_parameters()}
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        for attach in attaches:
            attach(model)
    assert _equal(once, dict(model.named_parameters())), "attaching twice differs from attaching once"
    if not merges:
        return
    inputs = Batch.of(subject.data(BATCH, 0)).inputs
    model.eval()
    with torch.no_grad():
        before = model(inputs)
        for merge in merges:
            merge(model)
        after = model(inputs)
    assert torch.equal(before, after), "merging changed the output"
    assert set(model.state_dict()) == plain_names, "the merged model is not a plain one"


CHECKS: Mapping[str, Callable[[Subject], None]] = {
    "it_bites": check_it_bites,
    "deterministic": check_deterministic,
    "coefficient_zero": check_coefficient_zero,
    "accumulation": check_accumulation,
    "two_processes": check_two_processes,
    "state": check_state_survives,
    "resume": check_resume,
    "bf16": check_bf16,
    "compile": check_compile,
    "gpu": check_gpu,
    "attach": check_attach,
}


# -- checks of procedures -----------------------------------------------------------------------


def check_procedure_learns(subject: ProcedureSubject) -> None:
    """Training changes the weights, and two equal runs give equal weights."""
    results = []
    for _ in range(2):
        torch.manual_seed(0)
        procedure = subject.build()
        start = {name: tensor.clone() for name, tensor in subject.weights(procedure).items()}
        subject.train(procedure, 1)
        results.append({name: tensor.clone() for name, tensor in subject.weights(procedure).items()})
        assert _distance(start, results[-1]) > 0, "training changes nothing"
    assert _equal(*results), "two runs with the same seed differ"


def check_procedure_resume(subject: ProcedureSubject) -> None:
    """Saved after an epoch and loaded into a fresh procedure, the next epoch is bit for bit that of the first one."""
    torch.manual_seed(0)
    whole = subject.build()
    subject.train(whole, 1)
    with tempfile.TemporaryDirectory() as folder:
        torch.save(whole.state_dict(), Path(folder) / "state.pt")
        state = torch.load(Path(folder) / "state.pt", weights_only=True)
    torch.manual_seed(1)
    resumed = subject.build()
    resumed.load_state_dict(state)
    # One after the other, from the same global random state: a procedure draws from its own state or from this one.
    torch.manual_seed(2)
    subject.train(whole, 1)
    torch.manual_seed(2)
    subject.train(resumed, 1)
    a, b = subject.weights(whole), subject.weights(resumed)
    assert _equal(a, b), f"the resumed procedure differs by {_distance(a, b):.3g}"


PROCEDURE_CHECKS: Mapping[str, Callable[[ProcedureSubject], None]] = {
    "learns": check_procedure_learns,
    "resume": check_procedure_resume,
}


# -- checks of diagnostics ----------------------------------------------------------------------


def check_diagnostic_leaves_alone(subject: DiagnosticSubject) -> None:
    """Weights, buffers, gradients, modes, hooks and the global random state are afterwards what they were."""
    torch.manual_seed(0)
    model = subject.model()
    untouched = copy.deepcopy(model)
    random_state = torch.get_rng_state()
    subject.report(model)
    assert torch.equal(random_state, torch.get_rng_state()), "the report drew from the global random generator"
    assert _equal(dict(model.state_dict()), dict(untouched.state_dict())), "the report changed weights or buffers"
    for (name, ours), theirs in zip(model.named_modules(), untouched.modules(), strict=True):
        assert ours.training == theirs.training, f"{name!r} was left in another mode"
        hooks = len(ours._forward_hooks) + len(ours._forward_pre_hooks) + len(ours._backward_hooks)
        assert not hooks, f"{name!r} was left with hooks"
    for (name, p), before in zip(model.named_parameters(), untouched.parameters(), strict=True):
        assert p.grad is None, f"{name!r} was left with a gradient"
        assert p.requires_grad == before.requires_grad, f"{name!r} has another requires_grad"


def check_diagnostic_deterministic(subject: DiagnosticSubject) -> None:
    """Two reports on one model are equal, and free of autograd."""
    torch.manual_seed(0)
    model = subject.model()
    first, second = subject.report(model), subject.report(model)
    assert _equal(first, second), "two reports on the same model differ"
    assert not any(tensor.requires_grad for tensor in first.values()), "the report hangs on an autograd graph"


def check_diagnostic_sees(subject: DiagnosticSubject) -> None:
    """The report on another model differs: it says something about the model."""
    reports = []
    for seed in (0, 1):
        torch.manual_seed(seed)
        reports.append(subject.report(subject.model()))
    assert not _equal(*reports), "two different models get the same report"


def check_diagnostic_gpu(subject: DiagnosticSubject) -> None:
    """On a GPU, where there is one, the report is near that on the CPU."""
    if not torch.cuda.is_available():
        return
    torch.manual_seed(0)
    model = subject.model()
    cpu = subject.report(model)
    gpu = {name: tensor.cpu() for name, tensor in subject.report(model.to("cuda")).items()}
    distance = _distance(cpu, gpu)
    assert distance < 1e-3, f"the report on a GPU differs by {distance:.3g}"


DIAGNOSTIC_CHECKS: Mapping[str, Callable[[DiagnosticSubject], None]] = {
    "leaves_alone": check_diagnostic_leaves_alone,
    "deterministic": check_diagnostic_deterministic,
    "sees": check_diagnostic_sees,
    "gpu": check_diagnostic_gpu,
}


def check_bad_input(bad: BadInput) -> None:
    """The call raises or warns as promised, in words that help."""
    message: str | None = None
    if issubclass(bad.error, Warning):
        with warnings.catch_warnings(record=True) as caught:
            warnings.simplefilter("always")
            bad.call()
        message = next((str(w.message) for w in caught if issubclass(w.category, bad.error)), None)
    else:
        try:
            bad.call()
        except bad.error as error:
            message = str(error)
    assert message is not None, f"{bad.line}: no {bad.error.__name__} came"
    absent = [word for word in bad.says if word not in message]
    assert not absent, f"{bad.line}: the message lacks {absent}: {message}"
