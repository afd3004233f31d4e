"""``python -m regularized``: the command line, for where no script is on the path."""

from regularized.cli.__main__ import main

if __name__ == "__main__":
    main()
