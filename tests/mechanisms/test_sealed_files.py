"""Files of tensors with settings beside them: what is not as it was written is told."""

import json

import pytest
import torch

from regularized.mechanisms.sealed_files import check_seal, load_sealed, read_settings, save_sealed, write_settings


@pytest.fixture
def folder(tmp_path):
    tensors = {"a": torch.arange(6.0).view(2, 3).T, "b": torch.tensor([1, 2], dtype=torch.int32)}
    save_sealed(tmp_path, "part", tensors, {"rate": 0.1, "names": ["x", "ß"], "none": None}, version=3)
    return tmp_path


def test_what_is_saved_is_loaded(folder):
    settings, tensors = load_sealed(folder, "part", version=3)
    assert (settings["rate"], settings["names"], settings["none"]) == (0.1, ["x", "ß"], None)
    assert torch.equal(tensors["a"], torch.arange(6.0).view(2, 3).T)
    assert tensors["b"].dtype == torch.int32


def test_every_flipped_bit_is_told(folder):
    """Fails when a byte of the tensors, or a value of the settings, does not count."""
    for name in ("part.safetensors", "part.json"):
        file = folder / name
        whole = file.read_bytes()
        for place in range(len(whole)):
            damaged = bytearray(whole)
            damaged[place] ^= 1 << place % 8
            file.write_bytes(damaged)
            try:
                settings, _ = load_sealed(folder, "part", version=3)
            except ValueError:
                continue
            # White space between two values is nobody's value.
            assert name == "part.json"
            assert settings == json.loads(whole)
        file.write_bytes(whole)
    load_sealed(folder, "part", version=3)


def test_two_files_that_do_not_belong_together(folder):
    """Fails when the settings of one adapter are believed beside the tensors of another."""
    save_sealed(folder / "other", "part", {"a": torch.zeros(2)}, {}, version=3)
    (folder / "part.json").write_bytes((folder / "other" / "part.json").read_bytes())
    with pytest.raises(
        ValueError, match=r"part.safetensors and its settings do not have the checksum.*Save or download"
    ):
        load_sealed(folder, "part", version=3)


@pytest.mark.parametrize("text", ["", "3", "[]", "{", '{"a": 1} x', "[" * 100_000])
def test_settings_that_are_no_settings(folder, text):
    """Fails when errors of JSON come through, or what is no object is taken for one."""
    (folder / "part.json").write_text(text)
    with pytest.raises(ValueError, match=r"part.json is damaged.*again"):
        load_sealed(folder, "part", version=3)


def test_other_errors(folder):
    with pytest.raises(ValueError, match="has format 3, this version reads 4"):
        load_sealed(folder, "part", version=4)
    settings = read_settings(folder / "part.json")
    del settings["checksum"]
    with pytest.raises(ValueError, match="have no checksum"):
        check_seal(settings, folder / "part.safetensors")
    (folder / "part.safetensors").write_bytes(b"no tensors")
    write_settings(folder / "part.json", settings, folder / "part.safetensors")
    with pytest.raises(ValueError, match="holds no tensors"):
        load_sealed(folder, "part", version=3)
    for name in ("part.safetensors", "part.json"):
        (folder / name).unlink()
        with pytest.raises(FileNotFoundError, match=name):
            load_sealed(folder, "part", version=3)


def test_what_is_free_may_change(folder):
    """Fails when a free setting counts, or another one does not."""
    file, tensors = folder / "free.json", folder / "part.safetensors"
    write_settings(file, {"note": "x", "rank": 2}, tensors, free=["note"])
    settings = read_settings(file)
    check_seal({**settings, "note": "y"}, tensors, free=["note"])
    with pytest.raises(ValueError, match="checksum"):
        check_seal({**settings, "rank": 3}, tensors, free=["note"])
