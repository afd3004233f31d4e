"""The API against its own description: schemathesis sends what the description allows, and what it does not."""

import shutil

import pytest
from hypothesis import HealthCheck, given, settings
from tests.site.helpers import settings_in

from regularized.site.app import create_app
from regularized.site.database import open_database
from regularized.site.mail import Mailer
from regularized.site.state import Site
from regularized.site.templating import environment

schemathesis = pytest.importorskip("schemathesis", reason="needs schemathesis")


@pytest.fixture(scope="module")
def description(filled, tmp_path_factory):
    """The description of a running API."""
    folder = tmp_path_factory.mktemp("contract")
    shutil.copy(filled, folder / "site.sqlite")
    found = settings_in(folder)
    engine = open_database(found.database)
    site = Site(found, engine, environment(), Mailer(found), None)
    yield schemathesis.openapi.from_asgi("/api/openapi.json", create_app(site))
    engine.dispose()


MODES = schemathesis.GenerationMode
WITHOUT_PARAMETERS = [f"/api/v1/{name}" for name in ("families", "leaders", "changes", "totals")]
PAPERS = "/api/v1/papers"
PATHS = [PAPERS, f"{PAPERS}/{{slug}}", f"{PAPERS}/{{slug}}/comments", f"{PAPERS}/{{slug}}/plots"]
PATHS += ["/api/v1/verdict-changes", *WITHOUT_PARAMETERS]


# What has no parameters cannot be asked wrongly. Not by the plugin's own decorator: it needs an older pytest.
@pytest.mark.parametrize(
    ("path", "mode"),
    [(path, mode) for path in PATHS for mode in MODES if mode is MODES.POSITIVE or path not in WITHOUT_PARAMETERS],
)
def test_answers_are_as_described(description, path, mode):
    """Fails on a server error, an undocumented status, type or body, or a wrong request that passes."""
    assert set(description.raw_schema["paths"]) == set(PATHS)
    operation = description[path]["GET"]
    assert bool(list(operation.iter_parameters())) == (path not in WITHOUT_PARAMETERS)

    @given(case=operation.as_strategy(generation_mode=mode))
    @settings(max_examples=25, suppress_health_check=list(HealthCheck))
    def check(case):
        case.call_and_validate()

    check()
