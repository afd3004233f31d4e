"""SORSA in transformers' Trainer and in our loop, on PEFT."""

import copy

import pytest
import torch

pytest.importorskip("peft", reason='needs the extra "peft"')

import transformers
from torch import nn
from torch.nn import functional as F

from regularized.evidence.pretrained import tiny_llama
from regularized.fine_tuning.peft_host import factor_layers
from regularized.fine_tuning.sorsa.huggingface import SorsaCallback
from regularized.fine_tuning.sorsa.layer import SorsaLinear, inject_sorsa
from regularized.fine_tuning.sorsa.peft import inject, load
from regularized.fine_tuning.sorsa.penalty import OrthonormalPenalty
from regularized.fine_tuning.sorsa.term import Sorsa
from regularized.training import CrossEntropy
from regularized.training.progress import Progress
from regularized.training.step import Batch, Step

TARGETS = ["q_proj", "down_proj"]


def samples(n=8):
    tokens = torch.randint(256, (n, 6), generator=torch.Generator().manual_seed(3))
    return [{"input_ids": row, "labels": row} for row in tokens]


def arguments(folder, **settings):
    shared = {
        "max_steps": 3,
        "per_device_train_batch_size": 4,
        "learning_rate": 0.05,
        "lr_scheduler_type": "constant",
        "optim": "sgd",
        "max_grad_norm": 1.0,
        "report_to": [],
        "use_cpu": True,
        "disable_tqdm": True,
        "save_strategy": "no",
        "logging_strategy": "no",
        "weight_decay": 0.0,
    }
    return transformers.TrainingArguments(str(folder), **{**shared, **settings})


def stretched(model):
    """Factors away from orthonormal: at the start of training, rounding alone decides whether the penalty acts."""
    with torch.no_grad():
        for _, layer in factor_layers(model):
            layer.sorsa_left.default.mul_(1.1)
    return model


def trained(folder, *, gamma=0.01, resume=None, prepare=lambda model: model, **settings):
    model = prepare(inject(tiny_llama(0), TARGETS, r=3, task_type="CAUSAL_LM"))
    trainer = transformers.Trainer(
        model, arguments(folder, **settings), train_dataset=samples(), callbacks=[SorsaCallback(gamma)]
    )
    trainer.train(resume_from_checkpoint=resume)
    return trainer


def factors(model):
    return {name: p.detach().clone() for name, p in model.named_parameters() if p.requires_grad}


def distance(a, b):
    assert a.keys() == b.keys()
    return max(float((a[name] - b[name]).abs().max()) for name in a)


def test_penalty_in_transformers_trainer(tmp_path):
    """Fails when the callback is not called, or accumulation changes its share (PEFT's AdaLoRA multiplies it)."""
    split_up = {"per_device_train_batch_size": 1, "gradient_accumulation_steps": 4}
    whole = factors(trained(tmp_path, prepare=stretched).model)
    split = factors(trained(tmp_path, prepare=stretched, **split_up).model)
    without = factors(trained(tmp_path, prepare=stretched, gamma=0.0).model)
    assert distance(whole, split) < 1e-5
    assert distance(whole, without) > 1e-3


def test_one_step_of_the_trainer_by_hand(tmp_path):
    """Fails when the penalty is added before the clip, not at all, or with another rate than the peak one."""
    gamma, lr = 0.01, 0.05
    by_hand = stretched(inject(tiny_llama(0), TARGETS, r=3))
    automatic = copy.deepcopy(by_hand)
    data = samples(4)
    trainer = transformers.Trainer(
        automatic,
        arguments(tmp_path, max_steps=1, learning_rate=lr, max_grad_norm=0.1),
        train_dataset=data,
        callbacks=[SorsaCallback(gamma)],
    )
    trainer.train()
    tokens = torch.stack([row["input_ids"] for row in data])
    by_hand(input_ids=tokens, labels=tokens).loss.backward()
    own = [p for p in by_hand.parameters() if p.requires_grad]
    nn.utils.clip_grad_norm_(own, 0.1)
    OrthonormalPenalty(by_hand, gamma=gamma, lr=lr).add_gradient()
    torch.optim.SGD(own, lr=lr).step()
    assert distance(factors(automatic), factors(by_hand)) < 1e-6


def test_resumed_from_a_checkpoint_of_the_adapter(tmp_path):
    """Fails when the checkpoint of ``Trainer`` does not bring the adapter back onto a freshly injected model."""
    settings = {"save_strategy": "steps", "save_steps": 2, "optim": "adamw_torch", "max_steps": 4}
    whole = trained(tmp_path, **settings)
    assert not list((tmp_path / "checkpoint-2").glob("model*")), "the base model is not part of it"
    resumed = trained(tmp_path, **settings, resume=str(tmp_path / "checkpoint-2"))
    assert distance(factors(whole.model), factors(resumed.model)) == 0.0
    alone = load(tiny_llama(0), tmp_path / "checkpoint-4")
    tokens = samples(2)[0]["input_ids"][None]
    torch.testing.assert_close(alone(tokens).logits, whole.model.eval()(tokens).logits)


def test_weight_decay_is_warned_about(tmp_path):
    """Fails when the optimizer of the Trainer is not looked at."""
    with pytest.warns(UserWarning, match="weight_decay=0.1 on singular vectors"):
        trained(tmp_path, weight_decay=0.1)


def test_errors(tmp_path):
    model = inject(tiny_llama(0), TARGETS, r=3)
    callback, state, control = SorsaCallback(), transformers.TrainerState(), transformers.TrainerControl()
    half = arguments(tmp_path, max_grad_norm=0.0)
    half.fp16 = True
    with pytest.raises(ValueError, match="max_grad_norm"):
        callback.on_train_begin(half, state, control, model=model)
    with pytest.raises(ValueError, match="no SORSA layers"):
        callback.on_train_begin(arguments(tmp_path), state, control, model=tiny_llama(0))
    with pytest.raises(ValueError, match="gamma must be >= 0"):
        SorsaCallback(-1.0)
    frozen = inject(tiny_llama(0), TARGETS, r=3).requires_grad_(False)
    with pytest.raises(RuntimeError, match="the adapter is frozen"):
        OrthonormalPenalty(frozen, lr=0.1).add_gradient()


def test_plain_layer_and_layer_of_peft_are_one():
    """Fails when the two implementations drift apart: equal outputs, equal gradients, equal penalty."""
    torch.manual_seed(0)
    base = nn.Sequential(nn.Linear(7, 9), nn.Tanh(), nn.Linear(9, 4)).double()
    plain, on_peft = copy.deepcopy(base), inject(copy.deepcopy(base), ["0", "2"], r=3, alpha=6.0)
    inject_sorsa(plain, r=3, alpha=6.0)
    generator = torch.Generator().manual_seed(1)
    ours = [p for layer in plain if isinstance(layer, SorsaLinear) for p in (layer.left, layer.values, layer.right)]
    theirs = [getattr(layer, name).default for _, layer in factor_layers(on_peft) for name in layer.trainable]
    with torch.no_grad():
        for a, b in zip(ours, theirs, strict=True):
            assert torch.equal(a, b)
            noise = 0.1 * torch.randn(a.shape, generator=generator, dtype=a.dtype)
            a.add_(noise)
            b.add_(noise)
    x = torch.randn(5, 7, dtype=torch.float64)
    for model in (plain, on_peft):
        model(x).square().sum().backward()
        OrthonormalPenalty(model, gamma=0.1, lr=0.5).add_gradient()
    torch.testing.assert_close(plain(x), on_peft(x))
    for a, b in zip(ours, theirs, strict=True):
        torch.testing.assert_close(a.grad, b.grad)


def test_term_takes_a_model_of_peft():
    """Fails when the term injects a second time, or merges what was there before it."""
    model = inject(tiny_llama(0), TARGETS, r=3)
    names = set(model.state_dict())
    term = Sorsa(r=99, lr=0.1, gamma=0.5)
    term.attach(model)
    tokens = samples(2)[0]["input_ids"][None]
    F.cross_entropy(model(tokens).logits[0], tokens[0]).backward()
    with torch.no_grad():
        for _, layer in factor_layers(model):
            layer.sorsa_left.default.mul_(1.5)
    before = {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}
    term.before_step(Step(model, Batch.of((tokens, tokens)), Progress(0, 1)))
    after = {name: p.grad for name, p in model.named_parameters() if p.grad is not None}
    assert distance(before, after) > 0.01
    term.merge(model)
    assert set(model.state_dict()) == names
    assert CrossEntropy.contributes
    assert not term.contributes
