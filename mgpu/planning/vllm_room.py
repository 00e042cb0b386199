"""What a vLLM candidate on cards has room for: users, contexts, and how small a share would do."""

from __future__ import annotations

import math

from mgpu.models.facts import ModelFacts
from mgpu.planning.candidates import Candidate
from mgpu.planning.vllm_memory import (
    BLOCK_TOKENS,
    DEFAULT_UTILISATION,
    OVERHEAD_BYTES,
    VllmWants,
    request_bytes,
    visible_bytes,
)
from mgpu.planning.vllm_placement import one_of_each, own_layers


def users_at_once(candidate: Candidate, facts: ModelFacts) -> int:
    """Return how many users on cards can have the whole context at once, all replicas together; at most
    `candidate.parallel`."""
    held = [
        device.kv_bytes // size
        for device in one_of_each(candidate.devices)
        if (
            size := request_bytes(
                own_layers(facts, device), candidate.tensor_parallel, candidate.kv_type, candidate.ctx_tokens
            )
        )
    ]
    return min(candidate.replicas * min(held, default=candidate.parallel), candidate.parallel)


def longest_ctx_tokens(facts: ModelFacts, candidate: Candidate, most_tokens: int) -> int:
    """Return the largest context (a multiple of a block, at most `most_tokens`) that one user can have with the shares
    of a candidate on cards without a pipeline, as `vllm_candidate` would judge it; 0 where the shares are not free."""
    wants = candidate.wants
    assert isinstance(wants, VllmWants)
    rooms = []
    for device in candidate.devices:
        taken = int(visible_bytes(device.card_bytes or 0) * (wants.gpu_memory_utilization or DEFAULT_UTILISATION))
        if taken > device.free_bytes:
            return 0
        rooms.append(taken - OVERHEAD_BYTES - wants.graph_bytes - device.weights_bytes)
    low, high = 0, most_tokens // BLOCK_TOKENS
    while low < high:
        middle = (low + high + 1) // 2
        needed = request_bytes(facts.layers, candidate.tensor_parallel, candidate.kv_type, middle * BLOCK_TOKENS)
        low, high = (middle, high) if needed <= min(rooms) else (low, middle - 1)
    return low * BLOCK_TOKENS


def least_share(facts: ModelFacts, candidate: Candidate) -> float:
    """Return the smallest share of each card (in steps of 0.01) in which `candidate` gives all its users their whole
    context at once: what an engine gets that is not alone on its cards. At most what the candidate has."""
    wants = candidate.wants
    assert isinstance(wants, VllmWants)
    needed = [
        (
            device.weights_bytes
            + request_bytes(
                own_layers(facts, device), candidate.tensor_parallel, candidate.kv_type, candidate.ctx_tokens
            )
            * candidate.users_per_replica
            + device.compute_bytes
            + device.runtime_bytes
        )
        / visible_bytes(device.card_bytes or 1)
        for device in candidate.devices
    ]
    most = wants.gpu_memory_utilization or DEFAULT_UTILISATION
    return min(most, math.ceil(max(needed, default=0.0) * 100) / 100)
