"""Asks llama-server what it would allocate for models without data, and plans the same.

    python -m tests.planning.engine_rows    # writes tests/data/llama_cpp_memory_sparse.csv anew, in half a minute

It needs the `llamacpp` extra and, for the Vulkan rows, Mesa's software renderer.
"""

from __future__ import annotations

import csv
import os
import re
import subprocess
import tempfile
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass, fields, replace
from functools import cache
from itertools import chain
from pathlib import Path

from mgpu.machine.snapshot import Gpu, Host
from mgpu.models.facts import ModelFacts
from mgpu.models.gguf import GgufHeader
from mgpu.models.gguf_facts import facts_from_header
from mgpu.planning.candidates import Candidate, place_layers
from mgpu.planning.wants import Wants
from mgpu.units import GIB
from tests.fakes.devices import NO_VULKAN, lavapipe_environment, real_llama_server, rpc_devices
from tests.fakes.sparse_models import MODELS, SparseModel

ROWS = Path(__file__).parents[1] / "data" / "llama_cpp_memory_sparse.csv"
# A software renderer takes no matrix above 128 MiB: there, the models have few tokens.
_FEW_TOKENS = 8192


@dataclass(frozen=True)
class Asked:
    """One question: a model on devices, and llama-server's options."""

    model: str
    backend: str = "RPC"
    devices: int = 2
    ctx: int = 32768
    np: int = 1
    ctk: str = "f16"
    ctv: str = "f16"
    fa: str = "auto"
    ub: int = 512
    ngl: int = 999
    extra: str = ""

    @property
    def sparse(self) -> SparseModel:
        model = MODELS[self.model]
        return replace(model, vocabulary=_FEW_TOKENS) if self.backend == "Vulkan" else model


@dataclass(frozen=True)
class Answer:
    """What the engine projects for a device, or for the host (everything else): MiB, whole ones but for `compute`."""

    device: str
    weights_mib: int
    kv_mib: int
    compute_mib: float


def questions() -> Iterator[Asked]:
    """Yield what is asked of every model; what a software renderer cannot hold is left out."""
    for name, model in MODELS.items():
        experts = "expert_count" in model.keys
        yield Asked(name)
        yield Asked(name, devices=1)
        yield Asked(name, ctx=131_072)
        yield Asked(name, ctx=2048, ub=256)
        yield Asked(name, ctx=8192, ub=1024)
        yield Asked(name, np=4)
        yield Asked(name, ctx=30_720, np=3, extra="--kv-unified")
        yield Asked(name, ctk="q8_0", ctv="q8_0")
        if model.architecture != "deepseek2":  # it has one type for the whole cache
            yield Asked(name, ub=2048, ctk="q8_0", ctv="q4_0")
        yield Asked(name, fa="off")
        yield Asked(name, extra="--swa-full")
        yield Asked(name, extra="-nkvo")
        yield Asked(name, ngl=10)
        if experts:
            yield Asked(name, extra="-ncmoe 7")
        # Its matrices of experts would have to be small, and no scan over states so long be needed.
        if not experts or name == "qwen3moe-small":
            on_vulkan = Asked(name, backend="Vulkan")
            yield on_vulkan
            yield replace(on_vulkan, ctk="q8_0", ctv="q8_0")
            yield replace(on_vulkan, ctx=2048, ub=128, fa="off")
            yield replace(on_vulkan, ngl=15)
            yield Asked(name, backend="Vulkan", devices=1, ngl=9)
            if experts:
                yield Asked(name, backend="Vulkan", devices=1, extra="-ncmoe 7")
                yield Asked(name, backend="Vulkan", extra="-ncmoe 7")


def ask(asked: Asked, path: Path, endpoints: Sequence[str]) -> tuple[Answer, ...]:
    """Return what llama-server projects for the model at `path`; nothing where it refuses."""
    names = [f"{asked.backend}{index}" for index in range(asked.devices)]
    command = [str(real_llama_server()), "-m", str(path)]
    environment = {**os.environ, "GGML_VK_VISIBLE_DEVICES": ",".join("0" * asked.devices)}
    if asked.backend == "RPC":
        command += ["--rpc", ",".join(endpoints[: asked.devices])]  # before their names
        environment |= NO_VULKAN
    command += ["-dev", ",".join(names), "-ts", ",".join("1" * asked.devices)]
    command += ["-c", str(asked.ctx), "-np", str(asked.np), "-ctk", asked.ctk, "-ctv", asked.ctv, "-fa", asked.fa]
    command += ["-ub", str(asked.ub), "-b", "2048", "-ngl", str(asked.ngl), "--fit", "on", "-lv", "5", "--port", "0"]
    rows: dict[str, list[int]] = {}
    exact: list[float] = []
    with subprocess.Popen(
        [*command, *asked.extra.split()],
        env=environment,
        stdin=subprocess.DEVNULL,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        errors="replace",
    ) as server:
        assert server.stdout
        for line in server.stdout:
            if buffer := _BUFFER.search(line):
                exact.append(float(buffer[1]))
            elif row := _ROW.search(line):
                name = row[1] if row[1] in names else "Host"
                parts = rows.setdefault(name, [0, 0, 0])
                rows[name] = [part + int(more) for part, more in zip(parts, row.groups()[1:], strict=True)]
            elif rows:
                break
        server.kill()
    # The buffers come in the order of the devices, the host's last.
    order = [*names, "Host"]
    computed = dict(zip(order, exact, strict=False)) if len(exact) == len(order) else {}
    return tuple(
        Answer(name, rows[name][0], rows[name][1], computed.get(name, rows[name][2])) for name in order if name in rows
    )


def plan(asked: Asked) -> Candidate:
    """Return the plan of what is asked."""
    gpus = [
        Gpu(
            index=index,
            vendor="other",
            name="card",
            total_bytes=9000 * GIB,
            free_bytes=9000 * GIB,
            engine_devices=(f"{asked.backend}{index}",),
        )
        for index in range(asked.devices)
    ]
    option, _, count = asked.extra.partition(" ")
    wants = Wants(
        parallel=asked.np,
        kv_type_k=asked.ctk,
        kv_type_v=asked.ctv,
        ubatch=asked.ub,
        flash_attention=asked.fa,
        tensor_split=(1.0,) * asked.devices,
        kv_unified=option == "--kv-unified",
        swa_full=option == "--swa-full",
        kv_on_host=option == "-nkvo",
        cpu_moe_layers=int(count) if option == "-ncmoe" else 0,
    )
    facts = facts_of(asked.model, few_tokens=asked.backend == "Vulkan")
    host_units = max(len(facts.layers) + 1 - asked.ngl, 0)
    return place_layers(facts, wants, gpus, Host(), asked.ctx // asked.np, host_units=host_units)


@cache
def facts_of(model: str, *, few_tokens: bool = False) -> ModelFacts:
    """Return the facts of a model by its header, without writing it."""
    sparse = Asked(model, backend="Vulkan" if few_tokens else "RPC").sparse
    return facts_from_header(
        GgufHeader(
            path=Path(model),
            parts=(Path(model),),
            version=3,
            metadata=sparse.metadata(),
            tensors=tuple(sparse.tensors()),
            file_bytes=0,
        )
    )


def read_rows() -> dict[Asked, tuple[Answer, ...]]:
    """Return the questions that were asked, with their answers."""
    found: dict[Asked, list[Answer]] = {}
    with ROWS.open(newline="") as file:
        for row in csv.DictReader(file):
            asked = Asked(
                model=row["model"],
                backend=row["backend"],
                extra=row["extra"],
                ctk=row["ctk"],
                ctv=row["ctv"],
                fa=row["fa"],
                devices=int(row["devices"]),
                ctx=int(row["ctx"]),
                np=int(row["np"]),
                ub=int(row["ub"]),
                ngl=int(row["ngl"]),
            )
            parts = int(row["weights_mib"]), int(row["kv_mib"]), float(row["compute_mib"])
            found.setdefault(asked, []).append(Answer(row["device"], *parts))
    return {asked: tuple(answers) for asked, answers in found.items()}


def main() -> None:
    columns = ["build", *(each.name for each in chain(fields(Asked), fields(Answer)))]
    with tempfile.TemporaryDirectory() as folder, rpc_devices(2) as endpoints, ROWS.open("w", newline="") as file:
        writer = csv.DictWriter(file, columns, lineterminator="\n")
        writer.writeheader()
        for asked in questions():
            if asked.backend == "Vulkan" and not lavapipe_environment():
                continue
            path = Path(folder) / f"{asked.model}-{asked.sparse.vocabulary}.gguf"
            if not path.exists():
                asked.sparse.write(path)
            for answer in ask(asked, path, endpoints):
                writer.writerow({"build": BUILD, **asdict(asked), **asdict(answer)})


BUILD = "b10434"
_BUFFER = re.compile(r"sched_reserve: .* compute buffer size = +([\d.]+) MiB")
_ROW = re.compile(r"memory_breakdown_print: \|\s+- (\w+).*= +(\d+) \+ +(\d+) \+ +(\d+)")

if __name__ == "__main__":
    main()
