"""PEFT as the host: what users of PEFT count on, for adapters of factors."""

import copy
import json
import warnings
from dataclasses import dataclass

import pytest
import torch
from torch import nn

pytest.importorskip("peft", reason='needs the extra "peft"')

import peft
from safetensors.torch import load_file, save_file
from transformers import GPT2Config, GPT2LMHeadModel

from regularized.evidence.pretrained import tiny_llama
from regularized.fine_tuning import peft_host
from regularized.fine_tuning.peft_host import base_state_dict, export_lora, factor_layers
from regularized.fine_tuning.peft_layer import FREE_SETTINGS, FactorConfig, FactorLayer, Factors
from regularized.fine_tuning.sorsa import inject_sorsa
from regularized.fine_tuning.sorsa.peft import SorsaConfig, inject, load
from regularized.fine_tuning.svfit import peft as svfit_peft
from regularized.mechanisms.sealed_files import write_settings

pytestmark = pytest.mark.filterwarnings("ignore:.*fan_in_fan_out.*")


def llama():
    return tiny_llama(0), ["q_proj", "down_proj"], torch.arange(14).view(2, 7)


def gpt2():
    torch.manual_seed(0)
    size = {"n_embd": 16, "n_layer": 1, "n_head": 2, "n_positions": 16, "bos_token_id": None, "eos_token_id": None}
    return GPT2LMHeadModel(GPT2Config(vocab_size=32, **size)), ["c_attn", "c_proj"], torch.arange(14).view(2, 7)


def convolutions():
    torch.manual_seed(0)
    net = nn.Sequential(nn.Conv2d(3, 8, 3, stride=2, padding=1), nn.ReLU(), nn.Conv2d(8, 6, 1), nn.Flatten())
    return net.append(nn.Linear(6 * 16, 5)), ["0", "2", "4"], torch.randn(2, 3, 8, 8)


def outputs(model, x):
    model.eval()
    with torch.no_grad():
        y = model(x)
    return getattr(y, "logits", y)


def perturb(model, seed=1):
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for p in model.parameters():
            if p.requires_grad:
                p += 0.05 * torch.randn(p.shape, generator=generator)


def seal(folder, **settings):
    """Make an edited adapter a whole one again: what is tested is another check than that of the checksum."""
    file = folder / "adapter_config.json"
    saved = {**json.loads(file.read_text()), **settings}
    write_settings(file, saved, folder / "adapter_model.safetensors", free=FREE_SETTINGS)


def close(a, b, tolerance=1e-5):
    torch.testing.assert_close(a, b, atol=tolerance, rtol=0)


@pytest.mark.parametrize("make", [llama, gpt2, convolutions])
def test_life_of_an_adapter(make, tmp_path):
    """Start, change, off, file, export, merge: fails when a layout, a scale or the residual is wrong in any of them."""
    base, targets, x = make()
    before, names = outputs(base, x), set(base.state_dict())
    adapted = inject(copy.deepcopy(base), targets, r=3, alpha=6.0)
    assert all("sorsa_" in name for name, p in adapted.named_parameters() if p.requires_grad)
    close(outputs(adapted, x), before)
    perturb(adapted)
    after = outputs(adapted, x)
    assert (after - before).abs().max() > 1e-2
    with adapted.disable_adapter():
        close(outputs(adapted, x), before)
    close(outputs(adapted, x), after, 0.0)

    adapted.save_pretrained(tmp_path / "own")
    assert not list((tmp_path / "own").glob("*.bin"))
    close(outputs(load(copy.deepcopy(base), tmp_path / "own"), x), after)

    export_lora(adapted, tmp_path / "lora")
    with warnings.catch_warnings():
        warnings.simplefilter("error", UserWarning)
        stock = peft.PeftModel.from_pretrained(copy.deepcopy(base), tmp_path / "lora")
    assert not list(factor_layers(stock))
    close(outputs(stock, x), after)
    close(outputs(stock.merge_and_unload(), x), after)

    adapted.merge_adapter()
    close(outputs(adapted, x), after)
    adapted.unmerge_adapter()
    close(outputs(adapted, x), after)
    unloaded = copy.deepcopy(adapted).unload()
    close(outputs(unloaded, x), before)
    merged = adapted.merge_and_unload()
    close(outputs(merged, x), after)
    assert set(merged.state_dict()) == set(unloaded.state_dict()) == names


def test_gradients_are_those_of_the_dense_weight():
    """Fails when the thin products compute something else than ``(rest + c left diag(values) right) x``."""
    linear = nn.Linear(7, 5).double()
    adapted = inject(nn.Sequential(copy.deepcopy(linear)), ["0"], r=3, alpha=1.5)
    perturb(adapted)
    layer = next(layer for _, layer in factor_layers(adapted))
    x = torch.randn(4, 7, dtype=torch.float64)
    adapted(x).square().sum().backward()
    factors = [layer.sorsa_left.default, layer.sorsa_values.default, layer.sorsa_right.default]
    left, values, right = (p.detach().clone().requires_grad_() for p in factors)
    weight = layer.base_layer.weight + 0.5 * left @ torch.diag(values) @ right
    nn.functional.linear(x, weight, linear.bias).square().sum().backward()
    for ours, theirs in zip(factors, (left, values, right), strict=True):
        torch.testing.assert_close(ours.grad, theirs.grad)


def test_factors_are_not_rounded_to_a_bfloat16_base(tmp_path):
    """Fails when PEFT moves the factors to the base's dtype, which costs orthonormality 3 digits (its PiSSA does)."""
    base, targets, x = llama()
    base = base.bfloat16()
    before = outputs(base, x)
    adapted = inject(copy.deepcopy(base), targets, r=4)
    for _, layer in factor_layers(adapted):
        left = layer.sorsa_left.default
        assert left.dtype == torch.float32
        close(left.T @ left, torch.eye(4), 1e-5)
        assert layer.base_layer.weight.dtype == torch.bfloat16
    close(outputs(adapted, x), before, 2e-2)
    perturb(adapted)
    adapted.save_pretrained(tmp_path)
    assert all(t.dtype == torch.float32 for t in load_file(tmp_path / "adapter_model.safetensors").values())
    close(outputs(load(base, tmp_path), x), outputs(adapted, x), 0.0)


def test_two_adapters_on_one_model():
    """Fails when an inactive adapter leaves its hole in the weight, or the second one splits the first one's rest."""
    base, targets, x = llama()
    before = outputs(base, x)
    alone = {}
    for name, rank in (("one", 3), ("two", 5)):
        single = inject(copy.deepcopy(base), targets, r=rank)
        perturb(single, rank)
        alone[name] = outputs(single, x)
    both = inject(base, targets, r=3, adapter_name="one")
    perturb(both, 3)
    both.add_adapter("two", SorsaConfig(r=5, target_modules=targets))
    both.set_adapter("two")
    perturb(both, 5)
    close(outputs(both, x), alone["two"])
    both.set_adapter("one")
    close(outputs(both, x), alone["one"])
    both.delete_adapter("two")
    close(outputs(both, x), alone["one"])
    with both.disable_adapter():
        close(outputs(both, x), before)


@pytest.mark.parametrize("low_memory", [False, True])
def test_a_file_with_other_signs_loads_into_an_injected_model(tmp_path, low_memory):
    """A decomposition elsewhere may turn the signs of triplets; fails when the rest of *this* one is kept for them.

    This is how ``Trainer`` resumes: inject again, then load the adapter.
    """
    base, targets, x = llama()
    adapted = inject(copy.deepcopy(base), targets, r=3)
    perturb(adapted)
    adapted.save_pretrained(tmp_path)
    file = tmp_path / "adapter_model.safetensors"
    tensors = load_file(file)
    for name in tensors:
        if "sorsa_left" in name or "sorsa_right" in name:
            tensors[name] = tensors[name] * -1
    # Not only signs: another scale of values against vectors is the same function, too.
    for name in tensors:
        if "sorsa_left" in name:
            tensors[name] = 2 * tensors[name]
        if "sorsa_values" in name:
            tensors[name] = tensors[name] / 2
    save_file(tensors, file)
    seal(tmp_path)
    if low_memory:
        again = peft.PeftModel.from_pretrained(
            base, tmp_path, config=SorsaConfig.read(tmp_path), low_cpu_mem_usage=True
        )
    else:
        again = inject(base, targets, r=3)
        again.load_adapter(tmp_path, "default", is_trainable=True)
    close(outputs(again, x), outputs(adapted, x))
    with again.disable_adapter(), adapted.disable_adapter():
        close(outputs(again, x), outputs(adapted, x))


def test_the_whole_state_loads():
    """Fails when loading a state that brings the base weight along takes the start out of it once more."""
    base, targets, x = llama()
    first = inject(copy.deepcopy(base), targets, r=3)
    perturb(first)
    second = inject(tiny_llama(1), targets, r=3)  # what it took from its own weight is another matrix
    state = {name: -t if "_left" in name or "_right" in name else t for name, t in first.state_dict().items()}
    second.load_state_dict(state)
    close(outputs(second, x), outputs(first, x), 1e-6)


def test_what_is_saved_besides_the_factors_is_exported_too(tmp_path):
    """Fails when modules_to_save, or the rank of a single layer, is lost on the way to LoRA."""
    base, targets, x = convolutions()
    config = SorsaConfig(r=3, target_modules=targets[:2], modules_to_save=["4"], rank_pattern={"2": 5})
    adapted = peft_host.inject(copy.deepcopy(base), config)
    perturb(adapted)
    adapted.save_pretrained(tmp_path / "own")
    export_lora(adapted, tmp_path / "lora")
    for again in (
        load(copy.deepcopy(base), tmp_path / "own"),
        peft.PeftModel.from_pretrained(copy.deepcopy(base), tmp_path / "lora"),
    ):
        close(outputs(again, x), outputs(adapted, x))
    assert json.loads((tmp_path / "lora" / "adapter_config.json").read_text())["r"] == 10


def test_stock_peft_refuses_what_it_cannot_read(tmp_path):
    """Fails when stock PEFT makes an empty LoRA of our folder, and the base model passes for the fine-tuned one."""
    base, targets, _ = llama()
    inject(copy.deepcopy(base), targets, r=3).save_pretrained(tmp_path)
    with pytest.raises(KeyError, match=r"no LoRA, and stock PEFT cannot read it: use .*load\(model, folder\)"):
        peft.PeftModel.from_pretrained(base, tmp_path)
    card = (tmp_path / "README.md").read_text(encoding="utf-8")
    assert "library_name: peft" not in card
    assert "stock PEFT cannot read it" in card
    assert load(base, tmp_path).peft_config["default"].peft_type == peft.PeftType.LORA, "inside it is one, for PEFT"


# -- a second technique on the same host -------------------------------------------------------


class ShiftLayer(FactorLayer):
    """Trains the change of all singular values that make up nine tenths of the sum; the base is not touched."""

    trainable = ("shift_delta",)
    frozen = ("shift_left", "shift_right")

    def choose_rank(self, values, config):
        return int((values.cumsum(0) < config.share * values.sum()).sum()) + 1

    def start(self, svd, scale):
        return {"shift_delta": torch.zeros_like(svd.values), "shift_left": svd.left, "shift_right": svd.right}

    def now(self, adapter):
        return Factors(self.shift_left[adapter], self.shift_delta[adapter], self.shift_right[adapter])


@dataclass
class ShiftConfig(FactorConfig):
    technique: str = "shift"
    share: float = 0.9
    layer_class = ShiftLayer


def test_another_technique_in_a_few_lines(tmp_path):
    """Fails when the host knows SORSA: an untouched base, ranks chosen by the layer, settings of its own."""
    base, targets, x = llama()
    before = outputs(base, x)
    adapted = peft_host.inject(copy.deepcopy(base), ShiftConfig(target_modules=targets, share=0.8))
    close(outputs(adapted, x), before, 0.0)
    ranks = {layer.r["default"] for _, layer in factor_layers(adapted)}
    assert len(ranks) > 1
    perturb(adapted)
    adapted.save_pretrained(tmp_path / "own")
    export_lora(adapted, tmp_path / "lora")
    again = peft_host.load(copy.deepcopy(base), tmp_path / "own", ShiftConfig)
    assert again.peft_config["default"].share == 0.8
    close(outputs(again, x), outputs(adapted, x), 0.0)
    stock = peft.PeftModel.from_pretrained(copy.deepcopy(base), tmp_path / "lora")
    close(outputs(stock, x), outputs(adapted, x))
    with pytest.raises(ValueError, match=r"adapter of 'shift', not of 'sorsa'"):
        load(base, tmp_path / "own")


# -- errors ------------------------------------------------------------------------------------


def _groups():
    inject(nn.Sequential(nn.Conv2d(4, 4, 3, groups=2)), ["0"], r=2)


def _broken():
    net = nn.Sequential(nn.Linear(4, 4))
    net[0].weight.data[0, 0] = float("nan")
    inject(net, ["0"], r=2)


def _quantized():
    net = nn.Sequential(nn.Linear(4, 4))
    net[0].weight = nn.Parameter(torch.zeros(4, 4, dtype=torch.int8), requires_grad=False)
    inject(net, ["0"], r=2)


def _twice():
    base, targets, _ = llama()
    inject(inject(base, targets, r=2).base_model.model, targets, r=2)


def _stock_beside_ours():
    base, targets, _ = llama()
    inject(base, targets, r=2).add_adapter("stock", peft.LoraConfig(target_modules=targets))


def _train_merged():
    base, targets, x = llama()
    adapted = inject(base, targets, r=2)
    adapted.merge_adapter()
    adapted.train()(x)


def _many_in_a_batch():
    adapted = inject(nn.Sequential(nn.Linear(4, 4)), ["0"], r=2).eval()
    adapted(torch.zeros(1, 4), adapter_names=["default"])


def _dilated(folder="/nowhere"):
    export_lora(inject(nn.Sequential(nn.Conv2d(4, 4, 3, dilation=2)), ["0"], r=2), folder)


@pytest.mark.parametrize(
    ("call", "error", "words"),
    [
        (lambda: inject(llama()[0], ["q_pro"], r=2), ValueError, ("q_pro", "close names", "q_proj")),
        (lambda: inject(llama()[0], ["k_proj"], r=20), ValueError, ("k_proj", "r is 20", "at most 16")),
        (lambda: inject(llama()[0], ["k_proj"], r=0), ValueError, ("r must be at least 1", "0")),
        (lambda: inject(llama()[0], ["k_proj"], r=2, alpha=-1.0), ValueError, ("alpha", "-1")),
        (lambda: inject(llama()[0], ["lm_head"], r=2), ValueError, ("lm_head", "shares its weight", "embed_tokens")),
        (lambda: SorsaConfig(use_dora=True), ValueError, ("use_dora", "default")),
        (_groups, ValueError, ("groups=2",)),
        (_broken, ValueError, ("'0'", "NaN")),
        (_quantized, TypeError, ("'0'", "quantized", "int8")),
        (lambda: SorsaConfig(lora_alpha=8), ValueError, ("lora_alpha=8", "alpha", "export_lora")),
        (_twice, ValueError, ("already has an adapter", "add_adapter")),
        (_stock_beside_ours, TypeError, ("SorsaLayer", "LoraConfig")),
        (_train_merged, RuntimeError, ("merged", "unmerge_adapter")),
        (_many_in_a_batch, NotImplementedError, ("adapter_names", "set_adapter")),
        (_dilated, ValueError, ("dilation (2, 2)", "merge_and_unload")),
        (lambda: load(llama()[0], "/nowhere"), FileNotFoundError, ("adapter_config.json", "save_pretrained")),
        (lambda: export_lora(nn.ReLU(), "/nowhere"), ValueError, ("no adapter 'default'",)),
        (lambda: export_lora(nn.ReLU(), "/nowhere", adapter_name={}), ValueError, ("no adapter",)),
    ],
)
def test_errors(call, error, words):
    with pytest.raises(error) as caught:
        call()
    assert all(word.lower() in str(caught.value).lower() for word in words), str(caught.value)


def test_an_adapter_of_another_model_is_refused(tmp_path):
    """Fails when missing or misshapen factors are only warned about."""
    base, targets, _ = llama()
    inject(copy.deepcopy(base), targets[:1], r=2).save_pretrained(tmp_path / "less")
    seal(tmp_path / "less", target_modules=targets)
    with pytest.raises(ValueError, match=r"does not fit this model.*down_proj"):
        load(copy.deepcopy(base), tmp_path / "less")
    inject(tiny_llama(0, width=64), targets, r=2).save_pretrained(tmp_path / "wide")
    with pytest.raises(ValueError, match=r"(?s)does not fit this model.*size mismatch"):
        load(base, tmp_path / "wide")


# -- modules that cannot be adapted ------------------------------------------------------------

TECHNIQUES = {"sorsa": inject, "svfit": svfit_peft.inject}


def mixed():
    torch.manual_seed(0)
    parts = {"emb": nn.Embedding(9, 8), "lin": nn.Linear(8, 8), "attn": nn.MultiheadAttention(8, 2)}
    return nn.ModuleDict({**parts, "conv": nn.Conv1d(8, 8, 3), "volume": nn.Conv3d(8, 8, 3)})


@pytest.mark.parametrize("technique", TECHNIQUES)
@pytest.mark.parametrize("among", [[], ["lin"]])
@pytest.mark.parametrize("other", ["emb", "attn", "conv", "volume"])
def test_no_module_becomes_a_stock_lora(technique, among, other):
    """Fails when PEFT adapts what we cannot split by itself, alone or among others; or the model is changed by then."""
    model = mixed()
    before, trained = set(model.state_dict()), [p.requires_grad for p in model.parameters()]
    kind = type(model[other]).__name__
    with pytest.raises(TypeError, match=rf"layer '{other}' is a {kind}.*choose such layers"):
        TECHNIQUES[technique](model, [*among, other], r=2)
    assert set(model.state_dict()) == before
    assert [p.requires_grad for p in model.parameters()] == trained
    with pytest.raises(TypeError, match=rf"layer '{other}' is a {kind}"):  # past our inject
        peft.get_peft_model(model, SorsaConfig(r=2, target_modules=[*among, other]))


@pytest.mark.parametrize("technique", TECHNIQUES)
def test_layers_whose_weight_is_read_are_refused(technique):
    """Fails when an adapter sits on a layer that is never called: attention's projection, torch's fast encoder."""
    encoder = nn.Sequential(nn.TransformerEncoderLayer(8, 2, 16, batch_first=True))
    for target, owner in (("out_proj", "MultiheadAttention"), ("linear1", "TransformerEncoderLayer")):
        with pytest.raises(ValueError, match=rf"{target}' belongs to nn.{owner}.*passed by"):
            TECHNIQUES[technique](encoder, [target], r=2)
    with pytest.raises(ValueError, match="passed by"):
        TECHNIQUES[technique](encoder, "all-linear", r=2)
    with pytest.raises(ValueError, match="passed by"):
        inject_sorsa(encoder, r=2)


# -- what PEFT does to the matrices of a LoRA --------------------------------------------------


def pair(technique, base, targets):
    """A model with two trained adapters, the second one on fewer layers, and active."""
    model = TECHNIQUES[technique](base, targets, r=3, adapter_name="one")
    perturb(model, 3)
    config = {"sorsa": SorsaConfig, "svfit": svfit_peft.SVFitConfig}[technique]
    model.add_adapter("two", config(r=2, target_modules=targets[1:]))
    model.set_adapter("two")
    perturb(model, 5)
    return model


@pytest.mark.parametrize("technique", TECHNIQUES)
@pytest.mark.parametrize("kind", ["linear", "svd", "cat"])
def test_weighted_adapter_of_peft_is_refused(technique, kind):
    """Fails when ``add_weighted_adapter`` makes an adapter that does nothing, or leaves half of one behind."""
    base, targets, x = convolutions()
    model = pair(technique, base, targets)
    before, names = outputs(model, x), set(model.state_dict())
    for adapters in (["one"], ["one", "two"] if kind != "linear" else ["two"]):
        with pytest.raises(ValueError, match=r"add_weighted_adapter.*export_lora"):
            model.add_weighted_adapter(adapters, [0.5] * len(adapters), "sum", combination_type=kind)
    assert set(model.peft_config) == {"one", "two"}
    assert set(model.state_dict()) == names
    close(outputs(model, x), before, 0.0)


@pytest.mark.parametrize("technique", TECHNIQUES)
@pytest.mark.parametrize("make", [llama, gpt2, convolutions])
def test_weighted_sum_as_a_lora(technique, make, tmp_path):
    """Fails when the export of several adapters is not ``W + sum of share * change``, layer by layer."""
    base, targets, _ = make()
    model = pair(technique, copy.deepcopy(base), targets)
    shares = {"one": 0.7, "two": -0.4}
    export_lora(model, tmp_path, adapter_name=shares)
    stock = peft.PeftModel.from_pretrained(copy.deepcopy(base), tmp_path).merge_and_unload()
    seen = 0
    for name, layer in factor_layers(model):
        name = name.removeprefix("base_model.model.")
        expected = base.get_submodule(name).weight.detach().clone()
        for adapter in shares.keys() & layer.r.keys():
            expected += shares[adapter] * layer.get_delta_weight(adapter).detach()
            seen += 1
        close(stock.get_submodule(name).weight, expected)
    assert seen > len(list(factor_layers(model))) > 1


def test_a_module_saved_whole_has_no_weighted_sum(tmp_path):
    """Fails when one of two trained heads is exported for both."""
    base, targets, _ = convolutions()
    model = peft_host.inject(base, SorsaConfig(r=2, target_modules=targets[:2], modules_to_save=["4"]))
    model.add_adapter("two", SorsaConfig(r=2, target_modules=targets[:2], modules_to_save=["4"]))
    with pytest.raises(ValueError, match=r"'base_model.model.4.bias' whole"):
        export_lora(model, tmp_path, adapter_name={"default": 0.5, "two": 0.5})


def test_the_state_of_the_base_model():
    """Fails when the rest of a weight, without what its adapters took, passes for the weight."""
    base, targets, _ = convolutions()
    untouched = copy.deepcopy(base)
    model = pair("sorsa", base, targets)
    for ask in (peft.get_base_model_state_dict, lambda m: m.get_base_model().state_dict()):
        with pytest.raises(RuntimeError, match=r"not that of the base model.*'0'.*base_state_dict"):
            ask(model)
    state = base_state_dict(model)
    assert {name: t.shape for name, t in state.items()} == {n: t.shape for n, t in untouched.state_dict().items()}
    for name, tensor in untouched.state_dict().items():
        close(state[name], tensor)
    convolutions()[0].load_state_dict(state)
    model.merge_adapter(["one"])
    with pytest.raises(RuntimeError, match="unmerge_adapter"):
        base_state_dict(model)
    model.unmerge_adapter()
    model.load_state_dict(model.state_dict())  # of the whole model there is no doubt
    hosted = svfit_peft.inject(copy.deepcopy(untouched), targets, r=2)  # takes nothing: PEFT's own answer is right
    for state in (peft.get_base_model_state_dict(hosted), base_state_dict(hosted)):
        assert all(torch.equal(state[name], tensor) for name, tensor in untouched.state_dict().items())


@pytest.mark.parametrize("technique", TECHNIQUES)
def test_a_deleted_adapter_leaves_no_name(technique):
    """Fails when a layer goes on knowing an adapter: its settings, or that its buffers are not saved."""
    base, targets, x = convolutions()
    before = outputs(base, x)
    model = pair(technique, base, targets)
    model.delete_adapter("two")

    def names(value):
        if isinstance(value, nn.Module):
            return set().union(*(names(v) for v in vars(value).values()))
        if isinstance(value, dict):
            return set(value).union(*(names(v) for v in value.values()))
        return {v for v in value if isinstance(v, str)} if isinstance(value, set | list | tuple) else {value}

    for _, layer in factor_layers(model):
        own = {key: value for key, value in vars(layer).items() if key != "_modules"}
        assert "two" not in {n for n in names(own) if isinstance(n, str)}
        for key, child in layer.named_children():
            assert "two" not in {n for n in names(child) if isinstance(n, str)}, key
    model.delete_adapter("one")
    close(outputs(model.base_model.model, x), before)


# -- damaged files -----------------------------------------------------------------------------


@pytest.mark.parametrize("technique", TECHNIQUES)
def test_no_damaged_byte_is_believed(technique, tmp_path):
    """Fails when a flipped bit of a value or of a setting loads, as another function or with an error of its own."""
    own = {"sorsa": load, "svfit": svfit_peft.load}[technique]
    adapted = TECHNIQUES[technique](nn.Sequential(nn.Linear(6, 5)), ["0"], r=2)
    adapted.save_pretrained(tmp_path)
    flips = 0
    for file in (tmp_path / "adapter_model.safetensors", tmp_path / "adapter_config.json"):
        whole = file.read_bytes()
        saved = json.loads(whole) if file.suffix == ".json" else None
        for place in range(0, len(whole), 23):
            damaged = bytearray(whole)
            damaged[place] ^= 1 << place % 7
            file.write_bytes(damaged)
            try:
                same = {**json.loads(damaged), **{k: saved[k] for k in FREE_SETTINGS}} == saved if saved else False
            except ValueError:
                same = False
            if not same:
                flips += 1
                with pytest.raises(ValueError, match=r"damaged|adapter of"):
                    own(nn.Sequential(nn.Linear(6, 5)), tmp_path)
        file.write_bytes(whole[:-9])
        with pytest.raises(ValueError, match="damaged"):
            own(nn.Sequential(nn.Linear(6, 5)), tmp_path)
        file.write_bytes(whole)
    assert flips > 60


@pytest.mark.parametrize(
    "text", ["", "{", "[1]", "null", '{"technique": ["sorsa"]}', "[" * 100_000, '{"technique": "sorsa"}', "\udcff"]
)
def test_settings_that_are_none(text, tmp_path):
    """Fails when a damaged ``adapter_config.json`` gives errors of JSON, of dictionaries or of PEFT."""
    inject(nn.Sequential(nn.Linear(6, 5)), ["0"], r=2).save_pretrained(tmp_path)
    (tmp_path / "adapter_config.json").write_bytes(text.encode("utf-8", "surrogateescape"))
    with pytest.raises(ValueError, match=r"damaged|adapter of|checksum"):
        load(nn.Sequential(nn.Linear(6, 5)), tmp_path)


@pytest.mark.parametrize(
    "settings", [{"r": "two"}, {"alpha": []}, {"rank_pattern": 3}, {"target_modules": 7}, {"bias": {}}]
)
def test_hostile_settings_are_refused(settings, tmp_path):
    """Fails when a file that is whole, but was written by nobody, leaks an error of another kind."""
    inject(nn.Sequential(nn.Linear(6, 5)), ["0"], r=2).save_pretrained(tmp_path)
    seal(tmp_path, **settings)
    with pytest.raises(ValueError, match=r"settings that cannot be|does not fit this model"):
        load(nn.Sequential(nn.Linear(6, 5)), tmp_path)


def test_a_file_may_be_moved(tmp_path):
    """Fails when the name of the base model, which people write into the file, counts as damage."""
    adapted = inject(nn.Sequential(nn.Linear(6, 5)), ["0"], r=2)
    adapted.save_pretrained(tmp_path)
    file = tmp_path / "adapter_config.json"
    file.write_text(json.dumps({**json.loads(file.read_text()), "base_model_name_or_path": "elsewhere"}, indent=4))
    assert SorsaConfig.read(tmp_path).base_model_name_or_path == "elsewhere"
    (tmp_path / "adapter_model.safetensors").unlink()
    with pytest.raises(FileNotFoundError, match="adapter_model"):
        load(nn.Sequential(nn.Linear(6, 5)), tmp_path)
