"""Emoji as small colour images of nine categories, from an npm package that the user has unpacked."""

import json
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from regularized.evidence.requirements import need_files, need_package

__all__ = ["Glyphs", "emoji"]


@dataclass(frozen=True, slots=True)
class Glyphs:
    """One picture of each emoji, without skin tones.

    Args:
        pixels: (n, 3, 64, 64) uint8, on white.
        labels: (n,) int64, number of the category.
        categories: their names.
        names: of the emoji, the same with every maker.
    """

    pixels: Tensor
    labels: Tensor
    categories: tuple[str, ...]
    names: tuple[str, ...]


def emoji(maker: str = "google") -> Glyphs:
    """About 1,900 pictures in nine categories (faces, people, animals, food, places, activities, objects, ...).

    Args:
        maker: whose drawings: ``"google"`` (Apache-2.0) or ``"twitter"`` (CC-BY-4.0).

    Raises:
        Unavailable: the package, or Pillow, is not here.
    """
    package = f"emoji-datasource-{maker}"
    how = f"of the npm package {package}: npm pack {package}@16.0.0, unpacked, its folder renamed to {package}"
    folder = need_files({f"{package}/emoji.json": how, f"{package}/img/{maker}/64": how}) / package
    need_package("PIL", "pip install pillow")
    from PIL import Image

    entries = json.loads((folder / "emoji.json").read_text(encoding="utf-8"))
    entries = [e for e in entries if e[f"has_img_{maker}"] and e["category"] != "Component"]
    entries.sort(key=lambda e: e["unified"])
    categories = sorted({e["category"] for e in entries})
    pictures = []
    for entry in entries:
        glyph = Image.open(folder / "img" / maker / "64" / entry["image"]).convert("RGBA")
        white = Image.new("RGBA", glyph.size, (255, 255, 255, 255))
        pictures.append(np.asarray(Image.alpha_composite(white, glyph).convert("RGB")))
    return Glyphs(
        torch.from_numpy(np.stack(pictures)).permute(0, 3, 1, 2).contiguous(),
        torch.tensor([categories.index(e["category"]) for e in entries]),
        tuple(categories),
        tuple(e["unified"] for e in entries),
    )
