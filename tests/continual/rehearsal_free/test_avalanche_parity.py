"""Avalanche's strategies beside ours: refused where it is missing, equal in weights where it is there."""

import runpy
from importlib.util import find_spec
from pathlib import Path

import pytest

SCRIPT = Path(__file__).parents[3] / "benchmarks" / "avalanche_parity.py"


def test_weights_agree_with_avalanche_or_its_absence_is_said(capsys):
    """Fails when the anchor or the distillation is not Avalanche's; without it, when the script does not say so."""
    script = runpy.run_path(str(SCRIPT))
    if find_spec("avalanche") is None:
        with pytest.raises(SystemExit):
            script["main"]([])
        assert "pip install avalanche-lib" in capsys.readouterr().err
        return
    sizes = script["Sizes"](images=100, test=50, tasks=2, epochs=1, width=16)
    assert script["compare"]("domains", "EWC online, per sample", 1000, sizes)["float64"] < 1e-12
    assert script["compare"]("domains", "EWC online, as shipped", 1000, sizes)["float64"] > 1e-5
    assert script["compare"]("classes", "LwF seen", 1000, sizes)["float64"] < 1e-12
