"""Images that a package ships (digits, photographs), and original sets where the user has put them (CIFAR, Kodak)."""

from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from regularized.evidence.datasets.folder import data_folder
from regularized.evidence.experiment import Unavailable, data_fingerprint

__all__ = ["Split", "cifar", "digits", "kodak", "photographs"]


@dataclass(frozen=True, slots=True)
class Split:
    """Inputs and labels for training and for test.

    Args:
        train_x: (N, ...) float32.
        train_y: (N,) int64.
        test_x: (M, ...) float32.
        test_y: (M,) int64.
    """

    train_x: Tensor
    train_y: Tensor
    test_x: Tensor
    test_y: Tensor

    @property
    def fingerprint(self) -> str:
        """Short hash of the content, see :func:`~regularized.evidence.experiment.data_fingerprint`."""
        return data_fingerprint(*(t.numpy() for t in (self.train_x, self.train_y, self.test_x, self.test_y)))


def digits(train: int = 1000, *, seed: int = 0, scale: float = 0.3) -> Split:
    """scikit-learn's 1,797 handwritten digits (8 x 8), split by class; inputs (x / 16 - train mean) / scale, (N, 64).

    Args:
        train: number of training samples; the rest is the test set.
        seed: seed of the stratified split.
        scale: divisor after centring; default 0.3, about the standard deviation of a pixel in the centre.

    Examples:
        >>> split = digits(1000)
        >>> split.train_x.shape, split.test_x.shape
        (torch.Size([1000, 64]), torch.Size([797, 64]))
    """
    from sklearn.datasets import load_digits
    from sklearn.model_selection import train_test_split

    x, y = load_digits(return_X_y=True)
    train_x, test_x, train_y, test_y = train_test_split(x / 16.0, y, train_size=train, stratify=y, random_state=seed)
    mean = train_x.mean(axis=0)
    arrays = ((train_x - mean) / scale, train_y, (test_x - mean) / scale, test_y)
    tensors = [torch.from_numpy(np.ascontiguousarray(a)) for a in arrays]
    return Split(tensors[0].float(), tensors[1].long(), tensors[2].float(), tensors[3].long())


def cifar(classes: int = 10) -> Split:
    """CIFAR-10 or CIFAR-100 in its *binary* version (nothing is unpickled); float32 in [0, 1], (N, 3, 32, 32).

    Raises:
        Unavailable: the files are not under :func:`data_folder`.
        ValueError: ``classes`` is neither 10 nor 100, or a file has the wrong size.
    """
    names = {
        10: ("cifar-10-batches-bin", [f"data_batch_{i}.bin" for i in range(1, 6)], ["test_batch.bin"], 1),
        100: ("cifar-100-binary", ["train.bin"], ["test.bin"], 2),
    }
    if classes not in names:
        raise ValueError(f"classes must be 10 or 100, got {classes}")
    folder, train_files, test_files, label_bytes = names[classes]
    root = data_folder() / folder
    missing = [name for name in (*train_files, *test_files) if not (root / name).is_file()]
    if missing:
        raise Unavailable(
            f"CIFAR-{classes} is not at {root} (missing: {', '.join(missing)}). Download the binary version from "
            f"https://www.cs.toronto.edu/~kriz/cifar.html, unpack it under {data_folder()}, or set REGULARIZED_DATA"
        )

    def read(files: list[str]) -> tuple[Tensor, Tensor]:
        row = label_bytes + 3 * 32 * 32
        raw = np.concatenate([np.fromfile(root / name, dtype=np.uint8) for name in files])
        if raw.size % row:
            raise ValueError(
                f"{root}: the files {files} have {raw.size} bytes, not a multiple of {row}; download again"
            )
        rows = raw.reshape(-1, row)
        images = torch.from_numpy(rows[:, label_bytes:].reshape(-1, 3, 32, 32).copy()).float() / 255
        return images, torch.from_numpy(rows[:, label_bytes - 1].astype(np.int64))

    return Split(*read(train_files), *read(test_files))


def photographs() -> list[Tensor]:
    """The two photographs that scikit-learn ships, in grey: (427, 640) float64 in [0, 1].

    Examples:
        >>> [tuple(image.shape) for image in photographs()]
        [(427, 640), (427, 640)]
    """
    from sklearn.datasets import load_sample_images

    return [torch.from_numpy(image.astype(np.float64).mean(axis=-1) / 255.0) for image in load_sample_images().images]


def kodak(size: int = 96) -> Tensor:
    """The photographs of the Kodak set in grey, shrunk to squares: (N, size, size) float64 in [0, 1].

    Raises:
        Unavailable: there is no ``kodim*.png`` under ``kodak`` in :func:`data_folder`.
    """
    files = sorted((data_folder() / "kodak").glob("kodim*.png"))
    if not files:
        raise Unavailable(
            f"the Kodak photographs are not at {data_folder() / 'kodak'}. Put kodim01.png ... kodim24.png there (from "
            "https://r0k.us/graphics/kodak/), or set REGULARIZED_DATA"
        )
    from PIL import Image

    images = [np.asarray(Image.open(file).convert("L").resize((size, size))) for file in files]
    return torch.from_numpy(np.stack(images).astype(np.float64) / 255.0)
