"""CAST as a whole: surgery, teacher, guard of the optimizer, the final cut, and its state."""

import copy
import warnings
from functools import partial

import pytest
import torch
from torch import nn

from regularized.compression.cast import CAST, ScaledLinear, SparseAdamW, distillation_loss, follows_pattern
from regularized.evidence.pretrained import byte_tokens, tiny_llama
from regularized.training import Batch, CrossEntropy, Progress, Step, TensorData, Trainer, cosine

pytestmark = pytest.mark.filterwarnings("ignore:even at a constant rate")


def network(seed=0):
    torch.manual_seed(seed)
    return nn.Sequential(nn.Linear(8, 16), nn.ReLU(), nn.Linear(16, 4))


def data(n=64, seed=0):
    x = torch.randn(n, 8, generator=torch.Generator().manual_seed(seed))
    return x, x[:, :4].argmax(1)


def train(cast, model, steps=120, l1=0.1, lr=1e-2):
    optimizer = SparseAdamW(cast.param_groups(), lr, l1=l1, total_steps=steps)
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, steps)
    x, y = data()
    for _ in range(steps):
        distillation_loss(model(x), cast.teacher(x), y, eta=cast.eta).loss.backward()
        optimizer.step()
        schedule.step()
        optimizer.zero_grad()
    return optimizer


def test_the_cut_costs_nothing_after_enough_decay():
    """Fails when the decay does not bring to zero what the cut takes, or the cut and the fold are not those of W."""
    model = network()
    cast = CAST(model)
    train(cast, model)
    x, _ = data(seed=1)
    before = model(x)
    expected = {
        name: layer.scaled_weight().detach() * cast.masks()[name]
        for name, layer in model.named_modules()
        if isinstance(layer, ScaledLinear)
    }
    assert cast.residual() < 0.01
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        cast.finalize()
    assert (model(x) - before).abs().max() < 0.01 * before.abs().max()
    assert list(expected) == ["0", "2"]
    for name, weight in expected.items():
        found = model.get_parameter(f"{name}.weight")
        assert torch.equal(found, weight)
        assert follows_pattern(found)
        assert not torch.signbit(found[found == 0]).any()
        assert (found.unflatten(1, (-1, 4)).count_nonzero(-1) == 2).all()  # no kept weight happens to be 0
    assert [type(module) for module in model] == [nn.Linear, nn.ReLU, nn.Linear]
    assert cast.teacher is None


def test_too_weak_a_decay_is_said_at_the_cut():
    """Fails when a model is cut to pieces in silence: the number is the ratio of mean sizes."""
    model = network()
    cast = CAST(model)
    sizes = torch.cat([w.abs()[~m] for w, m in zip(cast.weights().values(), cast.masks().values(), strict=True)])
    kept = torch.cat([w.abs()[m] for w, m in zip(cast.weights().values(), cast.masks().values(), strict=True)])
    assert cast.residual() == pytest.approx((sizes.mean() / kept.mean()).item(), rel=1e-5)
    with pytest.warns(UserWarning, match=f"{cast.residual():.3g} of the mean size"):
        cast.finalize()


def test_teacher_is_the_dense_start():
    """Fails when the teacher is trained along, gets the scales, or is in the state and in the model's parameters."""
    model = network()
    x, _ = data()
    before = model(x)
    cast = CAST(model)
    train(cast, model, steps=3)
    assert torch.equal(cast.teacher(x), before)
    assert not torch.equal(model(x), before)
    assert not any(isinstance(m, ScaledLinear) for m in cast.teacher.modules())
    assert list(cast.parameters()) == []
    assert set(cast.state_dict()) == {"teacher", "pattern"}
    assert next(cast.double().teacher.parameters()).dtype == torch.float64  # it moves with the term


def test_groups_hold_every_parameter_once():
    """Fails when biases or scales get the pattern, or anything that is trained is left out."""
    model = network()
    model[2].bias.requires_grad_(False)
    sparse, rest = CAST(model).param_groups()
    assert [p.shape for p in sparse["params"]] == [(16, 8), (4, 16)]
    assert sparse["pattern"] == (2, 4)
    assert {id(p) for p in rest["params"]} == {id(model[0].bias), id(model[0].scale), id(model[2].scale)}
    assert "pattern" not in rest


def test_a_language_model_keeps_its_head_dense():
    """Fails when the tied head becomes sparse (and the embedding with it), or tokens are not shifted or averaged."""
    model = tiny_llama(0)
    cast = CAST(model, shift=True)
    assert {name.rpartition(".")[2] for name in cast.names} == {
        "q_proj",
        "k_proj",
        "v_proj",
        "o_proj",
        "gate_proj",
        "up_proj",
        "down_proj",
    }
    tokens = byte_tokens("a few words").view(1, -1)
    labels = tokens.clone()
    labels[:, 4] = -100
    step = Step(model, Batch.of({"input_ids": tokens, "labels": labels}), Progress(0, 1))
    found = cast(step) / cast.count(step.batch)
    out = model(tokens).logits
    known = distillation_loss(out[:, :-1], cast.teacher(input_ids=tokens).logits[:, :-1], labels[:, 1:])
    torch.testing.assert_close(found, known.loss)
    assert cast.count(step.batch) == tokens.shape[1] - 2


def test_without_teacher_it_is_the_task():
    """Fails when eta=0 still runs a teacher, or is not cross-entropy."""
    model = network()
    cast = CAST(model, eta=0.0, scale_groups=0)
    assert cast.teacher is None
    x, y = data()
    step = Step(model, Batch.of((x, y)), Progress(0, 1))
    assert torch.equal(cast(step), nn.functional.cross_entropy(model(x), y, reduction="sum"))
    assert type(model[0]) is nn.Linear


def test_trainer():
    """Fails when the loop's moments do not fit: surgery before the optimizer, groups with the pattern, merging."""
    model = network()
    trainer = Trainer(
        model,
        terms={"cast": CAST(target_modules=["0"])},
        optimizer=partial(SparseAdamW, lr=1e-2, l1=0.1, total_steps=120),
        schedule=cosine(),
    )
    trainer.fit(TensorData(*data(), batch_size=32), epochs=60)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        trainer.merge()
    assert follows_pattern(model[0].weight)
    assert not follows_pattern(model[2].weight)


def test_another_optimizer_is_refused_at_its_first_step():
    """Fails when a run goes on under Adam, which decays nothing, until the cut destroys it."""
    model = network()
    cast = CAST(model)
    other, wrong = torch.optim.AdamW(model.parameters()), SparseAdamW(model.parameters(), 1e-2, l1=0.1, total_steps=9)
    for optimizer, says in ((other, "AdamW trains weights that CAST"), (wrong, "pattern=None instead of")):
        with pytest.raises(RuntimeError, match=says):
            optimizer.step()
    torch.optim.AdamW(network(1).parameters()).step()  # of another model
    x, y = data()
    right = SparseAdamW(cast.param_groups(), 1e-2, l1=0.1, total_steps=9)
    nn.functional.cross_entropy(model(x), y).backward()
    right.step()
    assert right.steps == 1
    del cast
    other.step()  # nobody asks any more


def test_a_wrapped_optimizer_is_let_through():
    """Fails when an optimizer that holds ours and shares its groups is taken for another one."""
    model = network()
    cast = CAST(model)

    class Wrapper(torch.optim.Optimizer):
        def __init__(self, base):
            super().__init__(base.param_groups, {})
            self.base = base

        def step(self):
            self.base.step()

    wrapper = Wrapper(SparseAdamW(cast.param_groups(), 1e-2, l1=0.1, total_steps=9))
    x, y = data()
    nn.functional.cross_entropy(model(x), y).backward()
    wrapper.step()
    assert wrapper.base.steps == 1


def test_training_after_the_cut():
    """Fails when zeros can be filled again unseen; other optimizers may train on, under a mask or elsewhere."""
    model = network()
    cast = CAST(model)
    optimizer = train(cast, model, steps=120)
    trainer = Trainer(network(1), terms={"task": CrossEntropy(), "cast": cast}, optimizer=torch.optim.SGD)
    cast.finalize()
    fresh = SparseAdamW([{"params": [model[0].weight], "pattern": (2, 4)}], 1e-2, l1=0.1, total_steps=9)
    for again in (cast.finalize, cast.param_groups, optimizer.step, fresh.step, lambda: cast.attach(model)):
        with pytest.raises(RuntimeError, match=r"finalize\(\) was called|all total_steps=120 are done"):
            again()
    with pytest.raises(RuntimeError, match=r"finalize\(\) was called"):
        trainer.fit(TensorData(*data(), batch_size=32), epochs=1)
    torch.optim.SGD(model.parameters(), lr=0.1).step()


def test_a_state_of_another_run_is_refused():
    """Fails when a run goes on with another teacher (the half-trained model, say) or another pattern."""
    cast = CAST(network())
    state = cast.state_dict()
    CAST(network()).load_state_dict(state)
    with pytest.raises(ValueError, match="another teacher"):
        CAST(network(1)).load_state_dict(state)
    with pytest.raises(ValueError, match=r"pattern \(2, 4\), not \(1, 4\)"):
        CAST(network(), pattern=(1, 4)).load_state_dict(state)
    with pytest.raises(RuntimeError, match="Missing key"):
        CAST(network()).load_state_dict({})


def test_attaching_twice_and_copying():
    """Fails when a second call scales or copies again, or a copy of model and term is not whole."""
    model = network()
    cast = CAST(model)
    layer, teacher = model[0], cast.teacher
    cast.attach(model)
    assert model[0] is layer
    assert cast.teacher is teacher
    twin_model, twin = copy.deepcopy((model, cast))
    train(twin, twin_model, steps=120)
    twin.finalize()
    assert follows_pattern(twin_model[0].weight)
    assert isinstance(model[0], ScaledLinear)


def test_a_given_teacher():
    """Fails when the given network is not the one that is asked."""
    teacher = network(5)
    cast = CAST(network(), teacher=teacher)
    assert cast.teacher.module is teacher
    assert not any(p.requires_grad for p in teacher.parameters())


def test_in_transformers(tmp_path):
    """Fails when transformers' optimizer is not ours on the term's groups, or its accumulation changes the loss."""
    import transformers

    from regularized.training.huggingface import TermsTrainer

    model = tiny_llama(0)
    tokens = byte_tokens("a few words, and some more of them").tolist()
    rows = [{"input_ids": tokens[i : i + 8], "labels": tokens[i : i + 8]} for i in range(16)]
    arguments = transformers.TrainingArguments(
        str(tmp_path),
        max_steps=4,
        per_device_train_batch_size=2,
        gradient_accumulation_steps=2,
        report_to=[],
        use_cpu=True,
        disable_tqdm=True,
        save_strategy="no",
    )
    cast = CAST(shift=True)
    options = {"lr": 1e-3, "l1": 1e-2, "total_steps": 4}
    trainer = TermsTrainer(
        model,
        arguments,
        terms={"task": cast},
        train_dataset=rows,
        optimizer_cls_and_kwargs=(SparseAdamW, options),
    )
    trainer.train()
    (optimizer,) = [
        o for o in (trainer.optimizer, getattr(trainer.optimizer, "optimizer", None)) if type(o) is SparseAdamW
    ]
    assert optimizer.steps == 4
    assert set(optimizer.masks()) == set(cast.weights().values())
    with pytest.warns(UserWarning, match="of the mean size"):
        cast.finalize()
    assert all(follows_pattern(model.get_parameter(f"{name}.weight")) for name in cast.names)
