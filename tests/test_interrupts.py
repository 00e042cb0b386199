"""Signals as KeyboardInterrupt: none is lost, whatever Python does at that moment."""

from __future__ import annotations

import subprocess
import sys

import pytest

from mgpu.interrupts import Interrupts

BEGIN = """
import gc, os, signal, time, weakref
from mgpu.interrupts import interrupts
signal.signal(signal.SIGINT, interrupts)
interrupts.recover_lost()
def signalled(*_):
    os.kill(os.getpid(), signal.SIGINT)
    for _ in range(1000):
        pass  # the handler runs here
class Thing:
    pass
try:
"""
END = """
    time.sleep(60)
except KeyboardInterrupt:
    print("heard")
"""


def interrupted(moment: str) -> subprocess.CompletedProcess[str]:
    """What a program says that is interrupted at that moment."""
    program = [sys.executable, "-c", BEGIN + moment + END]
    return subprocess.run(program, capture_output=True, text=True, timeout=180, check=False)


@pytest.mark.parametrize(
    "moment",
    [
        pytest.param("    signalled()", id="anywhere"),
        pytest.param("    reference = weakref.ref(Thing(), signalled)", id="in the callback of a weak reference"),
        pytest.param("    Thing.__del__ = signalled; Thing()", id="in a destructor"),
        pytest.param("    gc.callbacks.append(signalled); gc.collect()", id="in the collector of garbage"),
    ],
)
def test_an_interrupt_is_heard(moment: str) -> None:
    told = interrupted(moment)
    assert (told.stdout, told.stderr) == ("heard\n", "")


def test_another_problem_in_a_destructor_is_still_printed() -> None:
    moment = "    Thing.__del__ = lambda self: 1 / 0; Thing(); signalled()"
    told = interrupted(moment)
    assert told.stdout == "heard\n"
    assert "ZeroDivisionError" in told.stderr


WAITS = """
import os, threading, time
from mgpu.interrupts import interrupts
signal.signal(signal.SIGTERM, interrupts)
def hear(*_):
    print("another heard")
signal.signal(signal.SIGHUP, hear)
def to_this_thread(number):
    time.sleep(0.3)  # or the signal comes before the call begins, which is as good
    signal.pthread_kill(threading.get_ident(), number)
def while_waiting(number, what):
    threading.Thread(target=to_this_thread, args=(number,)).start()
    what()
never, ever = os.pipe()
"""


def test_one_that_python_notes_while_a_system_call_waits_is_heard() -> None:
    """A signal that comes just before the call leaves Python in the same state as one that another thread takes."""
    moment = WAITS.replace("\n", "\n    ") + "while_waiting(signal.SIGTERM, lambda: os.read(never, 1))"
    told = interrupted(moment)
    assert (told.stdout, told.stderr) == ("heard\n", "")


def test_one_of_another_handler_is_heard_by_that_alone() -> None:
    moment = (
        WAITS.replace("\n", "\n    ")
        + "while_waiting(signal.SIGHUP, lambda: time.sleep(1)); print('waited'); signalled()"
    )
    told = interrupted(moment)
    assert (told.stdout, told.stderr) == ("another heard\nwaited\nheard\n", "")


def test_what_is_left_for_the_end_is_done_once_nothing_interrupts_it(capsys: pytest.CaptureFixture[str]) -> None:
    ending = Interrupts()
    ending.at_end(ending)
    ending.at_end(lambda: print("tidied up"))
    ending.end()
    assert capsys.readouterr().out == "tidied up\n"
