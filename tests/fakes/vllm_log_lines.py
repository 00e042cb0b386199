"""How vLLM logs: every process puts its name in front, and ends of its processes are told as they were recorded.

Tracebacks are replayed from `tests/data/logs/vllm`, with the pids, the times and the decisive line of this run.
"""

from __future__ import annotations

import os
import re
import sys
import time
from collections.abc import Mapping
from pathlib import Path

RECORDED = Path(__file__).parent.parent / "data" / "logs" / "vllm"
_PREFIX = re.compile(
    r"\((?P<process>\w+) pid=\d+\) (?:(?P<level>[A-Z]+) \d\d-\d\d \d\d:\d\d:\d\d (?P<where>\[\S+\]) ?)?(?P<text>.*)"
)
_LOGO: tuple[str, ...] = ("", "       █     █     █▄   ▄█", " ▄▄ ▄█ █     █     █ ▀▄▀ █  version {version}")
_LOGO += ("  █▄█▀ █     █     █     █  model   {model}", "   ▀▀  ▀▀▀▀▀ ▀▀▀▀▀ ▀     ▀", "")


class Log:
    """What one process writes, each call in one piece: log lines to standard output, all else to standard error."""

    def __init__(self, process: str) -> None:
        self.process = process

    def info(self, where: str, text: str) -> None:
        self._log("INFO", f"[{where}]", text)

    def warning(self, where: str, text: str) -> None:
        self._log("WARNING", f"[{where}]", text)

    def error(self, where: str, text: str) -> None:
        self._log("ERROR", f"[{where}]", text)

    def logo(self, version: str, model: str) -> None:
        for line in _LOGO:
            self.info("api_utils.py:347", line.format(version=version, model=model))

    def plain(self, text: str) -> None:
        """A line that is no log line: what a library prints, a progress bar, the web server."""
        _write(2, text + "\n")

    def replay(
        self, name: str, first: str, last: str = "", *, of: str | None, instead: Mapping[str, str] | None = None
    ) -> None:
        """Write again what the processes whose names begin with `of` (None: the lines without a name) wrote in the
        recording `name`, from the first line that matches `first` to the next that matches `last` (default: the
        end). `instead` has patterns, and what to write for what they match."""
        lines: list[str] = []
        for line in _between((RECORDED / f"{name}.log").read_text(encoding="utf-8").splitlines(), first, last):
            match = _PREFIX.match(line)
            if (match is None) != (of is None) or (match and not match["process"].startswith(of or "")):
                continue
            text = match["text"] if match else line
            for pattern, new in (instead or {}).items():
                text = re.sub(pattern, lambda _, new=new: new, text)
            lines.append(self._line(match["level"], match["where"], text) if match else text)
        _write(1 if of else 2, "".join(line + "\n" for line in lines))

    def _log(self, level: str, where: str, text: str) -> None:
        _write(1, self._line(level, where, text) + "\n")

    def _line(self, level: str, where: str, text: str) -> str:
        return f"({self.process} pid={os.getpid()}) {level} {time.strftime('%m-%d %H:%M:%S')} {where} {text}"


def leaked(what: str, count: int) -> str:
    """The warning with which Python's resource tracker ends."""
    where = f"{Path(os.__file__).parent}/multiprocessing/resource_tracker.py:254"
    what = f"There appear to be {count} leaked {what} objects to clean up at shutdown"
    warn = "  warnings.warn('resource_tracker: There appear to be %d '"
    return f"{where}: UserWarning: resource_tracker: {what}\n{warn}"


def _between(lines: list[str], first: str, last: str) -> list[str]:
    begin = next(number for number, line in enumerate(lines) if re.search(first, line))
    if not last:
        return lines[begin:]
    end = next(number for number in range(begin, len(lines)) if re.search(last, lines[number]))
    return lines[begin : end + 1]


def _write(descriptor: int, text: str) -> None:
    try:
        os.write(descriptor, text.encode(errors="replace"))
    except OSError:  # whoever read it has gone
        sys.exit(1)
