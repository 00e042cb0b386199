"""One way to run a model with vLLM: the ledger of each card, and the verdict."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace

from mgpu.machine.snapshot import Gpu, Host
from mgpu.models.facts import Layer, ModelFacts
from mgpu.planning.candidates import Candidate, PlannedDevice, PlannedHost
from mgpu.planning.speed import Speed
from mgpu.planning.tensor_parallel import check_shape, pipeline_partition, replica_problems
from mgpu.planning.vllm_memory import (
    BLOCK_TOKENS,
    DEFAULT_UTILISATION,
    KV_BYTES,
    OVERHEAD_BYTES,
    VllmWants,
    kv_token_bytes,
    model_bytes,
    request_bytes,
    shard_bytes,
    stage_bytes,
    visible_bytes,
)
from mgpu.units import GIB, gib

BACKEND_NAME = "vllm"
_BASIS = "weights by formula from the files, KV cache what vLLM's share of the card leaves"


def vllm_candidate(
    facts: ModelFacts,
    wants: VllmWants,
    gpus: Sequence[Gpu],
    host: Host,
    ctx_tokens: int,
    *,
    tensor_parallel: int = 1,
    pipeline_parallel: int = 1,
) -> Candidate:
    """Return one way: `wants.replicas` engines behind one address, each of them `pipeline_parallel` stages of
    `tensor_parallel` cards; `gpus` in the order of vLLM's ranks."""
    plan = _Placement(
        facts=facts,
        wants=wants,
        gpus=tuple(gpus),
        host=host,
        ctx_tokens=ctx_tokens,
        tensor_parallel=tensor_parallel,
        pipeline_parallel=pipeline_parallel,
    )
    return plan.on_cards() if gpus else plan.on_the_cpu()


def device_name(gpu: Gpu, place: int) -> str:
    """Return what vLLM's driver calls a card: the name that an engine of that driver gives it or, where none does, by
    its `place` among the cards of its vendor."""
    library = "ROCm" if gpu.vendor == "amd" else "CUDA"
    named = (name for name in gpu.engine_devices if name.rstrip("0123456789") == library)
    return next(named, f"{library}{place}")


def planned_kv_tokens(candidate: Candidate, facts: ModelFacts) -> int:
    """Return how many tokens the planned KV cache of one replica holds, of one length or many, windows left aside:
    the number vLLM logs as "KV cache size"."""
    if not candidate.devices:
        workers = candidate.tensor_parallel * candidate.pipeline_parallel * candidate.replicas
        per_worker = _cpu_kv_bytes(candidate.host.kv_bytes, workers)
        return per_worker // max(1, kv_token_bytes(facts.layers, candidate.tensor_parallel, candidate.kv_type))
    tokens = [
        device.kv_bytes // per_token
        for device in candidate.devices
        if (
            per_token := kv_token_bytes(
                facts.layers[device.first_layer : device.first_layer + device.layers],
                candidate.tensor_parallel,
                candidate.kv_type,
            )
        )
    ]
    return min(tokens, default=0)


def own_layers(facts: ModelFacts, device: PlannedDevice) -> tuple[Layer, ...]:
    """Return the layers on a card."""
    return facts.layers[device.first_layer : device.first_layer + device.layers]


def one_of_each(devices: tuple[PlannedDevice, ...]) -> tuple[PlannedDevice, ...]:
    """Return one device of those that hold the same layers and as much cache: sums over layers take their time."""
    return tuple({(device.first_layer, device.layers, device.kv_bytes): device for device in devices}.values())


@dataclass(frozen=True, slots=True, kw_only=True)
class _Placement:
    """A shape on certain cards, to be judged."""

    facts: ModelFacts
    wants: VllmWants
    gpus: tuple[Gpu, ...]
    host: Host
    ctx_tokens: int
    tensor_parallel: int
    pipeline_parallel: int

    def on_cards(self) -> Candidate:
        """The candidate with its ledger: how much of each card vLLM takes, and what that leaves for the KV cache."""
        per_replica = len(self.gpus) // max(1, self.wants.replicas)
        legality = check_shape(
            self.facts,
            self.gpus[:per_replica],
            tensor_parallel=self.tensor_parallel,
            pipeline_parallel=self.pipeline_parallel,
        )
        problems = [*legality.problems, *self._problems()]
        problems += replica_problems(self.facts, self.tensor_parallel, self.wants.replicas)
        if len(self.gpus) != per_replica * self.wants.replicas:
            cards = "1 card" if len(self.gpus) == 1 else f"{len(self.gpus)} cards"
            problems.append(f"{cards} cannot be dealt evenly to {self.wants.replicas} replicas")
        if problems:
            return self._candidate("illegal", problems, tuple(self._idle(gpu) for gpu in self.gpus), 0)
        share = self._share()
        wants = replace(self.wants, gpu_memory_utilization=share)
        stages = self._stages(share, per_replica)
        weights = [shard_bytes(stage_bytes(self.facts, *stage), self.tensor_parallel) for stage in stages]
        ranks = [each for each in zip(stages, weights, strict=True) for _ in range(self.tensor_parallel)]
        ranks *= self.wants.replicas
        devices = tuple(self._device(gpu, share, *rank) for gpu, rank in zip(self.gpus, ranks, strict=True))
        devices = self._with_equal_blocks(devices)
        reasons, short = self._judge(devices, share)
        notes = list(legality.notes)
        if self.wants.gpu_memory_utilization is None and share < DEFAULT_UTILISATION:
            notes.append(f"vLLM is given {share:g} of each card, because no more is free")
        notes += self._notes()
        verdict = "does-not-fit" if short else "fits"
        return self._candidate(verdict, [*reasons, *notes], devices, short, wants)

    def on_the_cpu(self) -> Candidate:
        """The candidate of vLLM's CPU build: each worker takes a KV cache of whole GiB."""
        legality = check_shape(
            self.facts, (), tensor_parallel=self.tensor_parallel, pipeline_parallel=self.pipeline_parallel
        )
        problems = [*legality.problems, *self._problems()]
        workers = self.tensor_parallel * self.pipeline_parallel * self.wants.replicas
        wanted = request_bytes(self.facts.layers, self.tensor_parallel, self._kv_type, self.ctx_tokens)
        users = -(-self.wants.parallel // max(1, self.wants.replicas))
        per_worker = _cpu_kv_bytes(wanted * users * workers, workers)
        host = PlannedHost(
            layers=len(self.facts.layers),
            weights_bytes=model_bytes(self.facts) * self.wants.replicas,
            kv_bytes=per_worker * workers,
            compute_bytes=OVERHEAD_BYTES * (workers + 2),
            free_bytes=self.host.ram_available_bytes,
        )
        short = max(0, -(host.spare_bytes or 0))
        reasons = list(problems)
        if short:
            reasons.append(f"{gib(host.total_bytes)} needed in host memory, {gib(host.free_bytes or 0)} available")
        verdict = "illegal" if problems else "does-not-fit" if short else "fits"
        return self._candidate(verdict, reasons, (), short, host=host)

    @property
    def _kv_type(self) -> str:
        return self.wants.kv_type_k

    def _problems(self) -> list[str]:
        found = []
        if self.wants.kv_type_k not in KV_BYTES or self.wants.kv_type_k != self.wants.kv_type_v:
            found.append(f"vLLM has no KV cache of type {self.wants.kv_type_k}; it has f16 and fp8")
        longest = self.facts.context_length
        if longest and self.ctx_tokens > longest:
            found.append(f"{self.ctx_tokens} tokens are more than the {longest} vLLM allows for this model")
        found += [f"gpu{gpu.index}'s memory is unknown" for gpu in self.gpus if not gpu.total_bytes]
        return found

    def _notes(self) -> list[str]:
        found = [
            f"gpu{gpu.index} drives a display: {gib(self.wants.headroom_on(gpu))} of it stays free"
            for gpu in self.gpus
            if gpu.display and self.wants.gpu_memory_utilization is None
        ]
        if self.facts.experts and self.wants.replicas > 1:
            found.append("the replicas share the experts of each layer, so that they wait for one another")
        return found

    def _share(self) -> float:
        """The share of its memory that vLLM may take of every card: what is asked for, or as much as is free on the
        card with least (vLLM refuses to start otherwise), at most 0.90."""
        if self.wants.gpu_memory_utilization is not None:
            return self.wants.gpu_memory_utilization
        shares = [
            ((gpu.free_bytes or 0) - self.wants.headroom_on(gpu)) / visible_bytes(gpu.total_bytes or 1)
            for gpu in self.gpus
        ]
        return max(0.05, min(DEFAULT_UTILISATION, math.floor(min(shares) * 100) / 100))

    def _stages(self, share: float, per_replica: int) -> list[tuple[int, int]]:
        """First layer and number of layers of each stage. The cards of later replicas are taken to be like those of
        the first one."""
        count = len(self.facts.layers)
        if self.pipeline_parallel == 1:
            return [(0, count)]
        cards = self.gpus[:per_replica]
        groups = [cards[i : i + self.tensor_parallel] for i in range(0, per_replica, self.tensor_parallel)]
        capacities = [min(self._room(gpu, share) for gpu in group) * self.tensor_parallel for group in groups]
        kv_type, parallel = self._kv_type, self.wants.parallel
        caches: dict[tuple[int, int, int | None], int] = {}
        units = []
        for layer in self.facts.layers:
            shape = layer.kv_heads, layer.key_length + layer.value_length, layer.sliding_window
            if shape not in caches:
                caches[shape] = request_bytes((layer,), 1, kv_type, self.ctx_tokens) * parallel
            units.append(layer.weights_bytes + caches[shape])
        counts = pipeline_partition(
            units, self.facts.embedding_bytes + self.facts.other_bytes, self.facts.head_bytes, capacities
        )
        firsts = [sum(counts[:i]) for i in range(len(counts))]
        return list(zip(firsts, counts, strict=True))

    def _room(self, gpu: Gpu, share: float) -> int:
        """What a card has for weights and KV cache."""
        taken = int(visible_bytes(gpu.total_bytes or 0) * share)
        return max(0, taken - OVERHEAD_BYTES - self.wants.graph_bytes)

    def _device(self, gpu: Gpu, share: float, stage: tuple[int, int], weights: int) -> PlannedDevice:
        first, layers = stage
        return PlannedDevice(
            gpu=gpu.index,
            uuid=gpu.uuid,
            name=gpu.name,
            device=device_name(gpu, gpu.index),
            first_layer=first,
            layers=layers,
            head=first + layers == len(self.facts.layers),
            weights_bytes=weights,
            kv_bytes=max(0, self._room(gpu, share) - weights),
            compute_bytes=OVERHEAD_BYTES,
            runtime_bytes=self.wants.graph_bytes,
            card_bytes=gpu.total_bytes,
            free_bytes=gpu.free_bytes or 0,
            basis=_BASIS,
        )

    def _idle(self, gpu: Gpu) -> PlannedDevice:
        """A card of a shape that is not possible: nothing is on it."""
        device = self._device(gpu, 0.0, (0, 0), 0)
        return replace(device, head=False, kv_bytes=0, compute_bytes=0, runtime_bytes=0)

    def _with_equal_blocks(self, devices: tuple[PlannedDevice, ...]) -> tuple[PlannedDevice, ...]:
        """Every card gets as many blocks of KV cache as the one that has least room for them."""
        sizes = {(each.first_layer, each.layers): self._token_bytes(each) for each in one_of_each(devices)}
        per_token = [sizes[device.first_layer, device.layers] for device in devices]
        blocks = min(
            (device.kv_bytes // (size * BLOCK_TOKENS) for device, size in zip(devices, per_token, strict=True) if size),
            default=0,
        )
        return tuple(
            replace(device, kv_bytes=blocks * size * BLOCK_TOKENS)
            for device, size in zip(devices, per_token, strict=True)
        )

    def _judge(self, devices: tuple[PlannedDevice, ...], share: float) -> tuple[list[str], int]:
        """Why it does not fit and by how much; or what to know when it does."""
        short = 0
        reasons: list[str] = []
        requests = {(each.first_layer, each.layers): self._one_request(each) for each in one_of_each(devices)}
        for gpu, device in zip(self.gpus, devices, strict=True):
            taken = int(visible_bytes(gpu.total_bytes or 0) * share)
            free = gpu.free_bytes or 0
            if taken > free:
                short += taken - free
                reasons.append(f"vLLM was to take {gib(taken)} of gpu{gpu.index}, where {gib(free)} are free")
            needed = device.weights_bytes + requests[device.first_layer, device.layers]
            room = self._room(gpu, share)
            if needed > room:
                short += needed - room
                reasons.append(
                    f"gpu{gpu.index}: {gib(device.weights_bytes)} weights and {gib(needed - device.weights_bytes)} "
                    f"KV cache for one request, where {gib(room)} can be had"
                )
        if not short:
            # With sliding windows the stages need unlike numbers of blocks for a request, and all get the fewest.
            for device in one_of_each(devices):
                request = requests[device.first_layer, device.layers]
                if device.kv_bytes < request:
                    short += request - device.kv_bytes
                    reasons.append(
                        f"gpu{device.gpu}: {gib(request)} KV cache for one request, and {gib(device.kv_bytes)} with "
                        "the blocks that every stage has room for"
                    )
        if not short:
            held = [d.kv_bytes // size for d in devices if (size := requests[d.first_layer, d.layers])]
            users = min(held, default=self.wants.parallel) * self.wants.replicas
            if users < self.wants.parallel:
                reasons.append(
                    f"room for {users} of {self.wants.parallel} users at {self.ctx_tokens} tokens; the others wait"
                )
        return reasons, short

    def _one_request(self, device: PlannedDevice) -> int:
        return request_bytes(own_layers(self.facts, device), self.tensor_parallel, self._kv_type, self.ctx_tokens)

    def _token_bytes(self, device: PlannedDevice) -> int:
        return kv_token_bytes(own_layers(self.facts, device), self.tensor_parallel, self._kv_type)

    def _candidate(
        self,
        verdict: str,
        reasons: Sequence[str],
        devices: tuple[PlannedDevice, ...],
        short: int,
        wants: VllmWants | None = None,
        host: PlannedHost | None = None,
    ) -> Candidate:
        split_mode = "tensor" if self.tensor_parallel > 1 else "pipeline" if self.pipeline_parallel > 1 else "none"
        return Candidate(
            backend=BACKEND_NAME,
            split_mode=split_mode,
            tensor_parallel=self.tensor_parallel,
            pipeline_parallel=self.pipeline_parallel,
            replicas=self.wants.replicas,
            quant=self.facts.quantisation,
            kv_type=self._kv_type,
            ctx_tokens=self.ctx_tokens,
            parallel=self.wants.parallel,
            verdict=verdict,
            reasons=tuple(reasons),
            devices=devices,
            host=host
            or PlannedHost(
                layers=0, weights_bytes=0, kv_bytes=0, compute_bytes=0, free_bytes=self.host.ram_available_bytes
            ),
            short_bytes=short,
            max_ctx_tokens=None,
            speed=Speed(),
            wants=wants or self.wants,
        )


def _cpu_kv_bytes(wanted_bytes: int, workers: int) -> int:
    """What each worker of the CPU build takes: whole GiB."""
    return max(1, -(-wanted_bytes // (workers * GIB))) * GIB
