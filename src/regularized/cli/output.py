"""What a command prints: JSON for scripts, a table in a terminal, tab-separated values in a pipe.

Standard output carries the result alone; progress, notes and errors go to standard error.
"""

import codecs
import json
import math
import re
import sys
import unicodedata
from collections.abc import Iterable, Mapping, Sequence
from io import TextIOWrapper
from typing import TYPE_CHECKING, Any, Literal

if TYPE_CHECKING:
    from rich.console import Console

__all__ = ["Output", "OutputError", "console", "emit_json", "emit_table", "in_terminal", "note"]


SPELLED_OUT = "regularized.spelled_out"
"""Name of the error handler by which a character that the terminal lacks is written in letters that it has."""

_SIGNS = {"−": "-", "–": "-", "·": "*", "×": "x", "‖": "||", "²": "^2", "ᵀ": "^T", "±": "+-", "∝": "~", "…": "..."}
_SIGNS |= {"⟨": "<", "⟩": ">", "’": "'", "“": '"', "”": '"', "→": "->", "≥": ">=", "≤": "<=", "≈": "~", "ß": "ss"}


def _spell_out(error: UnicodeError) -> tuple[str, int]:
    """Greek letters by name, signs by what is typed for them, accents left out, and the rest as an escape."""
    assert isinstance(error, UnicodeEncodeError)
    return "".join(map(_in_ascii, error.object[error.start : error.end])), error.end


def _in_ascii(character: str) -> str:
    name = unicodedata.name(character, "")
    if (found := re.fullmatch(r"GREEK (SMALL|CAPITAL) LETTER (?:FINAL )?(\w+)(?: SYMBOL)?", name)) is not None:
        letter = found[2].replace("LAMDA", "LAMBDA")  # Unicode's spelling
        return letter.lower() if found[1] == "SMALL" else letter.capitalize()
    if name.startswith("BOX DRAWINGS"):
        return "|" if "VERTICAL" in name and "HORIZONTAL" not in name else "-"
    plain = unicodedata.normalize("NFKD", character).encode("ascii", "ignore").decode()
    escape = character.encode("ascii", "backslashreplace").decode()
    return _SIGNS.get(character) or plain or ("" if unicodedata.combining(character) else escape)


codecs.register_error(SPELLED_OUT, _spell_out)


class OutputError(Exception):
    """Standard output cannot be written.

    Args:
        cause: what the system says.
    """

    def __init__(self, cause: OSError) -> None:
        super().__init__(f"cannot write to standard output: {cause.strerror}")
        self.is_closed_pipe: bool = isinstance(cause, BrokenPipeError)


class Output(TextIOWrapper):
    """Standard output whose errors are told from those of other files; no character is beyond it.

    Args:
        stream: standard output as it was, which must not be used any more.
    """

    def __init__(self, stream: TextIOWrapper) -> None:
        buffering, through, encoding = stream.line_buffering, stream.write_through, stream.encoding
        super().__init__(stream.detach(), encoding, SPELLED_OUT, line_buffering=buffering, write_through=through)

    def write(self, text: str, /) -> int:
        """As of any text file, but for the kind of the error."""
        try:
            return super().write(text)
        except OSError as error:
            raise OutputError(error) from error

    def flush(self) -> None:
        """As of any text file, but for the kind of the error."""
        try:
            super().flush()
        except OSError as error:
            raise OutputError(error) from error


def in_terminal() -> bool:
    """Whether a person reads standard output."""
    return sys.stdout.isatty()


def console() -> "Console":
    """Console of standard output; wide and without colours in a pipe."""
    from rich.console import Console

    return Console(highlight=False, width=None if in_terminal() else 120)


def note(text: str) -> None:
    """Say something beside the result, on standard error."""
    print(text, file=sys.stderr, flush=True)


def emit_json(value: object) -> None:
    """Print plain data as JSON; numbers that JSON lacks (nan, infinities) become null.

    Examples:
        >>> emit_json({"ratio": float("inf"), "title": "a"})
        {
          "ratio": null,
          "title": "a"
        }
    """
    utf8 = codecs.lookup(sys.stdout.encoding or "ascii").name == "utf-8"
    text = json.dumps(_finite(value), indent=2, ensure_ascii=not utf8, allow_nan=False)
    # Half a surrogate pair, from an odd file name, becomes an escape, which JSON reads as the same.
    print(text.encode("utf-8", "backslashreplace").decode(), flush=True)


def emit_table(columns: Sequence[str], rows: Iterable[Sequence[object]], *, title: str = "") -> None:
    """Print a table, or tab-separated values with a header line where no person reads.

    Args:
        columns: headings; one that ends in ``">"`` is aligned to the right.
        rows: cells; None is shown as nothing.
        title: heading of the table, shown in a terminal only.

    Examples:
        >>> emit_table(["slug", "ratio>"], [["a", 1.5], ["b", None]])  # doctest: +NORMALIZE_WHITESPACE
        slug ratio
        a 1.5
        b
    """
    names = [column.removesuffix(">") for column in columns]
    if not in_terminal():
        for row in [names, *rows]:
            print("\t".join(" ".join(_cell(value).split()) for value in row))
        sys.stdout.flush()
        return
    from regularized.evidence.numbers import NARROW

    cells = [[_cell(value) for value in row] for row in rows]
    out = console()
    wide = sum(max(map(len, column)) + 2 for column in zip(names, *cells))
    if out.width < NARROW and wide > out.width:
        _print_blocks(names, cells, title, out)
        return
    from rich.box import SIMPLE_HEAD
    from rich.table import Table
    from rich.text import Text

    table = Table(title=title or None, title_justify="left", box=SIMPLE_HEAD, pad_edge=False)
    for column, name in zip(columns, names, strict=True):
        # Names are to be copied: what folds is the text beside them.
        is_name = name in ("slug", "claim", "arm")
        justify: Literal["right", "left"] = "right" if column.endswith(">") else "left"
        table.add_column(name, justify=justify, overflow="fold", no_wrap=is_name)
    for row in cells:
        table.add_row(*map(Text, row))
    out.print(table)


def _print_blocks(names: Sequence[str], rows: Iterable[Sequence[str]], title: str, out: "Console") -> None:
    """Each row as a block of lines, for a terminal in which the columns of a table would hold a word each."""
    from rich.padding import Padding
    from rich.text import Text

    if title:
        out.print(Text(title, style="italic"))
    for first, *others in rows:
        out.print(Text(first, style="bold"), soft_wrap=True)
        for name, text in zip(names[1:], others, strict=True):
            if text:
                out.print(Padding(Text(f"{name}: ", style="dim").append(text, style="not dim"), (0, 0, 0, 2)))


def _cell(value: object) -> str:
    if value is None:
        return ""
    if isinstance(value, bool):
        return "yes" if value else "no"
    return f"{value:.4g}" if isinstance(value, float) else str(value)


def _finite(value: Any) -> Any:
    if isinstance(value, Mapping):
        return {name: _finite(inner) for name, inner in value.items()}
    if isinstance(value, list | tuple):
        return [_finite(inner) for inner in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value
