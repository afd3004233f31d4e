"""Prompts in front of keys and values: a second derivation, limits, what is frozen, whose transformer."""

import copy
import importlib

import pytest
import torch
from tests.continual.ovor.vit import DIM, HEADS, TOKENS, Attention, Vit, images
from torch import nn

from regularized.continual.ovor import OnePrompt, PrefixAttention, prefix_attention


def tokens(seed=0):
    return torch.randn(2, TOKENS, DIM, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def prompt(length=6, seed=1):
    return torch.rand(length, DIM, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def attention():
    torch.manual_seed(0)
    return Attention().double()


def by_hand(layer, x, p):
    """Head by head, with a softmax over the longer row of scores."""
    half, width = len(p) // 2, DIM // HEADS
    q, k, v = layer.qkv(x).chunk(3, dim=-1)
    out = []
    for h in range(HEADS):
        columns = slice(h * width, (h + 1) * width)
        keys = torch.cat([p[:half, columns].expand(len(x), -1, -1), layer.k_norm(k[..., columns])], dim=1)
        values = torch.cat([p[half:, columns].expand(len(x), -1, -1), v[..., columns]], dim=1)
        scores = layer.q_norm(q[..., columns]) @ keys.transpose(1, 2) / width**0.5
        out.append(scores.softmax(-1) @ values)
    return layer.proj(torch.cat(out, dim=-1))


def test_prefix_by_hand():
    """Fails when keys and values change places, the prompt is normed or projected, or heads are cut otherwise."""
    layer, p = attention(), prompt()
    found = PrefixAttention(layer, nn.Parameter(p))(tokens())
    torch.testing.assert_close(found, by_hand(layer, tokens(), p), rtol=0, atol=1e-12)


def test_a_longer_sequence_without_further_queries():
    """Fails when the prompt is a token that asks, too: its row of the output would be there."""
    q = k = v = torch.randn(2, HEADS, TOKENS, DIM // HEADS, dtype=torch.float64)
    p = prompt(4)
    row = p.unflatten(1, (HEADS, -1)).transpose(0, 1).expand(2, -1, -1, -1)
    longer = torch.cat([row[:, :, :2], k], 2), torch.cat([row[:, :, 2:], v], 2)
    expected = nn.functional.scaled_dot_product_attention(q, *longer)
    torch.testing.assert_close(prefix_attention(q, k, v, p), expected)


def test_order_inside_a_prompt_means_nothing():
    """Keys and values permuted together. Fails when a position is added to the prompt."""
    layer, p = attention(), prompt(8)
    order = torch.tensor([2, 0, 3, 1])
    permuted = torch.cat([p[:4][order], p[4:][order]])
    found = PrefixAttention(layer, nn.Parameter(permuted))(tokens())
    torch.testing.assert_close(found, PrefixAttention(layer, nn.Parameter(p))(tokens()))


def test_each_sample_may_have_its_own():
    """Fails when prompts of samples are mixed."""
    q = k = v = torch.randn(2, HEADS, TOKENS, DIM // HEADS, dtype=torch.float64)
    both = torch.stack([prompt(seed=1), prompt(seed=2)])
    found = prefix_attention(q, k, v, both)
    for i in range(2):
        torch.testing.assert_close(
            found[i : i + 1], prefix_attention(q[i : i + 1], k[i : i + 1], v[i : i + 1], both[i])
        )


@pytest.mark.parametrize("kind", ["boolean", "added"])
def test_a_mask_leaves_the_prompt_free(kind):
    """Fails when a mask hides the prompt, or is applied one prompt too far to the right."""
    layer, p = attention(), prompt()
    seen = torch.ones(TOKENS, TOKENS, dtype=torch.bool)
    seen[:, -2:] = False
    mask = (
        seen if kind == "boolean" else torch.zeros(TOKENS, TOKENS, dtype=torch.float64).masked_fill(~seen, -torch.inf)
    )
    found = PrefixAttention(layer, nn.Parameter(p))(tokens(), attn_mask=mask)
    expected = by_hand(layer, tokens()[:, :-2], p)
    torch.testing.assert_close(found[:, :-2], expected, rtol=0, atol=1e-12)


def test_no_prompt_is_the_plain_transformer_bit_for_bit():
    """Fails when a length of 0 changes the way that attention is computed."""
    torch.manual_seed(0)
    vit = Vit().eval()
    expected = vit.forward_head(vit.forward_features(images()), pre_logits=True).detach()
    model = OnePrompt(vit, 5, layers={0: 0, 1: 0})
    assert torch.equal(model.features(images()), expected)
    assert not model.prompts


def test_prompts_stand_in_the_layers_that_are_named():
    """Fails when lengths go to other layers, or are drawn from another range than U(0, 1)."""
    model = OnePrompt(Vit(depth=3), 5, layers={2: 400, 0: 2})
    assert {name: len(p) for name, p in model.prompts.items()} == {"blocks.0.attn": 2, "blocks.2.attn": 400}
    long = model.prompts["blocks.2.attn"]
    assert 0.0 <= long.min().item() < 0.01 < 0.99 < long.max().item() <= 1.0
    assert long.mean().item() == pytest.approx(0.5, abs=0.02)


def test_only_prompts_and_head_are_trained_and_dropout_is_off():
    """Fails when the transformer learns, or follows `train()`."""
    torch.manual_seed(0)
    model = OnePrompt(Vit(), 5, layers={0: 2, 1: 4})
    before = copy.deepcopy(model.vit.state_dict())
    model.train()
    assert torch.equal(model(images()), model(images()))
    optimizer = torch.optim.Adam([p for p in model.parameters() if p.requires_grad], lr=0.1)
    model(images()).square().sum().backward()
    optimizer.step()
    moved = {name for name, value in model.vit.state_dict().items() if not torch.equal(value, before[name])}
    assert moved == {"blocks.0.attn.prompt", "blocks.1.attn.prompt"}
    assert [model.training, model.vit.training] == [True, False]


def transformer(name="ViT"):
    pytest.importorskip("transformers", reason="transformers is not installed")
    import transformers

    torch.manual_seed(0)
    sizes = {"hidden_size": 12, "num_hidden_layers": 2, "num_attention_heads": 3, "intermediate_size": 24}
    config = getattr(transformers, f"{name}Config")(**sizes, image_size=8, patch_size=4, num_channels=1)
    return getattr(transformers, f"{name}Model")(config).eval()


@pytest.mark.parametrize("name", ["ViT", "DeiT", "Dinov2"])
def test_transformers_with_a_prompt_without_weight(name):
    """A key so far off that it is never asked: the plain network. Fails when an attention of theirs is computed
    otherwise."""
    vit = transformer(name)
    x = torch.rand(2, 1, 8, 8)
    with torch.no_grad():
        expected = vit(x).last_hidden_state[:, 0]
        model = OnePrompt(vit, 5, layers={0: 2, 1: 2})
        drawn = model.features(x)
        for module in model.vit.modules():
            if isinstance(module, PrefixAttention):
                q = module.attention.q_proj
                q.weight.zero_(), module.attention.k_proj.weight.zero_()  # all scores equal but the prompt's
                q.bias.fill_(1.0), module.attention.k_proj.bias.zero_()
                module.prompt.fill_(-1e4)
        plain = copy.deepcopy(model.vit)
        for name_, module in list(plain.named_modules()):
            if isinstance(module, PrefixAttention):
                owner, _, last = name_.rpartition(".")
                setattr(plain.get_submodule(owner), last, module.attention)
        torch.testing.assert_close(model.features(x), plain(x).last_hidden_state[:, 0])
    assert not torch.allclose(drawn, expected)


def test_timm_itself():
    """Fails when timm calls its attention otherwise than we do, or pools elsewhere."""
    try:
        timm = importlib.import_module("timm")
    except Exception as error:
        pytest.skip(f"not applicable: timm cannot be imported beside this build of torch ({error})")
    torch.manual_seed(0)
    vit = timm.create_model("vit_tiny_patch16_224", num_classes=0).eval()
    x = torch.randn(1, 3, 224, 224)
    with torch.no_grad():
        expected = vit(x)
        model = OnePrompt(vit, 10)
        assert not torch.allclose(model.features(x), expected)
        for p in model.prompts.values():
            p[: len(p) // 2] = 0.0
            p[len(p) // 2 :] = 0.0
    assert len(model.prompts) == 5
