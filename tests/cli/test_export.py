"""`mgpu export`: units that systemd takes, whatever is in them, and scripts that start the planned engine."""

from __future__ import annotations

import json
import os
import re
import shutil
import signal
import subprocess
from dataclasses import replace
from pathlib import Path

import pytest

from mgpu.cli.systemd_unit import Service, quoted, unit_text
from mgpu.errors import UsageError
from tests.fakes.devices import free_port

from .contract import TEXT, checked, exactly, maybe
from .program import Mgpu, request, until
from .records import supervisor
from .test_run_fake import SECRET, TWO_CARDS

EXPORT = exactly(**{"as": {"enum": ["shell", "systemd"]}}, name=TEXT, unit=maybe(TEXT), path=maybe(TEXT), text=TEXT)
NASTY = (
    *("a b", "100%", "%h", "$HOME", "${HOME}", "$$", '"q"', "'s'", "\\", "\\x41", "tab\t", "line\nbreak", ";", "\\;"),
    *("", "é", "\u00a0", "\x01", "#c", "-", "@x", "a=b", "ends\\", "{}", "|", "日本", " before", "after ", "😀"),
)
SERVICE = Service(
    name="llama-8b",
    model="a model",
    command=("/bin/true", "run", "llama-8b"),
    environment={"PATH": "/usr/bin"},
    key_file=Path("/etc/mgpu/a %h key.env"),
    key_required=False,
    writable=(Path("/var/lib/mgpu"),),
)


@pytest.mark.parametrize(
    ("word", "expected"),
    [
        ("plain/word-1.0=a,b:c@d+e_f", "plain/word-1.0=a,b:c@d+e_f"),
        ("", '""'),
        ("a b", '"a b"'),
        ("50%", '"50%%"'),
        ("$HOME", '"$$HOME"'),
        ('"\\', '"\\"\\\\"'),
        (";", '";"'),
        ("a\nb\t", '"a\\x0ab\\x09"'),
        ("é\u00a0", '"é\\xc2\\xa0"'),
    ],
)
def test_a_word_stays_one_word_and_as_it_is(word: str, expected: str) -> None:
    assert quoted(word) == expected


def test_what_expands_no_variables_keeps_its_dollars() -> None:
    assert quoted("A=$HOME %h", expands=False) == '"A=$HOME %%h"'


def verify(path: Path, scope: str) -> None:
    """See that systemd has nothing to say against a unit."""
    if shutil.which("systemd-analyze") is None:
        pytest.skip("systemd-analyze is not installed")
    environment = {**os.environ, "XDG_RUNTIME_DIR": str(path.parent)}
    command = ["systemd-analyze", scope, "verify", str(path)]
    found = subprocess.run(command, env=environment, capture_output=True, text=True, check=False)
    about_it = [line for line in found.stderr.splitlines() if path.name in line]
    assert (found.returncode, about_it) == (0, []), found.stderr


@pytest.mark.parametrize("user", [None, "root"])
@pytest.mark.parametrize(
    "service",
    [
        pytest.param(SERVICE, id="an ordinary one"),
        pytest.param(replace(SERVICE, command=("/bin/true", *NASTY)), id="nasty arguments"),
        pytest.param(replace(SERVICE, model="".join(NASTY)), id="a nasty name"),
        pytest.param(replace(SERVICE, environment={"A": "".join(NASTY)}), id="a nasty variable"),
        pytest.param(replace(SERVICE, writable=(Path("/a b/%h/$c/;\\ \n"),)), id="nasty folders"),
        pytest.param(replace(SERVICE, folder=Path("/a b/%h;\\")), id="a nasty current folder"),
        pytest.param(replace(SERVICE, before_start=(("/bin/true", "-c 0"),)), id="with a command before it"),
        pytest.param(replace(SERVICE, key_required=True), id="with a key"),
    ],
)
def test_systemd_takes_the_unit(service: Service, user: str | None, tmp_path: Path) -> None:
    path = tmp_path / service.unit
    path.write_text(unit_text(replace(service, user=user)))
    verify(path, "--system" if user else "--user")


def test_a_unit_that_systemd_refuses_is_noticed(tmp_path: Path) -> None:
    path = tmp_path / "broken.service"
    path.write_text(unit_text(SERVICE).replace("/bin/true", "/bin/no-such-program"))
    with pytest.raises(AssertionError, match="no-such-program"):
        verify(path, "--user")


def test_what_no_unit_can_hold_is_refused() -> None:
    with pytest.raises(UsageError, match="UTF-8"):
        unit_text(replace(SERVICE, command=("/bin/true", "\udcff")))


def lines(text: str, name: str) -> list[str]:
    return [line.partition("=")[2] for line in text.splitlines() if line.startswith(f"{name}=")]


@pytest.mark.parametrize(
    ("service", "private"),
    [
        pytest.param(SERVICE, True, id="nothing there"),
        pytest.param(replace(SERVICE, command=("/bin/true", "/tmp/model.gguf")), False, id="the model"),
        pytest.param(replace(SERVICE, environment={"PATH": "/bin:/var/tmp/venv"}), False, id="a program"),
        pytest.param(replace(SERVICE, command=("/bin/true", "/home/x/tmp/y")), True, id="another folder of that name"),
    ],
)
def test_the_folder_of_temporary_files_is_private_unless_something_is_in_the_shared_one(
    service: Service, private: bool
) -> None:
    text = unit_text(service)
    assert (lines(text, "PrivateTmp") == ["yes"], "-/tmp" not in lines(text, "ReadWritePaths")[0].split()) == (
        private,
        private,
    )


def test_a_unit_runs_what_was_typed_and_no_more(mgpu: Mgpu, tiny: Path, tmp_path: Path) -> None:
    link = mgpu.here / "my model.gguf"
    link.symlink_to(tiny)
    path = tmp_path / "mgpu.service"
    words = ("--ctx", "4k", "--kv-type", "f16", "--port", "8099", "-o", path, "--", "--slots", "50%")
    ended = mgpu("export", "./my model.gguf", "--as", "systemd", *words)
    link.unlink()
    assert (ended.exit_code, ended.out) == (0, f"written {path}\n")
    (command,) = lines(path.read_text(), "ExecStart")
    program, _, rest = command.partition(" run ")
    assert Path(program.split()[0]).is_absolute()
    assert rest == (
        f'"{mgpu.here}/my model.gguf" --name my-model --port 8099 '
        f'--restart on-failure --ctx 4k --kv-type f16 -- --slots "50%%"'
    )
    assert lines(path.read_text(), "WorkingDirectory") == [f"-{mgpu.here}/"]
    assert f"-{mgpu.state}" in lines(path.read_text(), "ReadWritePaths")[0]
    verify(path, "--user")


@pytest.mark.parametrize(("model", "title"), [("llama-8b", "mgpu: llama-8b"), ("a model", "mgpu: a model as llama-8b")])
def test_what_is_named_as_its_model_is_named_once(model: str, title: str) -> None:
    assert lines(unit_text(replace(SERVICE, model=model)), "Description") == [title]


def test_what_is_missing_is_tried_again_and_wrong_usage_is_not() -> None:
    found = {name: lines(unit_text(SERVICE), name) for name in ("RestartPreventExitStatus", "SuccessExitStatus")}
    assert found == {"RestartPreventExitStatus": ["2"], "SuccessExitStatus": ["130"]}


def test_units_and_scripts_listen_on_a_port_that_lasts(mgpu: Mgpu, tiny: Path) -> None:
    for form in ("systemd", "shell"):  # each with the first port that is free in its moment
        text = mgpu("export", tiny, "--as", form, "--json").json["data"]["text"]
        assert len(re.findall(r"--port [1-9]\d+\b", text)) == 1, text
    with supervisor(mgpu, "tiny", url="http://127.0.0.1:9123"):
        assert "--port 9123" in mgpu("export", tiny, "--as", "systemd").out


def test_a_folder_that_path_names_twice_is_written_once(mgpu: Mgpu, tiny: Path) -> None:
    path = mgpu.environment["PATH"]
    text = mgpu("export", tiny, "--as", "systemd", PATH=f"{path}:/of/mine:{path}:/of/mine").out
    (setting,) = re.findall(r"Environment=\"?PATH=([^\"\n]*)", text)
    assert setting.split(":") == list(dict.fromkeys([*path.split(":"), "/of/mine"]))


def test_a_script_of_a_model_that_is_not_here_says_so(mgpu: Mgpu) -> None:
    ended = mgpu("export", "llama-8b", "--as", "shell", "--offload", "allow")
    assert ended.exit_code == 0, ended
    assert "mgpu pull llama-8b, then export it again" in ended.err
    assert "not here yet" not in mgpu("export", "llama-8b", "--as", "systemd").err  # which fetches it


@pytest.mark.parametrize("form", ["systemd", "shell"])
def test_a_key_is_in_no_file(mgpu: Mgpu, tiny: Path, form: str) -> None:
    ended = mgpu("export", tiny, "--as", form, MGPU_API_KEY=SECRET, HF_TOKEN="hf_abcdefgh", HF_ENDPOINT="https://u:p@h")
    assert ended.exit_code == 0
    assert not [secret for secret in (SECRET, "hf_abcdefgh", "u:p@h") if secret in ended.out + ended.err]
    if form == "systemd":
        assert lines(ended.out, "EnvironmentFile") == [f"{Path(os.environ['XDG_CONFIG_HOME'])}/mgpu/tiny.env"]
        assert "holds MGPU_API_KEY" in ended.err
    else:
        assert ': "${LLAMA_API_KEY:?}"' in ended.out


def test_without_a_key_none_is_required_and_in_the_network_one_is(mgpu: Mgpu, tiny: Path) -> None:
    alone, network = (
        mgpu("export", tiny, "--as", "systemd", "--host", host, "--json").json for host in ("127.0.0.1", "0.0.0.0")
    )
    assert lines(checked(alone, "export", EXPORT)["text"], "EnvironmentFile")[0].startswith("-")
    assert not lines(network["data"]["text"], "EnvironmentFile")[0].startswith("-")
    assert any("MGPU_API_KEY" in warning for warning in network["warnings"])
    open_to_all = mgpu("export", tiny, "--as", "systemd", "--host", "0.0.0.0", "--insecure", "--json").json
    assert lines(open_to_all["data"]["text"], "EnvironmentFile")[0].startswith("-")
    assert "--host 0.0.0.0 --insecure" in open_to_all["data"]["text"]


def test_a_unit_of_the_system_runs_as_the_user(mgpu: Mgpu, tiny: Path, tmp_path: Path) -> None:
    path = tmp_path / "mgpu.service"
    assert mgpu("export", tiny, "--as", "systemd", "--system", "-o", path).exit_code == 0
    text = path.read_text()
    assert (len(lines(text, "User")), lines(text, "WantedBy")) == (1, ["multi-user.target"])
    verify(path, "--system")


def test_the_script_starts_the_planned_engine(mgpu: Mgpu, tiny: Path, tmp_path: Path) -> None:
    script, port = tmp_path / "serve.sh", free_port()
    words = ("--as", "shell", "--ctx", "4k", "--port", port, "-o", script)
    assert mgpu("export", tiny, *words, FAKE_DEVICES=TWO_CARDS).exit_code == 0
    environment = mgpu.with_variables(FAKE_DEVICES=TWO_CARDS, CUDA_VISIBLE_DEVICES="7")
    log = tmp_path / "log"
    with log.open("wb") as out, subprocess.Popen([script], env=environment, stdout=out, stderr=out) as engine:
        until(lambda: b"listening on" in log.read_bytes() or engine.poll() is not None, "the engine listens")
        assert engine.poll() is None, log.read_text()
        assert request(f"http://127.0.0.1:{port}", "/v1/models")[0] == 200
        assert str(tiny) in Path(f"/proc/{engine.pid}/cmdline").read_text()  # exec: no shell in between
        engine.send_signal(signal.SIGTERM)


@pytest.mark.parametrize(
    ("words", "exit_code", "code"),
    [
        pytest.param("--as compose", 2, "usage", id="not there yet"),
        pytest.param("--as llama-swap", 2, "usage", id="not there yet either"),
        pytest.param("--as nonsense", 2, "usage", id="nothing there is"),
        pytest.param("", 2, "usage", id="nothing said"),
        pytest.param("--as systemd --name a/b", 2, "usage", id="a name that is none"),
        pytest.param("--as systemd --host nowhere.invalid", 2, "usage", id="a host that is none"),
        pytest.param("--as shell --ctx 9999999", 1, "does-not-fit", id="a script of what does not fit"),
        pytest.param("--as shell --host 0.0.0.0", 2, "usage", id="a script of a server that is open to the network"),
        pytest.param("--as shell --api-key x", 2, "usage", id="a key on the command line"),
        pytest.param("--as shell -o /proc/file", 3, "output-unwritable", id="where nothing can be written"),
        pytest.param("--as shell -o no/such/folder", 3, "output-unwritable", id="a folder that is not there"),
    ],
)
def test_what_cannot_be_exported_is_said_so(mgpu: Mgpu, tiny: Path, words: str, exit_code: int, code: str) -> None:
    ended = mgpu("export", tiny, *words.split(), "--json")
    assert (ended.exit_code, ended.json["errors"][0]["code"]) == (exit_code, code), ended.json


def test_a_service_may_wait_for_memory(mgpu: Mgpu, tiny: Path) -> None:
    found = mgpu("export", tiny, "--as", "systemd", "--ctx", "9999999", "--json").json
    assert (found["ok"], "does not fit now" in json.dumps(found["warnings"])) == (True, True)


def test_only_what_mgpu_exported_is_replaced(mgpu: Mgpu, tiny: Path, tmp_path: Path) -> None:
    path = tmp_path / "a folder" / "mine"
    refused = mgpu("export", tiny, "--as", "systemd", "-o", path)
    assert (refused.exit_code, f"mkdir -p '{path.parent}'" in refused.err, path.parent.exists()) == (3, True, False)
    path.parent.mkdir()
    for told in ("written", "replaced"):
        assert mgpu("export", tiny, "--as", "systemd", "-o", path).out == f"{told} {path}\n"
    assert path.stat().st_mode & 0o777 == 0o644
    path.write_text("precious")
    assert mgpu("export", tiny, "--as", "systemd", "-o", path).exit_code == 2
    assert [each.read_text() for each in path.parent.iterdir()] == ["precious"]
