"""The terms in Hugging Face's Trainer do what they do in ours: loss curve, weights, state, resume, two processes."""

import builtins
import importlib
import sys
from functools import partial

import pytest
import torch
from tests.training import adapter_cases as cases
from torch import nn
from transformers import Trainer as PlainTrainer
from transformers import TrainerCallback, TrainingArguments

from regularized.training import Batch, CrossEntropy, NonFiniteLoss, Term
from regularized.training.checkpoint import CheckpointError

SAMPLES = 22  # batches of 8: the last step of an epoch has 6, which are 2 or 3 micro-batches instead of 2 or 4
TAP = "bert.embeddings"
SPLITS = [(8, 1), (4, 2), (2, 4)]


def _train(folder, batch, accumulate, **settings):
    trainer = cases.huggingface(folder, cases.rows(*cases.sentences(SAMPLES)), batch, accumulate, **settings)
    trainer.train()
    return trainer


def _logged(trainer):
    return [entry for entry in trainer.state.log_history if "loss" in entry]


def _same(a, b, *, tolerance=0.0):
    assert a.keys() == b.keys()
    for name in a:
        assert torch.allclose(a[name], b[name], rtol=tolerance, atol=tolerance), (
            f"{name} differs by {(a[name] - b[name]).abs().max()}"
        )


@pytest.mark.parametrize(("batch", "accumulate"), SPLITS)
def test_equals_our_loop_bit_for_bit(batch, accumulate, tmp_path):
    """Fails if a moment comes too early, late or twice, a share is divided again, or clipping leaves a term out."""
    x, y = cases.sentences(SAMPLES)
    model, named = cases.bert(), cases.terms(SAMPLES, TAP)
    batches = [
        {"input_ids": x[index], "labels": y[index], "index": index} for index in torch.arange(SAMPLES).split(batch)
    ]
    records, _ = cases.ours(model, named, batches, accumulate, tmp_path / "ours")
    trainer = _train(tmp_path / "theirs", batch, accumulate)
    _same(cases.state(model, _holder(named)), cases.state(trainer.model, trainer.objective))
    logged = [{name: entry[f"terms/{name}"] for name in records[0]} for entry in _logged(trainer)]
    assert logged == records


def _holder(named):
    holder = nn.Module()
    holder.terms = nn.ModuleDict(named)
    return holder


@pytest.mark.parametrize(("batch", "accumulate"), SPLITS)
def test_equals_the_whole_batch_by_hand(batch, accumulate, tmp_path):
    """Fails if a penalty counts once a micro-batch, labels are counted before the transform or for each micro-batch by
    itself, an incomplete last step is scaled as a full one, or the terms' own parameters are not trained."""
    losses, expected = cases.by_hand(cases.bert(), TAP, *cases.sentences(SAMPLES), 8)
    trainer = _train(tmp_path, batch, accumulate)
    assert [entry["loss"] for entry in _logged(trainer)] == pytest.approx(losses, rel=2e-5)
    found = cases.state(trainer.model, trainer.objective)
    for name, value in expected.items():
        key = f"terms.remember.{name}" if name in ("scale", "history") else f"model.{name}"
        assert torch.allclose(found[key], value, rtol=1e-4, atol=2e-6), name
    epochs, steps, norm = found["terms.remember.moments"].tolist()
    assert (epochs, steps) == (2, 6)
    assert norm == pytest.approx(cases.CLIP, rel=1e-4)  # seen after clipping, over model and terms together


def test_why_the_adapter_exists(tmp_path):
    """A penalty added in compute_loss counts K times in transformers. Should this fail, the docs can be shortened."""

    class Naive(PlainTrainer):
        strength = 1.0

        def compute_loss(self, model, inputs, return_outputs=False, num_items_in_batch=None):
            loss = super().compute_loss(model, inputs, num_items_in_batch=num_items_in_batch)
            return loss + self.strength * cases.penalty(model)

    def step(strength, batch, accumulate):
        data = [{k: v for k, v in row.items() if k != "index"} for row in cases.rows(*cases.sentences(8))]
        settings = {"max_steps": 1, "max_grad_norm": 0.0, "lr_scheduler_type": "constant", "report_to": [], "seed": 0}
        trainer = Naive(
            cases.bert(),
            TrainingArguments(
                str(tmp_path), per_device_train_batch_size=batch, gradient_accumulation_steps=accumulate, use_cpu=True,
                train_sampling_strategy="sequential", save_strategy="no", logging_strategy="no", **settings,
            ),
            train_dataset=data,
            optimizer_cls_and_kwargs=(torch.optim.SGD, {"lr": 1.0}),
        )  # fmt: skip
        trainer.strength = strength
        trainer.train()
        return torch.cat([p.detach().flatten() for p in trainer.model.parameters()])

    effect = {k: (step(1.0, b, k) - step(0.0, b, k)).norm().item() for b, k in SPLITS}
    assert effect[2] == pytest.approx(2 * effect[1], rel=1e-3)
    assert effect[4] == pytest.approx(4 * effect[1], rel=1e-3)


class _Stop(TrainerCallback):
    def __init__(self, at):
        self.at = at

    def on_step_end(self, args, state, control, **_):
        control.should_training_stop = control.should_training_stop or state.global_step == self.at


@pytest.mark.parametrize("stop", [2, 3, 4])
def test_resumed_equals_uninterrupted(stop, tmp_path):
    """Fails if the state, generator or parameters of terms, or their optimizer state, are not in the checkpoint, or if
    an epoch starts twice. 3 steps an epoch: inside an epoch and at its end, with dropout, random order and noise."""

    def run(folder, resume=None, **settings):
        trainer = cases.huggingface(
            folder,
            cases.rows(*cases.sentences(SAMPLES)),
            4,
            2,
            model=cases.bert(dropout=0.2),
            named=cases.terms(SAMPLES, TAP, noise=0.1),
            train_sampling_strategy="random",
            save_strategy="steps",
            save_steps=1,
            **settings,
        )
        trainer.train(resume_from_checkpoint=resume)
        return cases.state(trainer.model, trainer.objective)

    expected = run(tmp_path / "whole")
    run(tmp_path / "parts", callbacks=[_Stop(stop)])
    folder = tmp_path / "parts" / f"checkpoint-{stop}"
    assert (folder / "terms.safetensors").is_file()
    torch.manual_seed(99)
    _same(run(tmp_path / "parts", resume=str(folder)), expected)


def test_checkpoint_of_another_run(tmp_path):
    """Fails if terms start silently anew from a checkpoint that does not have theirs."""
    trainer = _train(tmp_path, 8, 1, save_strategy="steps", save_steps=3, max_steps=3)
    other = cases.huggingface(
        tmp_path,
        cases.rows(*cases.sentences(SAMPLES)),
        8,
        1,
        named={"task": CrossEntropy(), "remember": cases.Remember(9)},
    )
    with pytest.raises(CheckpointError, match="not those of this run"):
        other.train(resume_from_checkpoint=str(tmp_path / "checkpoint-3"))
    (tmp_path / "checkpoint-3" / "terms.safetensors").unlink()
    with pytest.raises(CheckpointError, match=r"no terms\.safetensors"):
        trainer.train(resume_from_checkpoint=str(tmp_path / "checkpoint-3"))


def test_evaluation(tmp_path):
    """Fails if evaluation updates or needs per-sample state, passes labels or index to the model, or loses outputs."""
    x, y = cases.sentences(8)
    held_out = [{k: v for k, v in row.items() if k != "index"} for row in cases.rows(x, y)]
    seen = {}
    named = {name: term for name, term in cases.terms(SAMPLES, TAP).items() if name != "mask"}
    trainer = cases.huggingface(
        tmp_path, cases.rows(*cases.sentences(SAMPLES)), 8, 1, named=named, eval_dataset=held_out,
        eval_strategy="steps", eval_steps=2, per_device_eval_batch_size=8,
    )  # fmt: skip
    trainer.compute_metrics = lambda prediction: seen.update(shape=prediction.predictions.shape) or {}
    trainer.train()
    reference = _train(tmp_path, 8, 1, named={k: v for k, v in cases.terms(SAMPLES, TAP).items() if k != "mask"})
    _same(cases.state(trainer.model, trainer.objective), cases.state(reference.model, reference.objective))

    before = cases.state(trainer.model, trainer.objective)
    metrics = trainer.evaluate()
    with torch.no_grad():
        model, hidden = trainer.model.eval(), {}
        model.get_submodule(TAP).register_forward_hook(lambda m, i, output: hidden.update(value=output))
        logits = model(x).logits
        loss = nn.functional.cross_entropy(logits.reshape(-1, cases.CLASSES), y.reshape(-1)) + cases.penalty(model)
        loss += 0.5 * hidden["value"].square().mean()
    assert metrics["eval_loss"] == pytest.approx(loss.item(), rel=1e-5)
    assert seen["shape"] == (8, cases.LENGTH, cases.CLASSES)
    _same(cases.state(trainer.model, trainer.objective), before)
    without_labels = [{"input_ids": row["input_ids"], "index": 3} for row in held_out]
    assert trainer.predict(without_labels).predictions.shape == (8, cases.LENGTH, cases.CLASSES)


def test_evaluation_refuses_to_change_state(tmp_path):
    """Fails if a term that forgets `self.training` writes validation data into its history unnoticed."""

    class Careless(Term):
        def __init__(self):
            super().__init__()
            self.register_buffer("seen", torch.zeros(()))

        def forward(self, step):
            self.seen += 1
            return step.logits.sum() * 0.0

    data = cases.rows(*cases.sentences(8))
    trainer = cases.huggingface(tmp_path, data, 8, 1, named={"careless": Careless()}, eval_dataset=data)
    trainer.train()
    with pytest.raises(RuntimeError, match=r"careless\.seen"):
        trainer.evaluate()


def test_plain_module_and_index_column(tmp_path):
    """Fails if labels or index of a model without a `labels` argument are dropped as unused columns, or it is given
    them."""

    class Plain(nn.Module):
        def __init__(self):
            super().__init__()
            self.embedding = nn.Embedding(cases.VOCABULARY, 4)
            self.head = nn.Linear(4, cases.CLASSES)

        def forward(self, input_ids):
            return self.head(self.embedding(input_ids))

    data = [{**row, "unused": 1} for row in cases.rows(*cases.sentences(8))]
    trainer = cases.huggingface(
        tmp_path, data, 4, 2, model=Plain(), named=cases.terms(8, "embedding"), eval_dataset=data
    )
    trainer.train()
    assert trainer.objective.terms["remember"].history.abs().sum(1).min() > 0
    assert trainer.evaluate()["eval_loss"] > 0
    for rows in (data, [{"input_ids": row["input_ids"], "index": 3} for row in data]):
        assert trainer.predict(rows).predictions.shape == (8, cases.LENGTH, cases.CLASSES)


class _Surgery(Term):
    contributes = False

    def attach(self, model):
        nn.utils.parametrizations.weight_norm(model.classifier)


def test_surgery_comes_before_optimizer_and_checkpoint(tmp_path):
    """Fails if attach runs after the optimizer was built, or after a checkpoint was loaded into the bare model."""
    data = cases.rows(*cases.sentences(8))
    make = partial(cases.huggingface, tmp_path, data, 4, 2, save_strategy="steps", save_steps=1)
    trainer = make(named={"task": CrossEntropy(), "surgery": _Surgery()})
    before = [p.detach().clone() for p in trainer.model.classifier.parametrizations.parameters()]
    trainer.train()
    after = list(trainer.model.classifier.parametrizations.parameters())
    assert len(before) == 2
    assert all(not torch.equal(a, b) for a, b in zip(before, after, strict=True))
    resumed = make(named={"task": CrossEntropy(), "surgery": _Surgery()})
    resumed.train(resume_from_checkpoint=str(tmp_path / "checkpoint-1"))
    _same(cases.state(resumed.model, resumed.objective), cases.state(trainer.model, trainer.objective))

    model = cases.bert()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    stale = make(model=model, named={"task": CrossEntropy(), "r": cases.Remember(8)}, optimizers=(optimizer, None))
    with pytest.raises(ValueError, match=r"does not hold 1 trainable parameter.*r\.scale"):
        stale.train()


def test_transform_draws_after_the_random_state_is_restored(tmp_path):
    """Fails if transforms run while batches are fetched: transformers restores the random state only afterwards."""
    data = cases.rows(*cases.sentences(8))
    trainer = cases.huggingface(tmp_path, data, 4, 2)
    iterator = iter([{"input_ids": torch.zeros(4, 5, dtype=torch.long), "labels": torch.zeros(4, 5).long()}] * 2)
    calls = []
    trainer._transforms = [lambda batch: calls.append(batch) or batch]
    window, items = trainer.get_batch_samples(iterator, 2, torch.device("cpu"))
    assert len(window) == 2
    assert items is None
    assert not calls


def test_not_finite(tmp_path):
    """Fails if a NaN reaches the weights, or nobody says whose it was."""

    class Bad(Term):
        def forward(self, step):
            return step.logits.sum() * float("nan")

    data = cases.rows(*cases.sentences(8))
    trainer = cases.huggingface(tmp_path, data, 8, 1, named={"task": CrossEntropy(), "bad": Bad()})
    with pytest.raises(NonFiniteLoss, match="term 'bad'"):
        trainer.train()
    assert all(torch.isfinite(p).all() for p in trainer.model.parameters())


@pytest.mark.parametrize(
    ("settings", "says"),
    [
        ({"label_smoothing_factor": 0.1}, r"CrossEntropy\(label_smoothing"),
        ({"use_liger_kernel": True}, "use_liger_kernel"),
    ],
)
def test_refused(settings, says, tmp_path, monkeypatch):
    """Fails if an option that transformers would apply to its own loss is silently without effect."""
    with pytest.raises(ValueError, match=says):
        cases.huggingface(tmp_path, cases.rows(*cases.sentences(8)), 8, 1, **settings)


def test_causal_language_model(tmp_path):
    """Fails if shifted labels are counted or computed otherwise than transformers does it for its own loss."""
    from transformers import LlamaConfig, LlamaForCausalLM

    def model():
        torch.manual_seed(0)
        return LlamaForCausalLM(
            LlamaConfig(
                vocab_size=cases.VOCABULARY, hidden_size=8, intermediate_size=8, num_hidden_layers=1,
                num_attention_heads=2, num_key_value_heads=2, tie_word_embeddings=True,
            )
        )  # fmt: skip

    x, y = cases.sentences(SAMPLES)
    data = [{"input_ids": a, "labels": torch.where(b == -100, b, a)} for a, b in zip(x, y, strict=True)]
    trainer = cases.huggingface(tmp_path, data, 4, 2, model=model(), named={"task": CrossEntropy(shift=True)})
    trainer.train()
    plain = PlainTrainer(
        model(),
        trainer.args,
        train_dataset=data,
        optimizer_cls_and_kwargs=(torch.optim.SGD, {"lr": cases.RATE, "momentum": cases.MOMENTUM}),
    )
    plain.train()
    losses = [entry["loss"] for entry in _logged(plain)]
    assert [entry["loss"] for entry in _logged(trainer)] == pytest.approx(losses, rel=1e-5)
    _same(dict(trainer.model.state_dict()), dict(plain.model.state_dict()), tolerance=1e-5)


@pytest.mark.slow
def test_two_processes_equal_one(tmp_path):
    """Fails if counts are not summed over processes, shares are averaged, or parameters of terms drift apart."""
    trainer = cases.huggingface(tmp_path / "one", cases.rows(*cases.sentences(24)), 4, 2)
    trainer.train()
    first, second = cases.in_processes("huggingface", tmp_path, batch=2, accumulate=2)
    _same(first, second)
    losses = torch.tensor([entry["loss"] for entry in _logged(trainer)])
    _same(first, {**cases.state(trainer.model, trainer.objective), "losses": losses}, tolerance=2e-5)


def test_missing_extra(monkeypatch):
    """Fails if a person without transformers is not told what to install."""
    real = builtins.__import__

    def without(name, *rest):
        if name.split(".")[0] == "transformers":
            raise ModuleNotFoundError("No module named 'transformers'", name="transformers")
        return real(name, *rest)

    module = sys.modules.pop("regularized.training.huggingface", None)
    monkeypatch.setattr(builtins, "__import__", without)
    try:
        with pytest.raises(ImportError, match=r'pip install "regularized\[huggingface\]"'):
            importlib.import_module("regularized.training.huggingface")
    finally:
        if module is not None:
            sys.modules["regularized.training.huggingface"] = module


def test_batch_forms_survive(tmp_path):
    """Fails if a collator's own mapping type (as tokenizers return) is not understood."""
    from transformers import BatchEncoding

    encoded = BatchEncoding({"input_ids": torch.zeros(2, 5).long(), "labels": torch.zeros(2, 5).long()})
    assert Batch.of(encoded).size == 2
