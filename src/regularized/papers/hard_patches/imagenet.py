"""ImageNet for the paper's scale: crops to pretrain on, and whole images for the probe."""

from typing import Any, NamedTuple

from torch.utils.data import DataLoader

from regularized.evidence.requirements import need_files, need_gpu, need_package

__all__ = ["ImageNet", "imagenet"]

_MEAN, _DEVIATION = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)


class ImageNet(NamedTuple):
    """Batches of (images, labels)."""

    crops: DataLoader[Any]
    train: DataLoader[Any]
    test: DataLoader[Any]


def imagenet(batch: int, size: int) -> ImageNet:
    """The published training and validation images, augmented as in the official script: crops and flips alone.

    Args:
        batch: images of a batch.
        size: pixels of a side.

    Raises:
        Unavailable: the images, torchvision or a GPU of 40 GB is missing.
    """
    need_gpu("the paper scale pretrains ViT-B/16 for 200 epochs of ImageNet, weeks on one device,", gigabytes=40)
    folder = need_files(
        {
            "imagenet/train": "ImageNet-1K, a folder of images for each class (image-net.org)",
            "imagenet/val": "its validation images, sorted into folders of the same names",
        }
    )
    need_package("torchvision", "pip install torchvision (the release that fits your torch)")
    from torchvision import datasets, transforms

    bicubic = transforms.InterpolationMode.BICUBIC
    ending = [transforms.ToTensor(), transforms.Normalize(_MEAN, _DEVIATION)]
    whole = transforms.Compose(
        [transforms.Resize(round(size * 256 / 224), interpolation=bicubic), transforms.CenterCrop(size), *ending]
    )
    cropped = transforms.Compose(
        [
            transforms.RandomResizedCrop(size, scale=(0.2, 1.0), interpolation=bicubic),
            transforms.RandomHorizontalFlip(),
            *ending,
        ]
    )

    def loader(part: str, transform: Any, shuffle: bool) -> DataLoader[Any]:
        images = datasets.ImageFolder(folder / "imagenet" / part, transform)
        return DataLoader(
            images, batch_size=batch, shuffle=shuffle, drop_last=shuffle, num_workers=8, persistent_workers=True
        )

    return ImageNet(loader("train", cropped, True), loader("train", whole, False), loader("val", whole, False))
