"""The `mgpu` program, and `python -m mgpu`."""

from __future__ import annotations

import os
import signal

_INTERRUPTED = 130  # the exit code of `mgpu.errors.Interrupted`, which is not imported yet


def main() -> None:
    """Run mgpu; a Ctrl-C while it is still being imported ends it silently, as later ones do."""
    # An exception in the middle of an import may be swallowed or printed by whatever is imported: leave at once.
    heard = signal.getsignal(signal.SIGINT) is signal.default_int_handler
    if heard:
        signal.signal(signal.SIGINT, _leave)
    from mgpu.cli.main import run_main

    try:
        if heard:
            signal.signal(signal.SIGINT, signal.default_int_handler)
        run_main()
    except KeyboardInterrupt:  # before run_main listens itself
        os._exit(_INTERRUPTED)


def _leave(*_: object) -> None:
    os._exit(_INTERRUPTED)


if __name__ == "__main__":
    main()
