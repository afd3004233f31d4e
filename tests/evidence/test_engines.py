"""Runs on other machines: as those made here, none lost with a machine, none made twice."""

import os
import signal
import sys
import threading
import time
from collections import Counter
from concurrent.futures import Future
from functools import partial
from pathlib import Path

import pytest

from regularized.evidence import engines, runner
from regularized.evidence.engines import TRIES, EnginePool, ExecutorEngine, make_run
from regularized.evidence.experiment import Unavailable
from regularized.evidence.pool import Job
from regularized.evidence.provenance import code_key, versions
from regularized.evidence.store import Store

pytestmark = pytest.mark.skipif(sys.platform == "win32", reason="kills and forks")


class Machines:
    """An engine in this process whose machines are lost when a test says so; each task answers at once."""

    def __init__(self, lost=()):
        self.lost = Counter(lost)
        self.handed_out = Counter()
        self.cancelled = 0
        self.change = lambda answer, job: answer

    def submit(self, module_name, job, about):
        future = Future()
        key = (job["arm"], job["seed"])
        self.handed_out[key] += 1
        if self.lost[key]:
            self.lost[key] -= 1
            future.set_exception(RuntimeError("the node died"))
        else:
            future.set_result(self.change(make_run(module_name, job, about), job))
        return future

    def cancel(self, future):
        self.cancelled += 1


@pytest.fixture(autouse=True)
def no_process_is_left():
    yield
    while engines._kept:
        engines._kept.popitem()[1][0].end()


def compare(fake, engine=None, name="elsewhere", **options):
    """Metrics and curves by arm and seed, what the store has, failures."""
    pool = {} if engine is None else {"pool": partial(EnginePool, engine)}
    with Store(Path(os.environ["REGULARIZED_HOME"]) / f"{name}.sqlite") as store:
        found = runner.reproduce(
            "paper", fake, (), scale="smoke", seeds=2, store=store, progress=False, workers=1, **pool, **options
        )
        rows = store.find("paper", code_key=found.code_key)
    return {(run.arm, run.seed): (run.metrics, run.curves) for run in found.runs}, rows, found.failures


def test_the_same_numbers_as_here_and_nothing_lost_or_doubled(fake, warm_workers):
    """Fails when a lost machine takes runs along, a run is stored twice, or numbers differ from a local run's."""
    local, _, _ = compare(fake, name="here")
    machines = Machines(lost={("plain", 0): 1, ("better", 1): TRIES - 1})
    made, rows, failures = compare(fake, machines)
    assert made == local
    assert not failures
    assert sorted((run.arm, run.seed) for run in rows) == sorted(made)
    assert machines.handed_out["plain", 0] == 2
    assert machines.handed_out["better", 1] == TRIES
    assert machines.handed_out["control", 0] == 1
    again, _, _ = compare(fake, machines)
    assert again == local
    assert sum(machines.handed_out.values()) == 6 + TRIES  # nothing was handed out the second time


def test_one_process_makes_several_runs(fake, warm_workers):
    """Fails when each run pays for the start of a process."""
    about = {"code_key": code_key(fake), "versions": dict(versions()), "time_limit": None}
    seen = []
    for seed in range(3):
        answer = make_run(fake, {"arm": "plain", "seed": seed, "scale": "smoke", "overrides": {}}, about)
        assert answer["status"] == "done"
        seen.append(*engines._kept.values())
    assert {id(process) for process, _ in seen} == {id(seen[0][0])}


def test_a_run_that_dies_fails_alone(fake, warm_workers, monkeypatch):
    """Fails when a run that is killed takes the ones after it along, or is taken for a lost machine."""
    monkeypatch.setenv("FAKE_DIE", "better/0")
    machines = Machines()
    made, _, failures = compare(fake, machines)
    assert [(failure.arm, failure.seed) for failure in failures] == [("better", 0)]
    assert "killed" in failures[0].error
    assert len(made) == 5
    assert machines.handed_out["better", 0] == 1


def test_a_machine_that_is_lost_again_and_again_costs_its_run(fake, warm_workers):
    """Fails when a run that no machine survives is handed out for ever."""
    machines = Machines(lost={("plain", 0): 100})
    _, _, failures = compare(fake, machines)
    assert machines.handed_out["plain", 0] == TRIES
    assert failures[0].error == f"lost {TRIES} times: the node died"


def test_other_versions_are_refused(fake, warm_workers, monkeypatch):
    """Fails when what another torch has computed is kept as this one's."""
    real = engines.versions()
    monkeypatch.setattr(engines, "versions", lambda: real)
    engine = Machines()
    pool = EnginePool(engine, fake, [Job("plain", 0, "smoke")], workers=1, code_key=code_key(fake))
    monkeypatch.setattr(engines, "versions", lambda: {**real, "torch": "1.0"})
    with pool as under_way:
        ((_, answer),) = under_way.answers()
    assert answer["status"] == "fatal"
    assert f"torch 1.0 there and {real['torch']} here" in answer["error"]


def test_other_code_is_refused(fake, warm_workers):
    """Fails when a machine with another edition of the code takes part."""
    pool = EnginePool(Machines(), fake, [Job("plain", 0, "smoke")], workers=1, code_key="another")
    with pool as under_way:
        ((_, answer),) = under_way.answers()
    assert answer["status"] == "fatal"
    assert "code of the experiment changed" in answer["error"]


def test_paired_arms_run_on_one_kind_of_device(fake, warm_workers):
    """Fails when a run on a GPU is compared with one on a processor."""

    def on_gpu(answer, job):
        device = "NVIDIA H200" if job["arm"] == "better" else "cpu"
        return answer | {"environment": {**answer["environment"], "device": device}}

    machines = Machines()
    machines.change = on_gpu
    with pytest.raises(RuntimeError, match=r"one run was made on (cpu|NVIDIA H200), another on"):
        compare(fake, machines)


def test_the_checkout_is_the_callers(fake, warm_workers):
    """Fails when a shipped tree, which has no git, makes clean code dirty, or dirty code clean."""

    def shipped(answer, job):
        return answer | {"environment": {**answer["environment"], "commit": None, "dirty": False}}

    _, local, _ = compare(fake, name="here")
    machines = Machines()
    machines.change = shipped
    _, rows, _ = compare(fake, machines)
    assert {(run.dirty, run.environment["commit"]) for run in rows} == {
        (run.dirty, run.environment["commit"]) for run in local
    }


def test_what_is_under_way_is_cancelled(fake, warm_workers):
    """Fails when an interrupted comparison leaves a cluster computing."""

    class Never(Machines):
        def submit(self, module_name, job, about):
            return Future()

    engine = Never()
    jobs = [Job("plain", seed, "smoke") for seed in range(3)]
    with EnginePool(engine, fake, jobs, workers=1, code_key="key"):
        pass
    assert engine.cancelled == 3


def test_any_executor_will_do(fake, warm_workers):
    """Fails when only Ray's futures are understood."""
    from concurrent.futures import ThreadPoolExecutor

    with ThreadPoolExecutor(1) as executor:
        made, _, failures = compare(fake, ExecutorEngine(executor))
    assert len(made) == 6
    assert not failures


def test_dask_makes_the_same_runs(fake, warm_workers):
    """Fails when two tasks in one process of Dask's share a worker process of ours, numbers are not those from here, or
    a run waits for ever for a GPU that no machine has."""
    distributed = pytest.importorskip("distributed", reason="not installed: pip install 'regularized[dask]'")
    local, _, _ = compare(fake, name="here")
    with (
        distributed.LocalCluster(
            n_workers=1, threads_per_worker=2, processes=False, resources={"GPU": 1}, dashboard_address=None
        ) as cluster,
        distributed.Client(cluster),
    ):
        with pytest.raises(Unavailable, match="64 GPU, and no machine of the cluster has more than 1"):
            engines.DaskEngine(gpus=64)
        made, rows, failures = compare(fake, engines.DaskEngine(gpus=0.5))
    assert made == local
    assert not failures
    assert sorted((run.arm, run.seed) for run in rows) == sorted(made)
    assert len(engines._kept) == 2  # a process of ours for each thread


@pytest.mark.slow
@pytest.mark.timeout(600)
def test_ray_with_a_killed_worker_and_a_lost_node(fake, monkeypatch):
    """Fails when Ray loses or doubles a run as its workers and nodes die, or its numbers are not those from here."""
    ray = pytest.importorskip("ray", reason="not installed: pip install 'regularized[ray]'")
    psutil = pytest.importorskip("psutil")
    from ray.cluster_utils import Cluster

    local, _, _ = compare(fake, name="here")
    monkeypatch.setenv("PYTHONPATH", os.pathsep.join(path for path in sys.path if path))
    monkeypatch.setenv("FAKE_SLEEP", "2.0")
    options = {"num_cpus": 1, "object_store_memory": 100 * 2**20, "include_dashboard": False}
    cluster = Cluster(initialize_head=True, head_node_args=options)
    try:
        second = cluster.add_node(num_cpus=1, object_store_memory=100 * 2**20)
        monkeypatch.setenv("RAY_ADDRESS", cluster.address)
        with pytest.raises(Unavailable, match="64 GPU, and no machine of the cluster has more than"):
            engines.RayEngine(gpus=64)
        engine = engines.RayEngine()
        killed = []

        def kill():
            """A worker process of Ray once it has asked ours; then the second node."""
            deadline = time.monotonic() + 300
            while time.monotonic() < deadline and not killed:
                for process in psutil.process_iter(["cmdline"]):
                    if any(part.startswith("ray::make_run") for part in process.info["cmdline"] or ()):
                        ours = [c for c in process.children() if "worker.py" in " ".join(c.cmdline())]
                        if ours and not killed:
                            os.kill(process.pid, signal.SIGKILL)
                            killed.append(ours[0])
                time.sleep(0.1)
            cluster.remove_node(second, allow_graceful=False)

        thread = threading.Thread(target=kill, daemon=True)
        thread.start()
        made, rows, failures = compare(fake, engine)
        thread.join()
        assert killed
        assert not failures
        assert made == local
        assert sorted((run.arm, run.seed) for run in rows) == sorted(made)
        assert engine.handed_out > 6  # something was made again
        killed[0].wait(30)  # our process ends with the one that asked it
    finally:
        ray.shutdown()
        cluster.shutdown()
