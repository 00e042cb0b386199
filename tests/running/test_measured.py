"""What runs have measured, on disk: by several at once, cut off anywhere, and where nothing can be written."""

from __future__ import annotations

import fcntl
import json
import os
import stat
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pytest

from mgpu.errors import UsageError
from mgpu.planning.measurements import measurement_to_json
from mgpu.running import measured as module
from mgpu.running.client import Answer
from mgpu.running.measured import FILE, measured, remember, remembered
from mgpu.running.state import check_name, state_folder, state_path
from tests.ordinary_user import as_ordinary_user
from tests.planning.measured_settings import MEASURED, SETTING

ROOT = Path(__file__).parents[2]
MODELS = (SETTING.model,)
WRITER = """
import sys
from dataclasses import replace
from mgpu.running.measured import remember
from tests.planning.measured_settings import MEASURED
print("up", flush=True)
sys.stdin.readline()
for number in range(100):
    remember(replace(MEASURED, depth_tokens=number, users=int(sys.argv[1])))
"""
ANSWER = Answer(prompt_tokens=30, generated_tokens=200, prompt_tok_s=900.0, generation_tok_s=41.2, finish_reason="stop")


def path() -> Path:
    return state_path() / FILE


def line(depth_tokens: int, padding: str = "") -> bytes:
    setting = replace(SETTING, flags=(padding,)) if padding else SETTING
    return json.dumps(measurement_to_json(replace(MEASURED, setting=setting, depth_tokens=depth_tokens))).encode()


def test_an_answer_tells_the_rate_at_the_middle_of_what_was_generated() -> None:
    found = measured(SETTING, ANSWER)
    assert found is not None
    assert (found.setting, found.depth_tokens, found.users, found.tok_s) == (SETTING, 130, 1, 41.2)
    assert found.measured_at.endswith("Z")


@pytest.mark.parametrize(
    "answer",
    [
        pytest.param(replace(ANSWER, generated_tokens=31), id="a short one"),
        pytest.param(replace(ANSWER, generated_tokens=None), id="of nobody knows how many tokens"),
        pytest.param(replace(ANSWER, prompt_tokens=None), id="at nobody knows what depth"),
        pytest.param(replace(ANSWER, generation_tok_s=None), id="without a rate"),
        pytest.param(replace(ANSWER, generation_tok_s=0.0), id="that took for ever"),
        pytest.param(replace(ANSWER, generation_tok_s=float("inf")), id="that took no time"),
        pytest.param(replace(ANSWER, generation_tok_s=float("nan")), id="with a rate that is no number"),
        pytest.param(replace(ANSWER, timed_by_engine=False), id="timed by its reader"),
    ],
)
def test_an_answer_is_no_measurement(answer: Answer) -> None:
    assert measured(SETTING, answer) is None


def test_what_was_measured_is_remembered_in_its_order_for_its_user_alone() -> None:
    other = replace(MEASURED, tok_s=17.5)
    remember(MEASURED)
    remember(other)
    assert remembered(MODELS) == (MEASURED, other)
    assert stat.S_IMODE(path().stat().st_mode) == 0o600


def test_only_the_models_in_question_are_read() -> None:
    other = replace(MEASURED, setting=replace(SETTING, model='"übel".gguf, 5 bytes'))
    remember(MEASURED)
    remember(other)
    assert remembered(('"übel".gguf',)) == (other,)
    assert remembered(("GPU-1",)) == ()
    assert remembered(()) == ()


def test_no_instance_can_have_its_name() -> None:
    with pytest.raises(UsageError):
        check_name(FILE)


def test_a_line_cut_off_at_any_byte_costs_that_line_alone() -> None:
    whole = line(1) + b"\n" + line(2) + b"\n"
    state_folder()
    for length in range(len(whole)):
        path().write_bytes(whole[:length])
        # The last byte of a line ends it; without it, it can still be understood.
        survivors = [depth for depth, end in ((1, len(line(1))), (2, len(whole) - 1)) if length >= end]
        assert [each.depth_tokens for each in remembered(MODELS)] == survivors, length
        remember(replace(MEASURED, depth_tokens=3))
        assert [each.depth_tokens for each in remembered(MODELS)] == [*survivors, 3], length


@pytest.mark.parametrize(
    "damage",
    [
        pytest.param(b"\x00\xff\n", id="bytes that are no text"),
        pytest.param(b"[" * 100_000 + b"\n", id="deep nesting"),
        pytest.param(b'{"tok_s": ' + b"9" * 5000 + b"}\n", id="a number without end"),
        pytest.param(b"null\n[]\n5\n\n", id="JSON of something else"),
        pytest.param(line(5).replace(b"18.0", b"-18.0") + b"\n", id="a negative rate"),
        pytest.param(line(5).replace(b"18.0", b"NaN") + b"\n", id="not a number"),
        pytest.param(line(5).replace(b'"users"', b'"people"') + b"\n", id="keys of another version"),
    ],
)
def test_damaged_lines_count_for_nothing(damage: bytes) -> None:
    remember(MEASURED)
    with path().open("ab") as file:
        file.write(damage.replace(b"{", b'{"model": "' + SETTING.model.encode() + b'", ', 1))
    remember(MEASURED)
    assert remembered(MODELS) == (MEASURED, MEASURED)


def test_the_last_thousand_are_kept_when_they_have_become_many() -> None:
    state_folder()
    padding = "x" * 200
    path().write_bytes(b"".join(line(depth, padding) + b"\n" for depth in range(2000)))
    assert path().stat().st_size > 1 << 20
    remember(replace(MEASURED, depth_tokens=2000))
    assert [each.depth_tokens for each in remembered(MODELS)] == list(range(1001, 2001))
    assert path().stat().st_size < 1 << 20
    assert stat.S_IMODE(path().stat().st_mode) == 0o600
    assert [each.name for each in state_path().iterdir()] == [FILE]


def test_lines_without_end_are_not_kept_for_ever() -> None:
    state_folder()
    path().write_bytes(b"".join(line(depth, "x" * 50_000) + b"\n" for depth in range(60)))
    remember(replace(MEASURED, depth_tokens=60))
    found = [each.depth_tokens for each in remembered(MODELS)]
    assert found[-1] == 60
    assert 1 < len(found) < 20


def test_two_who_write_at_once_lose_nothing() -> None:
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}
    writers = [
        subprocess.Popen(
            [sys.executable, "-c", WRITER, str(users)],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            env=environment,
            text=True,
        )
        for users in (1, 2)
    ]
    for writer in writers:
        assert writer.stdout
        assert writer.stdout.readline() == "up\n"
    for writer in writers:
        assert writer.stdin
        writer.stdin.write("go\n")
        writer.stdin.flush()
    for writer in writers:
        writer.communicate()
        assert writer.returncode == 0
    found = remembered(MODELS)
    for users in (1, 2):
        assert [each.depth_tokens for each in found if each.users == users] == list(range(100))


def test_a_writer_that_waited_while_the_file_was_replaced_writes_into_the_new_one() -> None:
    remember(MEASURED)
    with path().open("rb") as old:
        fcntl.flock(old, fcntl.LOCK_EX)
        environment = {**os.environ, "PYTHONPATH": str(ROOT)}
        command = "from mgpu.running.measured import remember; from tests.planning.measured_settings import MEASURED; "
        with subprocess.Popen([sys.executable, "-c", command + "remember(MEASURED)"], env=environment) as writer:
            new = path().with_name("new")
            new.write_bytes(line(7) + b"\n")
            new.replace(path())
            fcntl.flock(old, fcntl.LOCK_UN)
            assert writer.wait() == 0
    assert [each.depth_tokens for each in remembered(MODELS)] == [7, MEASURED.depth_tokens]


def test_who_holds_the_lock_for_ever_holds_up_nobody(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "_PATIENCE_S", 0.05)
    remember(MEASURED)
    with path().open("rb") as held:
        fcntl.flock(held, fcntl.LOCK_EX)
        remember(MEASURED)
    assert remembered(MODELS) == (MEASURED,)


def test_a_folder_that_cannot_be_written_is_no_error() -> None:
    remember(MEASURED)
    path().chmod(0o400)
    state_path().chmod(0o500)
    with as_ordinary_user():
        remember(MEASURED)
    assert remembered(MODELS) == (MEASURED,)


@pytest.mark.parametrize("room", [0, 1, 100])
def test_on_a_full_disk_it_is_lost_and_the_next_one_is_not(room: int) -> None:
    remember(MEASURED)
    limit = path().stat().st_size + room
    program = (
        "import resource, signal; signal.signal(signal.SIGXFSZ, signal.SIG_IGN); "
        f"resource.setrlimit(resource.RLIMIT_FSIZE, ({limit}, {limit})); "
        "from mgpu.running.measured import remember; from tests.planning.measured_settings import MEASURED; "
        "remember(MEASURED)"
    )
    subprocess.run([sys.executable, "-c", program], env={**os.environ, "PYTHONPATH": str(ROOT)}, check=True)
    assert path().stat().st_size == limit
    assert remembered(MODELS) == (MEASURED,)
    remember(replace(MEASURED, depth_tokens=9))
    assert [each.depth_tokens for each in remembered(MODELS)] == [MEASURED.depth_tokens, 9]


@pytest.mark.parametrize(
    "make",
    [
        pytest.param(lambda place: place.mkdir(), id="a folder"),
        pytest.param(lambda place: place.symlink_to("/dev/zero"), id="a link"),
        pytest.param(lambda place: os.mkfifo(place), id="a pipe nobody writes into"),
        pytest.param(lambda place: None, id="nothing"),
    ],
)
def test_what_is_no_file_is_nothing_remembered(make: object) -> None:
    assert callable(make)
    state_folder()
    make(path())
    assert remembered(MODELS) == ()
    remember(MEASURED)
