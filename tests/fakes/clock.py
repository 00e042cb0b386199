"""A wall clock that a test sets, for real programs: clock.c, preloaded."""

from __future__ import annotations

import subprocess
from pathlib import Path

SOURCE = Path(__file__).with_name("clock.c")


class FakeClock:
    """Puts the wall clock of the programs that are started with its `environment` forward or back; built with gcc."""

    def __init__(self, folder: Path) -> None:
        folder.mkdir(parents=True, exist_ok=True)
        library = folder / "clock.so"
        subprocess.run(["gcc", "-O1", "-Wall", "-fPIC", "-shared", "-o", str(library), str(SOURCE)], check=True)
        self._ahead = folder / "ahead"
        self.jump(0)
        self.environment = {"LD_PRELOAD": str(library), "FAKE_CLOCK": str(self._ahead)}

    def jump(self, seconds: int) -> None:
        """Be so many seconds ahead of the true time from now on."""
        # In one piece: programs read it all the while.
        new = self._ahead.with_suffix(".new")
        new.write_text(str(seconds))
        new.replace(self._ahead)
