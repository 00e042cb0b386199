"""Work to predict the speed of, made by hand."""

from __future__ import annotations

from dataclasses import replace

from mgpu.planning.prediction import Prediction, predict
from mgpu.planning.work import Chip, HostPart, Share, Stage, Work

RTX_4090 = Chip(
    name="RTX 4090",
    vendor="nvidia",
    bandwidth_gb_s=1008,
    compute_capability=8.9,
    tensor_tflops=165.2,
    full_rate=False,
)
RX_7900_XTX = Chip(name="RX 7900 XTX", vendor="amd", bandwidth_gb_s=960, gfx="gfx1100", tensor_tflops=122.8)
ARC_B60 = Chip(name="Arc Pro B60", vendor="intel", bandwidth_gb_s=456, tensor_tflops=98.3)
P40 = Chip(name="Tesla P40", vendor="nvidia", bandwidth_gb_s=347, compute_capability=6.1, tensor_tflops=11.8)
MI100 = Chip(name="MI100", vendor="amd", bandwidth_gb_s=1229, memory="hbm", tensor_tflops=184.6)
GB10 = Chip(name="GB10", vendor="nvidia", bandwidth_gb_s=273, memory="lpddr", compute_capability=12.1)

CHIPS = (RTX_4090, RX_7900_XTX, ARC_B60, P40, MI100, GB10)
ENGINES = ("llama.cpp", "vllm", "ollama")
LIBRARIES = ("CUDA", "ROCm", "Vulkan", "SYCL")


def dense(
    chip: Chip = RTX_4090,
    *,
    cards: int = 1,
    tensor: bool = False,
    read_gb: float = 41.9,
    kv_gb: float = 0.0,
    layers: int = 80,
    engine: str = "llama.cpp",
    library: str = "CUDA",
    users: float = 1,
    host: HostPart | None = None,
    power: float = 1.0,
) -> Work:
    share = Share(chip=replace(chip, power=power), weights_bytes=read_gb * 1e9 / cards, kv_bytes=kv_gb * 1e9 / cards)
    stages = (
        (Stage(layers=layers, shares=(share,) * cards),)
        if tensor
        else tuple(Stage(layers=layers // cards, shares=(share,)) for _ in range(cards))
    )
    return Work(
        engine=engine,
        library=library,
        stages=stages,
        quantised=True,
        active_parameters=69.5e9,
        embedding_length=8192,
        users=users,
        host=host,
    )


def with_experts(work: Work) -> Work:
    """The same reads, of a model of which a token uses 8 of 128 experts."""
    stages = tuple(
        replace(stage, shares=tuple(replace(share, expert_bytes=share.weights_bytes * 8) for share in stage.shares))
        for stage in work.stages
    )
    return replace(work, stages=stages, experts=128, experts_used=8)


def predicted(work: Work) -> Prediction:
    found = predict(work)
    assert found is not None
    return found
