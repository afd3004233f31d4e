"""TRL's trainer with CREAM's loss."""

import copy
import importlib

import pytest
import torch
from tests.alignment.cream.small import PROMPTS, build

from regularized.evidence.pretrained import tiny_llama

trl = pytest.importorskip("trl", reason='needs the extra: pip install "regularized[alignment]"')
tokenizers = pytest.importorskip("tokenizers", reason="comes with transformers")
transformers = pytest.importorskip("transformers", reason="comes with trl")
ours = importlib.import_module("regularized.alignment.cream.trl")


def tokenizer():
    words = {str(k): k for k in range(8)}
    return transformers.PreTrainedTokenizerFast(
        tokenizer_object=tokenizers.Tokenizer(tokenizers.models.WordLevel(words, unk_token="0")), eos_token="7"
    )


def collected(**options):
    cream = build(policy=tiny_llama(1, vocab_size=8), base=tiny_llama(0, vocab_size=8), epochs=1, **options)
    return cream, cream.collect(PROMPTS)


def config(folder, **options):
    return trl.DPOConfig(
        output_dir=str(folder),
        report_to=[],
        use_cpu=True,
        bf16=False,
        save_strategy="no",
        disable_tqdm=True,
        **{"num_train_epochs": 1, "logging_steps": 1, **options},
    )


def test_a_step_is_that_of_our_own_loop(tmp_path):
    """Fails when labels belong to other pairs, the reference is computed anew, or padding is scored."""
    cream, pairs = collected(
        consistency="each", batch_size=64, schedule=1.0, optimizer=lambda p: torch.optim.SGD(p, lr=0.5)
    )
    policy = copy.deepcopy(cream.policy)
    sgd = torch.optim.SGD(policy.parameters(), lr=0.5)
    trainer = ours.cream_trainer(
        policy,
        pairs,
        cream.reference_log_probs,
        args=config(tmp_path, per_device_train_batch_size=64, max_grad_norm=1.0),
        processing_class=tokenizer(),
        optimizers=(sgd, torch.optim.lr_scheduler.ConstantLR(sgd, factor=1.0)),
    )
    trainer.train()
    (loss,) = cream.train()
    assert trainer.state.log_history[0]["loss"] == pytest.approx(loss, abs=1e-4)
    assert trainer.state.log_history[0]["consistency"] == pytest.approx(float(pairs.consistency.mean()), abs=1e-5)
    moved = 0.0
    for mine, theirs, start in zip(
        cream.policy.parameters(), policy.parameters(), tiny_llama(1, vocab_size=8).parameters(), strict=True
    ):
        torch.testing.assert_close(mine, theirs.cpu(), atol=1e-5, rtol=1e-4)
        moved += float((mine - start).detach().norm())
    assert moved > 0.01
    assert cream.finish_round().round == 1


def test_data_are_the_pairs_as_they_were_sampled():
    """Fails when the prompt is cut wrongly, or chosen and rejected are exchanged."""
    cream, pairs = collected()
    rows = ours.pair_dataset(pairs, cream.reference_log_probs)
    assert len(rows) == len(pairs)
    for number in (0, len(pairs) - 1):
        row = rows[number]
        assert row["prompt_ids"] == PROMPTS[int(pairs.prompt[number])].tolist()
        for place, name in enumerate(("chosen", "rejected")):
            assert row[f"{name}_ids"] == pairs.tokens[number, place][pairs.mask[number, place]].tolist()
            assert row[f"ref_{name}_logps"] == pytest.approx(float(cream.reference_log_probs[number, place]))


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"label_smoothing": 0.1}, "label_smoothing"),
        ({"loss_type": ["ipo"]}, "loss_type"),
        ({"max_length": 3}, "would cut"),
    ],
)
def test_refuses_what_would_change_the_loss(tmp_path, options, words):
    cream, pairs = collected()
    with pytest.raises(ValueError, match=words):
        ours.cream_trainer(
            cream.policy,
            pairs,
            cream.reference_log_probs,
            args=config(tmp_path, **options),
            processing_class=tokenizer(),
        )
