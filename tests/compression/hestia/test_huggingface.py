"""`hestia` on a model of transformers and in its loop."""

import pytest
import torch

from regularized.compression.hestia import Hestia, annealed_weights, hessian_traces, pack_weights
from regularized.evidence.pretrained import byte_tokens, tiny_llama
from regularized.training.terms import CrossEntropy

transformers = pytest.importorskip("transformers", reason='needs the extra "huggingface"')

TOKENS = byte_tokens("The quick brown fox jumps over the lazy dog. " * 12)[:512].view(16, 32)


def test_llama_trains_to_hard_weights_and_packs(tmp_path):
    """Fails when the term does not move in transformers' loop, unties the head, or packing changes a bit."""
    from regularized.training.huggingface import TermsTrainer

    model = tiny_llama(0)
    trainer = TermsTrainer(
        model=model,
        args=transformers.TrainingArguments(
            str(tmp_path),
            per_device_train_batch_size=4,
            num_train_epochs=1,
            report_to=[],
            use_cpu=True,
            save_strategy="no",
            disable_tqdm=True,
        ),
        train_dataset=[{"input_ids": row, "labels": row} for row in TOKENS],
        terms={"task": CrossEntropy(shift=True), "hestia": Hestia(group_size=-1, exclude=["lm_head"])},
    )
    trainer.train()
    weights = annealed_weights(model)
    assert len(weights) == 14
    assert all(weight.is_hard for weight in weights.values())
    assert model.lm_head.weight is model.model.embed_tokens.weight
    model.eval()
    hard = model(TOKENS[:2]).logits
    pack_weights(model)
    assert torch.equal(model(TOKENS[:2]).logits, hard)


def test_traces_of_a_llama_with_its_usual_attention():
    """Fails when the fused attention that transformers takes by itself has no second derivative."""
    traces = hessian_traces(
        tiny_llama(0),
        lambda model, row: model(input_ids=row[None], labels=row[None]).loss,
        TOKENS[:1],
        sketch=1,
        queries=1,
        exclude=["lm_head"],
    )
    assert len(traces) == 14
