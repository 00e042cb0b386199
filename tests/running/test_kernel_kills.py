"""An engine that the kernel killed for want of RAM is told from one that somebody killed."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest

from mgpu.backends.failure import LONGEST_MESSAGE, Failure, from_exit_status
from mgpu.backends.vllm_failure import diagnose
from mgpu.running.kernel_kills import KernelKills, explained, kernel_kills

KILLED = (from_exit_status("llama-server", -9, during="loading weights"), -9)
CRASHED = (from_exit_status("llama-server", -11), -11)
NO_CORE = (diagnose(["INFO:     Application startup complete."], 0), 0)
VMSTAT = Path("/proc/vmstat")
GROUP = Path("/sys/fs/cgroup/docker/memory.events")
EVENTS = "low 0\nhigh 0\nmax 7\noom 3\noom_kill 2\noom_group_kill 9\n"


def count(number: int, file: Path = VMSTAT) -> KernelKills:
    return KernelKills(count=number, file=file)


@pytest.mark.parametrize(
    ("end", "before", "after", "words"),
    [
        pytest.param(
            NO_CORE, count(3), count(4), "the kernel killed a process", id="vLLM's engine core, of an unknown"
        ),
        pytest.param(NO_CORE, count(3), count(3), None, id="vLLM's engine core, of something else"),
        pytest.param(KILLED, count(3), count(4), "probably for want of RAM: the kernel killed a process", id="one"),
        pytest.param(KILLED, count(0), count(12), "the kernel killed 12 processes", id="several"),
        pytest.param(KILLED, count(3), count(3), None, id="the kernel killed nobody"),
        pytest.param(KILLED, count(3), count(2), None, id="a count that has fallen"),
        pytest.param(KILLED, count(0), count(3, GROUP), None, id="counts of different things"),
        pytest.param(KILLED, None, count(3), None, id="no count before"),
        pytest.param(KILLED, count(3), None, None, id="no count after"),
        pytest.param(CRASHED, count(3), count(4), None, id="another signal than SIGKILL"),
    ],
)
def test_a_kill_is_the_kernel_s_where_the_kernel_has_killed_meanwhile(
    end: tuple[Failure, int], before: KernelKills | None, after: KernelKills | None, words: str | None
) -> None:
    failure, status = replace(end[0], line_number=7), end[1]
    found = explained(failure, status, before, after)
    if words is None:
        assert found == failure
        return
    assert (found.code, found.deterministic, found.line_number) == ("host-out-of-memory", False, 7)
    assert words in found.message
    assert len(found.message) <= LONGEST_MESSAGE
    assert not found.message.endswith("…")
    assert "journalctl" in (found.hint or "")


@pytest.mark.parametrize(
    ("files", "expected"),
    [
        pytest.param({}, None, id="nothing tells"),
        pytest.param({"proc/vmstat": "nr_free_pages 9\noom_kill 5\n"}, (5, "proc/vmstat"), id="the machine"),
        pytest.param({"proc/vmstat": "oom_kill many\n"}, None, id="no number"),
        pytest.param(
            {
                "proc/vmstat": "oom_kill 5\n",
                "proc/self/cgroup": "0::/a/b\n",
                "sys/fs/cgroup/a/b/memory.events": EVENTS,
                "sys/fs/cgroup/a/memory.events": "oom_kill 4\n",
            },
            (2, "sys/fs/cgroup/a/b/memory.events"),
            id="the control group alone, where it counts",
        ),
        pytest.param(
            {
                "proc/vmstat": "oom_kill 5\n",
                "proc/self/cgroup": "4:memory:/x\n0::/a/b\n",
                "sys/fs/cgroup/a/memory.events": "oom_kill 4\n",
            },
            (4, "sys/fs/cgroup/a/memory.events"),
            id="the next around it",
        ),
        pytest.param(
            {"proc/vmstat": "oom_kill 5\n", "proc/self/cgroup": "0::/\n"},
            (5, "proc/vmstat"),
            id="a group that does not",
        ),
    ],
)
def test_the_kernel_s_kills_are_counted(
    files: dict[str, str], expected: tuple[int, str] | None, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("MGPU_ROOT", str(tmp_path))
    for name, text in files.items():
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).write_text(text)
    found = kernel_kills()
    assert (found and (found.count, str(found.file.relative_to(tmp_path)))) == expected
