"""`mgpu top`: the table again and again, on a terminal, in a pipe and as JSON."""

from __future__ import annotations

import os
import pty
import select
import signal
import subprocess
import time

from mgpu.running.instance import Rate, State

from .contract import NOTHING, PS, checked
from .program import LIMIT_S, Mgpu, until
from .records import record, supervisor


def test_a_pipe_gets_the_table_again_and_again_until_ctrl_c(mgpu: Mgpu) -> None:
    with supervisor(mgpu, "llama"):
        running = mgpu.start("top", "--interval", "0.1")
        until(lambda: running.out.count("NAME ") >= 2, "two tables")
        ended = running.end(signal.SIGINT)
        assert (ended.exit_code, ended.err) == (130, "")
        assert ended.out.count("llama ") >= 2


def test_json_is_an_object_for_each_look(mgpu: Mgpu) -> None:
    running = mgpu.start("top", "--interval", "0.1", "--json")
    until(lambda: running.out.count("\n") >= 2, "two objects")
    record("llama", state=State.STOPPED)
    until(lambda: '"llama"' in running.out, "what is new")
    *looks, last = running.end(signal.SIGTERM).stream
    assert [each["name"] for each in checked(looks[-1], "top", PS)["instances"]] == ["llama"]
    checked(last, "top", NOTHING)
    assert last["errors"][0]["code"] == "interrupted"


def test_a_terminal_is_drawn_over_with_live_rates(mgpu: Mgpu) -> None:
    mine, theirs = pty.openpty()
    shown = b""

    def see(words: bytes) -> None:
        nonlocal shown
        deadline = time.monotonic() + LIMIT_S
        while words not in shown:
            assert time.monotonic() < deadline, shown
            if select.select([mine], [], [], 0.1)[0]:
                shown += os.read(mine, 65536)

    with supervisor(mgpu, "llama") as folder:
        me = mgpu.with_variables(TERM="xterm", COLUMNS="100")
        process = subprocess.Popen(mgpu.command("top", "--interval", "0.1"), stdin=theirs, stdout=theirs, env=me)
        see(b"llama")
        from mgpu.running import registry

        looked_after = registry.read(folder).supervisor
        assert looked_after
        record("llama", looked_after, rate=Rate(generation_tok_s=123.4))
        see(b"123.4")
        assert b"\x1b[1A" in shown, "it does not draw over what it has drawn"
        process.send_signal(signal.SIGINT)
        assert process.wait(LIMIT_S) == 130
    os.close(mine)
    os.close(theirs)


def test_an_interval_that_makes_no_sense_is_refused(mgpu: Mgpu) -> None:
    assert mgpu("top", "--interval", "0").exit_code == 2
