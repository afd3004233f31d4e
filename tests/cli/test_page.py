"""``regularized show SLUG --page``: the documentation of a technique without a network."""

import json
import re

import pytest
from typer.testing import CliRunner

from regularized.cli.app import app
from regularized.cli.page import filled_in
from regularized.papers.catalogue import load_catalogue

PAGED = [entry for entry in load_catalogue() if entry.page]
WITHOUT = [entry for entry in load_catalogue() if not entry.page]


def call(*arguments: str):
    return CliRunner().invoke(app, arguments, prog_name="regularized")


@pytest.mark.parametrize("entry", PAGED, ids=lambda entry: entry.slug)
def test_a_page_needs_no_other_file(entry):
    """Fails when a marker, or a link that leads to a file of the documentation, is left in what is printed."""
    text = filled_in(entry)
    assert "{{" not in text
    prose = re.sub(r"^```.*?^```$|`[^`\n]+`", "", text, flags=re.MULTILINE | re.DOTALL)
    assert all(target.startswith("http") for target in re.findall(r"\]\(([^)]*)\)", prose))
    assert not re.search(r"\]\[regularized", prose)
    assert entry.usage in text
    if entry.outcomes:
        assert entry.outcomes[0].claim.statement in text


def test_the_command():
    """Fails when the page is not what is printed, JSON is not JSON, or a paper without a page gives a traceback."""
    entry = PAGED[0]
    shown = call("show", entry.slug, "--page")
    assert (shown.exit_code, shown.stdout) == (0, filled_in(entry))
    assert json.loads(call("show", entry.slug, "--page", "--json").stdout) == {"slug": entry.slug, "page": shown.stdout}
    for without in WITHOUT[:1]:
        assert call("show", without.slug, "--page").exit_code == 3
