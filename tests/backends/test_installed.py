"""What is read of engines that are installed, without a start of any."""

from __future__ import annotations

from pathlib import Path

import pytest

from mgpu.backends.installed import installed_engines
from mgpu.machine.inspection import InstalledEngine
from tests.fakes.elf import built, bundle, fatbin


@pytest.fixture
def nothing(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Path:
    """An environment with no engine; programs in the folder are found."""
    monkeypatch.setenv("PATH", str(tmp_path / "bin"))
    monkeypatch.delenv("LD_LIBRARY_PATH", raising=False)
    (tmp_path / "bin").mkdir()
    return tmp_path


def install(folder: Path, name: str) -> Path:
    path = folder / "bin" / name
    path.write_text(f"#!/bin/sh\ntouch {folder}/started\n")
    path.chmod(0o755)
    return path


def engine(backend: str) -> InstalledEngine:
    (found,) = (each for each in installed_engines() if each.backend == backend)
    return found


def test_a_vllm_tells_its_version_and_its_cuda(nothing: Path) -> None:
    install(nothing, "vllm")
    packages = nothing / "lib" / "python3.12" / "site-packages"
    (packages / "vllm-0.32.0.dist-info").mkdir(parents=True)
    (packages / "torch").mkdir()
    (packages / "torch" / "version.py").write_text("from typing import Optional\ncuda: Optional[str] = '12.8'\n")
    (packages / "nvidia" / "nccl" / "lib").mkdir(parents=True)
    (packages / "nvidia" / "nccl" / "lib" / "libnccl.so.2").touch()
    found = engine("vllm")
    assert (found.version, found.cuda_runtime, found.cpu_build, found.nccl) == ("0.32.0", 12080, False, True)
    assert (found.architectures_known, found.problem) == (False, None)
    assert not (nothing / "started").exists()


@pytest.mark.parametrize(
    "text", [pytest.param("cuda: Optional[str] = None\n", id="none"), pytest.param("\0\xff garbage", id="garbage")]
)
def test_a_cuda_that_is_not_named_is_unknown(nothing: Path, text: str) -> None:
    install(nothing, "vllm")
    version = nothing / "lib" / "python3.12" / "site-packages" / "torch" / "version.py"
    version.parent.mkdir(parents=True)
    version.write_text(text, encoding="latin-1")
    found = engine("vllm")
    assert (found.version, found.cuda_runtime, found.nccl) == (None, None, False)


def test_a_setting_that_names_no_program_is_a_problem(nothing: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("MGPU_LLAMA_SERVER", str(nothing / "absent"))
    assert "MGPU_LLAMA_SERVER" in (engine("llama.cpp").problem or "")


@pytest.mark.parametrize(
    ("needed", "nccl"), [pytest.param(("libnccl.so.2",), True, id="with"), pytest.param((), False, id="without")]
)
def test_a_llama_cpp_tells_whether_it_has_nccl(nothing: Path, needed: tuple[str, ...], nccl: bool) -> None:
    install(nothing, "llama-server")
    assert engine("llama.cpp").nccl is None  # all in one program, which is none here
    (nothing / "bin" / "libggml-base.so").touch()
    built(nothing / "bin" / "libggml-cuda.so", needed=needed)
    assert engine("llama.cpp").nccl is nccl
    assert not (nothing / "started").exists()


def test_a_llama_cpp_tells_its_cards_its_cuda_and_its_nccl(nothing: Path) -> None:
    install(nothing, "llama-server")
    libraries = nothing / "bin"
    (libraries / "libggml-base.so.0").touch()
    built(libraries / "libnccl.so.2", constant="NCCL version 2.21.5+cuda12.4")
    built(libraries / "libcudart.so.12.8.90", name="libcudart.so.12")
    (libraries / "libcudart.so.12").symlink_to("libcudart.so.12.8.90")
    code = fatbin(("sm", 75), ("sm", 86), ("compute", 120))
    built(
        libraries / "libggml-cuda.so",
        needed=("libnccl.so.2", "libcudart.so.12"),
        run_path="$ORIGIN",
        sections={".nv_fatbin": code + code},
    )
    found = engine("llama.cpp")
    assert (found.architectures, found.architectures_known) == (("sm_75", "sm_86", "compute_120"), True)
    assert (found.cuda_runtime, found.nccl, found.nccl_version) == (12080, True, "2.21.5")
    (libraries / "libcudart.so.12").unlink()
    (libraries / "libnccl.so.2").unlink()
    found = engine("llama.cpp")
    assert (found.cuda_runtime, found.nccl, found.nccl_version) == (12000, True, None)  # the major version, by its name


def test_a_llama_cpp_in_one_program_tells_the_same(nothing: Path) -> None:
    libraries = nothing / "libraries"
    libraries.mkdir()
    code = fatbin(("compute", 80))
    needed = ("libcublas.so.13", "libnccl.so.2")
    program = nothing / "bin" / "llama-server"
    where = {"among": libraries, "run_path": str(libraries)}
    built(program, needed=needed, **where, sections={".nv_fatbin": code}, program=True)  # type: ignore[arg-type]
    found = engine("llama.cpp")
    assert (found.architectures, found.cuda_runtime, found.nccl, found.problem) == (("compute_80",), 13000, True, None)


def test_a_llama_cpp_without_cuda_is_for_no_certain_cards(nothing: Path) -> None:
    install(nothing, "llama-server")
    (nothing / "bin" / "libggml-base.so").touch()
    (nothing / "bin" / "libggml-vulkan.so").touch()
    found = engine("llama.cpp")
    assert (found.architectures, found.architectures_known, found.cuda_runtime) == ((), True, None)


@pytest.mark.parametrize(
    ("code", "architectures", "known"),
    [
        pytest.param(bundle("gfx1030", "gfx1100"), ("gfx1030", "gfx1100"), True, id="cards by name"),
        pytest.param(b"CCOB\x02\0\x01\0" + bytes(90), (), False, id="compressed, which hides them"),
    ],
)
def test_a_llama_cpp_with_hip_tells_its_cards(
    nothing: Path, code: bytes, architectures: tuple[str, ...], known: bool
) -> None:
    install(nothing, "llama-server")
    (nothing / "bin" / "libggml-base.so").touch()
    built(nothing / "bin" / "libggml-hip.so", sections={".hip_fatbin": code})
    found = engine("llama.cpp")
    assert (found.architectures, found.architectures_known, found.nccl) == (architectures, known, False)


def test_a_cuda_backend_that_is_garbage_leaves_all_unknown(nothing: Path) -> None:
    install(nothing, "llama-server")
    (nothing / "bin" / "libggml-base.so").touch()
    (nothing / "bin" / "libggml-cuda.so").write_bytes(b"\x7fELF\x02\x01" + b"\xff" * 500)
    found = engine("llama.cpp")
    assert (found.architectures_known, found.cuda_runtime, found.nccl, found.problem) == (False, None, None, None)


def test_a_vllm_tells_its_cards_and_its_nccl(nothing: Path) -> None:
    install(nothing, "vllm")
    packages = nothing / "lib" / "python3.12" / "site-packages"
    for name in ("torch/lib", "nvidia/nccl/lib", "nvidia_nccl_cu12-2.27.5.dist-info"):
        (packages / name).mkdir(parents=True)
    (packages / "nvidia_cuda_runtime_cu12-12.8.90.dist-info").mkdir()
    built(packages / "torch/lib/libtorch_cuda.so", sections={".nv_fatbin": fatbin(("sm", 80), ("compute", 90))})
    nccl = packages / "nvidia/nccl/lib/libnccl.so.2"
    nccl.write_bytes(b"cut off")
    found = engine("vllm")
    assert (found.architectures, found.architectures_known) == (("sm_80", "compute_90"), True)
    assert (found.cuda_runtime, found.nccl_version) == (12080, "2.27.5")  # by the packages
    built(nccl, constant="NCCL version 2.28.9+cuda13.0")
    assert engine("vllm").nccl_version == "2.28.9"  # what is there, not what a package was called


@pytest.mark.parametrize(
    ("text", "problem"),
    [
        pytest.param("#!{here}/bin/python\n", "its interpreter {here}/bin/python is not there", id="a removed Python"),
        pytest.param(
            "#!/bin/sh\n'''exec' \"{here}/a b/python\" \"$0\" \"$@\"\n' '''\n",
            "its interpreter {here}/a b/python is not there",
            id="a removed Python behind a shell",
        ),
        pytest.param("#!/usr/bin/env -S nopython3 -u\n", "its interpreter nopython3 is not there", id="of PATH"),
        pytest.param("#!/bin/sh\nexit\n", None, id="a shell"),
        pytest.param("#!\n", None, id="an interpreter without a name"),
        pytest.param("", None, id="an empty file"),
    ],
)
def test_a_program_whose_interpreter_is_gone_does_not_run(nothing: Path, text: str, problem: str | None) -> None:
    install(nothing, "vllm").write_text(text.format(here=nothing))
    said = engine("vllm").problem
    assert said is None if problem is None else (said or "").startswith(problem.format(here=nothing))


def test_a_program_whose_library_is_gone_does_not_run(nothing: Path) -> None:
    libraries = nothing / "libraries"
    libraries.mkdir()
    built(libraries / "libfar.so.7")
    built(libraries / "libnear.so.1", needed=("libfar.so.7",), run_path=str(libraries))
    program = nothing / "bin" / "ollama"
    built(program, needed=("libnear.so.1",), among=libraries, run_path=str(libraries), program=True)
    assert (engine("ollama").path, engine("ollama").problem) == (str(program), None)
    (libraries / "libfar.so.7").unlink()
    assert engine("ollama").problem == "it needs libfar.so.7, which the loader does not find"
