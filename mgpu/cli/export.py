"""`mgpu export`: the plan as a file for something else that starts engines."""

from __future__ import annotations

import contextlib
import os
import shlex
import shutil
import sys
from enum import StrEnum
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from mgpu.cli.options import JsonOption, ModelArgument, PlannerOptions, with_planner_options
from mgpu.cli.output import Output
from mgpu.cli.result import Result
from mgpu.errors import Missing, NoAnswer, UsageError

if TYPE_CHECKING:
    from mgpu.cli.prepared import Prepared
    from mgpu.cli.systemd_unit import Service

# Set by the main program before the command is called: a script is written as it is.
output = Output(as_json=False)

# What of the shell's environment mgpu and its engines find their things by. Nothing that is secret.
_KEPT_VARIABLES = (
    *("PATH", "LD_LIBRARY_PATH", "PYTHONPATH"),
    *("XDG_CONFIG_HOME", "XDG_STATE_HOME", "XDG_CACHE_HOME", "XDG_DATA_HOME"),
    *("MGPU_LLAMA_SERVER", "MGPU_VLLM", "MGPU_OLLAMA", "LLAMA_ARG_RPC"),
    *("HF_HOME", "HF_HUB_CACHE", "HF_HUB_OFFLINE", "HF_ENDPOINT", "OLLAMA_HOST", "OLLAMA_MODELS"),
    *("CUDA_VISIBLE_DEVICES", "HIP_VISIBLE_DEVICES", "ROCR_VISIBLE_DEVICES", "GGML_VK_VISIBLE_DEVICES"),
)
_LISTS = frozenset(("PATH", "LD_LIBRARY_PATH", "PYTHONPATH"))
_OWN_OPTIONS = ("model", "form", "system", "name", "output_file", "json")


class Form(StrEnum):
    """What a plan can be exported as."""

    shell = "shell"
    systemd = "systemd"
    compose = "compose"
    quadlet = "quadlet"
    llama_swap = "llama-swap"


@with_planner_options
def export(
    context: typer.Context,
    model: ModelArgument,
    options: PlannerOptions,
    form: Annotated[Form, typer.Option("--as", help="For what: a shell script, or a systemd unit.")],
    system: Annotated[bool, typer.Option("--system/--user", help="A unit of the system, or your own.")] = False,
    host: Annotated[str, typer.Option("--host", help="Address to listen on.")] = "127.0.0.1",
    port: Annotated[int | None, typer.Option("--port", help="Port (default: a free one from 8080 on).")] = None,
    name: Annotated[str | None, typer.Option("--name", help="Name of the instance (default: the model's).")] = None,
    insecure: Annotated[
        bool, typer.Option("--insecure", help="Serve a network without a key: everybody in it may use the engine.")
    ] = False,
    output_file: Annotated[
        Path | None, typer.Option("--output", "-o", help="Where to write it (default: to stdout).")
    ] = None,
    json: JsonOption = False,
) -> Result:
    """Write the plan for MODEL as a file for another tool. Engine arguments follow --."""
    from mgpu.cli.access import api_key, require_key
    from mgpu.cli.prepare import prepare
    from mgpu.running.ports import check_host
    from mgpu.running.state import check_name, name_from

    if form not in (Form.shell, Form.systemd):
        raise UsageError(f"--as {form} is not there yet", hint="--as systemd   or   --as shell")
    check_host(host)
    if form is Form.shell:
        require_key(host, api_key(), insecure=insecure)  # a unit takes its key from a file
    prepared = prepare(model, options, engine_arguments=context.obj or ())
    name = check_name(name) if name is not None else name_from(prepared.name)
    warnings = [*prepared.warnings, *_fit(prepared, form)]
    if form is Form.shell:
        unit, text = None, _script(prepared, name, host, port)
        if prepared.weights.path is None and not prepared.running:
            fetch = f"mgpu pull {shlex.quote(prepared.argument)}"
            warnings.append(f"the model is not here yet, and a script fetches none: {fetch}, then export it again")
    else:
        from mgpu.cli.systemd_unit import unit_text

        service = _service(context, prepared, name, host, port, insecure=insecure, system=system)
        warnings += _before_it_starts(service)
        unit, text = service.unit, unit_text(service)
    told = ""
    if output_file:
        told = _write(output_file, text, mode=0o755 if form is Form.shell else 0o644)
    elif not output.as_json:
        output.write_text(text)
    written = str(output_file) if output_file else None
    return Result(
        command="export",
        data={"as": form.value, "name": name, "unit": unit, "path": written, "text": text},
        screen=lambda _: (f"{told} {written}",) if written else (),
        warnings=tuple(warnings),
    )


def _fit(prepared: Prepared, form: Form) -> list[str]:
    """Raise NoAnswer for what can never run. A service may wait for memory that is in use just now."""
    plan, command = prepared.plan, f"mgpu plan {shlex.quote(prepared.argument)}"
    if plan.best is not None:
        return []
    reasons = "; ".join(plan.chosen.reasons)
    if form is Form.systemd and plan.chosen.verdict == "does-not-fit":
        return [f"it does not fit now: {reasons}   ({command} shows the ledger)"]
    verdict = "illegal" if plan.chosen.verdict == "illegal" else "does-not-fit"
    what = "cannot be run so" if verdict == "illegal" else "does not fit"
    raise NoAnswer(f"{prepared.name} {what}: {reasons}", code=verdict, hint=f"{command} shows the ledger")


def _script(prepared: Prepared, name: str, host: str, port: int | None) -> str:
    """The engine's own command as a POSIX shell script; keys are taken from variables when it runs."""
    from mgpu.backends import load_backend
    from mgpu.backends.engine import engine_environment
    from mgpu.cli.access import api_key
    from mgpu.cli.serving import Endpoint, build_launch
    from mgpu.cli.systemd_unit import MADE_BY
    from mgpu.running.ports import choose_port
    from mgpu.running.state import state_path

    endpoint = Endpoint(host=host, port=port, name=name, name_chosen=True, api_key=api_key(), stall_s=0)
    folder, backend = state_path() / name, load_backend(prepared.backend)
    launch = build_launch(prepared, endpoint, port=choose_port(host, port), folder=folder)
    if prepared.engine:
        launch = backend.fitted(launch, prepared.engine)
    inherited, _ = backend.environment()
    added = {k: v for k, v in inherited.items() if os.environ.get(k) != v} | dict(launch.env)
    # What an engine would do something else with than was planned, set now or when the script runs.
    masks = set(_KEPT_VARIABLES) - set(engine_environment(dict.fromkeys(_KEPT_VARIABLES, "")))
    left_out = sorted(masks.union(os.environ) - set(inherited) - set(added))
    lines = ["#!/bin/sh", f"{MADE_BY} mgpu run watches the engine as well; this starts it and no more.", "set -eu"]
    if backend.temporary_folder:
        lines.append(f"mkdir -p -m 700 {shlex.quote(str(backend.temporary_folder(folder)))}")
    if left_out:
        lines.append(f"unset {' '.join(left_out)}")
    for variable, value in added.items():
        secret = variable in launch.secrets
        lines += (
            [f': "${{{variable}:?}}"', f"export {variable}"] if secret else [f"export {variable}={shlex.quote(value)}"]
        )
    text = "\n".join([*lines, f"exec {shlex.join(launch.argv)}"]) + "\n"
    if any("\ud800" <= character <= "\udfff" for character in text):
        raise UsageError("what the engine is told is no UTF-8: it cannot be written down")
    return text


def _service(
    context: typer.Context,
    prepared: Prepared,
    name: str,
    host: str,
    port: int | None,
    *,
    insecure: bool,
    system: bool,
) -> Service:
    import pwd

    import platformdirs

    from mgpu.cli.access import api_key
    from mgpu.cli.asked import typed
    from mgpu.cli.systemd_unit import Service
    from mgpu.running.ollama_attach import Attached
    from mgpu.running.ports import is_loopback

    engine_arguments = tuple(context.obj or ())
    # What the user did not say is not pinned, but for the address: clients are told it once. Of an Ollama that runs it
    # is that one's own.
    if port is None and not isinstance(prepared.running, Attached):
        port = _lasting_port(name, host)
    given, _ = typed(context, without=(*_OWN_OPTIONS, "port"))
    address = () if port is None else ("--port", str(port))
    words = ["run", _lasting(prepared.argument), "--name", name, *address, "--restart", "on-failure", *given]
    if engine_arguments:
        words += ["--", *engine_arguments]
    here = str(Path.cwd())
    user = None
    if system:
        try:
            user = pwd.getpwuid(os.geteuid()).pw_name
        except KeyError:
            user = str(os.geteuid())
    environment = _environment()
    return Service(
        name=name,
        model=prepared.argument,
        command=(*_program(), *words),
        environment=environment,
        key_file=platformdirs.user_config_path("mgpu") / f"{name}.env",
        key_required=bool(api_key()) or not (insecure or is_loopback(host)),
        writable=_writable(environment),
        user=user,
        folder=Path(here) if engine_arguments and here.isprintable() else None,
        before_start=_device_nodes(prepared) if system else (),
    )


def _lasting(argument: str) -> str:
    """MODEL so that it means the same in every folder."""
    from dataclasses import replace

    from mgpu.models.source import GgufFile, ModelFolder, parse_model

    source = parse_model(argument)
    if isinstance(source, (GgufFile, ModelFolder)):
        source = replace(source, path=source.path.absolute())
    return str(source)


def _lasting_port(name: str, host: str) -> int:
    """A port that is free now; where an instance of that name runs already, such as an older unit's, its port."""
    from mgpu.running.census import port_of
    from mgpu.running.ports import FIRST_PORT, choose_port
    from mgpu.running.registry import read
    from mgpu.running.state import state_path

    entry = read(state_path() / name)
    if entry.instance and not entry.is_over and (port := port_of(entry.instance.url)):
        return port
    try:
        return choose_port(host, None)
    except Missing:  # an address that this machine may have when the unit starts
        return FIRST_PORT


def _program() -> tuple[str, ...]:
    """The absolute command of this mgpu: its script, or its interpreter where there is none beside that."""
    python = Path(sys.executable).absolute()
    script = python.parent / "mgpu"
    return (str(script),) if os.access(script, os.X_OK) else (str(python), "-m", "mgpu")


def _environment() -> dict[str, str]:
    found = {variable: value for variable in _KEPT_VARIABLES if (value := os.environ.get(variable))}
    for variable in _LISTS & found.keys():  # shells that were set up twice name folders twice
        found[variable] = ":".join(dict.fromkeys(found[variable].split(":")))
    cache = _cache()
    # Where they are by default a sandboxed service cannot write.
    found |= {"CUDA_CACHE_PATH": str(cache / "nv"), "TRITON_CACHE_DIR": str(cache / "triton")}
    # An address may hold a password.
    return {variable: value for variable, value in found.items() if "://" not in value or "@" not in value}


def _writable(environment: dict[str, str]) -> tuple[Path, ...]:
    from mgpu.running.state import state_folder

    with contextlib.suppress(OSError):
        _cache().mkdir(parents=True, exist_ok=True)
    named = [Path(environment[name]) for name in ("HF_HOME", "HF_HUB_CACHE", "OLLAMA_MODELS") if name in environment]
    folders = [state_folder(), _cache(), Path.home() / ".ollama", *named]
    return tuple(dict.fromkeys(folder for folder in folders if folder.is_absolute()))


def _cache() -> Path:
    import platformdirs

    return platformdirs.user_cache_path()


def _device_nodes(prepared: Prepared) -> tuple[tuple[str, ...], ...]:
    """What makes the nodes of NVIDIA's cards after a boot: a program with root's rights, which a service must not
    gain."""
    modprobe = shutil.which("nvidia-modprobe")
    cards = [gpu.index for gpu in prepared.plan.machine.gpus if gpu.vendor == "nvidia"]
    return ((modprobe, "-u", *(f"-c{index}" for index in cards)),) if modprobe and cards else ()


def _before_it_starts(service: Service) -> list[str]:
    warnings = []
    if service.key_required and not service.key_file.is_file():
        warnings.append(f"it starts once {service.key_file} holds MGPU_API_KEY=… (make it with mode 0600)")
    if service.user == "root":
        warnings.append("it would run as root: export it as the user whose engine it shall be")
    return warnings


def _write(path: Path, text: str, *, mode: int) -> str:
    """Write the file as a whole, and say what became of it. One that mgpu did not export stays."""
    from mgpu.cli.systemd_unit import MADE_BY

    temporary = path.with_name(f".{path.name}.new")
    try:
        is_there = path.exists()
        if is_there and MADE_BY not in path.read_bytes()[:200].decode(errors="replace"):
            raise UsageError(
                f"{path} is there already, and not made by mgpu", hint="remove it, or choose another --output"
            )
        if not path.parent.is_dir():
            raise Missing(
                f"{path} cannot be written: there is no folder {path.parent}",
                code="output-unwritable",
                hint=f"mkdir -p {shlex.quote(str(path.parent))}",
            )
        temporary.write_text(text, encoding="utf-8")
        temporary.chmod(mode)
        temporary.replace(path)
    except OSError as error:
        raise Missing(f"{path} cannot be written: {error.strerror}", code="output-unwritable") from None
    return "replaced" if is_there else "written"
