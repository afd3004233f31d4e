"""Data of a comparison: parts that nothing leaks between, and every way to bring data in."""

import math

import numpy as np
import pytest
import torch
from PIL import Image
from torch.utils.data import TensorDataset

from regularized.evidence.comparison import Problem, problem_of
from regularized.evidence.comparison.problem import all_samples, load, new_samples, save

pd = pytest.importorskip("pandas", reason="needs pandas")


class Samples:
    """A map-style data set of dictionaries that is none of torch's, as Hugging Face's."""

    def __init__(self, columns):
        self.columns = columns

    def __len__(self):
        return len(next(iter(self.columns.values())))

    def __getitem__(self, index):
        return {name: values[index] for name, values in self.columns.items()}


def table(samples=200, classes=2):
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(samples, 3, generator=generator)
    return Problem(x, torch.arange(samples) % classes, tuple(map(str, range(classes))))


def test_parts_are_disjoint_and_whole():
    """Fails when a sample that is judged on was trained on, or chosen on."""
    problem = table()
    parts = problem.split(0)
    together = torch.cat(list(parts))
    assert together.sort().values.tolist() == list(range(200))
    assert {name: len(getattr(parts, name)) for name in parts._fields} == problem.sizes()
    assert problem.split(0).train.tolist() == parts.train.tolist() != problem.split(1).train.tolist()


def test_rare_classes_are_in_every_part():
    """Fails when a split leaves a part without a rare class by bad luck."""
    targets = torch.zeros(400, dtype=torch.long)
    targets[:20] = 1
    problem = Problem(torch.randn(400, 2), targets, ("common", "rare"))
    for number in range(5):
        for part in problem.split(number):
            assert abs(float(targets[part].float().mean()) - 0.05) < 0.04
            assert targets[part].any()


def test_scaling_sees_the_training_part_alone():
    """Fails when means or spreads are computed over samples that are judged on."""
    problem = table()
    split = problem.split(0)
    before, _ = problem.prepared(split)
    problem.inputs[split.judge] += 1000.0
    after, _ = problem.prepared(split)
    assert torch.equal(before["train"], after["train"])
    assert float(before["train"].mean().abs()) < 1e-5
    assert float(after["judge"].mean()) > 100


def test_missing_values_are_told_to_the_network():
    """Fails when NaN reaches a network, or a missing value cannot be told from an average one."""
    problem = table()
    problem.inputs[::3, 1] = torch.nan
    inputs, _ = problem.prepared(problem.split(0))
    assert problem.input_shape == (4,)
    assert all(part.isfinite().all() for part in inputs.values())
    missing = problem.inputs[problem.split(0).train, 1].isnan()
    assert torch.equal(inputs["train"][:, 3] > 0.5, missing)
    assert all_samples(problem)[0].shape == (200, 4)


def test_clean_test_data_are_judged_on():
    """Fails when trusted targets are trained or chosen on, or the user's own are judged on."""
    problem = table()
    clean = Problem(problem.inputs, problem.targets, problem.classes, torch.zeros(30, 3), torch.ones(30).long())
    _, targets = clean.prepared(clean.split(0))
    assert targets["judge"].tolist() == [1] * 30
    assert len(targets["train"]) + len(targets["validation"]) + len(targets["selection"]) == 200


def test_a_problem_survives_the_file(tmp_path, monkeypatch):
    """Fails when runs in other processes see other data, or a damaged file gives a traceback of safetensors."""
    monkeypatch.setenv("REGULARIZED_HOME", str(tmp_path))
    problem = table()
    path = save(problem)
    again = load(str(path))
    assert again.fingerprint == problem.fingerprint == path.stem
    assert again.classes == problem.classes
    path.write_bytes(path.read_bytes()[:50])
    load.cache_clear()
    with pytest.raises(ValueError, match="start the comparison again"):
        load(str(path))


def test_every_way_in(tmp_path):
    """Fails when a file, frame, array or data set gives other data than the tensors it was made of."""
    rng = np.random.default_rng(0)
    x, y = rng.normal(size=(200, 2)).astype("float32"), np.arange(200) % 3
    frame = pd.DataFrame({"a": x[:, 0], "b": x[:, 1], "label": [f"c{k}" for k in y]})
    frame.to_csv(tmp_path / "t.csv", index=False)
    frame.to_parquet(tmp_path / "t.parquet")
    np.savez(tmp_path / "t.npz", x=x, y=y)
    ways = [
        problem_of(tmp_path / "t.csv", target="label"),
        problem_of(str(tmp_path / "t.parquet"), target="label"),
        problem_of(frame, target="label"),
        problem_of(tmp_path / "t.npz", target="y"),
        problem_of((x, y)),
        problem_of((torch.tensor(x), torch.tensor(y))),
        problem_of(TensorDataset(torch.tensor(x), torch.tensor(y))),
        problem_of([{"a": a, "b": b, "label": f"c{k}"} for (a, b), k in zip(x, y, strict=True)], target="label"),
        problem_of(Samples({"x": x, "y": y}), target="y"),
        problem_of(Samples({"x": torch.tensor(x), "y": torch.tensor(y)}), target="y"),
        problem_of(Samples({"x": x.tolist(), "y": y.tolist()}), target="y"),
    ]
    for problem in ways:
        assert torch.allclose(problem.inputs, torch.tensor(x))
        assert problem.targets.tolist() == y.tolist()
        assert problem.num_outputs == 3
    assert ways[0].classes == ("c0", "c1", "c2")


def test_columns_of_words_become_numbers():
    """Fails when categories are numbered as if they had an order, or a missing one becomes a category."""
    frame = pd.DataFrame({"colour": (["red", "blue", None, "red"] * 50), "y": np.linspace(0, 1, 200)})
    problem = problem_of(frame, target="y")
    assert problem.columns == ("colour=blue", "colour=red")
    assert problem.inputs[:4].tolist() == [[0, 1], [1, 0], [0, 0], [0, 1]]
    assert problem.task == "regression"


def test_folder_of_images(tmp_path):
    """Fails when images and classes are mixed up, or pixels keep their bytes."""
    for name, value in (("cats", 255), ("dogs", 0)):
        (tmp_path / name).mkdir()
        for i in range(80):
            Image.fromarray(np.full((8, 8, 3), value, "uint8")).save(tmp_path / name / f"{i}.png")
    problem = problem_of(tmp_path)
    assert problem.inputs.shape == (160, 3, 8, 8)
    assert problem.classes == ("cats", "dogs")
    assert problem.inputs[problem.targets == 0].min() == 1.0


def test_dictionaries_with_images():
    """Fails when images of Pillow stay height x width x colour, keep their bytes, or lose what has no label."""
    images = [Image.fromarray(np.full((8, 6, 3), 255 * (i % 2), "uint8")) for i in range(200)]
    labels = [i % 2 for i in range(199)] + [None]
    with pytest.warns(UserWarning, match="1 rows without a target"):
        problem = problem_of(Samples({"image": images, "label": labels}), target="label")
    assert problem.inputs.shape == (199, 3, 8, 6)
    assert torch.equal(problem.inputs.amax((1, 2, 3)), problem.targets.float())
    pairs = problem_of([{"x": image, "y": i % 2} for i, image in enumerate(images)], target="y")
    assert torch.equal(pairs.inputs[:199], problem.inputs)


def test_a_data_set_of_hugging_face():
    """Fails when a table of it is not what the same frame is, or its gaps and words are lost."""
    datasets = pytest.importorskip("datasets", reason="needs datasets")
    frame = pd.DataFrame({"a": [0.5, None, 2.0, 1.0] * 50, "b": ["red", "blue"] * 100, "y": [0, 1, 1, 0] * 50})
    theirs = datasets.Dataset.from_pandas(frame)
    expected = problem_of(frame, target="y")
    for given in (theirs, theirs.with_format("torch")):
        problem = problem_of(given, target="y")
        assert problem.columns == expected.columns == ("a", "b=blue", "b=red")
        assert torch.equal(problem.inputs.nan_to_num(7.0), expected.inputs.nan_to_num(7.0))
        assert problem.targets.tolist() == expected.targets.tolist()
    with pytest.raises(TypeError, match=r"a mapping of \['train'\]; give one of its parts"):
        problem_of(datasets.DatasetDict(train=theirs), target="y")
    with pytest.raises(TypeError, match=r"collect its samples: list\(dataset\)"):
        problem_of(theirs.to_iterable_dataset(), target="y")


@pytest.mark.parametrize(
    ("columns", "target", "message"),
    [
        ({"x": torch.zeros(4, 2), "label": [0, 1, 0, 1]}, None, r"say which column is the target; .* 'label'\]"),
        ({"x": torch.zeros(4, 2), "label": [0, 1, 0, 1]}, "y", r"no column 'y'; there are \['x', 'label'\]"),
        ({"x": torch.zeros(4, 2), "z": [1.0] * 4, "y": [0, 1, 0, 1]}, "y", r"of which \['x'\] .*select_columns"),
        ({"x": [[1.0], [1.0, 2.0]], "y": [0, 1]}, "y", r"one shape in all samples; found .* pad or cut them"),
        ({"x": [["a"], ["b"]], "y": [0, 1]}, "y", "column 'x' must hold numbers"),
        ({"x": [], "y": []}, "y", "no samples"),
    ],
)
def test_dictionaries_that_do_not_fit(columns, target, message):
    """Fails when samples that mean nothing are compared on, or the error does not say what to leave out."""
    with pytest.raises(ValueError, match=message):
        problem_of(Samples(columns), target=target)


@pytest.mark.parametrize(
    ("data", "options", "message"),
    [
        ((torch.zeros(50, 2), torch.arange(50) % 2), {}, "too few"),
        ((torch.zeros(200, 2), torch.zeros(199, dtype=torch.long)), {}, "one target a sample"),
        ((torch.full((200, 2), torch.inf), torch.arange(200) % 2), {}, "infinite"),
        ((torch.zeros(200, 2), torch.zeros(200, dtype=torch.long)), {}, "two classes"),
        ((torch.zeros(200, 2), torch.full((200,), torch.nan)), {"task": "regression"}, "NaN"),
        (pd.DataFrame({"a": range(200)}), {}, "say which column is the target; there are \\['a'\\]"),
        (pd.DataFrame({"a": range(200)}), {"target": "y"}, "no column 'y'"),
        (pd.DataFrame({"a": [str(i) for i in range(200)], "y": [0, 1] * 100}), {"target": "y"}, "200 different texts"),
    ],
)
def test_bad_data(data, options, message):
    """Fails when data that mean nothing are compared on."""
    with pytest.raises(ValueError, match=message):
        problem_of(data, **options)


def test_unknown_kinds(tmp_path):
    """Fails when what cannot be read gives a traceback of somebody else's."""
    (tmp_path / "t.txt").write_text("a")
    (tmp_path / "empty").mkdir()
    with pytest.raises(ValueError, match="none of"):
        problem_of(tmp_path / "t.txt", target="a")
    with pytest.raises(ValueError, match="folder of images for each"):
        problem_of(tmp_path / "empty")
    with pytest.raises(FileNotFoundError):
        problem_of(tmp_path / "nothing.csv", target="a")
    with pytest.raises(TypeError, match="got int"):
        problem_of(3)


def test_new_samples_are_scaled_by_the_problem_alone():
    """Fails when what is new is scaled by itself, or a gap in it becomes NaN or a column that the network lacks."""
    gen = torch.Generator().manual_seed(0)
    inputs = 5.0 + 3.0 * torch.randn(200, 2, generator=gen)
    inputs[0, 1] = math.nan
    data = Problem(inputs, torch.arange(200) % 2, ("a", "b"))
    scaled, _ = all_samples(data)
    assert torch.equal(new_samples(data, inputs), scaled)
    assert torch.allclose(new_samples(data, inputs[7:8]), scaled[7:8])
    assert new_samples(data, torch.tensor([[math.nan, math.nan]])).tolist() == [[0.0, 0.0, 1.0]]
    with pytest.raises(ValueError, match=r"shape \(3,\) a sample, those of the problem \(2,\)"):
        new_samples(data, torch.zeros(1, 3))
