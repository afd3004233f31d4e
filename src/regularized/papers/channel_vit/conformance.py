"""Golden vectors of Channel ViT: tokens, draws, one block with the class token, and the masking for a plain ViT."""

import random
from collections.abc import Mapping
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor
from torch.nn import functional as F

from regularized.evidence.conformance import Case, UnknownCase
from regularized.robustness.channel_vit.layer import ChannelPatchEmbed, Positions
from regularized.robustness.channel_vit.model import ChannelViT
from regularized.robustness.channel_vit.sampling import HierarchicalChannelSampling, draw_channels


def tolerance(case: Case, output: str) -> float:
    """Draws and counts are exact; the sheet's bounds for the rest."""
    if output in ("draws", "n_channels"):
        return 0.0
    return 1e-9 if case.has("in/param/cls_token") else 1e-10


def compute(case: Case) -> Mapping[str, NDArray[Any]]:
    """Every output of a case, in the precision of its inputs."""
    if case.has("in/x", "in/param/cls_token", "in/param/pos_embed"):
        return _numpy(_transformer(case))
    if case.has("in/x", "in/weight", "in/channel_embed"):
        return _numpy(_tokens(case))
    if case.has("in/x", "in/weight", "in/dropped"):
        return _numpy(_masked(case))
    if case.has("hp/python_seed", "hp/channels"):
        return _draws(case)
    raise UnknownCase(case)


def _given(case: Case) -> dict[str, Tensor]:
    return {name: torch.tensor(array) for name, array in case.inputs.items()}


def _numpy(found: Mapping[str, Tensor]) -> dict[str, NDArray[Any]]:
    return {name: tensor.detach().numpy() for name, tensor in found.items()}


def _tokens(case: Case) -> dict[str, Tensor]:
    """The patch embedding, in training behind the sampling with the choice of the case."""
    given = _given(case)
    width, size = len(given["weight"]), given["weight"].shape[-1]
    embed = ChannelPatchEmbed(len(given["channel_embed"]), patch_size=size, embed_dim=width).to(given["x"].dtype)
    embed.load_state_dict(
        {
            "proj.weight": given["weight"],
            "proj.bias": given.get("bias", torch.zeros(width)),
            "channel_embed.weight": given["channel_embed"],
        }
    )
    x, channels = given["x"], given.get("channels", torch.arange(given["x"].shape[1]))
    if case.number("training", 0.0) and "selected" in given:
        x, channels = HierarchicalChannelSampling()(x, channels, kept=given["selected"].tolist())
    return {"tokens": embed(x, channels), "n_channels": torch.tensor(x.shape[1])}


def _masked(case: Case) -> dict[str, Tensor]:
    """A plain patch embedding behind the masking; as in the released code, a channel is there if it is not all 0."""
    given = _given(case)
    x, weight = given["x"], given["weight"]
    present = x.sum(dim=(0, 2, 3)) != 0
    if case.number("training", 1.0):
        dropped = set(given["dropped"].tolist())
        kept = [plane for plane in range(x.shape[1]) if present[plane] and plane not in dropped]
        x, _ = HierarchicalChannelSampling("mask")(x, kept=kept, present=present)
    tokens = F.conv2d(x, weight, given.get("bias"), stride=weight.shape[-1])
    return {"tokens": tokens.flatten(2).transpose(1, 2)}


def _draws(case: Case) -> dict[str, NDArray[Any]]:
    channels = int(case.number("channels"))
    times = len(case.outputs["draws"]) if case.has("out/draws") else int(case.number("times", 12))
    rng = random.Random(int(case.number("python_seed")))
    draws = np.full((times, channels), -1)
    for row in draws:
        kept = draw_channels(channels, rng)
        row[: len(kept)] = kept
    return {"draws": draws}


def _transformer(case: Case) -> dict[str, Tensor]:
    """Features of the class token: exact positions, warped ones, and the first channel alone."""
    given = _given(case)
    x = given["x"]
    channels = given.get("channels", torch.arange(x.shape[1]))
    state = {name.removeprefix("param/"): tensor for name, tensor in given.items() if name.startswith("param/")}
    exact, warped = (_network(case, state, positions) for positions in ("exact", "official"))
    places = warped.places(x)
    return {
        "cls_all_exact_pos": exact(x, channels),
        "cls_all": warped(x, channels),
        "cls_ch0": exact(x[:, :1], channels[..., :1]),
        "pos_all": torch.cat([warped.pos_embed[:, :1], places.repeat(1, x.shape[1], 1)], dim=1),
    }


def _network(case: Case, state: Mapping[str, Tensor], positions: Positions) -> ChannelViT:
    filters = state["patch_embed.proj.weight"]
    width, size = len(filters), filters.shape[-1]
    side = round((state["pos_embed"].shape[1] - 1) ** 0.5) * size
    heads = next((int(case.number(name)) for name in ("num_heads", "heads", "n_heads") if f"{name}" in case.hp), 2)
    net = ChannelViT(
        len(state["patch_embed.channel_embed.weight"]),
        num_classes=0,
        img_size=side,
        patch_size=size,
        embed_dim=width,
        depth=len({name.split(".")[1] for name in state if name.startswith("blocks.")}),
        num_heads=heads,
        mlp_ratio=len(state["blocks.0.mlp.fc1.weight"]) / width,
        positions=positions,
    )
    net.to(filters.dtype).load_state_dict(state)
    return net.eval()
