"""What only a GPU can show: no wait for the device in a step, flags that arrive late, rows that meet, bf16 there.

Everything here is skipped on a machine without one. The contract suite compares CPU and GPU results besides.
"""

import copy
import warnings

import pytest
import torch
from tests.contracts import offered
from torch import nn

from regularized import odeint, sdeint
from regularized.evidence.contract import Subject
from regularized.evidence.contract.loop import distance, train
from regularized.mechanisms.sample_history import store_rows
from regularized.mechanisms.taps import Taps
from regularized.papers.catalogue import load_catalogue
from regularized.training import (
    Batch,
    Checkpoints,
    CrossEntropy,
    NonFiniteLoss,
    Objective,
    Progress,
    Step,
    TensorData,
    Term,
    Trainer,
)

pytestmark = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")

SUBJECTS = [
    (entry.slug, subject)
    for entry in load_catalogue()
    if entry.implemented
    for subject in offered(entry)
    if isinstance(subject, Subject)
]
LONG = 1000
IDS = [f"{slug}-{subject.name}" for slug, subject in SUBJECTS]


def trained_steps(subject, steps, *, watch):
    """Train on the GPU; from the second step on, a wait for the device is an error where ``watch`` is set."""
    torch.manual_seed(0)
    model = subject.model()
    objective = Objective(subject.terms())
    for attach in objective.moments("attach"):
        attach(model)
    model.to("cuda")
    objective.to("cuda")
    optimizer = subject.optimizer(objective.parameter_groups(model))
    batch = Batch.of({name: tensor.to("cuda") for name, tensor in subject.data(8, 0).items()})
    taps = Taps(model, objective.taps)
    # The first steps of a long training: what happens once in it, such as a new selection at half time, may wait.
    for moment in objective.moments("epoch_start"):
        moment(Progress(0, LONG, 0, 1))
    for number in range(steps):
        torch.cuda.set_sync_debug_mode("error" if watch and number else "default")
        try:
            window = [batch]
            for transform in objective.moments("transform"):
                window = [transform(one) for one in window]
            taps.clear()
            step = Step(model, window[0], Progress(number, LONG, 0, 1), taps.states)
            loss = objective.loss(step, objective.counts(window, device=torch.device("cuda")))
            loss.backward()
            for moment in objective.moments("before_step"):
                moment(step)
            optimizer.step()
            for moment in objective.moments("after_step"):
                moment(step)
            optimizer.zero_grad()
        finally:
            torch.cuda.set_sync_debug_mode("default")
    taps.remove()
    return model


@pytest.mark.parametrize(("slug", "subject"), SUBJECTS, ids=IDS)
def test_a_step_never_waits_for_the_device(slug, subject):
    """Fails for an `.item()`, a host branch on a tensor, or boolean indexing in a step."""
    trained_steps(subject, 4, watch=True)


@pytest.mark.parametrize(("slug", "subject"), SUBJECTS, ids=IDS)
def test_bf16_on_the_gpu(slug, subject):
    exact = train(subject, subject.terms(), epochs=1, device="cuda").weights
    low = train(subject, subject.terms(), epochs=1, device="cuda", autocast=True).weights
    assert all(bool(tensor.isfinite().all()) for tensor in low.values())
    assert distance(exact, low) < 0.1


class Poisoned(Term):
    """Not a number in the third step."""

    def forward(self, step):
        return step.logits.sum() * (float("nan") if step.progress.step == 2 else 1e-3)


def test_a_loss_that_is_not_finite_is_named(tmp_path):
    """The flag travels asynchronously: it must be read before the next step, and before any checkpoint."""
    x, y = torch.randn(32, 4, device="cuda"), torch.randint(3, (32,), device="cuda")
    trainer = Trainer(
        nn.Linear(4, 3),
        terms={"task": CrossEntropy(), "poison": Poisoned()},
        optimizer=lambda groups: torch.optim.SGD(groups, lr=0.1),
        checkpoints=Checkpoints(tmp_path, every=1),
    )
    with pytest.raises(NonFiniteLoss, match="step 2: term 'poison'"):
        trainer.fit(TensorData(x, y, batch_size=8), epochs=2)
    for file in tmp_path.rglob("*.safetensors"):
        from safetensors.torch import load_file

        assert all(bool(tensor.isfinite().all()) for tensor in load_file(file).values()), "a spoilt checkpoint"


def test_resume_on_the_gpu(tmp_path):
    """Interrupted in the middle of an epoch and resumed, training ends where the uninterrupted one ends."""
    x, y = torch.randn(48, 6), torch.randint(3, (48,))

    def trainer(folder):
        torch.manual_seed(0)
        model = nn.Sequential(nn.Linear(6, 16), nn.ReLU(), nn.Dropout(0.2), nn.Linear(16, 3))
        return model, Trainer(
            model,
            terms={"task": CrossEntropy()},
            optimizer=lambda groups: torch.optim.AdamW(groups, lr=0.01),
            checkpoints=folder and Checkpoints(folder, every=1),
        )

    data = TensorData(x, y, batch_size=8, seed=1)
    whole, one = trainer(None)
    one.fit(data, epochs=3)
    assert next(whole.parameters()).is_cuda
    trainer(tmp_path)[1].fit(data, epochs=3, max_steps=9)
    resumed, other = trainer(tmp_path)
    other.fit(data, epochs=3, resume=True)
    for a, b in zip(whole.parameters(), resumed.parameters(), strict=True):
        torch.testing.assert_close(a, b, rtol=1e-6, atol=1e-7)


def _waits(work):
    """How often the host waits for the device in this work, and what comes of it."""
    with warnings.catch_warnings(record=True) as seen:
        warnings.simplefilter("always")
        torch.cuda.set_sync_debug_mode("warn")
        try:
            result = work()
        finally:
            torch.cuda.set_sync_debug_mode("default")
    return sum("synchronizing" in str(warning.message) for warning in seen), result


@pytest.mark.parametrize("graph", [True, False], ids=["graph", "no_grad"])
@pytest.mark.parametrize("kind", ["ordinary", "stochastic"])
def test_an_adaptive_solve_reads_one_number_an_attempt(kind, graph):
    """A read for each attempted step and one for the first step size, none in the backward pass; the CPU's results.

    Fails for a second `float()` in the loop, for coefficients that are copied to the device in each solve, and for a
    time tensor made on the host.
    """
    torch.manual_seed(0)
    net = nn.Sequential(nn.Linear(6, 16), nn.Tanh(), nn.Linear(16, 6)).double()
    start = torch.randn(8, 6, dtype=torch.float64)
    results = []
    for device in ("cpu", "cuda"):
        model, u = copy.deepcopy(net).to(device), start.to(device)

        def drift(t, v, model=model):
            return 6.0 * model(v) * (7.0 * t).cos()

        def solve(u=u, drift=drift):
            if kind == "ordinary":
                return odeint(drift, u, [0.0, 0.3, 1.0], rtol=1e-6, atol=1e-6)
            return sdeint(drift, lambda t, v: 0.0 * v, u, [0.0, 0.3, 1.0], rtol=0.1, atol=0.1)

        with torch.set_grad_enabled(graph):
            solve()  # the first solve on a device copies the coefficients there
            waits, solution = _waits(solve) if device == "cuda" else (0, solve())
        statistics = solution.statistics
        assert waits <= len(statistics.step_sizes) + statistics.rejected + 1
        if graph:
            backward, _ = _waits(
                lambda s=solution: (s.states[-1].sum() + s.statistics.errors_times_steps.sum()).backward()
            )
            assert backward == 0
            gradient = model[0].weight.grad.cpu()
        else:
            gradient = torch.zeros(())
        results.append((solution.states.detach().cpu(), torch.tensor(statistics.step_sizes), gradient))
    for cpu, gpu in zip(*results, strict=True):
        torch.testing.assert_close(gpu, cpu, rtol=1e-6, atol=1e-8)


def test_repeated_rows_have_a_defined_result():
    """A sample that is in a batch more than once: the last row wins, as on the CPU."""
    index = torch.tensor([3, 1, 3, 0, 3])
    rows = torch.arange(10.0).reshape(5, 2)
    results = []
    for device in ("cpu", "cuda"):
        table = torch.zeros(5, 2, device=device)
        store_rows(table, index.to(device), rows.to(device))
        results.append(table.cpu())
    torch.testing.assert_close(*results)


@pytest.mark.parametrize("max_grad_norm", [0.0, 1e6], ids=["unclipped", "clipped"])
def test_fp16_gradients_reach_terms_unscaled(max_grad_norm, tmp_path):
    """Fails when `before_step` sees gradients times fp16's loss scale in transformers' loop (65536 at first)."""
    transformers = pytest.importorskip("transformers")
    from regularized.training.huggingface import TermsTrainer

    class Watch(Term):
        def __init__(self):
            super().__init__()
            self.norms = []

        def forward(self, step):
            return step.output.logits.sum() * 0.0

        def before_step(self, step):
            grads = [p.grad.detach().float() for p in step.model.parameters() if p.grad is not None]
            self.norms.append(torch.stack([grad.norm() for grad in grads]).norm().item())

    config = transformers.BertConfig(
        vocab_size=20,
        hidden_size=8,
        num_hidden_layers=1,
        num_attention_heads=1,
        intermediate_size=8,
        num_labels=2,
        hidden_dropout_prob=0.0,
        attention_probs_dropout_prob=0.0,
    )
    data = [{"input_ids": torch.arange(i, i + 5) % 20, "labels": i % 2} for i in range(16)]
    norms = {}
    for fp16 in (False, True):
        torch.manual_seed(0)
        watch = Watch()
        TermsTrainer(
            transformers.BertForSequenceClassification(config),
            transformers.TrainingArguments(
                tmp_path,
                max_steps=3,
                per_device_train_batch_size=8,
                report_to=[],
                disable_tqdm=True,
                fp16=fp16,
                max_grad_norm=max_grad_norm,
                save_strategy="no",
                seed=0,
                learning_rate=1e-5,
            ),
            terms={"task": CrossEntropy(), "watch": watch},
            train_dataset=data,
        ).train()
        norms[fp16] = watch.norms
    assert len(norms[True]) == 3
    torch.testing.assert_close(torch.tensor(norms[True]), torch.tensor(norms[False]), rtol=0.05, atol=0.0)
