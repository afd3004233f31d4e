"""The comparison itself: what must be an error, and what must not pass."""

import pickle
from types import SimpleNamespace

import numpy as np
import pytest

from regularized.evidence.conformance import GoldenError, UnknownCase, conform, load_cases


def write(path, **arrays):
    np.savez(path, **{name.replace("__", "/"): np.asarray(value) for name, value in arrays.items()})
    return path


def doubling(case):
    if not case.has("in/x"):
        raise UnknownCase(case)
    return {"y": 2 * case.inputs["x"]}


ADAPTER = SimpleNamespace(TOLERANCE=1e-12, compute=doubling)


def test_equal_output_is_ok_and_other_is_not(tmp_path):
    """Fails when a difference just above the tolerance passes, or one below it does not."""
    path = write(
        tmp_path / "g.npz",
        a__in__x=[1.0, 2.0],
        a__out__y=[2.0, 4.0 * (1 + 5e-13)],
        b__in__x=[1.0, 2.0],
        b__out__y=[2.0, 4.0 * (1 + 2e-12)],
    )
    rows = {row.case: row for row in conform("slug", ADAPTER, path)}
    assert rows["a"].ok
    assert not rows["b"].ok
    assert rows["b"].max_rel_error == pytest.approx(2e-12, rel=0.1)
    assert set(rows["a"].to_dict()) == {"slug", "case", "output", "max_abs_error", "max_rel_error", "tolerance", "ok"}


@pytest.mark.parametrize(
    ("x", "y", "ok"),
    [
        ([[1.0]], [2.0], False),  # broadcasting would hide a wrong shape
        ([np.nan], [2.0], False),
        ([1.0], [np.nan], False),
        ([np.nan], [np.nan], True),
        ([np.inf], [np.inf], True),
        ([np.inf], [-np.inf], False),
        ([], [], True),
        ([1.0, 2.0], [2.0], False),
    ],
)
def test_shapes_and_what_is_not_finite(tmp_path, x, y, ok):
    """Fails when nan compares as small, inf - inf slips through, or shapes broadcast."""
    (row,) = conform("slug", ADAPTER, write(tmp_path / "g.npz", c__in__x=x, c__out__y=y))
    assert row.ok is ok


def test_case_that_nobody_understands_is_an_error(tmp_path):
    """Fails when an unknown case, or one whose adapter raises, is skipped."""
    path = write(tmp_path / "g.npz", odd__in__z=[1.0], odd__out__y=[1.0], empty__in__x=[1.0])
    rows = conform("slug", ADAPTER, path)
    assert [row.ok for row in rows] == [False, False]
    assert "no check for case odd" in rows[0].note
    assert "no output" in rows[1].note


def test_output_that_is_not_computed_is_an_error(tmp_path):
    """Fails when only the outputs that the adapter gives are compared."""
    path = write(tmp_path / "g.npz", c__in__x=[1.0], c__out__y=[2.0], c__out__more=[1.0])
    rows = {row.output: row for row in conform("slug", ADAPTER, path)}
    assert rows["y"].ok
    assert not rows["more"].ok


def test_tolerance_of_an_output(tmp_path):
    """An adapter may state a tolerance for each output."""
    adapter = SimpleNamespace(compute=doubling, tolerance=lambda case, output: 0.1 if output == "y" else 0.0)
    (row,) = conform("slug", adapter, write(tmp_path / "g.npz", c__in__x=[1.0], c__out__y=[2.05]))
    assert row.ok
    assert row.tolerance == 0.1


def test_tagged_settings_belong_to_their_case(tmp_path):
    """Fails when `case/tag_in_x` is refused, or becomes a case without the hyperparameters that it shares."""
    path = tmp_path / "g.npz"
    np.savez(path, **{"c/hp/rate": 2.0, "c/near_in_x": np.ones(2), "c/near_out_y": np.ones(3), "c/out/in_out_z": 1.0})
    (case,) = load_cases(path)
    assert case.has("hp/rate", "in/near/x", "out/near/y", "out/in_out_z")


def test_cases_below_a_case_share_its_inputs(tmp_path):
    """Fails when the inputs that `c` keeps for `c/a` and `c/b` are not theirs, or `c` itself must have an output."""
    path = tmp_path / "g.npz"
    np.savez(path, **{"c/in/x": 1.0, "c/hp/rate": 2.0, "c/a/out/y": 3.0, "c/b/in/z": 4.0, "c/b/out/y": 5.0})
    cases = {case.name: case for case in load_cases(path)}
    assert set(cases) == {"c/a", "c/b"}
    assert cases["c/a"].has("in/x", "hp/rate", "out/y")
    assert not cases["c/a"].has("in/z")
    assert cases["c/b"].has("in/x", "in/z", "hp/rate", "out/y")


def test_all_cases_share_what_is_shared(tmp_path):
    """Fails when `shared` must have an output, is not every case's, or hides what a case has itself."""
    path = tmp_path / "g.npz"
    np.savez(path, **{"shared/in/x": 1.0, "shared/hp/rate": 2.0, "a/out/y": 3.0, "b/hp/rate": 4.0, "b/out/y": 5.0})
    cases = {case.name: case for case in load_cases(path)}
    assert set(cases) == {"a", "b"}
    assert cases["a"].has("in/x", "hp/rate", "out/y")
    assert (cases["a"].number("rate"), cases["b"].number("rate")) == (2.0, 4.0)


@pytest.mark.parametrize("damage", ["truncated", "garbage", "missing", "pickled", "empty", "keys"])
def test_damaged_file_is_named(tmp_path, damage):
    """A golden file is hostile input: nothing is unpickled, and the error says which file."""
    path = write(tmp_path / "g.npz", c__in__x=np.arange(1000.0), c__out__y=np.arange(1000.0))
    if damage == "truncated":
        path.write_bytes(path.read_bytes()[:2000])
    elif damage == "garbage":
        path.write_bytes(b"not an archive")
    elif damage == "missing":
        path = tmp_path / "absent.npz"
    elif damage == "pickled":
        np.savez(path, **{"c/in/x": np.array([{"a": 1}], dtype=object)})
    elif damage == "empty":
        np.savez(path)
    elif damage == "keys":
        np.savez(path, x=np.zeros(2))
    with pytest.raises(GoldenError, match=path.name):
        load_cases(path)


def test_whatever_a_file_holds_it_is_an_error_with_its_name(tmp_path):
    """Fails when a damaged or wrongly named file leaks an error of zlib, zipfile or numpy."""
    file = tmp_path / "slug.npz"
    np.savez_compressed(file, **{"case/in/x": np.arange(500.0), "case/out/y": np.arange(500.0)})
    good = file.read_bytes()
    generator = np.random.default_rng(0)
    seen = set()
    for _ in range(400):
        damaged = bytearray(good)
        for position in generator.integers(len(good), size=generator.integers(1, 4)):
            damaged[position] = generator.integers(256)
        file.write_bytes(damaged)
        try:
            load_cases(file)
        except GoldenError as error:
            seen.add(type(error.__cause__).__name__ if str(file) in str(error) else "a message without the file")
    assert "a message without the file" not in seen
    assert {"error", "NotImplementedError", "BadZipFile"} <= seen, "the damage must reach zlib and the method of a file"
    np.save(tmp_path / "array.npy", np.zeros(3))
    (tmp_path / "array.npy").rename(tmp_path / "array.npz")
    (tmp_path / "folder.npz").mkdir()
    (tmp_path / "pickle.npz").write_bytes(pickle.dumps({"a": 1}))
    for name in ("array.npz", "folder.npz", "pickle.npz"):
        with pytest.raises(GoldenError, match=name):
            load_cases(tmp_path / name)


def test_a_case_that_cannot_be_compared_is_a_row_that_fails(tmp_path):
    """Fails when one strange array or a name without a tolerance takes the rows of all other cases along."""

    class Strange:
        @staticmethod
        def tolerance(case, output):
            return {"y": 1e-6, "dates": 1e-6}[output]

        @staticmethod
        def compute(case):
            return dict.fromkeys(case.outputs, np.zeros(3))

    file = tmp_path / "slug.npz"
    arrays = {
        "y": np.zeros(3),
        "unknown": np.zeros(3),
        "dates": np.zeros(3, "M8[s]"),
    }
    np.savez(file, **{f"case/out/{name}": array for name, array in arrays.items()})
    rows = {row.output: row for row in conform("slug", Strange, file)}
    assert rows["y"].ok
    assert [rows[name].ok for name in ("unknown", "dates")] == [False] * 2
    assert rows["unknown"].note == "KeyError: 'unknown'"
