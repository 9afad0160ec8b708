"""The command `adaptive-optax`, also as `python -m adaptive_optax`."""

from __future__ import annotations

import sys


def main() -> None:
    """Runs the command line, or says in a sentence which package is missing."""
    try:
        from adaptive_optax.study.cli import main as run
    except ImportError as error:
        sys.exit(f"adaptive-optax: {error}")
    run()


if __name__ == "__main__":
    main()
