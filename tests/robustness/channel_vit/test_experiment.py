"""The experiment of `channel_vit`, its subsets and its data."""

import sys
import types

import numpy as np
import pytest
import torch

from regularized.evidence.datasets import multichannel
from regularized.evidence.experiment import Unavailable, resolve, run_arm
from regularized.papers.channel_vit import experiment, so2sat
from regularized.papers.channel_vit.networks import PlainViT


@pytest.fixture(scope="module")
def runs():
    return {arm: run_arm(experiment, arm, 0, "smoke") for arm in experiment.ARMS if "directions" not in arm}


def test_arms_share_the_images_and_differ(runs):
    """Fails when arms see other images, or an arm is the same as another under two names."""
    images = {arm: run for arm, run in runs.items() if "bands" not in arm}
    assert len({run.data for run in images.values()}) == 1
    assert len({tuple(sorted(run.metrics.items())) for run in images.values()}) >= len(images) - 1


def test_tokens_without_a_name():
    """Fails when the control of the channel's vector still says, or learns, which channel a token is of."""
    named, unnamed = (
        experiment._network(resolve(experiment, f"bands_{arm}", "smoke"), 4, 8, 10)
        for arm in ("channel_vit_sampling", "unnamed")
    )
    assert named.patch_embed.channel_embed.weight.requires_grad
    assert not unnamed.patch_embed.channel_embed.weight.requires_grad
    assert float(unnamed.patch_embed.channel_embed.weight.abs().max()) == 0.0
    assert float(named.patch_embed.channel_embed.weight.detach().abs().max()) > 0.0


def test_subsets():
    """Fails when a subset of few channels is left out, or subsets of many change from run to run."""
    few = experiment.subsets_of(4)
    assert {many: len(some) for many, some in few.items()} == {1: 4, 2: 6, 3: 4, 4: 1}
    many = experiment.subsets_of(65)
    assert many == experiment.subsets_of(65)
    assert list(many) == [2, 4, 8, 16, 32, 64, 65]
    assert all(len(set(kept)) == size for size, some in many.items() for kept in some)


def test_few_complete_images():
    """Fails when a batch mixes both kinds of images, an image is left out, or more than the share are complete."""
    x, y = torch.arange(40.0).view(40, 1, 1, 1).expand(40, 4, 1, 1), torch.arange(40)
    batches = list(experiment.Mixed(x, y, 0.25, batch=8, seed=0).batches(0))
    assert sorted(b.inputs.shape[1] for b in batches) == [2, 2, 2, 2, 4, 4]
    assert sorted(torch.cat([b.targets for b in batches]).tolist()) == list(range(40))
    assert sum(len(b.targets) for b in batches if b.inputs.shape[1] == 4) == 10


def test_missing_channels_of_a_plain_vit_are_zero():
    """Fails when a channel that is missing is seen, or the scale of the others is another than n / m."""
    net = PlainViT(4, num_classes=2, img_size=4, patch_size=2, embed_dim=8, depth=1, num_heads=2).eval()
    x = torch.randn(2, 4, 4, 4)
    zeroed = x * torch.tensor([1.0, 0.0, 0.0, 1.0]).view(4, 1, 1)
    for scaled in (False, True):
        found = experiment.logits(net, x, [0, 3], channels=4, scaled=scaled)
        torch.testing.assert_close(found, net(zeroed * (2.0 if scaled else 1.0)))


def test_a_coin_keeps_as_many_on_average():
    """Fails when the control sees fewer channels than the method, or none at all."""
    draws = torch.Generator().manual_seed(0)
    sizes = [len(experiment._choice("coin", 65, draws)) for _ in range(2000)]
    assert abs(sum(sizes) / len(sizes) - 33) < 0.5
    assert min(len(experiment._choice("coin", 2, draws)) for _ in range(500)) == 1


def test_landsat_of_the_original_files(tmp_path, monkeypatch):
    """Fails when pixels and bands are exchanged, or class 7 is not the sixth."""
    folder = tmp_path / "statlog_landsat"
    folder.mkdir()
    row = [10 * pixel + band for pixel in range(9) for band in range(4)]
    for name, kind in (("sat.trn", 1), ("sat.tst", 7)):
        (folder / name).write_text(" ".join(map(str, [*row, kind])) + "\n" + " ".join(map(str, [*row, 5])) + "\n")
    monkeypatch.setenv("REGULARIZED_DATA", str(tmp_path))
    multichannel.landsat.cache_clear()
    x, y = multichannel.landsat()
    multichannel.landsat.cache_clear()
    assert x.shape == (4, 4, 3, 3)
    assert x[0, 2].tolist() == [[2.0, 12.0, 22.0], [32.0, 42.0, 52.0], [62.0, 72.0, 82.0]]
    assert y.tolist() == [0, 4, 5, 4]


def test_landsat_says_how_to_get_it(tmp_path, monkeypatch):
    """Fails when the refusal names no way."""
    monkeypatch.setenv("REGULARIZED_DATA", str(tmp_path))
    monkeypatch.setattr(multichannel, "_DEBIAN", tmp_path)
    multichannel.landsat.cache_clear()
    with pytest.raises(Unavailable, match=r"r-cran-mlbench.*rdata.*sat\.trn"):
        multichannel.landsat()


def test_axis_of_a_tensor():
    """Fails when the fit mixes up directions: signals of a known tensor must give its axis."""
    generator = np.random.default_rng(0)
    directions = generator.normal(size=(64, 3))
    directions = np.concatenate([np.zeros((1, 3)), directions / np.linalg.norm(directions, axis=1, keepdims=True)])
    strengths = np.array([0.0] + [1000.0] * 64)
    for axis in range(3):
        diffusion = 3e-4 * np.eye(3)
        diffusion[axis, axis] = 1.7e-3
        logs = 6.0 - strengths * np.einsum("ki,ij,kj->k", directions, diffusion, directions)
        assert multichannel._main_axis(logs[None], strengths, directions).tolist() == [axis]


def test_scan_is_cut_into_neighbours_of_a_slice(tmp_path, monkeypatch):
    """Fails when rows, columns and slices are exchanged: a voxel's middle pixel is the voxel itself."""
    files = tmp_path / "dipy" / "data" / "files"
    files.mkdir(parents=True)
    volume = np.random.default_rng(0).integers(1, 500, size=(4, 5, 3, 7)).astype(np.int16)
    directions = np.random.default_rng(1).normal(size=(7, 3))
    directions[0] = np.nan
    np.save(files / "small_64D.bvals.npy", np.array([0.0] + [1000.0] * 6))
    np.save(files / "small_64D.gradients.npy", directions)
    spec = types.SimpleNamespace(origin=str(tmp_path / "dipy" / "__init__.py"))
    monkeypatch.setattr(multichannel, "need_package", lambda name, install: spec)
    reader = types.SimpleNamespace(load=lambda path: types.SimpleNamespace(dataobj=volume))
    monkeypatch.setitem(sys.modules, "nibabel", reader)
    multichannel.diffusion_scan.cache_clear()
    x, y, slices = multichannel.diffusion_scan()
    multichannel.diffusion_scan.cache_clear()
    assert x.shape == (60, 7, 3, 3)
    assert slices.tolist() == [k for k in range(3) for _ in range(20)]
    at = 20 * 1 + 5 * 2 + 3  # slice 1, row 2, column 3
    torch.testing.assert_close(x[at, :, 1, 1], torch.from_numpy(np.log(volume[2, 3, 1].astype(np.float32))))
    torch.testing.assert_close(x[at, 4, 0, 2], torch.tensor(np.log(float(volume[1, 4, 1, 4]))).float())
    assert set(y.tolist()) <= {0, 1, 2}


def test_edges():
    """Fails when the two edges are exchanged, or the border is one."""
    slope = torch.arange(8.0).view(1, 1, 1, 8).expand(1, 1, 8, 8)
    image, across, along, mean = multichannel.edges_and_mean(slope)[0]
    assert torch.equal(image, slope[0, 0])
    assert across[:, 1:-1].unique().tolist() == [8.0]
    assert along.abs().max() == 0
    torch.testing.assert_close(mean[:, 2:-2], slope[0, 0, :, 2:-2])


def test_so2sat_is_read_a_few_rows_at_a_time(tmp_path, monkeypatch):
    """Fails when channels end up last, or rows between two reads are lost."""
    generator = np.random.default_rng(0)
    file = {
        "sen1": generator.normal(size=(5, 4, 4, 8)),
        "sen2": generator.normal(size=(5, 4, 4, 10)),
        "label": np.eye(17)[[3, 0, 16, 2, 2]],
    }

    class File(dict):
        def __init__(self, path):
            super().__init__(file)

        def __enter__(self):
            return self

        def __exit__(self, *of):
            return None

    monkeypatch.setitem(sys.modules, "h5py", types.SimpleNamespace(File=File))
    x, y = so2sat.read_so2sat(tmp_path, rows=2)
    assert x.shape == (5, 18, 4, 4)
    assert y.tolist() == [3, 0, 16, 2, 2]
    torch.testing.assert_close(
        x[4, 8 + 1].float(), torch.from_numpy(file["sen2"][4, :, :, 1]).float(), atol=1e-2, rtol=0
    )


def test_paper_scale_says_what_is_missing(monkeypatch):
    """Fails when the large run begins on a machine that cannot end it."""
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    with pytest.raises(Unavailable, match="ViT-S/8 for 100 epochs and needs a CUDA GPU of 40 GB"):
        run_arm(experiment, "vit", 0, "paper")
