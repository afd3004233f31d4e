"""Sounds of runs: encoded, kept by code and seed, played in the report, and copied beside it."""

import wave

import numpy as np
import pytest

from regularized.evidence import report, sounds
from regularized.evidence.claims import Claim
from regularized.evidence.experiment import Audible
from regularized.evidence.runner import reproduce


def samples_of(path):
    with wave.open(str(path)) as file:
        assert (file.getnchannels(), file.getframerate()) == (1, sounds.RATE)
        return np.frombuffer(file.readframes(file.getnframes()), dtype="<i2").tolist()


@pytest.mark.parametrize(("name", "shape"), [("stereo", (2, 2)), ("../up", (2,)), ("", (2,))])
def test_encode_refuses(name, shape):
    """Fails when a name leaves the folder, or two channels are taken for one sound."""
    with pytest.raises(ValueError, match="sound"):
        sounds.encode({name: np.zeros(shape)})


def test_reproduce_saves_them(tmp_path, monkeypatch, warm_workers):
    """Fails when sounds get lost between worker, runner and report, or with runs that were made before."""
    monkeypatch.setenv("REGULARIZED_HOME", str(tmp_path / "home"))
    module = tmp_path / "audible_experiment.py"
    module.write_text(
        "import numpy as np\n"
        "from regularized.evidence.experiment import About, Audible\n"
        "DEFAULTS = {'louder': 0}\n"
        "SCALES = {'smoke': {}}\n"
        "ARMS = {'plain': {}, 'better': {'louder': 1}}\n"
        "def about(settings):\n"
        "    return About('no data', 1, 'no model', 1)\n"
        "def run(settings, seed):\n"
        "    return Audible(metrics={'m': float(seed)}, sounds={'beep': np.array([0, 1 + settings['louder'], -1])})\n"
    )
    monkeypatch.syspath_prepend(str(tmp_path))
    arms = {"baseline": "plain", "method": "better", "differs": ("louder",)}
    claim = Claim(id="c", statement="s", metric="m", direction="higher", **arms)
    for _ in range(2):  # the second time from the store
        result = reproduce("some", "audible_experiment", [claim], scale="smoke", seeds=2, progress=False)
        assert [(sound.arm, sound.name) for sound in sounds.of(result)] == [("plain", "beep"), ("better", "beep")]
        page = report.write(result, tmp_path / "report").read_text()
        assert page.count("data:audio/wav;base64,") == 2
        assert "better: beep, seed 0" in page
        saved = tmp_path / "report" / "sounds" / "better_beep.wav"
        assert samples_of(saved) == [0, 32767, -32767]
        saved.unlink()
    assert result.reused == 4


def test_measurements_are_still_measurements():
    """Fails when the sounds become a duty."""
    assert Audible(metrics={"m": 1.0}).sounds == {}
