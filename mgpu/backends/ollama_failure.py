"""Why Ollama ended, why it could not load or fetch a model: one sentence, with a code.

A model's runner is a llama-server, so that most causes of a failed load are found as those of llama.cpp are.
"""

from __future__ import annotations

import json
import re
from collections.abc import Sequence
from dataclasses import replace

from mgpu.backends import llama_cpp_failure
from mgpu.backends.failure import LONGEST_LINE, Failure, from_exit_status, shorten
from mgpu.backends.llama_cpp_causes import Cause
from mgpu.errors import EngineFailed, MgpuError, Missing

ENGINE = "ollama"
RUNNER = "Ollama's llama-server"
LINES_READ = 2000

_CAUSES = (
    Cause(
        code="port-in-use",
        pattern=re.compile(r"^Error: listen tcp (?P<where>\S+): bind: address already in use"),
        message="{where} is taken by another program, perhaps by the system's own Ollama",
        hint="another --port; systemctl status ollama tells whether the service runs",
    ),
    Cause(
        code="bad-host",
        pattern=re.compile(r"^Error: (?:listen tcp|lookup) (?P<where>\S+): (?P<why>.*)"),
        message="cannot listen on {where}: {why}",
        hint="--host 127.0.0.1, or another --port",
    ),
    Cause(
        code="engine-broken",
        pattern=re.compile(r"\$HOME is not defined"),
        message="Ollama needs a home folder, and HOME is not set",
        hint="set HOME to a folder that can be written",
    ),
    Cause(
        code="engine-broken",
        pattern=re.compile(r"^Error: (?P<why>.*(?:permission denied|read-only file system|no such file).*)"),
        message="Ollama cannot use its folder: {why}",
        hint="set OLLAMA_MODELS to a folder that can be written",
    ),
    Cause(
        code="engine-broken",
        pattern=re.compile(r"error while loading shared libraries: (?P<what>[^:]+)"),
        message="Ollama lacks the shared library {what}",
        hint="install Ollama again: https://ollama.com/download",
    ),
    Cause(
        code="crashed",
        pattern=re.compile(r"^(?:panic|fatal error): (?P<why>.*)"),
        message="Ollama gave up: {why}",
        hint="read the end of the log",
        deterministic=False,
    ),
    Cause(
        code="engine-broken",
        pattern=re.compile(r"llama-server binary not found"),
        message="this Ollama was installed without its llama-server, which runs the models",
        hint="install Ollama again: https://ollama.com/download",
    ),
    Cause(
        code="host-out-of-memory",
        pattern=re.compile(r"requires more system memory \((?P<wanted>[^)]*)\) than is available \((?P<free>[^)]*)\)"),
        message="out of memory in host RAM: {wanted} wanted, {free} available",
        hint="a smaller --ctx or --quant, or close programs that hold RAM",
    ),
    Cause(
        code="stalled",
        pattern=re.compile(r"timed out waiting for (?:llama-server|llama runner)"),
        message="Ollama gave up a load that made no progress",
        hint="a card that hangs looks like this; OLLAMA_LOAD_TIMEOUT=30m after -- waits longer",
        deterministic=False,
    ),
)
_LOAD_FAILED = re.compile(r'msg="Load failed".* error="(?P<why>(?:[^"\\]|\\.)*)"')
_NOT_STARTED = re.compile(r'msg="failed to create server".* error="(?P<why>(?:[^"\\]|\\.)*)"')
_RUNNER_GONE = re.compile(r'msg="llama-server process no longer running" sys=(?P<signal>\d+)')
_STARTING = re.compile(r'msg="(?:starting llama-server|starting runner)" cmd=')
_ENDED = re.compile(
    r"(?:llama-server|llama runner) process (?:has terminated|no longer running):? ?(?P<why>.*)", re.DOTALL
)
_EXIT_STATUS = re.compile(r"exit status (\d+)|signal: (\w+)")
_SERVING = 'msg="Listening on '

_NOT_FOUND = re.compile(r"file does not exist|not found|manifest unknown", re.IGNORECASE)
_UNREACHABLE = re.compile(
    r"dial tcp|no such host|connection refused|connection reset|network is unreachable|i/o timeout|TLS|x509"
    r"|proxyconnect|context deadline exceeded",
)
_TOO_OLD = re.compile(r"requires? a newer version of Ollama", re.IGNORECASE)


def diagnose(lines: Sequence[str], exit_status: int | None) -> Failure:
    """Return why Ollama is no longer there, from its log and `Popen.returncode` (None when unknown). Never raises."""
    window = _window(lines)
    for cause in _CAUSES:
        for number, line in reversed(window):
            if match := cause.pattern.search(line):
                return _explained(cause, match, number, line)
    if found := load_failure(lines):
        return found
    # It ends with status 0 on a signal only, and logs nothing of it.
    if exit_status == 0 and any(_SERVING in line for line in lines):
        return Failure(code="stopped", message="ollama was asked to stop from outside, and did", deterministic=False)
    words = next((line for _, line in reversed(window) if line.startswith("Error: ")), None)
    return from_exit_status(ENGINE, exit_status, last_words=shorten(words) if words else None)


def load_failure(lines: Sequence[str]) -> Failure | None:
    """Return why the last load failed or the last runner died, as the log tells it; None when neither happened."""
    window = _window(lines)
    for place in range(len(window) - 1, -1, -1):
        number, line = window[place]
        if match := _LOAD_FAILED.search(line) or _NOT_STARTED.search(line):
            failure = _why_not_loaded(_unquoted(match["why"]), [text for _, text in window[:place]])
            return failure if failure.line else _at(failure, number, line)
        if match := _RUNNER_GONE.search(line):
            return _at(from_exit_status(RUNNER, -int(match["signal"][:3])), number, line)
        if _STARTING.search(line):
            return None
    return None


def explain_load(model: str, text: str, lines: Sequence[str] = ()) -> MgpuError:
    """Return the error for what Ollama answered to a request that loads or uses `model`.

    Where its runner ended, the `lines` of Ollama's log tell more than the answer does.
    """
    text = _plain(text)
    if re.search(r"model '?.*'? not found|try pulling it first", text):
        return Missing(
            f"Ollama does not have the model {shorten(model, 60)}",
            code="not-found",
            hint=f"mgpu pull ollama:{shorten(model, 60)}",
        )
    if _TOO_OLD.search(text):
        return EngineFailed(shorten(text), code="engine-too-old", hint="install a newer Ollama")
    failure = _why_not_loaded(text, [line for _, line in _window(lines)] if _ENDED.search(text) else ())
    if failure.code == "exited" and "no longer running" in text:
        # Ollama does not know its exit status, and the last lines are those of when all was well.
        return EngineFailed(
            "the model's llama-server ended while it answered", code="exited", hint="read the end of the log"
        )
    return EngineFailed(failure.message, code=failure.code, hint=failure.hint)


def explain_pull(tag: str, text: str) -> MgpuError:
    """Return the error for what Ollama answered to a request to fetch `tag`."""
    text, tag = _plain(text), shorten(tag, 60)
    if "sharded GGUF" in text:
        return Missing(
            f"{tag} comes in several parts, which Ollama cannot run", code="split-model", hint="use --backend llama.cpp"
        )
    if "no space left" in text:
        return Missing(f"the disk of Ollama's models is full: {tag} does not fit", code="disk-full")
    if _TOO_OLD.search(text):
        return EngineFailed(f"{tag} needs a newer Ollama", code="engine-too-old", hint="install a newer Ollama")
    if _UNREACHABLE.search(text):
        return Missing(
            shorten(f"Ollama cannot reach its library: {text}"),
            code="hub-unreachable",
            hint="check the network; Ollama takes proxies from HTTPS_PROXY in its own environment",
        )
    if _NOT_FOUND.search(text):
        return Missing(f"Ollama's library has no {tag}", code="not-found", hint="see https://ollama.com/library")
    return EngineFailed(shorten(f"Ollama could not fetch {tag}: {text}"), code="pull-failed")


def _why_not_loaded(text: str, before: Sequence[str]) -> Failure:
    """The cause of a failed load: in the runner's own lines, else in what Ollama repeats of them."""
    for cause in _CAUSES:
        if match := cause.pattern.search(text):
            return _explained(cause, match, None, None)
    ended = _ENDED.search(text)
    said = (ended["why"] if ended else text).replace("\\n", "\n")
    runner = _last_runner(before) or said.splitlines()
    status = _EXIT_STATUS.search(said)
    code = int(status[1]) if status and status[1] else -9 if status and status[2] == "killed" else None
    failure = llama_cpp_failure.diagnose(runner, code)
    if failure.code in ("exited", "engine-broken") and code is None and not ended:
        return Failure(
            code="load-failed", message=shorten(f"Ollama could not load the model: {text}"), deterministic=False
        )
    return failure


def _last_runner(lines: Sequence[str]) -> list[str]:
    """The lines the last runner wrote itself."""
    start = next((i for i in range(len(lines) - 1, -1, -1) if _STARTING.search(lines[i])), None)
    if start is None:
        return []
    return [line for line in lines[start:] if not line.startswith(("time=", "[GIN"))]


def _explained(cause: Cause, match: re.Match[str], number: int | None, line: str | None) -> Failure:
    words = {name: shorten(text or "", 60) for name, text in match.groupdict().items()}
    return Failure(
        code=cause.code,
        message=shorten(cause.message.format(**words)),
        hint=cause.hint,
        deterministic=cause.deterministic,
        line_number=number,
        line=shorten(line, LONGEST_LINE) if line else None,
    )


def _at(failure: Failure, number: int, line: str) -> Failure:
    return replace(failure, line_number=number, line=shorten(line, LONGEST_LINE))


def _window(lines: Sequence[str]) -> list[tuple[int, str]]:
    start = max(0, len(lines) - LINES_READ)
    return [(number + 1, lines[number][:4096]) for number in range(start, len(lines))]


def _unquoted(text: str) -> str:
    return text.replace("\\n", "\n").replace('\\"', '"').replace("\\\\", "\\")


def _plain(text: str) -> str:
    """The message of an error, which comes as text or as JSON."""
    with_json = text.strip()
    if with_json.startswith("{"):
        try:
            error = json.loads(with_json).get("error")
        except (ValueError, RecursionError, AttributeError):
            return text
        return str(error.get("message") if isinstance(error, dict) else error)
    return text
