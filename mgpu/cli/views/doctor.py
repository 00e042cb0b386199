"""The doctor's screens: a line an area when all is well, evidence and a fix for what is not; the checks' own words."""

from __future__ import annotations

import re
import textwrap
from collections.abc import Iterable, Iterator, Sequence
from typing import TYPE_CHECKING

from mgpu import __version__
from mgpu.cli.views.doctor_areas import NOTHING, area_line, header, judged_for
from mgpu.cli.views.doctor_joined import joined
from mgpu.cli.views.words import plain_table
from mgpu.doctor.check import Area, Check, Finding, Severity
from mgpu.doctor.facts import named
from mgpu.doctor.fixes import remedies
from mgpu.doctor.report import Report
from mgpu.units import seconds

if TYPE_CHECKING:
    from rich.console import RenderableType
    from rich.text import Text

_WIDEST = 100
_AREA_COLUMNS = 11
_LABEL_COLUMNS = 16
_MOST_EVIDENCE = 4
_MOST_REASONS = 4
_PROOF = "p2p-proof"
# The kinds of paths between cards, in words.
_KINDS = {
    "PIX": "one switch",
    "PXB": "several switches",
    "PHB": "same host bridge",
    "NODE": "same processor",
    "SYS": "across sockets",
}
# Where a note does not say what the cards are.
_FACTS_BESIDE_NOTES = (Area.driver, Area.gpus, Area.pcie)
# Symbol, its word where symbols cannot be shown, and its colour. Information is never coloured.
_MARKS = {
    "ok": ("[✓]", "ok  ", "green"),
    "warn": ("[!]", "WARN", "bold yellow"),
    "fail": ("[✗]", "FAIL", "bold red"),
    "info": ("[i]", "info", ""),
    "skip": ("[-]", "skip", "dim"),
}
# What a fix begins with when it is a command; everything else is a step for people, and may be wrapped as prose.
_COMMAND = re.compile(
    r"(sudo|echo|export|unset|docker|nvidia-smi|nvidia-ctk|mgpu|rm|pip|kill|numactl|systemctl|wsl|apt|vllm|ollama|cd"
    r"|modprobe|setpci|journalctl|lspci|cat|ls|fuser|df|du|free|grep|mkdir|mv|cp|dmesg|rocm-smi|[A-Z][A-Z0-9_]+=\S*)\b"
)


def doctor_screen(report: Report, width: int, *, symbols: bool, verbose: bool) -> Iterator[RenderableType]:
    """Yield the diagnosis, at most 100 columns wide. Without `symbols` marks are words."""
    screen = _Screen(report, min(width, _WIDEST), symbols=symbols, verbose=verbose)
    yield from screen.heading()
    for area in Area:
        yield from screen.area(area)
    yield from screen.skipped()
    yield from screen.fixes()
    yield from screen.closing()


def list_screen(checks: Sequence[Check], width: int) -> Iterator[RenderableType]:
    """Yield the table of all checks."""
    wide = width >= 84
    headings = ["check", "area", "tier", "root", "finds"] if wide else ["check", "finds"]
    table = plain_table([(heading, "left") for heading in headings])
    for each in checks:
        middle = (each.area.value, each.tier, "yes" if each.needs_root else "") if wide else ()
        table.add_row(each.id, *middle, each.title)
    yield table
    yield ""
    yield "  mgpu doctor --explain CHECK says how it is read, the rule, why, and what to do"


def explain_screen(checks: Sequence[Check], width: int) -> Iterator[RenderableType]:
    """Yield what there is to know of each check."""
    from rich.text import Text

    for position, each in enumerate(checks):
        if position:
            yield ""
        yield Text.assemble((each.id, "bold"), f"   {each.area.value}, tier {each.tier}")
        for paragraph in each.explanation.split("\n\n"):
            yield ""
            yield from _paragraph(paragraph, min(width, _WIDEST))


def _paragraph(text: str, width: int) -> Iterator[str]:
    """A paragraph with a line of its own for each of its labels ("Rule: ...")."""
    joined = re.sub(r"\n(?=[A-Z][\w ]{1,20}: )", "\0", text).replace("\n", " ")
    for part in joined.split("\0"):
        hanging = "  " if re.match(r"[A-Z][\w ]{1,20}: ", part) else ""
        yield from _wrapped(part, width, hanging=hanging)


class _Screen:
    def __init__(self, report: Report, width: int, *, symbols: bool, verbose: bool) -> None:
        self.report, self.width, self.verbose = report, width, verbose
        self.symbols = symbols
        self.indent = (4 if symbols else 5) + _AREA_COLUMNS + 1

    def heading(self) -> Iterator[RenderableType]:
        words = _printable(header(self.report, __version__))
        # What is replayed took no time that says anything.
        time = "" if self.report.replayed else seconds(self.report.seconds)
        space = self.width - len(words) - len(time)
        if time and space > 0:
            yield words + " " * space + time
        else:
            yield from _wrapped(" · ".join(part for part in (words, time) if part), self.width)
        if purpose := judged_for(self.report):
            yield from _wrapped(purpose, self.width)

    def area(self, area: Area) -> Iterator[RenderableType]:
        """The findings of an area, or what is there; nothing for an area that nobody asked for or that is not here."""
        ids = [check.id for check in self.report.checks if check.area is area]
        findings = [finding for finding in self.report.diagnosis.findings if finding.id in ids]
        skipped = {skip.id for skip in self.report.diagnosis.skipped if skip.id in ids}
        line = area_line(area, self.report) if ids else None
        name: str = area.value
        bad = any(finding.severity is not Severity.info for finding in findings)
        told = bool(findings) and (line in NOTHING or not (self.verbose or area in _FACTS_BESIDE_NOTES))
        if line is not None and not bad and not told:
            unseen = skipped.issuperset(ids) or not self.is_here(area)
            mark = "info" if line in NOTHING else "skip" if unseen else "ok"
            yield from self.line(mark, name, line)
            name = ""
        for finding in joined(findings):
            yield from self.finding(name, finding)
            name = ""
        well = [check_id for check_id in ids if check_id in self.report.diagnosis.well]
        if self.verbose and well:
            yield from _wrapped(
                f"      {'ok':<{_LABEL_COLUMNS - 6}}{', '.join(well)}", self.width, " " * _LABEL_COLUMNS
            )

    def is_here(self, area: Area) -> bool:
        """Whether there is anything of an area that can be well."""
        if area is Area.gpus and not self.report.inspection.machine.gpus:
            return False
        return area_line(area, self.report) not in (None, *NOTHING)

    def line(self, mark: str, name: str, words: str | Text, style: str = "") -> Iterator[Text]:
        from rich.text import Text

        symbol, word, colour = _MARKS[mark]
        first, *more = _wrapped(str(words), self.width - self.indent) or [""]
        start = f"{symbol if self.symbols else word} "
        yield Text.assemble((start, colour), f"{name:<{_AREA_COLUMNS}} ", (first, style))
        for text in more:
            yield Text.assemble(" " * self.indent, (text, style))

    def finding(self, name: str, finding: Finding) -> Iterator[RenderableType]:
        yield from self.line(finding.severity.value, name, f"{finding.id}: {finding.summary}")
        if finding.severity is Severity.info and not self.verbose:
            return
        shown = finding.evidence if self.verbose else finding.evidence[:_MOST_EVIDENCE]
        for evidence in shown:
            yield from self.labelled("seen", f"{evidence.path} = {evidence.value}")
        if len(finding.evidence) > len(shown):
            yield from self.labelled("", f"and {len(finding.evidence) - len(shown)} more: -v")
        for position, step in enumerate(finding.fix):
            yield from self.labelled("" if position else "fix", step)
        yield from self.labelled("why", f"mgpu doctor --explain {finding.id}")

    def labelled(self, label: str, words: str) -> Iterator[RenderableType]:
        from rich.text import Text

        room = self.width - _LABEL_COLUMNS
        lines = _command_lines(_printable(words), room) if _COMMAND.match(words) else _wrapped(words, room)
        for position, text in enumerate(lines):
            yield Text.assemble(f"      {'' if position else label:<{_LABEL_COLUMNS - 6}}", text)

    def skipped(self) -> Iterator[RenderableType]:
        """What could not be looked at, said once for each reason; what root could look at, with the command for it."""
        name = "Skipped"
        skips = self.report.diagnosis.skipped
        for_root = list(dict.fromkeys(skip.id for skip in skips if skip.needs_root))
        by_reason: dict[str, list[str]] = {}
        for skip in skips:
            if not skip.needs_root or self.report.root or self.verbose:
                by_reason.setdefault(skip.reason, []).append(skip.id)
        if for_root and not self.report.root:
            need = "needs" if len(for_root) == 1 else "need"
            yield from self.line("skip", name, f"{', '.join(for_root)} {need} root:")
            yield from self.labelled("run", self.report.rerun(*for_root))
            name = ""
        if len(by_reason) > _MOST_REASONS and not self.verbose:
            # But why there is no proof is told to who asked for one.
            unasked = {reason: ids for reason, ids in by_reason.items() if _PROOF not in ids}
            every = dict.fromkeys(check_id for ids in unasked.values() for check_id in ids)
            yield from self.line("skip", name, f"{', '.join(every)}: -v says why")
            by_reason = {reason: ids for reason, ids in by_reason.items() if reason not in unasked}
            name = ""
        for reason, ids in by_reason.items():
            yield from self.line("skip", name, f"{', '.join(dict.fromkeys(ids))}: {reason}")
            name = ""

    def fixes(self) -> Iterator[RenderableType]:
        marks = {"done": "ok", "failed": "fail", "refused": "info", "declined": "info", "not run": "info"}
        name = "Fixes"
        if self.report.mending and not self.report.outcomes:
            yield from self.line("info", name, "nothing to fix: no finding has a command that can be undone")
        for outcome in self.report.outcomes:
            detail = f": {outcome.detail}" if outcome.detail else ""
            yield from self.line(marks[outcome.result], name, f"{outcome.result}{detail}")
            yield from self.labelled("command", outcome.remedy.shown(root=self.report.root))
            yield from self.labelled("does", outcome.remedy.does)
            yield from self.labelled("undo", outcome.remedy.undo)
            name = ""

    def closing(self) -> Iterator[RenderableType]:
        """The best sets of cards, the counts with the failures' names first, and the next command."""
        diagnosis = self.report.diagnosis
        if self.report.whole and (groups := self.report.groups):
            sets: dict[tuple[int, str], list[str]] = {}
            for group in groups:
                sets.setdefault((group.size, group.kind), []).append(",".join(map(str, group.gpus)))
            words = (
                f"tp{size} = GPU{' or '.join(cards)} ({_KINDS.get(kind, kind)})" for (size, kind), cards in sets.items()
            )
            bad = self.report.failing
            without = f"; without {named(bad)}, which fail{'s' * (len(bad) == 1)}" if bad else ""
            yield from _wrapped(f"Best sets: {'; '.join(words)}{without}.", self.width)
        if not self.verbose and any(each.severity is Severity.info and each.fix for each in diagnosis.findings):
            yield "Notes have evidence and fixes, too: -v shows them."
        parts = []
        for severity, word in ((Severity.fail, "fail"), (Severity.warn, "warning"), (Severity.info, "note")):
            ids = dict.fromkeys(finding.id for finding in diagnosis.findings if finding.severity is severity)
            if count := diagnosis.count(severity):
                of = f" ({', '.join(ids)})" if severity is not Severity.info else ""
                parts.append(f"{count} {word}{'s' if count > 1 else ''}{of}")
        unseen = len({skip.id for skip in diagnosis.skipped})
        parts += [f"{unseen} skipped"] if unseen else []
        yield from _wrapped(", ".join((*parts, f"{len(diagnosis.well)} ok")) + ".", self.width)
        if not self.report.outcomes and not self.report.replayed and remedies(self.report.inspection, diagnosis):
            yield "Some of it can be fixed here, each after a question: mgpu doctor --fix"


def _printable(text: str) -> str:
    """Kernel logs and files of others may hold what a terminal would obey."""
    return "".join(character if character.isprintable() else "?" for character in text)


def _wrapped(text: str, width: int, hanging: str = "") -> list[str]:
    return textwrap.wrap(
        _printable(text), max(width, 20), subsequent_indent=hanging, break_on_hyphens=False, break_long_words=True
    )


def _command_lines(command: str, width: int) -> list[str]:
    """A command in lines that a shell takes as one: broken at spaces outside quotes, with a backslash where the line
    does not end with an operator that goes on anyway. A remark after it that has no room is a comment below it."""
    command, mark, remark = command.partition("  # ")
    if mark and len(command) + len(mark + remark) <= width:
        return [command + mark + remark]
    lines, line = [], ""
    for word in _words(command):
        if line and len(line) + 1 + len(word) > width - 2:
            lines.append(line if line.endswith(("&&", "||", "|")) else f"{line} \\")
            line = f"  {word}"
        else:
            line = f"{line} {word}" if line else word
    return [*lines, line, *(f"# {text}" for text in (_wrapped(remark, width - 2) if mark else ()))]


def _words(command: str) -> Iterable[str]:
    """The words of a command as they are written, quotes and all."""
    return re.findall(r"""(?:[^\s'"\\]|\\.|'[^']*'|"(?:[^"\\]|\\.)*"|['"\\])+""", command)
