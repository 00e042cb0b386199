"""Engines that mgpu did not start, in a tree of /proc as the kernel has it."""

from __future__ import annotations

import http.server
import os
import socket
import subprocess
import sys
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path

import pytest

from mgpu.machine.snapshot import Gpu, GpuProcess, Machine
from mgpu.running import strangers as module
from mgpu.running.census import census_of
from mgpu.running.identity import identity
from mgpu.running.instance import GpuShare, State
from mgpu.running.registry import Entry
from mgpu.running.strangers import engine_name, strangers
from tests.fakes.engines import until
from tests.running.crashing_supervisor import starting

GIB = 1 << 30
LOCALHOST = "0100007F"


class Tree:
    """/proc under a root."""

    def __init__(self, root: Path) -> None:
        self.root = root
        (root / "proc" / "net").mkdir(parents=True)

    def process(self, pid: int, *command: str, parent: int = 1, sockets: tuple[int, ...] = ()) -> None:
        folder = self.root / "proc" / str(pid)
        (folder / "fd").mkdir(parents=True)
        (folder / "cmdline").write_bytes(b"".join(os.fsencode(word) + b"\0" for word in command))
        (folder / "stat").write_text(f"{pid} (a ) name) S {parent} {pid} {pid} " + "0 " * 20)
        for number, inode in enumerate(sockets):
            (folder / "fd" / str(number)).symlink_to(f"socket:[{inode}]")

    def listens(self, *sockets: tuple[int, int], address: str = LOCALHOST, name: str = "tcp") -> None:
        lines = [
            f"   0: {address}:{port:04X} 00000000:0000 0A 00000000:00000000 00:00000000 00000000  0 0 {inode} 1"
            for port, inode in sockets
        ]
        (self.root / "proc" / "net" / name).write_text("\n".join(["  sl  local_address ...", *lines, "damaged", ""]))


@pytest.fixture
def tree(tmp_path: Path) -> Tree:
    return Tree(tmp_path)


def machine(*used: GpuProcess) -> Machine:
    cards = (Gpu(index=0, vendor="nvidia", name="a card", uuid="GPU-0", used_by=used),)
    return Machine(captured_at="2026-01-02T03:04:05Z", source="probed", gpus=cards)


def found(tree: Tree, *used: GpuProcess, own: set[int] | None = None) -> list[tuple[int | None, str, str | None]]:
    return [(each.pid, each.name, each.url) for each in strangers(machine(*used), own or set(), set(), tree.root)]


@pytest.mark.parametrize(
    ("command", "name"),
    [
        pytest.param(("/usr/bin/ollama", "serve"), "ollama", id="Ollama"),
        pytest.param(("/opt/llama.cpp/llama-server", "-m", "x.gguf"), "llama.cpp", id="llama-server"),
        pytest.param(("/venv/bin/python3", "/venv/bin/vllm", "serve", "model"), "vllm", id="vLLM, by its script"),
        pytest.param(("python3", "-m", "vllm.entrypoints.openai.api_server"), "vllm", id="vLLM, by its module"),
        pytest.param(("VLLM::Worker_TP0",), "vllm", id="a worker of vLLM"),
        pytest.param(("python3", "-m", "sglang.launch_server"), "sglang", id="SGLang"),
        pytest.param(("/usr/lib/Xorg",), None, id="a desktop"),
        pytest.param(("vim", "ollama:notes"), None, id="a file that is called so"),
        pytest.param(("mgpu", "run", "ollama:qwen"), None, id="mgpu with a model of Ollama's"),
        pytest.param((), None, id="a thread of the kernel"),
        pytest.param(("\udcff\x1b",), None, id="no text"),
    ],
)
def test_an_engine_is_known_by_its_command(tree: Tree, command: tuple[str, ...], name: str | None) -> None:
    tree.process(77, *command)
    assert engine_name(77, tree.root) == name


def test_an_engine_is_one_with_all_that_it_has_started(tree: Tree) -> None:
    tree.listens((11434, 500))
    tree.process(70, "/usr/bin/ollama", "serve", sockets=(500,))
    tree.process(71, "/usr/bin/ollama", "runner", parent=70)
    tree.process(72, "/usr/bin/ollama", "runner", parent=70)
    (one,) = strangers(machine(GpuProcess(pid=71, bytes=GIB), GpuProcess(pid=72, bytes=GIB)), set(), set(), tree.root)
    assert (one.pid, one.name, one.url) == (70, "ollama", "http://127.0.0.1:11434")
    assert one.gpus == (GpuShare(uuid="GPU-0", index=0, actual_bytes=2 * GIB),)


def test_what_holds_much_is_shown_whatever_it_is(tree: Tree) -> None:
    tree.process(70, "python3", "train.py")
    tree.process(71, "/usr/lib/Xorg")
    used = (GpuProcess(pid=70, name="python3", bytes=GIB), GpuProcess(pid=71, name="Xorg", bytes=GIB // 4))
    assert found(tree, *used, GpuProcess(pid=72, bytes=None)) == [(70, "python3", None)]


def test_an_engine_that_holds_no_card_is_found_where_it_listens(tree: Tree) -> None:
    tree.listens((9999, 500))
    tree.listens((8000, 501), address="0" * 32, name="tcp6")
    tree.process(70, "llama-server", sockets=(500,))
    tree.process(71, "python3", "/bin/vllm", sockets=(7, 501))
    tree.process(72, "nginx", sockets=(502,))
    assert found(tree) == [(70, "llama.cpp", "http://127.0.0.1:9999"), (71, "vllm", "http://127.0.0.1:8000")]
    assert found(tree, own={70, 71}) == []


def test_a_machine_without_proc_has_no_strangers(tmp_path: Path) -> None:
    assert strangers(machine(), set(), set(), tmp_path) == ()


@contextmanager
def server(body: bytes) -> Iterator[int]:
    """The port of somebody who answers all with this."""

    class Handler(http.server.BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            self.wfile.write(b"HTTP/1.0 200 OK\r\n\r\n" + body)

        def log_message(self, format: str, *args: object) -> None:  # noqa: A002
            pass

    with http.server.HTTPServer(("127.0.0.1", 0), Handler) as listening:
        thread = threading.Thread(target=listening.serve_forever, kwargs={"poll_interval": 0.01})
        thread.start()
        yield listening.server_port
        listening.shutdown()
        thread.join()


@pytest.mark.parametrize(
    ("body", "name"),
    [
        pytest.param(b'{"data": [{"id": "x", "owned_by": "llamacpp"}]}', "llama.cpp", id="a llama-server"),
        pytest.param(b'{"data": [{"id": "x", "owned_by":"vllm"}]}', "vllm", id="a vLLM"),
        pytest.param(b"<html>a router's page", None, id="something else"),
        pytest.param(b"\xff" * 100_000, None, id="garbage"),
    ],
)
def test_one_that_is_hidden_on_an_engines_port_is_asked(
    tree: Tree, monkeypatch: pytest.MonkeyPatch, body: bytes, name: str | None
) -> None:
    with server(body) as port:
        monkeypatch.setattr(module, "PORTS", {port: "llama.cpp"})
        tree.listens((port, 500))
        assert found(tree) == ([(None, name, f"http://127.0.0.1:{port}")] if name else [])


def test_one_that_does_not_answer_is_nothing(tree: Tree, monkeypatch: pytest.MonkeyPatch) -> None:
    with socket.create_server(("127.0.0.1", 0)) as silent:
        port = silent.getsockname()[1]
        monkeypatch.setattr(module, "PORTS", {port: "llama.cpp"})
        tree.listens((port, 500))
        assert found(tree) == []


def test_a_process_of_an_engine_that_made_a_group_of_its_own_counts_to_its_instance(tmp_path: Path) -> None:
    script = "import os, subprocess, time; subprocess.Popen(['sleep', '600'], process_group=0); time.sleep(600)"
    with subprocess.Popen([sys.executable, "-c", script]) as process:
        children = Path(f"/proc/{process.pid}/task/{process.pid}/children")
        until(lambda: bool(children.read_text().split()))
        child = int(children.read_text().split()[0])
        engine = identity(process.pid)
        assert engine
        shares = tuple(GpuShare(uuid=f"GPU-{index}", index=index, planned_bytes=GIB) for index in range(3))
        instance = replace(starting(), state=State.READY, engine=engine, gpus=shares)
        entry = Entry(
            name="llama",
            folder=tmp_path,
            instance=instance,
            problem=None,
            supervisor=instance.supervisor,
            engine=(engine,),
        )
        used = (GpuProcess(pid=process.pid, bytes=GIB), GpuProcess(pid=child, bytes=2 * GIB))
        two = machine(*used)
        two = replace(two, gpus=(*two.gpus, replace(two.gpus[0], index=1, uuid="GPU-1", used_by=())))
        census = census_of([entry], two, Path("/"))
        assert census.entries[0].instance
        # The second card holds nothing, whatever was planned; of the third no driver tells.
        assert [share.actual_bytes for share in census.entries[0].instance.gpus] == [3 * GIB, 0, None]
        assert not {each.pid for each in census.strangers} & {process.pid, child}
        os.kill(child, 9)
        process.kill()
