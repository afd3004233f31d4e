"""Channel ViT: tokens, positions and the transformer. Golden vectors and the contract are checked elsewhere."""

import copy

import torch
from torch import nn

from regularized.papers.channel_vit.networks import PlainViT
from regularized.robustness.channel_vit import ChannelPatchEmbed, ChannelViT, channel_tokens, place_embedding

SHAPE = {"img_size": 8, "patch_size": 4, "embed_dim": 16, "num_heads": 2}


def network(channels=5, classes=3, dtype=torch.float64, **options):
    torch.manual_seed(0)
    net = ChannelViT(channels, num_classes=classes, depth=2, **{**SHAPE, **options}).to(dtype)
    with torch.no_grad():  # away from the initialisation, where tokens hardly differ
        for p in net.parameters():
            p.add_(0.3 * torch.randn_like(p))
    return net.eval()


def images(channels=5, count=3, side=8, dtype=torch.float64):
    return torch.randn(count, channels, side, side, generator=torch.Generator().manual_seed(1), dtype=dtype)


def test_one_channel_is_a_plain_vit():
    """Fails when the channel's vector, the positions or the class token enter in another way than as a patch bias."""
    ours = network()
    plain = PlainViT(1, num_classes=3, depth=2, **SHAPE).to(torch.float64).eval()
    state = {k: v for k, v in ours.state_dict().items() if not k.startswith("patch_embed")}
    state["patch_embed.weight"] = ours.patch_embed.proj.weight
    state["patch_embed.bias"] = ours.patch_embed.proj.bias + ours.patch_embed.channel_embed.weight[3]
    plain.load_state_dict(state)
    x = images(1)
    torch.testing.assert_close(ours(x, channels=[3]), plain(x), rtol=0, atol=1e-12)


def test_blocks_are_those_of_torch():
    """Fails when heads are cut in another order, the norm stands behind the branch, or GELU is the approximate one."""
    block = network().blocks[1]
    theirs = nn.TransformerEncoderLayer(
        16, 2, 64, dropout=0.0, activation="gelu", layer_norm_eps=1e-6, batch_first=True, norm_first=True
    ).double()
    names = {
        "self_attn.in_proj_": "attn.qkv.",
        "self_attn.out_proj.": "attn.proj.",
        "linear1.": "mlp.fc1.",
        "linear2.": "mlp.fc2.",
        "norm1.": "norm1.",
        "norm2.": "norm2.",
    }
    state = block.state_dict()
    theirs.load_state_dict({a + end: state[b + end] for a, b in names.items() for end in ("weight", "bias")})
    x = torch.randn(2, 7, 16, dtype=torch.float64)
    torch.testing.assert_close(block(x), theirs(x), rtol=0, atol=1e-12)


def test_order_of_the_channels_does_not_matter():
    """Fails when a token's position counts channels, or ids are not looked up."""
    net, x = network(), images()
    order = [3, 0, 4, 1, 2]
    torch.testing.assert_close(net(x[:, order], channels=order), net(x), rtol=0, atol=1e-10)
    assert not torch.allclose(net(x[:, order]), net(x), atol=1e-3)  # without the ids they are other images


def test_a_subset_is_the_same_tokens_left_out():
    """Fails when a missing channel changes the tokens of the others."""
    net, x = network(), images()
    tokens = net.tokens(x)
    some = net.tokens(x[:, [1, 4]], channels=[1, 4])
    of_channels = tokens[:, 1:].unflatten(1, (5, 4))[:, [1, 4]].flatten(1, 2)
    torch.testing.assert_close(some, torch.cat([tokens[:, :1], of_channels], dim=1), rtol=0, atol=1e-12)
    torch.testing.assert_close(net(x[:, [1, 4]], channels=[1, 4]), net.classify(net.encode(some)))


def test_equal_planes_give_equal_features():
    """Fails when anything but content, channel and place tells tokens apart; the class token sees them twice."""
    net, x = network(), images(1)
    tokens = net.tokens(x, channels=[2])
    twice = net.encode(torch.cat([tokens, tokens[:, 1:]], dim=1))
    torch.testing.assert_close(twice[:, 1:5], twice[:, 5:], rtol=0, atol=1e-10)
    assert not torch.allclose(twice[:, 0], net.encode(tokens)[:, 0], atol=1e-6)


def test_images_of_a_batch_may_differ_in_their_channels():
    """Fails when the ids of the first image are used for all."""
    net, x = network(), images(2, count=2)
    both = net(x, channels=torch.tensor([[0, 1], [4, 2]]))
    alone = [net(x[k : k + 1], channels=ids) for k, ids in enumerate(([0, 1], [4, 2]))]
    torch.testing.assert_close(both, torch.cat(alone))


def test_tokens_in_another_way():
    """Fails when patches are cut in another order than a convolution's, or channels are not the outer index."""
    embed = ChannelPatchEmbed(3, patch_size=2, embed_dim=5).double()
    x = torch.randn(2, 3, 4, 6, dtype=torch.float64)
    planes = [embed.proj(x[:, c : c + 1]).flatten(2).transpose(1, 2) + embed.channel_embed.weight[c] for c in range(3)]
    torch.testing.assert_close(embed(x), torch.cat(planes, dim=1))


def test_gradients_of_the_tokens():
    """Fails when the one table that is added hides a gradient, for ids of the batch and of each image."""
    torch.manual_seed(0)
    x = torch.randn(2, 2, 4, 4, dtype=torch.float64, requires_grad=True)
    rest = [(3, 1, 2, 2), (3,), (4, 3), (1, 4, 3)]
    weight, bias, vectors, places = (torch.randn(s, dtype=torch.float64, requires_grad=True) for s in rest)
    for ids in (torch.tensor([3, 1]), torch.tensor([[3, 1], [0, 1]])):
        assert torch.autograd.gradcheck(
            lambda x, w, b, v, p, ids=ids: channel_tokens(x, ids, w, b, v, p), (x, weight, bias, vectors, places)
        )


def test_maps_are_of_channels_and_places():
    """Fails when a map is transposed, or channels and places are mixed up."""
    net = network(img_size=(8, 12))
    x = torch.randn(2, 2, 8, 12, dtype=torch.float64)
    features, maps = net.forward_features(x, [4, 1]), net.feature_maps(x, [4, 1])
    assert maps.shape == (2, 2, 16, 2, 3)
    torch.testing.assert_close(maps[:, 1, :, 1, 0], features[:, 1 + 6 + 3])


def test_positions_on_their_own_grid_are_exact():
    """Fails when several channels, or a needless interpolation, change the table (the official code's do)."""
    net, x = network(), images()
    torch.testing.assert_close(net.places(x), net.pos_embed[:, 1:], rtol=0, atol=0)
    warped = network(positions="official")
    assert not torch.allclose(warped.places(x), net.places(x), atol=1e-3)
    torch.testing.assert_close(warped.places(x[:, :1]), net.places(x), rtol=0, atol=0)


def test_positions_of_other_sizes():
    """Fails when rows and columns are exchanged, or a table that rises along the rows does not do so any more."""
    table = torch.arange(4.0).repeat_interleave(4).view(1, 16, 1)  # the row's number
    wide = place_embedding(table, (4, 4), (4, 8)).view(4, 8)
    torch.testing.assert_close(wide, torch.arange(4.0)[:, None].expand(4, 8))
    net = network()
    assert net(images(side=12)).shape == (3, 3)


def test_released_filters_are_those_of_a_3d_convolution(tmp_path):
    """Fails when weights of the released shape, (D, 1, 1, P, P), do not load, or loading changes the caller's."""
    net, other = network(), network(positions="official")
    state = copy.copy(net.state_dict())
    state["patch_embed.proj.weight"] = state["patch_embed.proj.weight"].unsqueeze(2)
    other.load_state_dict(state)
    torch.testing.assert_close(other.patch_embed.proj.weight, net.patch_embed.proj.weight)
    assert state["patch_embed.proj.weight"].dim() == 5


def test_initialisation():
    """Fails when a matrix is left to torch's initialisation, or a bias is not 0; the filter keeps torch's."""
    torch.manual_seed(0)
    net = ChannelViT(7, num_classes=5, embed_dim=192, depth=1, num_heads=3, img_size=32)
    drawn = {"cls_token": net.cls_token, "pos_embed": net.pos_embed, "chn": net.patch_embed.channel_embed.weight}
    drawn |= {name: layer.weight for name, layer in net.named_modules() if isinstance(layer, nn.Linear)}
    for name, weight in drawn.items():
        assert 0.016 < float(weight.detach().std()) < 0.024, name
    assert all(float(m.bias.detach().abs().max()) == 0 for m in net.modules() if isinstance(m, nn.Linear))
    assert float(net.patch_embed.proj.weight.detach().abs().max()) <= 1 / 16


def test_branches_are_skipped_in_training_alone():
    """Fails when a skipped branch is not made up for by the others, a part of an image skips, or evaluation does."""
    net = network(drop_path=0.5).train()
    assert [round(block.drop_path, 3) for block in net.blocks] == [0.0, 0.5]
    block, x = net.blocks[1], torch.randn(1, 3, 16, dtype=torch.float64)
    with torch.no_grad():
        torch.manual_seed(0)
        outputs = block(x.expand(400, -1, -1))
        attention = block.attn(block.norm1(x))
        kinds = [x + a * attention for a in (0.0, 2.0)]
        kinds += [h + 2.0 * block.mlp(block.norm2(h)) for h in kinds]
        found = torch.stack([(outputs - kind).abs().amax(dim=(1, 2)) < 1e-9 for kind in kinds], dim=1)
        assert found.sum(dim=1).tolist() == [1] * 400  # each image is one of four
        assert all(70 < many < 130 for many in found.sum(dim=0).tolist())
        whole = net.eval().blocks[1](x.expand(4, -1, -1))
    h = x + attention
    torch.testing.assert_close(whole, (h + block.mlp(block.norm2(h))).expand(4, -1, -1))


def test_initial_filter_of_one_channel():
    """Fails when the filter's initialisation counts other channels than the one that it sees (torch's is kept)."""
    filters = ChannelPatchEmbed(9, patch_size=4).proj.weight.detach()
    assert 0.8 / 4 < float(filters.abs().max()) <= 1 / 4
