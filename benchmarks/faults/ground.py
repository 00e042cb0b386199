"""Where faults are injected: a machine of its own for each trial, with a state folder and engines that are fakes."""

from __future__ import annotations

import contextlib
import importlib.util
import os
import shutil
import signal
import subprocess
import sys
import tempfile
import threading
from collections.abc import Iterator, Sequence
from pathlib import Path

import psutil

from mgpu.backends.cpu_library import WHEEL
from mgpu.errors import MgpuError
from mgpu.models.fetch import fetch
from mgpu.profile import load_profile
from tests.cli.conftest import MEMORY, PROCESSORS
from tests.cli.deaths import Rig, child, vllm_worker
from tests.cli.program import ROOT, Mgpu
from tests.cli.test_run_ends import open_request as ask_llama
from tests.cli.vllm_rig import open_request as ask_vllm
from tests.cli.vllm_rig import with_vllm
from tests.fakes import vllm_environment
from tests.fakes.devices import NO_VULKAN, real_llama_server, rpc_devices
from tests.fakes.llama_server import install
from tests.fakes.shapes import SHAPES
from tests.fakes.sparse_gguf import make_sparse_gguf
from tests.fakes.tiny_llama import make_tiny_llama

_PERSONAL = ("MGPU_", "LLAMA_", "OLLAMA_", "VLLM_", "CUDA_", "GGML_", "FAKE_", "XDG_STATE", "XDG_CONFIG", "XDG_DATA")
_KEPT = ("MGPU_FAULT", "MGPU_TEST_")
# Long enough on a machine that does much else.
_SLOW = "slow-load:20"
_ONE_THREAD = ("--", "--threads", "1", "--threads-batch", "1")


class Ground:
    """A temporary folder, the fakes in it, and a new machine for each trial."""

    def __init__(self, folder: Path) -> None:
        self._folder = folder
        self._lock = threading.Lock()
        self._count = 0
        self.engine = install(folder)
        self.tiny = make_sparse_gguf(folder / "tiny.gguf", SHAPES["llama-3.2-1b"], "Q4_K_M", layers=4, vocabulary=1000)
        self.tiny_hf = make_tiny_llama(folder / "tiny")
        (folder / "root" / "proc").mkdir(parents=True)
        (folder / "root" / "proc" / "meminfo").write_text(MEMORY)
        (folder / "root" / "proc" / "cpuinfo").write_text(PROCESSORS)
        (folder / "no-driver").mkdir()
        (folder / "no-driver" / "libnvidia-ml.so.1").touch()  # found before a real one, and cannot be loaded

    @contextlib.contextmanager
    def mgpu(self, **environment: str) -> Iterator[Mgpu]:
        """mgpu on a computer without a card, with the fake llama-server and folders of its own; ended afterwards."""
        bare = {
            "MGPU_ROOT": str(self._folder / "root"),
            "LD_LIBRARY_PATH": str(self._folder / "no-driver"),
            **NO_VULKAN,
            "MGPU_LLAMA_SERVER": str(self.engine),
        }
        with self._machine({**bare, **environment}) as mgpu:
            yield mgpu

    @contextlib.contextmanager
    def llama(self) -> Iterator[Rig]:
        """The fake llama-server, with a child that ignores SIGTERM."""
        with self.mgpu(FAKE_FAIL="spawn-child") as mgpu:
            slow = {"FAKE_FAIL": f"spawn-child,{_SLOW}"}
            yield Rig(mgpu=mgpu, words=(self.tiny, "--interval", "0.1"), ask=ask_llama, worker=child, slow=slow)

    @contextlib.contextmanager
    def vllm(self) -> Iterator[Rig]:
        """The fake vLLM on two cards, whose workers ignore SIGTERM. Its cards' driver is a fake that gcc builds."""
        library = self._library()
        with self.mgpu(FAKE_TOKENS_PER_SECOND="50") as mgpu:
            with_vllm(mgpu, {"new": library}, mgpu.here.parent)
            starts = mgpu.here.parent / "starts"
            slow = {"FAKE_FAIL": _SLOW, "FAKE_FAIL_STARTS": f"1:{starts}"}
            words = (self.tiny_hf, "--gpus", "2", "--interval", "0.1")
            yield Rig(mgpu=mgpu, words=words, ask=ask_vllm, worker=vllm_worker, slow=slow)

    @contextlib.contextmanager
    def real(self) -> Iterator[Rig]:
        """The real llama-server with a small real model on two real RPC devices; these are its workers."""
        model = self._model()
        server = str(real_llama_server())
        with rpc_devices(2) as endpoints, self._machine({**NO_VULKAN, "MGPU_LLAMA_SERVER": server}) as mgpu:
            devices = _listening(endpoints)

            @contextlib.contextmanager
            def held() -> Iterator[None]:
                for process in devices:
                    process.send_signal(signal.SIGSTOP)
                try:
                    yield
                finally:
                    for process in devices:
                        with contextlib.suppress(psutil.NoSuchProcess):
                            process.send_signal(signal.SIGCONT)

            words = (model, "--ctx", "2048", "--interval", "0.1", *_ONE_THREAD, "--rpc", ",".join(endpoints))
            yield Rig(mgpu=mgpu, words=words, ask=ask_llama, worker=lambda _: devices[1].pid, hold=held)

    @contextlib.contextmanager
    def real_vllm(self) -> Iterator[Rig]:
        """The real vLLM, in two workers on the CPU; its two cards are a fake driver's."""
        cores = sorted(os.sched_getaffinity(0))
        bind = f"{cores[0]}|{cores[1]}" if len(cores) > 1 else "nobind"
        with self.mgpu() as mgpu:
            folder = mgpu.here.parent
            with_vllm(mgpu, {"new": self._library()}, folder)
            program = folder / "vllm"
            variables = f"VLLM_CPU_KVCACHE_SPACE=1 VLLM_CPU_OMP_THREADS_BIND='{bind}'"
            program.write_text(f"#!/bin/sh\n{variables} exec '{vllm_environment.real_vllm()}' \"$@\"\n")
            program.chmod(0o755)
            # What its flags are is asked once for all.
            mgpu.environment |= {"MGPU_VLLM": str(program), "XDG_CACHE_HOME": str(self._folder / "vllm-cache")}
            words = (self.tiny_hf, "--backend", "vllm", "--gpus", "2", "--ctx", "2048", "--interval", "0.1")
            yield Rig(mgpu=mgpu, words=(*words, "--", "--enforce-eager"), ask=ask_vllm, worker=vllm_worker)

    def lacks_for_real_vllm(self) -> str | None:
        """What `real_vllm` needs and this machine has not."""
        wanted = os.environ.get(vllm_environment.VARIABLE) == "1"
        return self.lacks_for_vllm() if wanted else "MGPU_TEST_VLLM=1 asks for it: 2.5 GB, half an hour"

    def lacks_for_vllm(self) -> str | None:
        """What `vllm` needs and this machine has not."""
        return None if shutil.which("gcc") else "the fake driver of its cards needs gcc to be built"

    def lacks_for_real(self) -> str | None:
        """What `real` needs and this machine has not."""
        if importlib.util.find_spec(WHEEL) is None:
            return "no llama-server is installed (pip install -e .[llamacpp])"
        try:
            self._model()
        except MgpuError as error:
            return f"the model cannot be had: {error.message}"
        return None

    def folder(self) -> Path:
        """A new and empty folder."""
        with self._lock:
            self._count += 1
            folder = self._folder / str(self._count)
        folder.mkdir()
        return folder

    @contextlib.contextmanager
    def _machine(self, environment: dict[str, str]) -> Iterator[Mgpu]:
        folder = self.folder()
        for name in ("state", "t"):
            (folder / name).mkdir(mode=0o700)
        mgpu = Mgpu(folder, {**environment, "XDG_STATE_HOME": str(folder / "state"), "TMPDIR": str(folder / "t")})
        mgpu.state = folder / "state" / "mgpu"
        try:
            yield mgpu
        finally:
            mgpu.end_all()
            shutil.rmtree(folder, ignore_errors=True)

    def _model(self) -> Path:
        profile = load_profile("smollm2-135m").profile
        return fetch(profile.quantisations[profile.default_quantisation])

    def _library(self) -> Path:
        with self._lock:
            folder = self._folder / "driver"
            if not folder.exists():
                folder.mkdir()
                build = [sys.executable, str(ROOT / "tests/fakes/nvml/build.py"), str(folder), "--new"]
                subprocess.run(build, check=True, capture_output=True)
        return folder


@contextlib.contextmanager
def ground() -> Iterator[Ground]:
    """A ground, and an environment without anything personal; both are over afterwards."""
    before = dict(os.environ)
    with tempfile.TemporaryDirectory(prefix="mgpu-") as place:
        for name in list(os.environ):
            if name.startswith(_PERSONAL) and not name.startswith(_KEPT):
                del os.environ[name]
        os.environ |= {"XDG_STATE_HOME": f"{place}/state", "XDG_CONFIG_HOME": f"{place}/config"}
        try:
            yield Ground(Path(place))
        finally:
            os.environ.clear()
            os.environ.update(before)


def _listening(endpoints: Sequence[str]) -> list[psutil.Process]:
    """The processes behind endpoints, of those that this one has started."""
    ports = [endpoint.rpartition(":")[2] for endpoint in endpoints]
    mine = psutil.Process().children()
    return [next(each for each in mine if port in _words(each)) for port in ports]


def _words(process: psutil.Process) -> list[str]:
    try:
        return list(process.cmdline())
    except psutil.Error:  # another one's, dead and not yet waited for
        return []
