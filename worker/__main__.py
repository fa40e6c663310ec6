"""`python -m worker` and the installed command `tokenmill`."""

import sys

from worker.cli import main as run


def main() -> None:
    """Ends the process with the command's exit code."""
    sys.exit(run())


if __name__ == "__main__":
    main()
