"""Finding engines and asking them: with programs that answer, lie, break and hang."""

from __future__ import annotations

import os
import re
import socket
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

import pytest

from mgpu.backends import engine as engines
from mgpu.backends import load_backend
from mgpu.backends.engine import (
    DeviceQuery,
    Engine,
    ask,
    engine_environment,
    find_llama_server,
    require_llama_server,
    version,
)
from mgpu.backends.ollama import find_ollama
from mgpu.backends.vllm_program import find_vllm
from mgpu.configuration import configuration_file
from mgpu.errors import EngineFailed, MgpuError, Missing, UsageError
from mgpu.machine.snapshot import EngineDevice
from tests.fakes.devices import fake_rpc_devices, real_llama_server

LIMIT_S = 120
TWO_CARDS = """Available devices:
  CUDA0: NVIDIA GeForce RTX 4090 (24081 MiB, 23600 MiB free)
  Vulkan1: AMD Radeon 780M (RADV PHOENIX) (16384 MiB, 0 MiB free)
"""


def program(path: Path, script: str) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(f"#!/bin/sh\n{script}\n")
    path.chmod(0o755)
    return path


def engine(path: Path) -> Engine:
    return Engine(backend="llama.cpp", path=path, found_in="PATH")


def says(path: Path, text: str, status: int = 0) -> Engine:
    return engine(program(path, f"cat <<'END'\n{text}\nEND\nexit {status}"))


def until(condition: Callable[[], bool]) -> None:
    deadline = time.monotonic() + LIMIT_S
    while not condition():
        assert time.monotonic() < deadline, "the condition never came true"
        time.sleep(0.01)


def alive(pid: int) -> bool:
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] not in "ZX"
    except FileNotFoundError:
        return False


@pytest.fixture
def nothing_installed(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Path:
    """A PATH with nothing on it and no package; the folder on PATH."""
    folder = tmp_path / "bin"
    folder.mkdir()
    monkeypatch.setenv("PATH", str(folder))
    monkeypatch.setattr(engines, "WHEEL", "no_such_package")
    return folder


def package_with(folder: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A stand-in for the package that brings a llama-server."""
    (folder / "a_package_with_an_engine" / "bin").mkdir(parents=True)
    (folder / "a_package_with_an_engine" / "__init__.py").touch()
    monkeypatch.syspath_prepend(folder)
    monkeypatch.setattr(engines, "WHEEL", "a_package_with_an_engine")
    return program(folder / "a_package_with_an_engine" / "bin" / "llama-server", "exit 0")


def configure(text: str) -> Path:
    path = configuration_file()
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(text)
    return path


def test_the_variable_goes_first_then_the_configuration_path_and_the_package(
    nothing_installed: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    assert find_llama_server() is None
    packaged = package_with(tmp_path / "packages", monkeypatch)
    assert find_llama_server() == Engine(backend="llama.cpp", path=packaged, found_in="package")
    on_path = program(nothing_installed / "llama-server", "exit 0")
    assert find_llama_server() == engine(on_path)
    built = program(tmp_path / "built" / "bin" / "llama-server", "exit 0")
    file = configure(f"engines:\n  llama.cpp: {built}\n")
    assert find_llama_server() == Engine(backend="llama.cpp", path=built, found_in=str(file))
    monkeypatch.setenv("HOME", str(tmp_path))
    configure("engines:\n  llama.cpp: ~/built\n")
    assert find_llama_server() == Engine(backend="llama.cpp", path=built, found_in=str(file)), "its folder does, too"
    named = program(tmp_path / "elsewhere" / "my-server", "exit 0")
    monkeypatch.setenv("MGPU_LLAMA_SERVER", str(named))
    assert find_llama_server() == Engine(backend="llama.cpp", path=named, found_in="$MGPU_LLAMA_SERVER")
    monkeypatch.setenv("MGPU_LLAMA_SERVER", f"{tmp_path}/built")
    assert find_llama_server() == Engine(backend="llama.cpp", path=built, found_in="$MGPU_LLAMA_SERVER"), "and so here"
    monkeypatch.setenv("MGPU_LLAMA_SERVER", "llama-server")
    assert find_llama_server() == Engine(backend="llama.cpp", path=on_path, found_in="$MGPU_LLAMA_SERVER")


@pytest.mark.parametrize(
    ("named", "meant"),
    [
        pytest.param("./here", "here", id="a program"),
        pytest.param("built", "built/bin/llama-server", id="a folder"),
        pytest.param("llama-server", "bin/llama-server", id="a program on PATH before a folder of its name"),
    ],
)
def test_a_relative_name_becomes_absolute(
    named: str, meant: str, nothing_installed: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for path in ("here", "built/bin/llama-server", "bin/llama-server", "llama-server/bin/llama-server"):
        program(tmp_path / path, "exit 0")
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("MGPU_LLAMA_SERVER", named)
    assert require_llama_server().path == tmp_path / meant


def test_a_package_without_the_program_is_no_engine(
    nothing_installed: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    package_with(tmp_path, monkeypatch).unlink()
    assert find_llama_server() is None


@pytest.mark.parametrize(
    ("named", "why"),
    [
        pytest.param("/no/such/program", "not a program that can be run", id="a path to nothing"),
        pytest.param("no-such-program", "not a program that can be run", id="a name of nothing"),
        pytest.param("plain-file", "not a program that can be run", id="no program"),
        pytest.param("/", "a folder without bin/llama-server", id="a folder without it"),
    ],
)
def test_a_variable_that_names_no_program_is_said_so(
    nothing_installed: Path, named: str, why: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    program(nothing_installed / "llama-server", "exit 0")
    (nothing_installed / "plain-file").write_text("not executable")
    monkeypatch.setenv("MGPU_LLAMA_SERVER", named)
    with pytest.raises(Missing) as missing:
        find_llama_server()
    assert missing.value.code == "engine-missing"
    assert missing.value.message == f"$MGPU_LLAMA_SERVER names {named!r}, which is {why}"


@pytest.mark.parametrize(
    ("backend", "find", "name"),
    [
        pytest.param("llama.cpp", find_llama_server, "llama-server", id="llama.cpp"),
        pytest.param("vllm", find_vllm, "vllm", id="vLLM"),
        pytest.param("ollama", find_ollama, "ollama", id="Ollama"),
    ],
)
def test_a_configuration_that_names_no_program_is_said_so(
    backend: str,
    find: Callable[[], Engine | None],
    name: str,
    nothing_installed: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setenv("HOME", str(tmp_path))
    monkeypatch.setenv("XDG_CONFIG_HOME", str(tmp_path / "config"))
    program(nothing_installed / name, "exit 0")  # it is not what was asked for
    (tmp_path / "empty").mkdir()
    (tmp_path / "text").write_text("not executable")
    for setting, path, why in (
        ("/no/such", "/no/such", "is not there"),
        ("~/empty", f"{tmp_path}/empty/bin/{name}", "is not there"),
        ("../../text", f"{tmp_path}/config/mgpu/../../text", "cannot be run"),
    ):
        configure(f"engines:\n  {backend}: {setting}\n")
        with pytest.raises(Missing) as missing:
            find()
        assert missing.value.code == "engine-missing"
        assert missing.value.message == (
            f"~/config/mgpu/config.yaml sets engines.{backend} to a program that {why}: {path}"
        )
        assert "take it out" in (missing.value.hint or "")
    configure("engines: [\n")
    with pytest.raises(UsageError):
        find()


def test_without_an_engine_the_hint_installs_one(nothing_installed: Path) -> None:
    with pytest.raises(Missing) as missing:
        require_llama_server()
    assert missing.value.code == "engine-missing"
    assert "pip install" in (missing.value.hint or "")


def test_devices_are_read_from_the_list(tmp_path: Path) -> None:
    chatter = "warn: something\n0.00.037.428 W load_backend: loaded\n"
    assert DeviceQuery(says(tmp_path / "server", chatter + TWO_CARDS)).devices() == (
        EngineDevice(
            id="CUDA0", description="NVIDIA GeForce RTX 4090", total_bytes=24081 << 20, free_bytes=23600 << 20
        ),
        EngineDevice(id="Vulkan1", description="AMD Radeon 780M (RADV PHOENIX)", total_bytes=16384 << 20, free_bytes=0),
    )


def test_an_engine_without_devices_is_no_failure(tmp_path: Path) -> None:
    assert DeviceQuery(says(tmp_path / "server", "Available devices:\n  (none)")).devices() == ()


def test_rpc_servers_are_told_to_the_engine(tmp_path: Path) -> None:
    asked = program(
        tmp_path / "server",
        """printf "%s\\n" "$@" "$CUDA_DEVICE_ORDER" >"$0.asked"
        echo "Available devices:"
        echo "  RPC0: a:1 (8192 MiB, 8192 MiB free)"
        echo "  RPC1: b:2 (8192 MiB, 8192 MiB free)" """,
    )
    DeviceQuery(engine(asked), rpc="a:1,b:2").devices()
    DeviceQuery(engine(asked), rpc="a:1,b:2").close()
    told = (tmp_path / "server.asked").read_text().splitlines()
    assert told == ["--rpc", "a:1,b:2", "--list-devices", "PCI_BUS_ID"]


NOT_A_PROGRAM = b"\x7fELF, but not really"
BROKEN = {
    "ends with a message": ("echo fine; echo 'no usable GPU' >&2; exit 1", "status 1: no usable GPU"),
    "ends in silence": ("exit 127", "status 127: no message"),
    "lacks a library": (
        "echo 'error while loading shared libraries: libcudart.so.12: cannot open' >&2; exit 127",
        "libcudart.so.12",
    ),
    "is killed": ("kill -9 $$", "status -9"),
    "answers with something else": ("echo 'ollama version is 0.6'", "does not answer as a llama-server"),
    "answers with bytes": ("printf '\\377\\376\\000\\033[31m\\n'", "does not answer as a llama-server"),
    "answers nothing": ("exit 0", "does not answer as a llama-server"),
}


@pytest.mark.parametrize("how", BROKEN)
def test_a_broken_engine_is_named_with_its_last_words(how: str, tmp_path: Path) -> None:
    script, words = BROKEN[how]
    path = program(tmp_path / "server", script)
    with pytest.raises(EngineFailed) as failed:
        DeviceQuery(engine(path)).devices()
    assert failed.value.code == "engine-broken"
    assert str(path) in failed.value.message
    assert words in failed.value.message
    assert f"{path} --list-devices" in (failed.value.hint or "")


@pytest.mark.parametrize(
    ("content", "mode"),
    [
        pytest.param(b"#!/bin/sh\nexit 0\n", 0o644, id="not executable"),
        pytest.param(b"#!/no/such/interpreter\n", 0o755, id="interpreter missing"),
        pytest.param(NOT_A_PROGRAM, 0o755, id="not a program at all"),
        pytest.param(None, 0o755, id="gone since it was found"),
    ],
)
def test_a_program_the_system_cannot_run_is_broken(content: bytes | None, mode: int, tmp_path: Path) -> None:
    path = tmp_path / "server"
    if content is not None:
        path.write_bytes(content)
        path.chmod(mode)
    with pytest.raises(EngineFailed) as failed:
        DeviceQuery(engine(path)).devices()
    assert failed.value.code == "engine-broken"


# A script that waits for the real program, as wrappers do; both must go.
HANGS = 'echo $$ >"$0.pids"; sleep 60 & echo $! >>"$0.pids"; wait'


def pids_of(path: Path) -> list[int]:
    noted = Path(f"{path}.pids")
    until(lambda: noted.exists() and len(noted.read_text().split()) == 2)
    return [int(pid) for pid in noted.read_text().split()]


def test_an_engine_that_hangs_is_given_up_and_ended_with_its_children(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(engines, "_ANSWER_TIMEOUT_S", 0.3)
    path = program(tmp_path / "server", HANGS)
    begun = time.monotonic()
    with pytest.raises(EngineFailed, match=r"did not answer within 0\.3 s") as failed:
        DeviceQuery(engine(path)).devices()
    assert failed.value.code == "engine-broken"
    until(lambda: not any(map(alive, pids_of(path))))
    assert time.monotonic() - begun < LIMIT_S, "it waited for the script's child"


def test_what_an_engine_leaves_in_its_temporary_folder_is_removed(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    temporary = tmp_path / "t"
    temporary.mkdir()
    monkeypatch.setattr(tempfile, "tempdir", str(temporary))
    path = program(tmp_path / "vllm", 'mkdir "$TMPDIR/torchinductor_me" && ls "$TMPDIR"')
    assert ask(Engine(backend="vllm", path=path, found_in="PATH"), ["--help"]) == "torchinductor_me\n"
    assert list(temporary.iterdir()) == []


def test_an_engine_is_asked_where_no_temporary_folder_can_be_made(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path / "not there"))
    path = program(tmp_path / "vllm", "echo help")
    assert ask(Engine(backend="vllm", path=path, found_in="PATH"), ["--help"]) == "help\n"


def test_a_query_that_is_closed_leaves_no_process(tmp_path: Path) -> None:
    path = program(tmp_path / "server", HANGS)
    query = DeviceQuery(engine(path))
    pids = pids_of(path)
    assert all(map(alive, pids))
    query.close()
    query.close()
    until(lambda: not any(map(alive, pids)))


def test_closing_after_the_answer_is_allowed(tmp_path: Path) -> None:
    query = DeviceQuery(says(tmp_path / "server", TWO_CARDS))
    assert len(query.devices()) == 2
    query.close()


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        pytest.param("version: 1 (abc)\nbuilt with GCC", "1 (abc)", id="version line"),
        pytest.param(
            "chatter\nversion: 0.1.0-dev (build 1, commit 7e4c0a9)",
            "0.1.0-dev (build 1, commit 7e4c0a9)",
            id="after chatter",
        ),
        pytest.param("ollama version is 0.32.15", "0.32.15", id="Ollama while a server runs"),
        pytest.param(
            "Warning: could not connect to a running Ollama instance\nWarning: client version is 0.32.15",
            "0.32.15",
            id="Ollama without a server",
        ),
        pytest.param(
            "ollama version is 0.30.1\nWarning: client version is 0.32.15", "0.32.15", id="Ollama beside another"
        ),
        pytest.param("something else", None, id="none"),
    ],
)
def test_version(text: str, expected: str | None, tmp_path: Path) -> None:
    assert version(says(tmp_path / "server", text)) == expected


@pytest.mark.parametrize(
    ("backend", "hint"),
    [
        pytest.param("llama.cpp", "server --list-devices` by hand, or pip install", id="llama.cpp"),
        pytest.param("vllm", "server serve --help` by hand, or mgpu backends install vllm", id="vLLM"),
        pytest.param("ollama", "server --version` by hand, or install it from https://ollama.com", id="Ollama"),
    ],
)
def test_what_to_do_about_a_broken_engine_is_its_own(backend: str, hint: str, tmp_path: Path) -> None:
    broken = Engine(backend=backend, path=program(tmp_path / "server", "exit 1"), found_in="PATH")
    with pytest.raises(EngineFailed) as failed:
        version(broken)
    assert hint in (failed.value.hint or "")


def test_secrets_and_masks_stay_out_of_the_engines_environment(monkeypatch: pytest.MonkeyPatch) -> None:
    secrets = (
        "HF_TOKEN",
        "HUGGING_FACE_HUB_TOKEN",
        "HUGGINGFACE_TOKEN",
        "MGPU_API_KEY",
        "LLAMA_API_KEY",
        "VLLM_API_KEY",
    )
    masks = ("CUDA_VISIBLE_DEVICES", "HIP_VISIBLE_DEVICES", "ROCR_VISIBLE_DEVICES", "GPU_DEVICE_ORDINAL")
    given = {**dict.fromkeys(secrets, "secret"), **dict.fromkeys(masks, "1"), "LD_LIBRARY_PATH": "/cuda"}
    assert engine_environment(given) == {"LD_LIBRARY_PATH": "/cuda", "CUDA_DEVICE_ORDER": "PCI_BUS_ID"}
    assert engine_environment({}) == {"CUDA_DEVICE_ORDER": "PCI_BUS_ID"}
    for name, value in given.items():
        monkeypatch.setenv(name, value)
    environment = engine_environment()
    assert "secret" not in environment.values()
    assert environment["PATH"] == os.environ["PATH"]


@pytest.mark.parametrize(
    ("backend", "told"),
    [
        pytest.param("llama.cpp", ("LLAMA_ARG_CTX_SIZE",), id="llama.cpp; LLAMA_ARG_RPC is read"),
        pytest.param(
            "vllm",
            ("VLLM_DP_SIZE", "VLLM_MODEL_REDIRECT_PATH", "VLLM_PORT", "VLLM_PP_LAYER_PARTITION"),
            id="vLLM; VLLM_PORT_… is a cluster's",
        ),
        pytest.param("ollama", ("LLAMA_ARG_CTX_SIZE", "LLAMA_ARG_RPC"), id="Ollama, whose runners are llama-servers"),
    ],
)
def test_what_contradicts_a_plan_is_left_out_and_told_to_those_it_concerns(
    backend: str, told: tuple[str, ...], monkeypatch: pytest.MonkeyPatch
) -> None:
    stray = ["LLAMA_ARG_CTX_SIZE", "LLAMA_ARG_RPC", "VLLM_PP_LAYER_PARTITION", "VLLM_DP_SIZE", "VLLM_PORT"]
    stray += ["VLLM_MODEL_REDIRECT_PATH"]
    kept = {"VLLM_LOGGING_LEVEL", "VLLM_CPU_KVCACHE_SPACE", "VLLM_PORT_8000_TCP"}
    for name in (*stray, *kept):
        monkeypatch.setenv(name, "1")
    environment, names = load_backend(backend).environment()
    assert names == told
    assert environment.keys() & {*stray, *kept} == kept


@pytest.mark.real_engine
def test_the_real_engine_is_understood(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("GGML_VK_VISIBLE_DEVICES", "")
    real = engine(real_llama_server())
    assert re.search(r"\d", version(real) or "")
    assert DeviceQuery(real).devices() == ()


@pytest.mark.real_device
def test_a_real_engine_lists_rpc_devices_and_misses_one(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("GGML_VK_VISIBLE_DEVICES", "")
    real = engine(real_llama_server())
    with fake_rpc_devices((24, 8)) as servers, socket.socket() as silent:
        silent.bind(("127.0.0.1", 0))
        devices = DeviceQuery(real, rpc=",".join(servers)).devices()
        assert [(device.id, device.description) for device in devices] == [("RPC0", servers[0]), ("RPC1", servers[1])]
        assert [device.total_bytes >> 30 for device in devices] == [24, 8]
        lost = f"127.0.0.1:{silent.getsockname()[1]}"
        with pytest.raises(MgpuError) as missing:
            DeviceQuery(real, rpc=f"{servers[0]},{lost}").devices()
    assert (type(missing.value), missing.value.code) == (Missing, "device-missing")
    assert lost in missing.value.message
