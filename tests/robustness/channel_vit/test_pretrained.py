"""timm's ViTs with tokens of channels: on a stand-in of their form everywhere, on timm's own where that is there."""

import importlib

import pytest
import torch
from torch import nn

from regularized.robustness.channel_vit import Block, convert_vit

WIDTH, PATCH, SIDE = 16, 4, 8


class PatchEmbed(nn.Module):
    def __init__(self, bias=True, norm=None):
        super().__init__()
        self.proj = nn.Conv2d(3, WIDTH, PATCH, stride=PATCH, bias=bias)
        self.norm = norm or nn.Identity()
        self.grid_size = (SIDE // PATCH, SIDE // PATCH)

    def forward(self, x):
        return self.norm(self.proj(x).flatten(2).transpose(1, 2))


class Vit(nn.Module):
    """The parts of timm's VisionTransformer by their names, and what it does with them."""

    def __init__(self, *, cls=True, registers=0, no_embed_class=False, bias=True, norm=None):
        super().__init__()
        self.patch_embed = PatchEmbed(bias, norm)
        self.cls_token = nn.Parameter(torch.randn(1, 1, WIDTH)) if cls else None
        self.reg_token = nn.Parameter(torch.randn(1, registers, WIDTH)) if registers else None
        self.no_embed_class = no_embed_class
        self.prefix = int(cls) + registers
        self.pos_embed = nn.Parameter(torch.randn(1, 4 + (0 if no_embed_class else self.prefix), WIDTH))
        self.pos_drop, self.patch_drop, self.norm_pre = nn.Identity(), nn.Identity(), nn.LayerNorm(WIDTH)
        self.blocks = nn.Sequential(Block(WIDTH, 2), Block(WIDTH, 4))
        self.norm, self.head = nn.LayerNorm(WIDTH), nn.Linear(WIDTH, 5)

    def forward_head(self, x):
        return self.head(x[:, 0] if self.cls_token_in_front() else x[:, self.prefix :].mean(1))

    def cls_token_in_front(self):
        return self.prefix > 0

    def reset_classifier(self, num_classes):
        self.head = nn.Linear(WIDTH, num_classes)

    def forward(self, x):
        front = [t.expand(len(x), -1, -1) for t in (self.cls_token, self.reg_token) if t is not None]
        x = self.patch_embed(x)
        if self.no_embed_class:
            x = torch.cat([*front, x + self.pos_embed], dim=1)
        else:
            x = torch.cat([*front, x], dim=1) + self.pos_embed
        return self.forward_head(self.norm(self.blocks(self.norm_pre(x))))


def grey(side=SIDE):
    return torch.randn(2, 1, side, side, generator=torch.Generator().manual_seed(0), dtype=torch.float64)


FORMS = [
    {},
    {"registers": 3},
    {"registers": 2, "no_embed_class": True},
    {"cls": False},
    {"cls": False, "registers": 1},
    {"bias": False},
]


@pytest.mark.parametrize("form", FORMS, ids=str)
def test_a_grey_image_gives_what_it_gave(form):
    """Fails when the filter is not the sum over colours, or tokens in front get another place."""
    torch.manual_seed(0)
    vit = Vit(**form).double().eval()
    net = convert_vit(vit, 6).eval()
    with torch.no_grad():
        net.patch_embed.channel_embed.weight.zero_()
    x = grey()
    torch.testing.assert_close(net(x, channels=[4]), vit(x.expand(-1, 3, -1, -1)), rtol=0, atol=1e-12)
    assert net(x.expand(-1, 2, -1, -1), channels=[5, 1]).shape == (2, 5)


def test_the_source_stays_and_a_head_can_be_new():
    """Fails when converting takes the source apart, or shares its weights."""
    vit = Vit().double().eval()
    before = {name: tensor.clone() for name, tensor in vit.state_dict().items()}
    net = convert_vit(vit, 4, num_classes=7)
    assert net(grey().expand(-1, 4, -1, -1)).shape == (2, 7)
    with torch.no_grad():
        for p in net.parameters():
            p.zero_()
    assert all(torch.equal(tensor, before[name]) for name, tensor in vit.state_dict().items())


def test_everything_of_it_is_trained():
    """Fails when a parameter is copied twice, or one of them is not reached by the loss."""
    net = convert_vit(Vit(registers=1).double(), 4)
    net(grey().expand(-1, 4, -1, -1)).square().sum().backward()
    assert [name for name, p in net.named_parameters() if p.grad is None] == []


@pytest.mark.parametrize(
    "name",
    [
        "vit_tiny_patch16_224",
        "deit3_small_patch16_224",
        "vit_wee_patch16_reg1_gap_256",
        "deit_tiny_distilled_patch16_224",
    ],
)
def test_timm(name):
    """Fails when a ViT of timm's own, with registers, a mean, or two class tokens, gives something else."""
    try:
        timm = importlib.import_module("timm")
    except (ImportError, RuntimeError) as error:  # a RuntimeError where its torchvision does not fit torch
        pytest.skip(f"not applicable: timm cannot be imported beside this build of torch ({error})")
    vit = timm.create_model(name, num_classes=5).double().eval()
    net = convert_vit(vit, 6).eval()
    with torch.no_grad():
        net.patch_embed.channel_embed.weight.zero_()
        x = grey(vit.patch_embed.img_size[0])
        torch.testing.assert_close(net(x, channels=[4]), vit(x.expand(-1, 3, -1, -1)), rtol=0, atol=1e-10)
