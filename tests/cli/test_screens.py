"""What people see: at any width, in plain ASCII, without colours, on a terminal that is redrawn."""

from __future__ import annotations

import fcntl
import os
import pty
import re
import select
import struct
import subprocess
import termios
import time
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path

import pytest
from rich.console import Console, RenderableType
from rich.table import Table

from mgpu.backends.backend import DeviceMemory
from mgpu.backends.samples import Rates, Sample
from mgpu.cli.output import Output
from mgpu.cli.views.machine import machine_screen
from mgpu.cli.views.plan import plan_screen
from mgpu.cli.views.status import cards_line, fetch_line, load_line, status_lines
from mgpu.cli.views.sums import explanation
from mgpu.machine.simulate import simulate
from mgpu.machine.snapshot import Machine
from mgpu.models.fetch import Progress
from mgpu.models.shape import facts_from_shape
from mgpu.planning.plan import Plan, make_plan
from mgpu.planning.wants import Wants
from mgpu.running.start import Loading
from tests.fakes.shapes import SHAPES
from tests.fakes.sparse_gguf import make_sparse_gguf

from .program import LIMIT_S, Mgpu

WIDTHS = (60, 84, 100, 200)
TWO_CARDS = (
    "CUDA0: NVIDIA GeForce RTX 4090 (24081 MiB, 23600 MiB free);"
    "CUDA1: NVIDIA GeForce RTX 4090 (24081 MiB, 23600 MiB free)"
)
LONG_NAME = "NVIDIA RTX PRO 6000 Blackwell Max-Q Workstation Edition"
MARKUP = "[bold]x[/bold] [/] [link=y]"

Render = Callable[[RenderableType, int], str]


@pytest.fixture
def render(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> Render:
    """What is written of a part of a screen at a width."""

    def render(part: RenderableType, width: int) -> str:
        monkeypatch.setenv("COLUMNS", str(width))
        Output(as_json=False).lines(part)
        return capsys.readouterr().out

    return render


def planned(cards: str, model: str = "llama-3.3-70b", quantisation: str = "Q4_K_M", name: str | None = None) -> Plan:
    machine = simulate(cards)
    if name:
        machine = replace(machine, gpus=tuple(replace(gpu, name=name) for gpu in machine.gpus))
    facts = facts_from_shape(model, SHAPES[model], quantisation)
    smaller = (facts_from_shape(model, SHAPES[model], "Q4_K_M"),)
    return make_plan(facts, machine, machine.gpus, Wants(), other_quantisations=smaller)


PLANS = {
    "two cards": planned("2x4090"),
    "unequal cards": planned("4090+3060", "qwen3-32b"),
    "eight cards": planned("8xA100-80", "llama-3.1-405b"),
    "too large": planned("2x4090", quantisation="Q8_0"),
    "long names": planned("2xA100-80", name=LONG_NAME),
    "names like markup": planned("2xA100-80", name=MARKUP),
    "the CPU": planned("none", "llama-3.2-1b"),
}


def numbers(plan: Plan) -> Iterator[tuple[str, str]]:
    """Card and figures that a plan's ledger shows at every width."""
    for device in plan.chosen.devices:
        parts = (device.weights_bytes, device.kv_bytes, device.compute_bytes, device.runtime_bytes)
        total, free = (sum(round(size / 2**30 * 100) for size in sizes) for sizes in (parts, (device.free_bytes,)))
        for figure in (total, free, free - total):
            yield f"gpu{device.gpu}", f"{figure / 100:.2f}"


@pytest.mark.parametrize("width", WIDTHS)
@pytest.mark.parametrize("plan", [pytest.param(plan, id=name) for name, plan in PLANS.items()])
def test_a_plan_keeps_its_width_and_its_numbers(render: Render, plan: Plan, width: int) -> None:
    text = ""
    for part in plan_screen("a-model", plan, width, explain=True):
        written = render(part, width)
        text += written
        if isinstance(part, Table):
            assert max(map(len, written.splitlines())) <= width, written
    for card, figure in numbers(plan):
        assert re.search(rf"(?m)^{card} .*\s{re.escape(figure)}\s", text), (card, figure, text)
    assert len(plan.fixes) == sum(fix.change in text for fix in plan.fixes)
    if plan.machine.source == "simulated":
        assert "SIMULATED" in text.splitlines()[0]


def probed(cards: str, name: str | None = None) -> Machine:
    machine = simulate(cards)
    gpus = (replace(gpu, power_w=71.5, temperature_c=47, utilisation_percent=99) for gpu in machine.gpus)
    return replace(machine, source="probed", gpus=tuple(replace(gpu, name=name or gpu.name) for gpu in gpus))


@pytest.mark.parametrize("width", WIDTHS)
@pytest.mark.parametrize(
    "machine",
    [
        pytest.param(probed("2x4090"), id="two cards"),
        pytest.param(probed("8xA100-80"), id="eight cards"),
        pytest.param(probed("2xA100-80", LONG_NAME), id="long names"),
        pytest.param(probed("2xA100-80", MARKUP), id="names like markup"),
    ],
)
def test_a_machine_keeps_its_width_and_its_numbers(render: Render, machine: Machine, width: int) -> None:
    text = ""
    for part in machine_screen(machine, width):
        written = render(part, width)
        text += written
        if isinstance(part, Table):
            assert max(map(len, written.splitlines())) <= width, written
    for gpu in machine.gpus:
        for size in (gpu.total_bytes, gpu.free_bytes):
            assert re.search(rf"(?m)^gpu{gpu.index} .* {(size or 0) / 2**30:.1f} ", text), text
        assert re.search(rf"(?m)^gpu{gpu.index} .* CUDA{gpu.index}\s*$", text), text


@pytest.mark.parametrize("width", WIDTHS)
def test_what_is_redrawn_never_wraps(width: int) -> None:
    candidate = PLANS["two cards"].chosen
    held = dict.fromkeys(range(len(candidate.devices)), DeviceMemory(weights_bytes=21 << 30))
    sample = Sample(at=1.0, running=3, waiting=2, kv_used=0.34)
    rates = Rates(prompt_tok_s=312.0, generation_tok_s=19.1)
    cards = cards_line(candidate, held)
    long_name = "Llama-3.3-70B-Instruct-Some-Finetune-Q4_K_M-00001-of-00002.gguf"
    progress = Progress(stage="downloading", name=long_name, done_bytes=26_400_000_000, total_bytes=42_500_000_000)
    loading = Loading(phase="reserving compute buffers", mapped_bytes=41 << 30, seconds=9.0)
    lines = [
        status_lines(sample, rates, 252.0, (1.0, 2.0, 19.1), cards, width),
        fetch_line(progress, 10.0, width),
        load_line(loading, 42 << 30, width),
    ]
    for line in lines:
        console = Console(width=width, markup=False, emoji=False)
        with console.capture() as capture:
            console.print(line)
        assert max(map(len, capture.get().splitlines())) <= width
        assert capture.get().count("\n") <= 3, "a line and what did not fit into it"
    with console.capture() as capture:
        console.print(lines[0])
    assert all(words in capture.get() for words in ("3 running, 2 waiting", "19.1 tok/s", "KV 34%", "gpu0 RTX 4090"))


ASCII = {"PYTHONIOENCODING": "ascii", "PYTHONUTF8": "0"}


@pytest.mark.parametrize(
    "words",
    [
        pytest.param("plan llama-70b --machine 2x4090 --explain", id="plan"),
        pytest.param("plan llama-70b --machine 2x4090 --quant Q8_0", id="plan that does not fit"),
        pytest.param("gpus --machine 4090+3060", id="gpus"),
        pytest.param("backends", id="backends"),
        pytest.param("profiles list", id="profiles"),
        pytest.param("profiles show llama-8b", id="a profile"),
        pytest.param("run {model} --ask Hello --tensor-split 1,1", id="run"),
        pytest.param("run {model} --dry-run", id="dry run"),
        pytest.param("plan nosuch-é", id="an error"),
        pytest.param("plan {model} --json", id="json"),
        pytest.param("--help", id="help"),
        pytest.param("", id="mgpu alone"),
    ],
)
def test_a_terminal_that_knows_ascii_only(mgpu: Mgpu, tiny: Path, tmp_path: Path, words: str) -> None:
    model = tmp_path / "modèle-№1.gguf"
    model.symlink_to(tiny)
    ended = mgpu(*words.format(model=model).split(), FAKE_DEVICES=TWO_CARDS, **ASCII)
    assert ended.exit_code == (2 if "nosuch" in words else 1 if "Q8_0" in words else 0), ended
    assert (ended.out + ended.err).isascii()
    if "--json" in words:
        assert ended.json["data"]["candidates"][0]["argv"][2] == str(model)
    mgpu.assert_nothing_left()


def test_what_looks_like_markup_is_shown_as_it_is(mgpu: Mgpu, tiny: Path, tmp_path: Path) -> None:
    model = tmp_path / "[bold]x[dim].gguf"
    model.symlink_to(tiny)
    assert mgpu("plan", model).out.startswith("FITS   [bold]x[dim] · Q4_K_M")
    assert "no profile '[/nothing]'" in mgpu("profiles", "show", "[/nothing]").err
    assert str(tmp_path / "[/].gguf") in mgpu("plan", tmp_path / "[/].gguf").err
    ended = mgpu("run", model, "--ask", "[red]Hello[/]")
    assert ended.exit_code == 0
    assert re.search(r"(?m)^ready: bold-x-dim on ", ended.err)


def test_an_answer_cannot_command_the_terminal(mgpu: Mgpu, tiny: Path) -> None:
    ended = mgpu("run", tiny, "--ask", "Hello", "--ctx", "256", FAKE_FAIL="garbage", FAKE_TOKENS_PER_SECOND="2000")
    assert "@@" in ended.out
    assert "\x7f" not in ended.out


class Terminal:
    """mgpu in a terminal of its own, as a user's shell would start it."""

    def __init__(self, mgpu: Mgpu, *words: object, columns: int = 100, **variables: str | None) -> None:
        self._master, terminal = pty.openpty()
        fcntl.ioctl(terminal, termios.TIOCSWINSZ, struct.pack("HHHH", 30, columns, 0, 0))
        self.process = subprocess.Popen(
            mgpu.command(*words),
            stdin=terminal,
            stdout=terminal,
            stderr=terminal,
            cwd=mgpu.here,
            env=mgpu.with_variables(**{"TERM": "xterm-256color", **variables}),
            start_new_session=True,
            preexec_fn=lambda: fcntl.ioctl(0, termios.TIOCSCTTY, 0),
        )
        os.close(terminal)
        self.text = ""

    def read(self, pattern: str) -> str:
        """Wait until the pattern was written; returns all so far."""
        deadline = time.monotonic() + LIMIT_S
        while not re.search(pattern, self.text):
            assert time.monotonic() < deadline, f"never came {pattern!r}: {self.text!r}"
            if select.select([self._master], [], [], 0.2)[0]:
                try:
                    new = os.read(self._master, 1 << 16)
                except OSError:  # the other side is closed
                    new = b""
                assert new, f"ended without {pattern!r}: {self.text!r}"
                self.text += new.decode(errors="replace")
        return self.text

    def type(self, text: str) -> None:
        os.write(self._master, text.encode())

    def end(self) -> int:
        """Read to the end, and return the exit code."""
        while True:
            try:
                new = os.read(self._master, 1 << 16)
            except OSError:
                new = b""
            if not new:
                break
            self.text += new.decode(errors="replace")
        return self.hang_up()

    def hang_up(self) -> int:
        """Close the terminal, and return the exit code."""
        os.close(self._master)
        return self.process.wait(LIMIT_S)


CTRL_C = "\x03"


@pytest.mark.parametrize("columns", [60, 100])
def test_a_terminal_shows_a_status_that_is_redrawn_until_ctrl_c(mgpu: Mgpu, tiny: Path, columns: int) -> None:
    terminal = Terminal(mgpu, "run", tiny, "--interval", "0.2", columns=columns, FAKE_DEVICES=TWO_CARDS)
    terminal.read(r"ready: tiny on http")
    text = terminal.read(r"(?s)(0 running.*){4}")
    status = text[text.index("0 running") :]
    assert status.count("\x1b[2K") >= 4, "each line is erased before it is drawn again"
    assert "\x1b[1A" in status, "the cursor goes up to draw over what was there"
    assert "RTX 4090" in status
    terminal.type(CTRL_C)
    assert terminal.end() == 130
    assert terminal.text.endswith("GiB given back\r\n")
    assert terminal.text.rindex("\x1b[?25h") > terminal.text.rindex("\x1b[?25l"), "the cursor is shown again"
    assert "Traceback" not in terminal.text
    mgpu.assert_nothing_left()


def test_colours_follow_the_terminal(mgpu: Mgpu) -> None:
    coloured = re.compile(r"\x1b\[[0-9;]*3[0-7]m")
    words = ("plan", "llama-8b", "--machine", "2x4090")
    terminals = {
        "plain": Terminal(mgpu, *words),
        "no colour": Terminal(mgpu, *words, NO_COLOR="1"),
        "dumb": Terminal(mgpu, *words, TERM="dumb"),
    }
    assert [terminal.end() for terminal in terminals.values()] == [0, 0, 0]
    assert coloured.search(terminals["plain"].text)
    assert not coloured.search(terminals["no colour"].text)
    assert "\x1b" not in terminals["dumb"].text
    assert "\x1b" not in mgpu(*words).out


def test_a_dumb_terminal_gets_lines_of_status(mgpu: Mgpu, tiny: Path) -> None:
    terminal = Terminal(mgpu, "run", tiny, "--interval", "0.2", TERM="dumb")
    terminal.read(r"(?s)(0 running.*){3}")
    terminal.type(CTRL_C)
    assert terminal.end() == 130
    assert "\x1b" not in terminal.text
    mgpu.assert_nothing_left()


def test_a_terminal_that_is_closed_ends_the_run(mgpu: Mgpu, tiny: Path) -> None:
    terminal = Terminal(mgpu, "run", tiny, "--interval", "0.2")
    terminal.read("0 running")
    assert terminal.hang_up() in (0, 130)  # its words cannot be written any more; or it is interrupted first
    mgpu.assert_nothing_left()


def test_models_of_any_size_have_a_plan_to_show(render: Render, tmp_path: Path) -> None:
    from mgpu.models.gguf_facts import facts_from_gguf

    facts = facts_from_gguf(make_sparse_gguf(tmp_path / "m.gguf", SHAPES["gpt-oss-20b"], "MXFP4", vocabulary=1000))
    machine = simulate("4090+3060")
    for part in plan_screen("m", make_plan(facts, machine, machine.gpus, Wants()), 100, explain=True):
        assert render(part, 100)


@pytest.mark.parametrize(
    ("displays", "words"),
    [
        pytest.param(
            (False, False),
            ["0.25 GiB of the spare memory are kept free on each card (--headroom)"],
            id="no display: one margin",
        ),
        pytest.param(
            (False, True),
            [
                "0.25 GiB of the spare memory are kept free on gpu0 (--headroom)",
                "1.00 GiB of the spare memory are kept free on gpu1 (--headroom)",
            ],
            id="a display: each card its own",
        ),
    ],
)
def test_the_sums_say_what_is_kept_free_on_which_card(displays: tuple[bool, bool], words: list[str]) -> None:
    machine = simulate("2x4090")
    gpus = tuple(replace(gpu, display=on) for gpu, on in zip(machine.gpus, displays, strict=True))
    machine = replace(machine, gpus=gpus)
    facts = facts_from_shape("llama-3.3-70b", SHAPES["llama-3.3-70b"], "Q4_K_M")
    plan = make_plan(facts, machine, gpus, Wants())
    assert [line for _, line in explanation(plan, plan.chosen) if "kept free" in line] == words
