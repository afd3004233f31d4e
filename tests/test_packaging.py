"""The wheel: what it holds, and that it works away from the checkout."""

import importlib.util
import json
import os
import re
import subprocess
import sys
import sysconfig
import venv
import zipfile
from email.parser import Parser
from pathlib import Path

import pytest

import regularized
from regularized.papers.catalogue import load_catalogue

PACKAGE = Path(regularized.__file__).parent
ROOT = PACKAGE.parents[1]
IMPLEMENTED = sorted((entry for entry in load_catalogue() if entry.implemented), key=lambda entry: entry.slug)

pytestmark = pytest.mark.skipif(not (ROOT / "pyproject.toml").is_file(), reason="needs the checkout to build the wheel")


@pytest.fixture(scope="module")
def wheel(tmp_path_factory) -> Path:
    """The wheel, built without network: the build backend is one of the dev dependencies."""
    folder = tmp_path_factory.mktemp("wheel")
    command = [sys.executable, "-m", "build", "--wheel", "--no-isolation", "--outdir", str(folder), str(ROOT)]
    built = subprocess.run(command, capture_output=True, text=True)
    assert built.returncode == 0, built.stdout + built.stderr
    return next(folder.glob("*.whl"))


def test_wheel_holds_what_the_commands_need(wheel):
    """Fails when cards, ledgers, golden vectors, types marker, templates or licence are left out, or tests come in."""
    with zipfile.ZipFile(wheel) as archive:
        names = set(archive.namelist())
    wanted = {
        path.relative_to(PACKAGE.parent).as_posix()
        for path in PACKAGE.rglob("*")
        if path.is_file() and path.suffix not in {".pyc", ".part"}
    }
    assert wanted <= names
    assert {f"regularized/papers/{entry.slug}/card.toml" for entry in load_catalogue()} <= names
    assert {f"regularized/papers/{entry.slug}/golden.npz" for entry in IMPLEMENTED} <= names
    assert {f"regularized/pages/{entry.slug}.md" for entry in load_catalogue() if entry.page} <= names
    assert "regularized/py.typed" in names
    assert any(name.endswith("licenses/LICENSE") for name in names)
    assert not [name for name in names if not name.startswith(("regularized/", "regularized-"))]


def test_no_link_of_the_description_leads_nowhere(wheel):
    """Fails when paths of the checkout are left in what an index shows, where nothing lies beside it."""
    with zipfile.ZipFile(wheel) as archive:
        (name,) = (name for name in archive.namelist() if name.endswith(".dist-info/METADATA"))
        description = Parser().parsestr(archive.read(name).decode()).get_payload()
    assert "what was measured" in description
    assert re.findall(r"\]\((?!https?:)", description) == []


def test_links_of_the_description_lead_into_the_tree():
    """With an address they are whole. Fails when one leads to a file that is not there, or a picture to its page."""
    spec = importlib.util.spec_from_file_location("hatch_build", ROOT / "hatch_build.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    readme = (ROOT / "README.md").read_text("utf-8")
    here = "https://example.org/regularized/blob/main"
    links = re.findall(rf"(!?)\[[^\]]*\]\({here}/([^)#?]+)(\?raw=true)?[^)]*\)", module.described(readme, here))
    assert len(links) == readme.count("](docs/") + readme.count("](constraints.txt)") > 10
    assert all((ROOT / path).is_file() for _, path, _ in links)
    assert all(bool(image) is bool(raw) for image, _, raw in links)


@pytest.fixture(scope="module")
def installed(wheel, tmp_path_factory) -> Path:
    """A fresh environment with the wheel, which borrows the other packages of this one."""
    folder = tmp_path_factory.mktemp("away")
    environment = folder / "venv"
    venv.create(environment, with_pip=False)
    packages = Path(sysconfig.get_path("purelib", "venv", vars={"base": str(environment)}))
    # A path in a .pth file is added as it is: the .pth files in there, which lead back to the checkout, are not read.
    (packages / "borrowed.pth").write_text(sysconfig.get_path("purelib") + "\n")
    options = ["--quiet", "--no-deps", "--no-index", "--ignore-installed", "--no-compile"]
    done = run(environment, "python", "-m", "pip", "install", *options, str(wheel))
    assert done.returncode == 0, done.stderr
    return environment


def run(environment: Path, *command: str) -> subprocess.CompletedProcess[str]:
    away = environment.parent
    clean = {
        name: value for name, value in os.environ.items() if not name.startswith(("PYTHON", "REGULARIZED", "VIRTUAL"))
    }
    clean |= {"HOME": str(away), "XDG_DATA_HOME": str(away / "data"), "OMP_NUM_THREADS": "1"}
    binaries = Path(sysconfig.get_path("scripts", "venv", vars={"base": str(environment)}))
    clean["PATH"] = f"{binaries}{os.pathsep}{clean.get('PATH', '')}"
    return subprocess.run(
        [str(binaries / command[0]), *command[1:]], cwd=away, env=clean, capture_output=True, text=True
    )


def test_papers_away_from_the_checkout(installed):
    """Fails when the catalogue needs a file that is in the checkout alone."""
    where = run(installed, "python", "-c", "import regularized; print(regularized.__file__)")
    assert where.stdout.startswith(str(installed)), where.stdout + where.stderr
    assert str(installed) in (installed / "bin" / "regularized").read_text().splitlines()[0]
    listed = run(installed, "regularized", "papers", "--json")
    assert listed.returncode == 0, listed.stderr
    papers = json.loads(listed.stdout)
    assert len(papers) == len(load_catalogue()) >= 44
    assert {paper["slug"] for paper in papers if paper["implemented"]} == {entry.slug for entry in IMPLEMENTED}
    verdicts = {claim["verdict"] for paper in papers for claim in paper["claims"]}
    assert (len(verdicts) > 1) is any(entry.ledger.is_file() for entry in IMPLEMENTED)


def test_what_an_installation_shows_and_refuses(installed):
    """Fails when the page of a technique is in the checkout alone, or files in site-packages are written into."""
    paper = IMPLEMENTED[0]
    page = run(installed, "regularized", "show", paper.slug, "--page")
    assert page.returncode == 0, page.stderr
    assert paper.page.splitlines()[0] in page.stdout
    assert "{{" not in page.stdout
    assert paper.usage in page.stdout
    for command in (["ledger", paper.slug], ["bench", paper.slug, "--save"]):
        refused = run(installed, "regularized", *command)
        assert refused.returncode == 4
        assert "this is an installed package" in refused.stderr


@pytest.mark.slow
def test_smoke_run_away_from_the_checkout(installed):
    """Fails when running, conforming or reporting needs a file that is in the checkout alone."""
    paper = IMPLEMENTED[0].slug
    conformed = run(installed, "regularized", "conform", paper, "--json")
    assert conformed.returncode == 0, conformed.stderr
    options = ["--scale", "smoke", "--seeds", "1", "--workers", "1", "--json"]
    done = run(installed, "regularized", "reproduce", paper, *options)
    assert done.returncode == 0, done.stderr
    result = json.loads(done.stdout)
    assert (result["slug"], result["scale"], result["seeds"], result["failures"]) == (paper, "smoke", 1, [])
    assert result["environment"]["commit"] == ""
    assert Path(result["report"]).is_file()
    assert Path(result["report"]).is_relative_to(installed.parent)


def test_constraints_pin_what_is_tested():
    """Fails when the constraints miss a dependency, or pin a torch that only one machine can get."""
    import re
    from importlib import metadata

    pins = dict(line.split("==") for line in (ROOT / "constraints.txt").read_text().splitlines() if "==" in line)
    assert pins["torch"] == "2.13.0"
    pinned = {re.sub(r"[-_.]+", "-", name).lower() for name in pins}
    required = {re.split(r"[^\w.-]", line, maxsplit=1)[0].lower() for line in metadata.requires("regularized") or []}
    assert {re.sub(r"[-_.]+", "-", name) for name in required} - {"regularized"} <= pinned
