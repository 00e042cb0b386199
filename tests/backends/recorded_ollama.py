"""Recorded output of a real Ollama 0.32.15 on a machine without a GPU: on its CPU, and on two software Vulkan
devices of 2 GiB that stand in for two cards. Routes, GGUF headers and sampling parameters were left out."""

from __future__ import annotations

from functools import cache
from pathlib import Path

FOLDER = Path(__file__).parent.parent / "data" / "logs" / "ollama"

# Ollama's old format, up to 0.24, as its users report it: it names cards by UUID and says itself what it allocated.
OLD = """\
time=2026-04-09T23:30:14.101Z level=INFO source=runner.go:67 msg="discovering available GPUs..."
time=2026-04-09T23:30:14.102Z level=INFO source=server.go:432 msg="starting runner" cmd="/usr/bin/ollama runner --ollama-engine --port 44781"
time=2026-04-09T23:30:14.951Z level=INFO source=types.go:42 msg="inference compute" id=GPU-aaaa filter_id="" library=CUDA compute=8.6 name=CUDA0 description="NVIDIA GeForce RTX 3090" libdirs=ollama,cuda_v13 driver=13.0 pci_id=0000:01:00.0 type=discrete total="24.0 GiB" available="23.5 GiB"
time=2026-04-09T23:30:14.951Z level=INFO source=types.go:42 msg="inference compute" id=GPU-bbbb filter_id="" library=CUDA compute=8.6 name=CUDA1 description="NVIDIA GeForce RTX 3090" libdirs=ollama,cuda_v13 driver=13.0 pci_id=0000:02:00.0 type=discrete total="24.0 GiB" available="23.5 GiB"
time=2026-04-09T23:30:15.001Z level=INFO source=server.go:432 msg="starting runner" cmd="/usr/bin/ollama runner --model /var/models/blobs/sha256-60e0 --port 44344"
time=2026-04-09T23:30:15.002Z level=INFO source=sched.go:491 msg="gpu memory" id=GPU-aaaa library=CUDA available="23.0 GiB" free="23.5 GiB" minimum="457.0 MiB" overhead="0 B"
time=2026-04-09T23:30:15.002Z level=INFO source=sched.go:491 msg="gpu memory" id=GPU-bbbb library=CUDA available="23.0 GiB" free="23.5 GiB" minimum="457.0 MiB" overhead="0 B"
time=2026-04-09T23:30:15.003Z level=INFO source=device.go:240 msg="model weights" device=CUDA0 size="19.9 GiB"
time=2026-04-09T23:30:17.630Z level=INFO source=runner.go:1284 msg=load request="{Operation:commit LoraPath:[] Parallel:1 BatchSize:512 FlashAttention:Enabled KvSize:8192 KvCacheType: NumThreads:8 GPULayers:49[ID:GPU-aaaa Layers:25(0..24) ID:GPU-bbbb Layers:24(25..48)] MultiUserCache:false ProjectorPath: MainGPU:0 UseMmap:false}"
time=2026-04-09T23:30:17.630Z level=INFO source=ggml.go:494 msg="offloaded 49/49 layers to GPU"
time=2026-04-09T23:30:17.630Z level=INFO source=device.go:240 msg="model weights" device=CUDA0 size="11.5 GiB"
time=2026-04-09T23:30:17.630Z level=INFO source=device.go:240 msg="model weights" device=CUDA1 size="11.9 GiB"
time=2026-04-09T23:30:17.630Z level=INFO source=device.go:245 msg="model weights" device=CPU size="680.0 MiB"
time=2026-04-09T23:30:17.631Z level=INFO source=device.go:251 msg="kv cache" device=CUDA0 size="1.0 GiB"
time=2026-04-09T23:30:17.631Z level=INFO source=device.go:251 msg="kv cache" device=CUDA1 size="960.0 MiB"
time=2026-04-09T23:30:17.631Z level=INFO source=device.go:262 msg="compute graph" device=CUDA0 size="884.1 MiB"
time=2026-04-09T23:30:17.631Z level=INFO source=device.go:262 msg="compute graph" device=CUDA1 size="270.6 MiB"
time=2026-04-09T23:30:17.631Z level=INFO source=device.go:272 msg="total memory" size="27.0 GiB"
""".splitlines()  # noqa: E501 - lines as they were printed


@cache
def text(name: str) -> str:
    return (FOLDER / name).read_text(encoding="utf-8", errors="replace")


def lines(name: str) -> list[str]:
    return text(f"{name}.log").splitlines()
