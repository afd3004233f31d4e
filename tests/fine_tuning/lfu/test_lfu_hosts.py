"""Learning from the Undesirable where people train: stock PEFT, Hugging Face trainers."""

import copy
import math
from pathlib import Path

import pytest
import torch
from torch import nn
from torch.nn import functional as F

from regularized.evidence.pretrained import tiny_llama
from regularized.fine_tuning.lfu.penalty import hidden_state_consistency
from regularized.fine_tuning.lfu.regularizer import LfU
from regularized.fine_tuning.lfu.term import LfUTerm
from regularized.training import CrossEntropy

peft = pytest.importorskip("peft", reason='needs the extra: pip install "regularized[peft]"')
transformers = pytest.importorskip("transformers", reason='needs the extra: pip install "regularized[huggingface]"')

ALPHA, LAMBDA = 0.3, 3.0


def adapted(*, dropout: float = 0.0, dtype: torch.dtype = torch.float32) -> nn.Module:
    """A tiny random Llama with a stock LoRA that does something already."""
    torch.manual_seed(0)
    base = tiny_llama(0, vocab_size=32).to(dtype)
    config = peft.LoraConfig(r=2, lora_alpha=4, lora_dropout=dropout, target_modules="all-linear")
    model = peft.get_peft_model(base, config).train()
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for name, p in model.named_parameters():
            if "lora_B" in name:
                p.copy_(0.05 * torch.randn(p.shape, generator=generator))
    return model


def tokens(n: int = 4, length: int = 6) -> tuple[torch.Tensor, torch.Tensor]:
    ids = torch.randint(32, (n, length), generator=torch.Generator().manual_seed(2))
    labels = ids.clone()
    labels[:, :2] = -100
    labels[0, 2:4] = -100
    return ids, labels


def trained(model: nn.Module) -> dict[str, torch.Tensor]:
    return {name: p for name, p in model.named_parameters() if p.requires_grad}


def step(model: nn.Module, lfu: LfU, ids: torch.Tensor, labels: torch.Tensor) -> torch.Tensor:
    with lfu.record():
        loss = model(input_ids=ids, labels=labels).loss
    loss.backward()
    return lfu.backward()


def test_peft_lora_against_a_displaced_copy():
    """The gradient is that of a second model whose adapter was really displaced; the base has none.

    Fails when substituted tensors miss PEFT's nested names, or labels of the call are not the mask.
    """
    ids, labels = tokens()
    model = adapted().double()
    twin = copy.deepcopy(model)
    penalty = step(model, LfU(model, alpha=ALPHA, strength=LAMBDA), ids, labels)

    out = twin(input_ids=ids, labels=labels, output_hidden_states=True)
    out.loss.backward()
    away = copy.deepcopy(twin)
    with torch.no_grad():
        norm = math.sqrt(sum(float(p.grad.square().sum()) for p in trained(twin).values()))
        for name, p in trained(away).items():
            p.add_(trained(twin)[name].grad, alpha=ALPHA / norm)
            p.grad = None
    states: list[list[torch.Tensor]] = [[], []]
    for net, kept in zip((twin, away), states, strict=True):
        for layer in net.get_base_model().model.layers:
            layer.register_forward_hook(lambda m, a, o, kept=kept: kept.append(o if torch.is_tensor(o) else o[0]))
        net(input_ids=ids)
    expected = hidden_state_consistency(*states, labels != -100)
    (LAMBDA * expected).backward()
    torch.testing.assert_close(penalty, expected.detach())
    for name, p in trained(model).items():
        torch.testing.assert_close(p.grad, trained(twin)[name].grad + trained(away)[name].grad)
    assert all(p.grad is None for p in model.parameters() if not p.requires_grad)


@pytest.mark.parametrize("aux", ["self", "lora", "steering"])
def test_activation_checkpointing_changes_nothing(aux):
    """The same gradients with recomputed activations. Fails when the recomputation sees the undisplaced weights."""
    ids, labels = tokens()
    found = []
    for checkpointing in (False, True):
        model = adapted(dropout=0.2)
        if checkpointing:
            model.enable_input_require_grads()
            model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
        torch.manual_seed(3)
        penalty = step(model, LfU(model, aux=aux, alpha=ALPHA, strength=LAMBDA), ids, labels)
        found.append((penalty, {name: p.grad for name, p in trained(model).items()}))
    torch.testing.assert_close(found[0], found[1])


def test_auxiliary_lora_beside_the_adapter():
    """It sits on the inner layers, not on the adapter's own, nor on the head; and nothing of it is saved."""
    model = adapted()
    before = set(model.state_dict())
    lfu = LfU(model, aux="lora")
    assert lfu.aux.targets is not None
    assert all(name.endswith("base_layer") for name in lfu.aux.targets)
    assert len(lfu.aux.targets) == 2 * 7
    assert step(model, lfu, *tokens()) > 0
    assert set(model.state_dict()) == before


def test_hidden_states_of_the_output():
    """`layers="hidden_states"` compares what transformers returns: embeddings, blocks, the last one normalised."""
    ids, labels = tokens()
    model = adapted()
    lfu = LfU(model, layers="hidden_states", alpha=ALPHA)
    with lfu.record():
        out = model(input_ids=ids, labels=labels, output_hidden_states=True)
    out.loss.backward()
    recorded = lfu._window[0]
    assert [tuple(h.shape) for h in recorded.hidden.values()] == [(4, 6, 32)] * 3
    assert torch.equal(recorded.hidden["2"], out.hidden_states[-1])
    assert lfu.backward() > 0


def test_padding_is_masked_without_labels():
    """Without labels in the call the attention mask decides. Fails when padded positions count."""
    ids, labels = tokens()
    attention = torch.ones_like(ids)
    attention[0, 4:] = 0
    values = []
    for mask in (None, attention.bool()):
        model = adapted()
        lfu = LfU(model, alpha=ALPHA)
        with lfu.record(mask):
            logits = model(input_ids=ids, attention_mask=attention).logits
        F.cross_entropy(logits[:, :-1].flatten(0, 1), labels[:, 1:].flatten()).backward()
        values.append(lfu.backward())
    assert values[0] == values[1]


def dataset() -> list[dict[str, torch.Tensor]]:
    ids, labels = tokens(8)
    return [
        {"input_ids": i, "labels": y, "attention_mask": torch.ones_like(i)} for i, y in zip(ids, labels, strict=True)
    ]


def arguments(folder: Path, **more: object) -> object:
    settings: dict[str, object] = {
        "max_steps": 2,
        "per_device_train_batch_size": 2,
        "gradient_accumulation_steps": 2,
        "learning_rate": 0.1,
        "lr_scheduler_type": "constant",
        "optim": "sgd",
        "max_grad_norm": 0.0,
        "report_to": [],
        "use_cpu": True,
        "disable_tqdm": True,
        "save_strategy": "no",
        "logging_steps": 1,
        "remove_unused_columns": False,
    }
    return transformers.TrainingArguments(str(folder), **{**settings, **more})


def in_order(trainer: object) -> object:
    trainer._get_train_sampler = lambda *_: torch.utils.data.SequentialSampler(range(8))
    return trainer


def by_hand() -> tuple[nn.Module, torch.Tensor]:
    """Two steps of SGD on batches of four."""
    model = adapted()
    lfu = LfU(model, alpha=ALPHA, strength=LAMBDA, clip_norm=0.5)
    optimizer = torch.optim.SGD(trained(model).values(), lr=0.1)
    ids, labels = tokens(8)
    for part in (slice(0, 4), slice(4, 8)):
        penalty = step(model, lfu, ids[part], labels[part])
        optimizer.step()
        optimizer.zero_grad()
    return model, penalty


@pytest.mark.parametrize("stock", [True, False])
def test_hugging_face_trainers(tmp_path, stock):
    """Both trainers take the steps of the loop by hand, over accumulated micro-batches with uneven labels.

    Fails when the callback or the term is asked before the last micro-batch, or a pass of it is not seen.
    """
    expected, penalty = by_hand()
    model = adapted()
    settings = {"alpha": ALPHA, "clip_norm": 0.5}
    if stock:
        from regularized.fine_tuning.lfu.huggingface import LfUCallback

        callback = LfUCallback(LfU(model, strength=LAMBDA, **settings))
        trainer = transformers.Trainer(model, arguments(tmp_path), train_dataset=dataset(), callbacks=[callback])
    else:
        from regularized.training.huggingface import TermsTrainer

        trainer = TermsTrainer(
            model,
            arguments(tmp_path),
            terms={"task": CrossEntropy(shift=True), "lfu": LfUTerm(weight=LAMBDA, **settings)},
            train_dataset=dataset(),
        )
    trainer.pop_callback(transformers.PrinterCallback)
    in_order(trainer).train()
    for name, p in trained(expected).items():
        torch.testing.assert_close(trained(model)[name], p, rtol=1e-4, atol=1e-6)
    if not stock:
        torch.testing.assert_close(trainer.objective.terms["lfu"].consistency, penalty, rtol=1e-3, atol=1e-7)
    assert not any(m._forward_hooks or m._forward_pre_hooks for m in model.modules())

    model.save_pretrained(tmp_path / "adapter")
    loaded = peft.PeftModel.from_pretrained(tiny_llama(0, vocab_size=32), tmp_path / "adapter")
    ids, _ = tokens()
    torch.testing.assert_close(loaded.eval()(input_ids=ids).logits, model.eval()(input_ids=ids).logits)


def test_callback_refuses_scaled_gradients():
    """Fails when fp16, of which the callback cannot know the factor, is let through."""
    from regularized.fine_tuning.lfu.huggingface import LfUCallback

    model = adapted()
    arguments = type("Arguments", (), {"fp16": True})
    with pytest.raises(ValueError, match="bf16=True"):
        LfUCallback(LfU(model)).on_train_begin(arguments, None, None)
