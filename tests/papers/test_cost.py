"""What comparisons cost: figures with their sources, and none that nobody has said."""

from types import SimpleNamespace

import pytest

from regularized.evidence.experiment import Seeds
from regularized.papers.card import PaperScale
from regularized.papers.cost import asked_memory, costs, total
from regularized.papers.memory import Memory

ASKS = '''
"""A docstring that speaks of a GPU of 900 GB."""

def run(s, seed):
    """Needs a CUDA GPU of 800 GB."""
    device = need_gpu("it trains", gigabytes=20)
    if too_small():
        raise Unavailable("it needs a CUDA GPU of 24 GiB")
'''


@pytest.fixture
def paper(tmp_path):
    """A paper of the catalogue with three arms, as far as its cost is concerned."""

    def make(slug="mine", *, source="", stated=None, ledger=None):
        folder = tmp_path / slug
        folder.mkdir()
        (folder / "experiment.py").write_text(source, encoding="utf-8")
        module = SimpleNamespace(
            ARMS={"a": {}, "b": {}, "c": {}}, SCALES={"laptop": {}, "paper": {}}, SEEDS=Seeds(count=4)
        )
        return SimpleNamespace(
            slug=slug,
            folder=folder,
            card=SimpleNamespace(paper_scale=stated),
            memory=Memory(None, ""),
            experiment=lambda: module,
            load_ledger=lambda: ledger,
        )

    return make


def test_nothing_is_known_where_nobody_has_said_it(paper):
    """Fails when a figure is made up."""
    (cost,) = costs([paper()])
    assert (cost.runs, cost.gpu, cost.gigabytes.value, cost.hours.value) == (12, False, None, None)
    assert str(cost.hours) == "unknown"
    assert total([cost]) == "12 runs of 1 papers; the time of none is known"


def test_memory_is_what_the_code_asks_for(paper):
    """Fails when a docstring counts, GiB are taken for GB, or a smaller demand hides a larger one."""
    gpu, figure = asked_memory(paper(source=ASKS).folder)
    assert gpu
    assert figure.value == pytest.approx(24 * 2**30 / 1e9)
    assert figure.source == "mine/experiment.py, line 8, asks for it"
    gpu, figure = asked_memory(paper("any", source='device = need_gpu("it trains")').folder)
    assert (gpu, figure.value) == (True, None)


@pytest.mark.parametrize(("each", "hours"), [("run", 24.0), ("comparison", 2.0)])
def test_hours_of_a_run_and_of_all(paper, each, hours):
    """Fails when the time of a run is taken for that of all, or the other way round, or the sum hides the unknown."""
    found = costs([paper(stated=PaperScale(2.0, each, "table 3")), paper("other")])
    assert (found[0].hours.value, found[0].hours.source) == (hours, "table 3")
    assert total(found).endswith(f"those of 1 take {hours:g} hours on one machine; the time of the other 1 is unknown")
    assert costs([paper("third", stated=PaperScale(2.0, each, "table 3"))], scale="laptop")[0].hours.value is None


def test_what_was_measured_comes_before_what_is_said(paper):
    """Fails when runs of another scale are taken for this one, or measured ones are passed over."""
    runs = [SimpleNamespace(seconds=1800.0, peak_memory=memory) for memory in (10**9, 3 * 10**9)]
    ledger = SimpleNamespace(scale="laptop", runs=runs, environment={"cpu": "a core"})
    entry = paper(stated=PaperScale(2.0, "run", "table 3"), ledger=ledger)
    (laptop,), (original,) = costs([entry], scale="laptop"), costs([entry])
    assert (laptop.hours.value, laptop.gigabytes.value) == (1.0, 3.0)
    assert laptop.hours.source == "ledger.json: 2 runs on a core"
    assert (original.hours.value, original.gigabytes.value) == (24.0, None)
    assert costs([entry], scale="vast") == []
