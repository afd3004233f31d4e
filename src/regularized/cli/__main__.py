"""Entry point of the command ``regularized`` and of ``python -m regularized.cli``."""

import os
import sys
from io import TextIOWrapper

from regularized.cli.app import app
from regularized.cli.errors import Exit
from regularized.cli.output import Output, OutputError, note

__all__ = ["main"]


def main() -> None:
    """Run the command line; the process ends with its exit code."""
    has_output = sys.stdout is not None
    _open_what_is_closed()
    if not has_output:
        note("error: standard output is closed; send it to /dev/null where it is not wanted")
        sys.exit(int(Exit.FAILED))
    if isinstance(sys.stdout, TextIOWrapper):
        sys.stdout = Output(sys.stdout)
    try:
        try:
            app(prog_name="regularized")
        finally:
            sys.stdout.flush()
    except OutputError as error:
        # Python would complain once more when it flushes at exit.
        os.dup2(os.open(os.devnull, os.O_WRONLY), 1)
        if error.is_closed_pipe:  # a reader that has seen enough, as of `| head`
            sys.exit(int(Exit.OK))
        note(f"error: {error}")
        sys.exit(int(Exit.FAILED))


def _open_what_is_closed() -> None:
    """Give streams that the caller has closed a file that swallows everything.

    Otherwise the next file to be opened gets their number, and what is printed is written into it.
    """
    while (descriptor := os.open(os.devnull, os.O_RDWR)) <= 2:
        os.set_inheritable(descriptor, True)
    os.close(descriptor)
    sys.stdin = sys.stdin or os.fdopen(0, encoding="utf-8")
    sys.stdout = sys.stdout or os.fdopen(1, "w", encoding="utf-8")
    sys.stderr = sys.stderr or os.fdopen(2, "w", encoding="utf-8")


if __name__ == "__main__":
    main()
