"""Sparse adapters: file, scale, sum, PEFT. Damaged and foreign files are in the contract's bad input."""

import copy
import json

import pytest
import torch
from torch import nn
from torch.nn import functional as F

from regularized.evidence.models import mlp, seeded
from regularized.fine_tuning.sara.adapter import SparseAdapter, combine_adapters
from regularized.fine_tuning.sara.entries import checksum, checksum_of_rest
from regularized.fine_tuning.sara.term import SaRA
from regularized.mechanisms.sealed_files import save_sealed


def tuned(dtype=torch.float32, seed=0, **settings):
    """A model, its fine-tuned copy, and the adapter, merged into the copy."""
    base = seeded(0, mlp, [8, 16, 4]).to(dtype)
    model = copy.deepcopy(base)
    sara = SaRA(model, **{"fraction": 0.3, "reselect_at": 0, "lambda_rank": 0, **settings})
    optimizer = sara.bind(torch.optim.SGD(sara.parameters(), lr=0.5))
    draws = torch.Generator().manual_seed(seed)
    for _ in range(4):
        F.cross_entropy(model(torch.randn(6, 8, generator=draws).to(dtype)).float(), torch.arange(6) % 4).backward()
        optimizer.step()
        optimizer.zero_grad()
    adapter = sara.adapter()
    sara.finalize()
    return base, model, adapter


def weights(model):
    return nn.utils.parameters_to_vector(model.parameters()).detach()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64])
def test_file_gives_the_trained_model_exactly(dtype, tmp_path):
    """Fails if changes are stored instead of values (one rounding), in another type, or without a tensor."""
    base, model, adapter = tuned(dtype, total_steps=4, reselect_at=0.5)
    adapter.save(tmp_path)
    assert sorted(p.name for p in tmp_path.iterdir()) == ["sparse_adapter.json", "sparse_adapter.safetensors"]
    assert json.loads((tmp_path / "sparse_adapter.json").read_text())["format"] == 2
    loaded = SparseAdapter.load(tmp_path)
    fresh = copy.deepcopy(base)
    loaded.merge(fresh)
    assert not torch.equal(weights(fresh), weights(base))
    assert torch.equal(weights(fresh), weights(model))
    loaded.unmerge(fresh)
    assert torch.equal(weights(fresh), weights(base))
    assert loaded.num_entries == adapter.num_entries


def test_no_damaged_byte_is_believed(tmp_path):
    """Fails when a flipped bit of a value, a position or a setting loads as another change, or with a raw error."""
    tuned()[2].save(tmp_path)
    flips = 0
    for file in sorted(tmp_path.iterdir()):
        whole = file.read_bytes()
        for place in range(0, len(whole), 13):
            damaged = bytearray(whole)
            damaged[place] ^= 1 << place % 7
            file.write_bytes(damaged)
            try:
                same = file.suffix == ".json" and json.loads(damaged) == json.loads(whole)
            except ValueError:
                same = False
            if not same:
                flips += 1
                with pytest.raises(ValueError, match="there is no readable adapter"):
                    SparseAdapter.load(tmp_path)
        file.write_bytes(whole)
    assert flips > 100
    SparseAdapter.load(tmp_path)


WEIGHT = {"shape": [2, 2], "frozen": 1, "start": 1}


@pytest.mark.parametrize(
    ("parameters", "index", "values"),
    [
        ([WEIGHT], torch.tensor([0]), torch.ones(1)),
        ({"w": 3}, torch.tensor([0]), torch.ones(1)),
        ({"w": WEIGHT | {"shape": 4}}, torch.tensor([0]), torch.ones(1)),
        ({"w": WEIGHT | {"shape": ["a"]}}, torch.tensor([0]), torch.ones(1)),
        ({"w": WEIGHT | {"frozen": "x"}}, torch.tensor([0]), torch.ones(1)),
        ({"v": WEIGHT}, torch.tensor([0]), torch.ones(1)),
        ({}, torch.tensor([0]), torch.ones(1)),
        ({"w": WEIGHT}, torch.tensor([4]), torch.ones(1)),
        ({"w": WEIGHT}, torch.tensor([-1]), torch.ones(1)),
        ({"w": WEIGHT}, torch.tensor([0.0]), torch.ones(1)),
        ({"w": WEIGHT}, torch.tensor([[0]]), torch.ones(1, 1)),
        ({"w": WEIGHT}, torch.tensor([0, 1]), torch.ones(1)),
        ({"w": WEIGHT}, torch.tensor([0]), torch.ones(1, dtype=torch.int32)),
    ],
)
def test_a_file_that_nobody_wrote_is_refused(tmp_path, parameters, index, values):
    """Fails when a hostile file, whole by its checksum, leaks an error of dictionaries or tensors, or is taken."""
    tensors = {"w.index": index, "w.values": values}
    save_sealed(tmp_path, "sparse_adapter", tensors, {"threshold": "0.1", "parameters": parameters}, version=2)
    with pytest.raises(ValueError, match=r"adapter"):
        SparseAdapter.load(tmp_path)


def test_scaling():
    """Fails if the scale acts on the values and not on the change."""
    base, model, adapter = tuned(torch.float64)
    change = weights(model) - weights(base)
    adapter.unmerge(model)
    for scale in (0.0, 0.5, 2.0):
        adapter.merge(model, scale=scale)
        torch.testing.assert_close(weights(model), weights(base) + scale * change, rtol=1e-13, atol=1e-15)
        adapter.unmerge(model)
    with pytest.raises(ValueError, match="not merged"):
        adapter.unmerge(model)
    adapter.merge(model)
    with pytest.raises(ValueError, match="merged already"):
        adapter.merge(model)


def test_two_tasks_add_up():
    """Fails if the values of one task overwrite the other's where both changed an entry; fractions overlap here."""
    base, one, first = tuned(torch.float64, seed=1, fraction=0.3)
    _, two, second = tuned(torch.float64, seed=2, fraction=0.6)
    expected = weights(base) + 0.6 * (weights(one) - weights(base)) + 0.4 * (weights(two) - weights(base))
    first.unmerge(one)
    second.unmerge(two)
    both = combine_adapters(base, [first, second], [0.6, 0.4])
    start = weights(base)
    both.merge(base)
    torch.testing.assert_close(weights(base), expected, rtol=1e-13, atol=1e-15)
    both.unmerge(base)
    assert torch.equal(weights(base), start)
    with pytest.raises(ValueError, match="scale for each"):
        combine_adapters(base, [first], [1.0, 2.0])
    first.merge(base)
    with pytest.raises(ValueError, match="unmerge"):
        combine_adapters(base, [first, second], [1.0, 1.0])


def test_checksum_sees_values_positions_and_signs():
    """Fails if the fingerprint is a plain sum, which a permutation or two opposite changes leave as it is."""
    x = torch.randn(1000, generator=torch.Generator().manual_seed(0))
    others = [x.flip(0), -x, x + torch.nn.functional.one_hot(torch.tensor(3), 1000) * 1e-6, x.double().float() * 2]
    assert len({checksum(t) for t in [x, *others]}) == 5
    index = torch.tensor([5, 900])
    moved = x.clone()
    moved[index] = 7.0
    assert checksum_of_rest(x, index) == checksum_of_rest(moved, index)
    moved[6] = 7.0
    assert checksum_of_rest(x, index) != checksum_of_rest(moved, index)


def llama():
    transformers = pytest.importorskip("transformers", reason='needs the extra "huggingface"')
    config = transformers.LlamaConfig(
        vocab_size=97,
        hidden_size=72,
        intermediate_size=80,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        tie_word_embeddings=True,
    )
    torch.manual_seed(0)
    return transformers.LlamaForCausalLM(config)


def text(n=8):
    tokens = torch.randint(97, (n, 12), generator=torch.Generator().manual_seed(1))
    return [{"input_ids": row, "labels": row} for row in tokens]


def test_language_model_in_the_hugging_face_trainer(tmp_path):
    """A Llama with tied embeddings in transformers' loop. Fails if zeroing, clipping or decay misses the entries."""
    transformers = pytest.importorskip("transformers", reason='needs the extra "huggingface"')
    from regularized.training import CrossEntropy
    from regularized.training.huggingface import TermsTrainer

    model = llama()
    base = copy.deepcopy(model)
    sara = SaRA(fraction=0.1)
    trainer = TermsTrainer(
        model,
        transformers.TrainingArguments(
            str(tmp_path),
            max_steps=6,
            per_device_train_batch_size=2,
            gradient_accumulation_steps=2,
            learning_rate=1e-2,
            weight_decay=0.1,
            report_to=[],
            use_cpu=True,
            disable_tqdm=True,
            save_strategy="no",
        ),
        terms={"task": CrossEntropy(shift=True), "sara": sara},
        train_dataset=text(),
    )
    trainer.train()
    assert sara.steps == 6
    adapter = sara.adapter()
    # 10 % was selected; three steps later part of it went on. Frozen entries keep their bits.
    assert sara.num_trainable < adapter.num_entries == round(0.1 * sum(p.numel() for p in base.parameters()))
    for name, p in model.named_parameters():
        rest = torch.ones(p.numel(), dtype=torch.bool)
        if name in adapter.changes:
            rest[adapter.changes[name].index.long()] = False
        assert torch.equal(p.flatten()[rest], base.get_parameter(name).flatten()[rest]), name
        assert name not in adapter.changes or not torch.equal(p, base.get_parameter(name)), name
    sara.merge(model)
    adapter.save(tmp_path / "adapter")
    SparseAdapter.load(tmp_path / "adapter").merge(base)
    tokens = text()[0]["input_ids"][None]
    assert torch.equal(model(input_ids=tokens).logits, base(input_ids=tokens).logits)


def test_stock_peft_loads_the_export(tmp_path):
    """Layers are changed unevenly, PEFT wants the same share of each: fails if the padding is not without effect."""
    peft = pytest.importorskip("peft", reason='needs the extra "peft"')
    model = llama()
    base = copy.deepcopy(model)
    sara = SaRA(model, fraction=0.07, reselect_at=0, include=["*_proj.weight"])
    optimizer = sara.bind(torch.optim.SGD(sara.parameters(), lr=5.0))
    batch = torch.stack([row["input_ids"] for row in text()])
    for _ in range(3):
        model(input_ids=batch, labels=batch).loss.backward()
        optimizer.step()
        optimizer.zero_grad()
    adapter = sara.adapter()
    sara.finalize()
    counts = {len(change.index) / change.values.new_empty(change.shape).numel() for change in adapter.changes.values()}
    assert len(counts) > 1
    with torch.no_grad():
        expected, before = model(input_ids=batch).logits, base(input_ids=batch).logits
    adapter.save(tmp_path / "own")
    fresh = SparseAdapter.load(tmp_path / "own")
    fresh.export_peft(tmp_path / "peft", base)
    loaded = peft.PeftModel.from_pretrained(base, str(tmp_path / "peft"))
    with torch.no_grad():
        got = loaded(input_ids=batch).logits
        merged = loaded.merge_and_unload()(input_ids=batch).logits
    assert float((expected - before).abs().max()) > 1e-3
    torch.testing.assert_close(got, expected, rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(merged, expected, rtol=1e-5, atol=1e-5)
    adapter.export_peft(tmp_path / "again", model)  # straight after training, as the page says
    for file in ("adapter_model.safetensors", "adapter_config.json"):
        assert (tmp_path / "again" / file).read_bytes() == (tmp_path / "peft" / file).read_bytes()
