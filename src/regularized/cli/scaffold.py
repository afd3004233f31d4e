"""``regularized new-paper``: the files of a new paper, to be filled in.

They are a working example (a penalty on confident predictions), so that everything can be run from the first minute.
What the paper must say instead is marked; the generated test fails with the list of these marks until none is left, and
the card is refused while it has one.
"""

import keyword
import re
from pathlib import Path
from string import Template

from regularized.cli.errors import CommandError, Exit
from regularized.papers.card import FAMILIES, MARK, RESERVED

__all__ = ["lay_out"]

_TEMPLATES = Path(__file__).parent / "new_paper"


def lay_out(slug: str, *, family: str, title: str, checkout: Path) -> list[Path]:
    """Write the files of a new paper.

    Args:
        slug: short name.
        family: problem family, the folder of the technique.
        title: exact title; empty leaves it to be filled in.
        checkout: root of the checkout.

    Returns:
        The files, the test last.

    Raises:
        CommandError: slug, family or title is not allowed, this is no checkout, or a file is there already; nothing is
            written then.
    """
    if not re.fullmatch(r"[a-z][a-z0-9]*(_[a-z0-9]+)*", slug) or keyword.iskeyword(slug) or slug in RESERVED:
        raise CommandError(
            f"SLUG must be lower-case letters and digits, words joined by underscores, such as early_stopping, and no "
            f"word of Python or of the commands; got {slug!r}",
            Exit.USAGE,
        )
    if family not in FAMILIES:
        raise CommandError(f"there is no family {family!r}; families: {', '.join(FAMILIES)}", Exit.USAGE)
    if not title.isprintable():
        raise CommandError(f"--title must be one line of printable characters; got {title!r}", Exit.USAGE)
    source = checkout / "src" / "regularized"
    if not (source / "papers").is_dir():
        raise CommandError(
            f"{checkout.absolute()} is no checkout of regularized: it has no src/regularized/papers. Go to its root, "
            "or give it with --checkout",
            Exit.NOT_FOUND,
        )
    folder = source / "papers" / slug
    files = {
        folder / "__init__.py": "package.py",
        folder / "card.toml": "card.toml",
        folder / "abstract.toml": "abstract.toml",
        folder / "experiment.py": "experiment.py",
        folder / "conformance.py": "conformance.py",
        folder / "bench.py": "bench.py",
        folder / "contract.py": "contract.py",
        folder / "recipe.py": "recipe.py",
        source / family / f"{slug}.py": "technique.py",
        checkout / "docs" / "techniques" / f"{slug}.md": "page.md",
        checkout / "tests" / family / f"test_{slug}.py": "test.py",
    }
    if there := [str(path) for path in files if path.exists()]:
        raise CommandError(f"there is such a paper already, nothing was written: {', '.join(there)}", Exit.USAGE)
    # Both a docstring and a TOML string end at a quotation mark, and both read a backslash as an escape.
    quoted = (title or f"{MARK}: the exact title").replace("\\", "\\\\").replace('"', '\\"')
    words = {
        "slug": slug,
        "family": family,
        "name": "".join(word.capitalize() for word in slug.split("_")),
        "quoted_title": quoted,
        "mark": MARK,
    }
    home = source / family / "__init__.py"
    if not home.exists():
        home.parent.mkdir(parents=True, exist_ok=True)
        home.write_text(f'"""Techniques for {FAMILIES[family]}."""\n', encoding="utf-8")
    for path, template in files.items():
        text = Template((_TEMPLATES / f"{template}.txt").read_text(encoding="utf-8")).substitute(words)
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(_IMPORTS.sub(_in_order, text), encoding="utf-8")
    return list(files)


# Where the import of the technique belongs depends on the name of its family.
_IMPORTS = re.compile(r"(?:^from regularized\.\S+ import .*\n)+", re.MULTILINE)


def _in_order(block: re.Match[str]) -> str:
    return "".join(sorted(block.group().splitlines(keepends=True)))
