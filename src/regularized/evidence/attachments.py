"""Files that runs make beside their numbers: kept by code, scale, arm and seed beside the store, never in the ledger.

A :class:`Kind` is a folder and an ending; :mod:`~regularized.evidence.pictures` and
:mod:`~regularized.evidence.sounds` are the two that there are, each with an ``encode`` of its own. Worker, runner and
report do the rest::

    encode(things) -> name -> file as text        in the process of the run
    keep(encoded, ...)                            in the user's data folder
    of(result) -> [Attachment, ...]               those of a result's first seed, also where its runs were made earlier
    save(result, folder)                          copies of them
"""

import base64
import shutil
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

from regularized.evidence.results import ReproduceResult
from regularized.evidence.store import home

__all__ = ["Attachment", "Kind", "as_text", "check_name"]


@dataclass(frozen=True, slots=True)
class Attachment:
    """One file of a result.

    Args:
        arm: whose run made it.
        name: what it is of.
        path: the file.
    """

    arm: str
    name: str
    path: Path


def check_name(what: str, name: str) -> None:
    """Refuse a name that cannot be a file's.

    Raises:
        ValueError: it holds more than letters, digits and underscores, or nothing.
    """
    if not name.replace("_", "").isalnum():
        raise ValueError(f"the name of {what} may hold letters, digits and underscores, got {name!r}")


def as_text(content: bytes) -> str:
    """A file as a worker sends it, which is base64."""
    return base64.b64encode(content).decode("ascii")


@dataclass(frozen=True, slots=True)
class Kind:
    """One kind of attachments.

    Args:
        folder: they lie in a folder of this name, in the user's data folder and beside a report.
        ending: of their files, with the dot.
    """

    folder: str
    ending: str

    def keep(self, encoded: Mapping[str, str], *, slug: str, scale: str, code_key: str, arm: str, seed: int) -> None:
        """Write those of one run to the user's data folder, over those of an earlier one."""
        folder = self._kept(slug, scale, code_key) / arm / str(seed)
        if encoded:
            folder.mkdir(parents=True, exist_ok=True)
        for name, text in encoded.items():
            (folder / f"{name}{self.ending}").write_bytes(base64.b64decode(text))

    def of(self, result: ReproduceResult) -> list[Attachment]:
        """Those of the first seed, in the order of the arms; none where the runs made none."""
        folder = self._kept(result.slug, result.scale, result.code_key)
        return [
            Attachment(arm, path.stem, path)
            for arm in result.arms
            for path in sorted((folder / arm / str(result.seeds[0])).glob(f"*{self.ending}"))
        ]

    def save(self, result: ReproduceResult, folder: Path) -> list[Path]:
        """Copy them to ``FOLDER/ARM_NAME`` with their ending, in a folder."""
        files = []
        for one in self.of(result):
            target = folder / self.folder / f"{one.arm}_{one.name}{self.ending}"
            target.parent.mkdir(exist_ok=True)
            files.append(Path(shutil.copyfile(one.path, target)))
        return files

    def _kept(self, slug: str, scale: str, code_key: str) -> Path:
        return home() / self.folder / slug / scale / code_key
