"""The bench measures ratios of interleaved steps; checked on steps whose cost is known."""

import multiprocessing as mp
import time
from functools import partial

import pytest

from regularized.evidence import bench as bench_module
from regularized.evidence.bench import Workload, bench
from regularized.evidence.bench_rows import BenchRow, departures, load, save
from regularized.evidence.processes import start_method


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
    # A fresh process has a clock of its own.
    monkeypatch.setattr(bench_module, "_in_fresh_process", lambda measure, *arguments: measure(*arguments))
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
    assert (first.peak_memory_ratio, first.processes) == (None, 1)


@pytest.fixture
def forked(monkeypatch):
    """Processes of a bench start in tenths of a second: they are as fresh, but for what they have imported."""
    context = mp.get_context(start_method())
    monkeypatch.setattr(mp, "get_context", lambda _method: context)


STATE = """
import os
import time
from pathlib import Path
from regularized.evidence.bench import Workload

now = 0.0
time.perf_counter = lambda: now  # only steps let it go on, as above

def step(seconds):
    global now
    now += seconds

def build():
    calls = Path(__file__).with_name("processes")
    number = len(calls.read_text().splitlines()) if calls.exists() else 0
    calls.write_text("".join([*(calls.read_text().splitlines(True) if number else []), f"{os.getpid()}\\n"]))
    return lambda: step(0.002), lambda: step(0.002 * (1 + 2 * number))

def workloads():
    return [Workload("slower in each process", build)]
"""


@pytest.mark.usefixtures("forked")
def test_the_interval_of_several_processes_is_what_they_gave(tmp_path, monkeypatch):
    """Fails when the repeats share a process, or the interval is that of the pairs within one."""
    (tmp_path / "state_bench.py").write_text(STATE)
    monkeypatch.syspath_prepend(tmp_path)
    (row,) = bench("slug", "state_bench", seconds=0.1, processes=3, memory=False)
    assert len(set((tmp_path / "processes").read_text().split())) == 3
    assert row.processes == 3
    low, high = row.ratio_interval
    assert low < 0.7 * row.ratio < row.ratio < 0.8 * high
    assert row.pairs >= 30
    with pytest.raises(ValueError, match="processes must be"):
        bench("slug", "state_bench", processes=0)


def test_a_figure_that_left_what_was_saved_is_told(tmp_path):
    """Fails when a slower step passes in silence, the noise of a sixth process raises alarm, or one process decides."""

    def row(ratio, interval, processes):
        return BenchRow("slug", "small", 1.0, ratio, ratio, interval, None, None, 50, processes=processes)

    def told(today, processes=5):
        saved = {"measured": "2026-01-02", "environment": {"cpu": "x"}, "rows": [row(1.2, (1.1, 1.3), processes)]}
        return list(departures([row(today, (today, today), 1)], saved))

    assert told(1.2) == told(1.35) == told(1.05) == []
    assert told(1.6) == ["small: 1.600 today, 1.100 to 1.300 in 5 processes on 2026-01-02 (x)"]
    assert told(0.8)
    assert told(1.6, processes=1) == []
    assert list(departures([row(9.0, (9.0, 9.0), 1)], None)) == []


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


@pytest.mark.usefixtures("forked")
def test_what_is_kept_is_counted_in_bytes(tmp_path, monkeypatch):
    """Fails when the two sizes are swapped, or a row without them gets some."""
    (tmp_path / "small_bench.py").write_text(
        "import time\n"
        "from regularized.evidence.bench import Workload\n"
        "def build():\n"
        "    return (lambda: time.sleep(0.001)), (lambda: time.sleep(0.001))\n"
        "def workloads():\n"
        "    return [Workload('small', build, kept=lambda: (400, 100)), Workload('plain', build)]\n"
    )
    monkeypatch.syspath_prepend(tmp_path)
    monkeypatch.setenv("PYTHONPATH", str(tmp_path))
    small, plain = bench("slug", "small_bench", seconds=0.02, memory=False)
    assert small.size_bytes == (400.0, 100.0)
    assert small.size_ratio == small.to_dict()["size_ratio"] == 0.25
    assert (plain.size_bytes, plain.size_ratio) == (None, None)


def test_save_and_load(tmp_path):
    """Fails when a row does not survive, or a damaged file passes."""
    row = BenchRow("slug", "size", 1.0, 2.0, 2.0, (1.9, 2.1), 1.0, None, 10, size_bytes=(8.0, 2.0))
    path = save([row], "regularized.evidence.bench", tmp_path / "bench.json")
    content = load(path)
    assert content is not None
    assert content["rows"] == [row]
    assert content["environment"]["cpu"]
    path.write_text(path.read_text()[:100])
    with pytest.raises(ValueError, match="damaged"):
        load(path)
    assert load(tmp_path / "absent.json") is None
