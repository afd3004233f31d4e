"""The bench measures ratios of interleaved steps; checked on steps whose cost is known."""

import time
from functools import partial

import pytest

from regularized.evidence.bench import Workload, bench
from regularized.evidence.bench_rows import BenchRow, load, save


class Clock:
    """Only steps let it go on: what else the machine does must not decide about a ratio."""

    def __init__(self):
        self.now = 0.0

    def read(self):
        return self.now

    def step(self, seconds):
        self.now += seconds


CLOCK = Clock()


def taking(plain, method):
    return partial(CLOCK.step, plain), partial(CLOCK.step, method)


def workloads():
    """This test module is its own bench module."""
    return [
        Workload("three times", lambda: taking(0.002, 0.006), floor=2.5),
        Workload("equal", lambda: taking(0.001, 0.001)),
    ]


def test_ratio_floor_and_interval(monkeypatch):
    """Fails when the ratio is turned round, the times are swapped, or a workload's own floor is lost."""
    monkeypatch.setattr(time, "perf_counter", CLOCK.read)
    seen = []
    rows = bench("slug", __name__, floor=1.0, seconds=0.2, memory=False, on_row=seen.append)
    assert rows == seen
    first, second = rows
    assert first.ratio == pytest.approx(3.0)
    assert first.ratio_interval == pytest.approx((3.0, 3.0))
    assert (first.plain_ms, first.method_ms) == pytest.approx((2.0, 6.0))
    assert (first.floor, second.floor) == (2.5, 1.0)
    assert second.ratio == pytest.approx(1.0)
    assert first.pairs >= 10
    assert first.peak_memory_ratio is None


def test_peak_memory_is_of_fresh_processes(tmp_path, monkeypatch):
    """Fails when the peak of this (large) process leaks into the measured ones, or plain and method are swapped."""
    module = tmp_path / "hungry_bench.py"
    module.write_text(
        "import time\n"
        "from regularized.evidence.bench import Workload\n"
        "def build():\n"
        "    small, large = [], []\n"
        "    def grow(kept, size):\n"
        "        kept.append(bytearray(b'x' * size))\n"
        "        time.sleep(0.001)\n"
        "        del kept[1:]\n"
        "    return (lambda: grow(small, 20_000_000)), (lambda: grow(large, 80_000_000))\n"
        "def workloads():\n"
        "    return [Workload('grows', build)]\n"
    )
    monkeypatch.syspath_prepend(tmp_path)
    monkeypatch.setenv("PYTHONPATH", str(tmp_path))
    ballast = bytearray(b"x" * 300_000_000)
    (row,) = bench("slug", "hungry_bench", seconds=0.05)
    assert len(ballast) == 300_000_000
    assert row.peak_memory_ratio is not None
    assert 2.5 < row.peak_memory_ratio < 5.0


def test_save_and_load(tmp_path):
    """Fails when a row does not survive, or a damaged file passes."""
    row = BenchRow("slug", "size", 1.0, 2.0, 2.0, (1.9, 2.1), 1.0, None, 10)
    path = save([row], "regularized.evidence.bench", tmp_path / "bench.json")
    content = load(path)
    assert content is not None
    assert content["rows"] == [row]
    assert content["environment"]["cpu"]
    path.write_text(path.read_text()[:100])
    with pytest.raises(ValueError, match="damaged"):
        load(path)
    assert load(tmp_path / "absent.json") is None
