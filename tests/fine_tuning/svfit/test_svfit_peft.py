"""SVFit on PEFT: the same numbers as without it, tiny files, stock LoRA export, merging."""

import copy
import json

import pytest
import torch
from torch import nn

pytest.importorskip("peft", reason="the extra regularized[peft] is not installed")

from peft import PeftModel
from transformers import LlamaConfig, LlamaForCausalLM, Trainer, TrainingArguments
from transformers.pytorch_utils import Conv1D

from regularized.fine_tuning.peft_host import export_lora, factor_layers
from regularized.fine_tuning.peft_host import inject as host_inject
from regularized.fine_tuning.peft_layer import FREE_SETTINGS
from regularized.fine_tuning.svfit import peft as svfit_peft
from regularized.fine_tuning.svfit.model import inject_svfit, svfit_layers, svfit_param_groups
from regularized.fine_tuning.svfit.peft import SVFitConfig
from regularized.mechanisms.sealed_files import write_settings


class Net(nn.Module):
    """A layer of each kind that PEFT's LoRA and ours take."""

    def __init__(self):
        super().__init__()
        self.conv = nn.Conv2d(2, 6, 3, stride=2, padding=1)
        self.one = nn.Linear(6, 10)
        self.two = Conv1D(7, 10)
        self.head = nn.Linear(7, 3)

    def forward(self, x):
        hidden = torch.relu(self.conv(x)).mean(dim=(2, 3))
        return self.head(torch.relu(self.two(torch.relu(self.one(hidden)))))


TARGETS = ["conv", "one", "two"]


def net():
    torch.manual_seed(0)
    made = Net()
    nn.init.normal_(made.two.weight, std=0.3)
    return made


def images(n=5):
    return torch.randn(n, 2, 8, 8, generator=torch.Generator().manual_seed(1))


def trained(model, seed=3):
    """Shifts as after training."""
    generator = torch.Generator().manual_seed(seed)
    for group in svfit_param_groups(model):
        for p in group["params"]:
            p.data += 0.5 * torch.randn(p.shape, generator=generator)
    return model.eval()


@pytest.mark.parametrize("settings", [{"r": 4}, {"r": "full"}, {"energy": 0.8}, {"r": 3, "decay": "sigma"}])
def test_same_as_without_peft(settings):
    """Outputs, ranks and gradients of the plain form; fails when PEFT's scale or rounding gets in."""
    x = images()
    hosted, plain = svfit_peft.inject(net(), TARGETS, **settings), net()
    inject_svfit(plain, target_modules=TARGETS, **{("rank" if k == "r" else k): v for k, v in settings.items()})
    assert torch.equal(hosted(x), net()(x))
    trained(hosted), trained(plain)
    for one in (hosted, plain):
        one(x).square().sum().backward()
    torch.testing.assert_close(hosted(x), plain(x))
    ours = [p for group in svfit_param_groups(hosted) for p in group["params"]]
    theirs = [layer.directions.trained for _, layer in svfit_layers(plain)]
    assert sum(p.numel() for p in hosted.parameters() if p.requires_grad) == sum(p.numel() for p in theirs)
    for a, b in zip(ours, theirs, strict=True):
        torch.testing.assert_close(a, b)
        torch.testing.assert_close(a.grad, b.grad)


@pytest.mark.parametrize("store_basis", [False, True])
@pytest.mark.parametrize("settings", [{"r": 4}, {"energy": 0.8}, {"r": "full", "decay": "sigma"}])
def test_saved_and_loaded(tmp_path, settings, store_basis):
    """Equal outputs on a fresh base; the small file holds one number for each direction and nothing else."""
    x, model = images(), trained(svfit_peft.inject(net(), TARGETS, store_basis=store_basis, **settings))
    model.save_pretrained(tmp_path)
    from safetensors.torch import load_file

    state = load_file(tmp_path / "adapter_model.safetensors")
    count = sum(layer.r["default"] for _, layer in factor_layers(model))
    assert (sum(t.numel() for t in state.values()) == count) is not store_basis
    again = svfit_peft.load(net(), tmp_path, trainable=True).eval()
    torch.testing.assert_close(again(x), model(x), rtol=1e-5, atol=1e-6)
    assert sum(p.numel() for p in again.parameters() if p.requires_grad) == count
    again.save_pretrained(tmp_path / "again")
    once_more = svfit_peft.load(net(), tmp_path / "again").eval()
    torch.testing.assert_close(once_more(x), model(x), rtol=1e-5, atol=1e-6)


def test_stored_basis_is_not_decomposed_again(tmp_path, monkeypatch):
    model = trained(svfit_peft.inject(net(), TARGETS, r=3, store_basis=True))
    model.save_pretrained(tmp_path)
    monkeypatch.setattr("torch.linalg.svd", lambda *a, **k: pytest.fail("decomposed"))
    torch.testing.assert_close(svfit_peft.load(net(), tmp_path).eval()(images()), model(images()))


def test_another_base_model_is_refused(tmp_path):
    """One weight changed by a little; a basis that cannot be found again; a layer that is not there."""
    trained(svfit_peft.inject(net(), TARGETS, r=3)).save_pretrained(tmp_path)
    other = net()
    other.one.weight.data[0, 0] += 1e-6
    with pytest.raises(ValueError, match=r"'one'.*fingerprint"):
        svfit_peft.load(other, tmp_path)
    config = tmp_path / "adapter_config.json"
    saved = json.loads(config.read_text())

    def rewrite():
        write_settings(config, saved, tmp_path / "adapter_model.safetensors", free=FREE_SETTINGS)

    saved["directions"]["one"]["gap"] = 1e-9
    rewrite()
    with pytest.raises(ValueError, match=r"'one'.*nearly equal"):
        svfit_peft.load(net(), tmp_path)
    saved["directions"]["one"]["gap"] = 0.1
    saved["directions"]["one"]["witness"][0] += 0.2
    rewrite()
    with pytest.raises(ValueError, match=r"'one'.*other singular vectors"):
        svfit_peft.load(net(), tmp_path)
    del saved["directions"]["one"]
    rewrite()
    with pytest.raises(ValueError, match=r"do not know layer 'one'"):
        svfit_peft.load(net(), tmp_path)


@pytest.mark.parametrize("settings", [{"r": 4}, {"energy": 0.8, "decay": "sigma"}])
def test_stock_peft_loads_the_export(tmp_path, settings):
    """A standard LoRA for the untouched base, of the same rank, with equal outputs."""
    model = trained(svfit_peft.inject(net(), TARGETS, **settings))
    export_lora(model, tmp_path)
    stock = PeftModel.from_pretrained(net(), tmp_path).eval()
    assert not any(True for _ in factor_layers(stock))
    torch.testing.assert_close(stock(images()), model(images()), rtol=1e-5, atol=1e-6)
    assert max(json.loads((tmp_path / "adapter_config.json").read_text())["r"], 0) == max(
        layer.r["default"] for _, layer in factor_layers(model)
    )


def test_merged_unmerged_disabled_unloaded():
    """Each gives what it should; the base weight comes back."""
    base, x = net().eval(), images()
    model = trained(svfit_peft.inject(net(), TARGETS))
    y = model(x)
    assert (y - base(x)).abs().max() > 0.03
    with model.disable_adapter():
        assert torch.equal(model(x), base(x))
    model.merge_adapter()
    torch.testing.assert_close(model(x), y, rtol=1e-5, atol=1e-6)
    model.unmerge_adapter()
    torch.testing.assert_close(model(x), y, rtol=1e-5, atol=1e-6)
    torch.testing.assert_close(copy.deepcopy(model).unload()(x), base(x), rtol=1e-5, atol=1e-6)
    merged = model.merge_and_unload()
    assert isinstance(merged, Net)
    assert set(merged.state_dict()) == set(base.state_dict())
    torch.testing.assert_close(merged(x), y, rtol=1e-5, atol=1e-6)


def test_two_adapters_on_one_base(tmp_path):
    """One tiny file a task, switched on the fly; together they add up."""
    x, base = images(), net().eval()
    changes = []
    for name, seed in (("a", 3), ("b", 4)):
        model = trained(svfit_peft.inject(net(), TARGETS, r=3), seed)
        model.save_pretrained(tmp_path / name)
        changes.append(dict(factor_layers(model))["base_model.model.one"].get_delta_weight("default"))
    both = svfit_peft.load(svfit_peft.load(net(), tmp_path / "a", adapter_name="a"), tmp_path / "b", adapter_name="b")
    for name, seed in (("a", 3), ("b", 4)):
        both.set_adapter(name)
        alone = trained(svfit_peft.inject(net(), TARGETS, r=3), seed)
        torch.testing.assert_close(both.eval()(x), alone(x), rtol=1e-5, atol=1e-6)
    both.base_model.set_adapter(["a", "b"])
    layer = dict(factor_layers(both))["base_model.model.one"]
    hidden = torch.randn(4, 6)
    expected = base.one(hidden) + hidden @ (changes[0] + changes[1]).T
    torch.testing.assert_close(layer(hidden), expected, rtol=1e-5, atol=1e-5)


def test_language_model_in_bfloat16(tmp_path):
    """Query and value of a small Llama: values stay float32, the count is the sum of ranks, and it learns."""
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=64,
        hidden_size=32,
        intermediate_size=48,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
    )
    base = LlamaForCausalLM(config).bfloat16()
    model = svfit_peft.inject(copy.deepcopy(base), ["q_proj", "v_proj"], task_type="CAUSAL_LM")
    groups = svfit_param_groups(model, lr=3e-2)
    assert sum(p.numel() for p in groups[0]["params"]) == 2 * (32 + 16)
    assert all(p.dtype == torch.float32 for p in groups[0]["params"])
    tokens = torch.randint(64, (4, 16))
    optimizer, losses = torch.optim.Adam(groups), []
    for _ in range(15):
        loss = model(input_ids=tokens, labels=tokens).loss
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(float(loss.detach()))
    assert losses[-1] < losses[0] - 0.05
    model.save_pretrained(tmp_path)
    again = svfit_peft.load(copy.deepcopy(base), tmp_path)
    torch.testing.assert_close(again(tokens).logits, model.eval()(tokens).logits)


def test_trainer_of_transformers(tmp_path):
    """Trained by Trainer, checkpointed by it, and loaded from its checkpoint."""
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=32, hidden_size=16, intermediate_size=16, num_hidden_layers=1, num_attention_heads=2
    )
    base = LlamaForCausalLM(config)
    model = svfit_peft.inject(copy.deepcopy(base), ["q_proj"], task_type="CAUSAL_LM")
    data = [{"input_ids": row, "labels": row} for row in torch.randint(32, (8, 6))]
    arguments = TrainingArguments(
        str(tmp_path), max_steps=2, save_steps=2, per_device_train_batch_size=4, report_to=[], use_cpu=True
    )
    optimizer = torch.optim.AdamW(svfit_param_groups(model, lr=1e-2), weight_decay=0.0)
    Trainer(model=model, args=arguments, train_dataset=data, optimizers=(optimizer, None)).train()
    tokens = torch.arange(6)[None]
    assert not torch.equal(model.eval()(tokens).logits, base.eval()(tokens).logits)
    again = svfit_peft.load(base, tmp_path / "checkpoint-2").eval()
    torch.testing.assert_close(again(tokens).logits, model(tokens).logits)


def test_settings_are_checked():
    for bad in ({"r": 0}, {"r": 2.5}, {"r": 3, "energy": 0.9}, {"energy": 1.5}, {"decay": "x"}):
        with pytest.raises(ValueError, match=r"rank|energy|decay"):
            SVFitConfig(**bad)
    with pytest.raises(ValueError, match=r"one.*at most 6"):
        svfit_peft.inject(net(), ["one"], r=7)
    with pytest.raises(ValueError, match="already has an adapter"):
        svfit_peft.inject(svfit_peft.inject(net(), ["one"], r=2), ["one"], r=2)

    class Padded(nn.Conv2d):
        def forward(self, x):
            return super().forward(nn.functional.pad(x, (1, 1, 1, 1)))

    with pytest.raises(ValueError, match="forward pass of its own"):
        svfit_peft.inject(nn.Sequential(Padded(3, 4, 3)), ["0"], r=2)


def test_settings_are_those_of_one_model():
    """Fails when a config that is used twice lets the first model's file speak of the second one's weights."""
    config = SVFitConfig(r=2, target_modules=["one"])
    host_inject(net(), config)
    host_inject(net(), config)
    other = net()
    nn.init.normal_(other.one.weight)
    with pytest.raises(ValueError, match="used for another model"):
        host_inject(other, config)


def test_one_adapter_takes_the_cheaper_form(monkeypatch):
    """Fails when the folded form, or its gradient, is not reached through PEFT."""
    model, x = trained(svfit_peft.inject(net(), TARGETS)), images()
    thin = model(x)
    called = []
    monkeypatch.setattr("regularized.fine_tuning.svfit.product.folding_pays", lambda *a, **k: called.append(1) or True)
    torch.testing.assert_close(model(x), thin, rtol=1e-5, atol=1e-6)
    assert len(called) == 3
