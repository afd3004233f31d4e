"""The user's folder of data."""

import os
from pathlib import Path

__all__ = ["data_folder"]


def data_folder() -> Path:
    """Where original data sets are looked for: what ``REGULARIZED_DATA`` names, or ``~/.cache/regularized/data``."""
    return Path(os.environ.get("REGULARIZED_DATA", "~/.cache/regularized/data")).expanduser()
