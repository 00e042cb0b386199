"""The `mgpu` program, and `python -m mgpu`."""

from __future__ import annotations

import sys


def main() -> None:
    """Run mgpu; a Ctrl-C while it is still being imported is no reason for a traceback."""
    try:
        from mgpu.cli.main import run_main
    except KeyboardInterrupt:
        sys.exit(130)
    run_main()


if __name__ == "__main__":
    main()
