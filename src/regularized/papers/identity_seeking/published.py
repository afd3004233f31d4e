"""At full size: crops of one's own videos, a ResNet-50 that knows ImageNet, and Market-1501, which it has never seen.

What the paper trains on (47.8 million crops of 7,400 clips) is not published, and neither are batch, interval,
optimizer and rates: those are ours.
"""

import importlib
from collections.abc import Mapping
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from regularized.evidence.experiment import About, Measurements, Unavailable
from regularized.evidence.requirements import need_files, need_gpu, need_package
from regularized.self_supervised.identity_seeking.loss import InterFrameContrastive
from regularized.self_supervised.identity_seeking.pretext import IdentitySeeking
from regularized.self_supervised.identity_seeking.retrieval import retrieval_scores
from regularized.self_supervised.identity_seeking.sampler import FramePairs
from regularized.self_supervised.pretraining import Pretraining

_CROPS = "isr/crops.npy"
_FILES = {
    _CROPS: "(N, 3, 256, 128) uint8 crops of people in your videos, by any detector",
    "isr/video.npy": "(N,) video of each crop",
    "isr/frame.npy": "(N,) frame of each crop, in seconds or in numbers of the film",
    "market1501/query": "query images of Market-1501 (zheng-lab.cecs.anu.edu.au/Project/project_reid.html)",
    "market1501/bounding_box_test": "its gallery",
}
_MEAN, _DEVIATION = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)


def about() -> About:
    """The paper's, without looking."""
    return About("47.8 million crops of 7,400 clips", 47_800_000, "ResNet-50", 24_600_000)


def run(s: Mapping[str, Any], seed: int) -> Measurements:
    """Train one arm and look for people of Market-1501.

    Raises:
        Unavailable: there is no large GPU, no timm, or no videos; or the arm needs labels of what is in the videos.
    """
    if s["pairs"] != "matched" or not s["trained"]:
        raise Unavailable("at this scale only matched pairs are trained: nobody knows the true ones. Take another arm")
    device = need_gpu("the paper scale trains a ResNet-50 on millions of crops", gigabytes=40.0)
    need_package("timm", "pip install timm")
    folder = need_files(_FILES)
    encoder = _encoder(seed).to(device)
    crops = torch.from_numpy(np.load(folder / _CROPS, mmap_mode="r+"))
    video, frame = (torch.from_numpy(np.load(folder / "isr" / f"{name}.npy")) for name in ("video", "frame"))
    frames = FramePairs(crops, video, frame, videos_per_batch=s["videos"], max_gap=4, batches_per_epoch=1000, seed=seed)
    training = Pretraining(
        IdentitySeeking(encoder, InterFrameContrastive(tau=s["tau"], q=s["q"])),
        optimizer=partial(torch.optim.AdamW, lr=s["lr"], weight_decay=0.05),
        seed=seed,
    )
    records = training.fit(frames, epochs=s["steps"] // len(frames))
    query, gallery, query_ids, gallery_ids, query_cameras, gallery_cameras = _market(encoder.eval(), folder, device)
    scores = retrieval_scores(
        query,
        gallery,
        query_ids,
        gallery_ids,
        query_cameras=query_cameras,
        gallery_cameras=gallery_cameras,
        ranks=(1,),
    )
    return Measurements(
        metrics={"rank_1": 100 * scores.rank[1], "mean_average_precision": 100 * scores.mean_average_precision},
        curves={"reliability": [(float(epoch), record["reliability"]) for epoch, record in enumerate(records)]},
        data=f"{len(crops)} crops",
    )


class _Normalised(nn.Module):
    """Bytes to what a network that knows ImageNet expects, and a linear layer behind it, as in the released model."""

    mean: Tensor
    deviation: Tensor

    def __init__(self, backbone: nn.Module, width: int) -> None:
        super().__init__()
        self.backbone = backbone
        self.head = nn.Linear(width, 512)
        self.register_buffer("mean", torch.tensor(_MEAN).view(3, 1, 1))
        self.register_buffer("deviation", torch.tensor(_DEVIATION).view(3, 1, 1))

    def forward(self, crops: Tensor) -> Tensor:
        pixels = (crops.to(self.head.weight.device).float() / 255 - self.mean) / self.deviation
        features: Tensor = self.head(self.backbone(pixels))
        return features


def _encoder(seed: int) -> nn.Module:
    timm: Any = importlib.import_module("timm")
    torch.manual_seed(seed)
    backbone = timm.create_model("resnet50", pretrained=True, num_classes=0)
    return _Normalised(backbone, backbone.num_features)


@torch.no_grad()
def _market(encoder: nn.Module, folder: Path, device: torch.device) -> tuple[Tensor, ...]:
    """Features, individuals and cameras of query and gallery, in the order that retrieval asks for them."""
    from PIL import Image

    parts = []
    for name in ("query", "bounding_box_test"):
        # 0002_c1s1_000451_03.jpg: individual and camera; -1 is junk, as in the set's own evaluation.
        paths = [
            path for path in sorted((folder / "market1501" / name).glob("*.jpg")) if not path.name.startswith("-1")
        ]
        ids = torch.tensor([int(path.name.split("_")[0]) for path in paths])
        cameras = torch.tensor([int(path.name.split("_")[1][1]) for path in paths])
        features = []
        for start in range(0, len(paths), 256):
            images = [np.asarray(Image.open(path).convert("RGB")) for path in paths[start : start + 256]]
            pixels = torch.stack([torch.from_numpy(image).permute(2, 0, 1) for image in images]).to(device)
            features.append(encoder(F.interpolate(pixels.float(), (256, 128), mode="bilinear")))
        parts.append((torch.cat(features), ids.to(device), cameras.to(device)))
    (query, query_ids, query_cameras), (gallery, gallery_ids, gallery_cameras) = parts
    return query, gallery, query_ids, gallery_ids, query_cameras, gallery_cameras
