"""Entry point of the command ``regularized`` and of ``python -m regularized.cli``."""

from regularized.cli.app import app

__all__ = ["main"]


def main() -> None:
    """Run the command line; the process ends with its exit code."""
    app(prog_name="regularized")


if __name__ == "__main__":
    main()
