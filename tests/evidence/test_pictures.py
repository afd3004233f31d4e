"""Pictures of runs: encoded, kept by code and seed, shown in the report, and copied beside it."""

import numpy as np
import pytest
from PIL import Image

from regularized.evidence import pictures, report
from regularized.evidence.claims import Claim
from regularized.evidence.experiment import Illustrated
from regularized.evidence.runner import reproduce


def test_encode_and_keep(tmp_path, monkeypatch):
    """Fails when values are scaled wrongly, or colour is lost."""
    monkeypatch.setenv("REGULARIZED_HOME", str(tmp_path))
    grey = np.array([[0.0, 0.5, 2.0]])
    colour = np.zeros((2, 2, 3))
    colour[..., 0] = 1.0
    encoded = pictures.encode({"grey": grey, "in_colour": colour})
    pictures.keep(encoded, slug="some", scale="smoke", code_key="0" * 16, arm="plain", seed=3)
    folder = tmp_path / "images" / "some" / "smoke" / ("0" * 16) / "plain" / "3"
    assert np.asarray(Image.open(folder / "grey.png")).tolist() == [[0, 128, 255]]
    assert np.asarray(Image.open(folder / "in_colour.png"))[0, 0].tolist() == [255, 0, 0]


@pytest.mark.parametrize(("name", "shape"), [("four", (2, 2, 4)), ("flat", (3,)), ("../up", (2, 2)), ("", (2, 2))])
def test_encode_refuses(name, shape):
    """Fails when a name leaves the folder, or a batch is taken for a picture."""
    with pytest.raises(ValueError, match="image"):
        pictures.encode({name: np.zeros(shape)})


def test_reproduce_saves_them(tmp_path, monkeypatch, warm_workers):
    """Fails when pictures get lost between worker, runner and report, or with runs that were made before."""
    monkeypatch.setenv("REGULARIZED_HOME", str(tmp_path / "home"))
    module = tmp_path / "illustrated_experiment.py"
    module.write_text(
        "import numpy as np\n"
        "from regularized.evidence.experiment import About, Illustrated\n"
        "DEFAULTS = {'brighter': 0}\n"
        "SCALES = {'smoke': {}}\n"
        "ARMS = {'plain': {}, 'better': {'brighter': 1}}\n"
        "def about(settings):\n"
        "    return About('no data', 1, 'no model', 1)\n"
        "def run(settings, seed):\n"
        "    image = np.full((2, 3), (1 + seed + settings['brighter']) / 4)\n"
        "    return Illustrated(metrics={'m': float(seed)}, images={'square': image})\n"
    )
    monkeypatch.syspath_prepend(str(tmp_path))
    arms = {"baseline": "plain", "method": "better", "differs": ("brighter",)}
    claim = Claim(id="c", statement="s", metric="m", direction="higher", **arms)
    for _ in range(2):  # the second time from the store
        result = reproduce("some", "illustrated_experiment", [claim], scale="smoke", seeds=2, progress=False)
        shown = pictures.of(result)
        assert [(picture.arm, picture.name) for picture in shown] == [("plain", "square"), ("better", "square")]
        page = report.write(result, tmp_path / "report").read_text()
        assert page.count("data:image/png;base64,") == 2
        assert "better: square, seed 0" in page
        saved = tmp_path / "report" / "images" / "better_square.png"
        assert np.asarray(Image.open(saved)).tolist() == [[128] * 3] * 2
        saved.unlink()
    assert result.reused == 4


def test_measurements_are_still_measurements():
    """Fails when the pictures become a duty."""
    assert Illustrated(metrics={"m": 1.0}).images == {}
