"""The only place that prints: results and events, for people or as JSON.

Results go to stdout; progress, warnings and errors to stderr. JSON never passes through Rich.
"""

from __future__ import annotations

import codecs
import errno
import io
import json
import os
import sys
import textwrap
from functools import cached_property
from typing import TYPE_CHECKING, Any, TextIO

from mgpu.cli.result import Result, envelope
from mgpu.errors import Interrupted, MgpuError

if TYPE_CHECKING:
    from rich.console import Console, RenderableType

# Wide enough for every table; used where there is no terminal to ask.
_PIPE_COLUMNS = 100
# What is written where a terminal's encoding lacks a character.
_PLAIN = "mgpu-plain"
_LABEL = 9  # columns of "warning" and what else stands before a message
_PLAIN_WORDS = {
    "·": "-",
    "×": "x",
    "÷": "/",
    "−": "-",
    "●": "*",
    "…": "...",
    "━": "=",
    "─": "-",
    "°": " ",
    "≥": ">=",
    "≤": "<=",
    "→": "->",
    "–": "-",
    "µ": "u",
}


def _plainly(error: UnicodeError) -> tuple[str, int]:
    assert isinstance(error, UnicodeEncodeError)
    return "".join(_PLAIN_WORDS.get(character, "?") for character in error.object[error.start : error.end]), error.end


codecs.register_error(_PLAIN, _plainly)


class Output:
    """Where a command's words go. `as_json` is known before any option is parsed."""

    def __init__(self, *, as_json: bool) -> None:
        self.as_json = as_json
        # A closed stream is no stream at all, and what a terminal's encoding lacks is shown as `?`.
        sys.stdout = self._usable(sys.stdout)
        sys.stderr = self._usable(sys.stderr)
        self._consoles: dict[bool, Console] = {}

    @staticmethod
    def nowhere() -> TextIO:
        """Return a stream that swallows everything."""
        return open(os.devnull, "w", encoding="utf-8")  # noqa: PTH123 - open until the program ends

    @classmethod
    def _usable(cls, stream: TextIO | None) -> TextIO:
        if stream is None:
            return cls.nowhere()
        if isinstance(stream, io.TextIOWrapper) and (stream.encoding or "").lower() not in ("utf-8", "utf8"):
            stream.reconfigure(errors=_PLAIN)
        return stream

    def console(self, *, error: bool = False) -> Console:
        """Return the Rich console of stdout or stderr; colours follow the terminal and NO_COLOR."""
        if error not in self._consoles:
            from rich.console import Console

            class OwnConsole(Console):
                @cached_property
                def is_terminal(self) -> bool:
                    # Found out once: Rich draws nothing on what is none, and one that is closed must raise.
                    return super().is_terminal

                def on_broken_pipe(self) -> None:
                    raise BrokenPipeError(errno.EPIPE, "nobody reads")

            stream = sys.stderr if error else sys.stdout
            width = None if stream.isatty() or os.environ.get("COLUMNS") else _PIPE_COLUMNS
            self._consoles[error] = OwnConsole(file=stream, highlight=False, width=width, emoji=False, markup=False)
        return self._consoles[error]

    def redraws(self, *, error: bool = False) -> bool:
        """Whether lines can be drawn over: on a terminal that can move its cursor, and not under --json."""
        if self.as_json:
            return False
        console = self.console(error=error)
        return console.is_terminal and not console.is_dumb_terminal

    def show(self, result: Result) -> None:
        """Print a finished command's result."""
        if self.as_json:
            self.json_line(envelope(result), indent=2 if sys.stdout.isatty() else None)
            return
        for warning in result.warnings:
            self.warn(warning)
        console = self.console()
        for part in result.screen(console.width):
            self.lines(part)
        for error in () if result.told else result.errors:
            self.error(error)

    def json_line(self, data: dict[str, Any], *, indent: int | None = None) -> None:
        """Print one JSON object, on one line unless `indent` is given."""
        # Only UTF-8 carries every name and path as it is.
        utf8 = (sys.stdout.encoding or "").lower().replace("-", "") == "utf8"
        sys.stdout.write(json.dumps(data, indent=indent, ensure_ascii=not utf8, allow_nan=False) + "\n")
        sys.stdout.flush()

    def lines(self, part: RenderableType, *, error: bool = False) -> None:
        """Print one part of a screen; tables fit the terminal, lines of text are left to it."""
        from rich.table import Table

        console = self.console(error=error)
        if isinstance(part, Table) and not console.is_terminal:  # who reads a pipe wants no blanks at the ends
            with console.capture() as captured:
                console.print(part)
            written = "\n".join(line.rstrip() for line in captured.get().splitlines())
            self.write_text(f"{written}\n", error=error)
            return
        console.print(part, soft_wrap=not isinstance(part, Table))

    def note(self, text: str) -> None:
        """Print one line of progress to stderr; nothing under --json."""
        if not self.as_json:
            self.console(error=True).print(text, soft_wrap=True)

    def warn(self, text: str) -> None:
        """Print one warning to stderr; under --json warnings are in the result."""
        if not self.as_json:
            self._labelled("warning", text, "yellow")

    def error(self, error: MgpuError) -> None:
        """Print what happened and the next command to type, to stderr."""
        if isinstance(error, Interrupted):
            return  # the user knows, and has seen what was stopped
        first, *rest = error.message.splitlines() or [""]
        self._labelled("error", first, "bold red")
        for line in rest:
            self.console(error=True).print(f"         {line}", soft_wrap=True)
        if error.hint:
            self._labelled("next", error.hint, "bold")
        reference = getattr(error, "log_reference", None)
        if reference:
            self._labelled("log", reference, "dim")

    def write_text(self, text: str, *, error: bool = False) -> None:
        """Write a piece of text as it is, without a line end: an answer that is being streamed."""
        stream = sys.stderr if error else sys.stdout
        stream.write(text)
        stream.flush()

    def agrees(self, question: str) -> bool:
        """Ask on the terminal, and return whether the answer is yes; what is no yes, the end of the input too, is a no.

        Raises KeyboardInterrupt for Ctrl-C. `input()` would make a SystemError of it where a second signal, such as
        that of `Interrupts.recover_lost`, comes before Python has heard of the first.
        """
        self.write_text(f"{question} [y/N] ", error=True)
        return sys.stdin.readline().strip().lower() in ("y", "yes")

    def _labelled(self, label: str, text: str, style: str) -> None:
        from rich.text import Text

        console = self.console(error=True)
        # On a terminal below one another; where a program reads, and for commands to copy, as one line.
        wraps = console.is_terminal and label != "next"
        width = max(console.width - _LABEL, 20)
        lines = textwrap.wrap(text, width, break_long_words=False, break_on_hyphens=False) if wraps else [text]
        for place, line in enumerate(lines or [""]):
            console.print(Text.assemble((f"{'' if place else label:<{_LABEL - 1}} ", style), line), soft_wrap=True)
