"""Candidates as a plan for Ollama would give them, without planning one."""

from __future__ import annotations

from collections.abc import Sequence

from mgpu.planning.candidates import Candidate, PlannedDevice, PlannedHost
from mgpu.planning.speed import Speed
from mgpu.planning.wants import Wants

MIB = 1 << 20
TWO_VULKAN = ("Vulkan0", "Vulkan1")


def planned(
    devices: Sequence[str] = TWO_VULKAN,
    layers: Sequence[int] = (16, 14),
    *,
    uuids: Sequence[str | None] = (),
    wants: Wants | None = None,
    ctx_tokens: int = 4096,
    split_mode: str | None = None,
) -> Candidate:
    """`layers` of each of `devices`, in order; the head is on the last one that has any."""
    uuids = uuids or [None] * len(devices)
    last = max((index for index, count in enumerate(layers) if count), default=-1)
    cards = tuple(
        PlannedDevice(
            gpu=index,
            uuid=uuid,
            name="card",
            device=device,
            first_layer=sum(layers[:index]),
            layers=count,
            head=index == last,
            weights_bytes=count * MIB,
            kv_bytes=count * MIB,
            compute_bytes=MIB,
            runtime_bytes=0,
            card_bytes=None,
            free_bytes=2048 * MIB,
            basis="test",
        )
        for index, (device, uuid, count) in enumerate(zip(devices, uuids, layers, strict=True))
    )
    wants = wants or Wants(ctx_tokens=ctx_tokens)
    return Candidate(
        backend="ollama",
        split_mode=split_mode or ("layer" if sum(map(bool, layers)) > 1 else "none"),
        tensor_parallel=1,
        pipeline_parallel=1,
        replicas=1,
        quant="Q4_1",
        kv_type=wants.kv_type_k,
        ctx_tokens=ctx_tokens,
        parallel=wants.parallel,
        verdict="fits",
        reasons=(),
        devices=cards,
        host=PlannedHost(layers=0, weights_bytes=0, kv_bytes=0, compute_bytes=0, free_bytes=None),
        short_bytes=0,
        max_ctx_tokens=None,
        speed=Speed(),
        wants=wants,
    )
