"""Fashion-MNIST and MNIST, 70,000 grey images each, from the idx files in which both are published.

The first of these that is there is read: a folder of the user's, a Debian package, a download through torchvision.
Whichever it was, the bytes are compared with known checksums, so all machines measure on the same images.
"""

import gzip
import hashlib
import tempfile
import zlib
from collections.abc import Mapping
from dataclasses import dataclass
from functools import lru_cache
from math import prod
from pathlib import Path

import torch
from torch import Tensor

from regularized.evidence.datasets.folder import data_folder
from regularized.evidence.datasets.images import Split
from regularized.evidence.experiment import Unavailable

__all__ = ["FASHION_MNIST", "MNIST", "IdxSet", "fashion_mnist", "labelled_images", "mnist", "read_idx"]

_LARGEST = 2**30  # bytes of one file; sixteen times what MNIST has
_FILES = ("train-images-idx3-ubyte", "train-labels-idx1-ubyte", "t10k-images-idx3-ubyte", "t10k-labels-idx1-ubyte")


@dataclass(frozen=True)
class IdxSet:
    """A set in MNIST's four files, and the places where it may lie.

    Args:
        name: what people call it.
        folder: its folder under :func:`~regularized.evidence.datasets.folder.data_folder`.
        torchvision: class in ``torchvision.datasets`` that downloads it, and the folder where that puts it.
        sha256: checksums of the uncompressed files, by file name; ``None`` compares nothing.
        debian: Debian package and where it puts the files; default no package has them.
    """

    name: str
    folder: str
    torchvision: str
    sha256: Mapping[str, str] | None
    debian: tuple[str, str] | None = None


FASHION_MNIST = IdxSet(
    "Fashion-MNIST",
    "fashion_mnist",
    "FashionMNIST",
    dict(
        zip(
            _FILES,
            (
                "c59f468a2f672dc815687fe0f83887768d799fd8a3f3276145d20f83aa44d888",
                "bad3541b69d912435c50bb6ba87bec294ff4f6a2e1246121d8633921760443d9",
                "5b4141f0afbad91edebe8549f8fcffe087ea10ca49f1dbef5c9a5cd8815ce37b",
                "0402a96d92fd2663957122ceb108a494c5af83dab82d92729df917d7dec38c34",
            ),
        )
    ),
    ("dataset-fashion-mnist", "/usr/share/datasets/fashion-mnist"),
)
MNIST = IdxSet(
    "MNIST",
    "mnist",
    "MNIST",
    dict(
        zip(
            _FILES,
            (
                "ba891046e6505d7aadcbbe25680a0738ad16aec93bde7f9b65e87a2fc25776db",
                "65a50cbbf4e906d70832878ad85ccda5333a97f0f4c3dd2ef09a8a9eef7101c5",
                "0fa7898d509279e482958e8ce81c8e77db3f2f8254e26661ceb7762c4d494ce7",
                "ff7bcfd416de33731a308c3f266cc351222c34898ecbeaf847f06e48f7ec33f2",
            ),
        )
    ),
)


def fashion_mnist() -> Split:
    """Fashion-MNIST with its published cut: 60,000 and 10,000 images, float32 in [0, 1], (N, 28, 28).

    Raises:
        Unavailable: it is in none of its places, or a file is damaged; the message says how to get it.
    """
    return _published(FASHION_MNIST)


def mnist() -> Split:
    """MNIST with its published cut: 60,000 and 10,000 images, float32 in [0, 1], (N, 28, 28).

    Raises:
        Unavailable: it is in none of its places, or a file is damaged; the message says how to get it.
    """
    return _published(MNIST)


def labelled_images(which: IdxSet) -> tuple[Tensor, Tensor]:
    """All images of a set, those for training first, and their labels: (N, H, W) uint8 and (N,) int64.

    Kept for the next call in the same process.

    Raises:
        Unavailable: the set is in none of its places, or a file is damaged.
    """
    train_x, train_y, test_x, test_y = _read_all(which)
    return torch.cat([train_x, test_x]), torch.cat([train_y, test_y]).long()


def read_idx(path: Path, sha256: str | None = None) -> Tensor:
    """One idx file of unsigned bytes, as it is or compressed (``.gz``); its shape stands in its header.

    Args:
        path: the file.
        sha256: of the uncompressed content; default ``None`` compares nothing.

    Raises:
        Unavailable: the file is no such file, is cut short, has bytes too many, or is another one than it should be.
    """
    remedy = f"delete it and get it again: {path}"
    try:
        with gzip.open(path) if path.suffix == ".gz" else path.open("rb") as file:
            magic = file.read(4)
            if len(magic) < 4 or magic[:3] != b"\x00\x00\x08" or not 1 <= magic[3] <= 4:
                raise Unavailable(f"not an idx file of bytes (it begins with {magic!r}); {remedy}")
            header = file.read(4 * magic[3])
            if len(header) < 4 * magic[3]:
                raise Unavailable(f"an idx file that is cut short in its header; {remedy}")
            shape = [int.from_bytes(header[i : i + 4], "big") for i in range(0, len(header), 4)]
            size = prod(shape)
            if not 0 < size <= _LARGEST:
                raise Unavailable(f"the header promises {size:,} bytes, and 1 to {_LARGEST:,} are allowed; {remedy}")
            body = bytearray(file.read(size + 1))  # one more, to see whether something follows
    except (OSError, EOFError, zlib.error) as error:
        raise Unavailable(f"cannot be read ({error}); {remedy}") from error
    if len(body) != size:
        found = f"more than {size:,}" if len(body) > size else f"{len(body):,}"
        raise Unavailable(f"the header promises {size:,} bytes of shape {tuple(shape)}, there are {found}; {remedy}")
    digest = hashlib.sha256(magic + header)
    digest.update(body)
    if sha256 not in (None, digest.hexdigest()):
        raise Unavailable(f"an idx file, but not the published one (SHA-256 differs); {remedy}")
    return torch.frombuffer(body, dtype=torch.uint8).view(shape)


def _published(which: IdxSet) -> Split:
    train_x, train_y, test_x, test_y = _read_all(which)
    return Split(train_x.float() / 255, train_y.long(), test_x.float() / 255, test_y.long())


def _read_all(which: IdxSet) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    paths = _find(which)
    checksums = which.sha256 or {}
    train_x, train_y, test_x, test_y = (_kept(path, checksums.get(name)) for name, path in zip(_FILES, paths))
    for images, labels, at in ((train_x, train_y, paths[0]), (test_x, test_y, paths[2])):
        if images.dim() != 3 or labels.dim() != 1 or len(images) != len(labels):
            raise Unavailable(
                f"{at} and its labels have shapes {tuple(images.shape)} and {tuple(labels.shape)}; expected (N, H, W) "
                f"and (N,). Get {which.name} again"
            )
    return train_x, train_y, test_x, test_y


_kept = lru_cache(maxsize=8)(read_idx)


def _find(which: IdxSet) -> list[Path]:
    """The four files, of the first place that has them all."""
    own = data_folder() / which.folder
    places = [own, data_folder() / which.torchvision / "raw"]
    if which.debian is not None:
        places.append(Path(which.debian[1]))
    for place in places:
        if not _missing(place):
            return _files_in(place)
    failure = _download(which, own)
    if failure is None:
        return _files_in(own)
    ways = [f"apt-get install {which.debian[0]}"] if which.debian is not None else []
    ways += [
        f"put {', '.join(_missing(own))} (as they are, or as .gz) into {own}, or set REGULARIZED_DATA to the folder "
        f"that holds {which.folder}",
        "with internet, pip install torchvision, which then downloads it here",
    ]
    told = "; ".join(f"({number}) {way}" for number, way in enumerate(ways, 1))
    raise Unavailable(f"{which.name} is not here. Ways to get it: {told}. The download was tried: {failure}")


def _path(place: Path, name: str) -> Path | None:
    return next((path for path in (place / name, place / f"{name}.gz") if path.is_file()), None)


def _missing(place: Path) -> list[str]:
    return [name for name in _FILES if _path(place, name) is None]


def _files_in(place: Path) -> list[Path]:
    return [path for name in _FILES if (path := _path(place, name)) is not None]


def _download(which: IdxSet, own: Path) -> str | None:
    """Get the set into the user's folder; what went wrong, or None. Safe where several processes do it at once."""
    try:
        import torchvision
    except (ImportError, RuntimeError) as error:  # a RuntimeError where its version does not fit torch's
        return f"torchvision cannot be imported ({error})"
    try:
        own.parent.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(dir=own.parent) as made:
            getattr(torchvision.datasets, which.torchvision)(made, download=True)
            own.mkdir(exist_ok=True)
            for path in (Path(made) / which.torchvision / "raw").iterdir():
                path.replace(own / path.name)
    except (OSError, RuntimeError) as error:
        return " ".join(str(error).split())
    still = _missing(own)
    return f"torchvision did not bring {', '.join(still)}" if still else None
