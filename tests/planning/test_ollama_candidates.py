"""Where Ollama puts a model: its recorded choices, its rules one by one, and what a candidate says of them."""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import replace
from functools import cache
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from mgpu.backends.backend import Serving
from mgpu.backends.ollama import build_launch
from mgpu.machine.simulate import simulate
from mgpu.machine.snapshot import Gpu, Host, Machine
from mgpu.models.facts import ModelFacts
from mgpu.models.shape import facts_from_shape
from mgpu.planning import memory
from mgpu.planning.candidates import Candidate
from mgpu.planning.memory import DeviceKind
from mgpu.planning.ollama_candidates import choose_cards, ollama_candidates, ollama_fixes, predicted_bytes
from mgpu.planning.wants import Wants
from mgpu.units import GIB, MIB
from tests.fakes.shapes import SHAPES


@cache
def facts(model: str, quantisation: str = "Q4_K_M") -> ModelFacts:
    return facts_from_shape(model, SHAPES[model], quantisation)


@cache
def recorded_model() -> ModelFacts:
    """SmolLM2-135M in Q4_1 with the embedding in Q8_0, as it was run: 63.41 MiB of layers, 28.69 MiB of head."""
    shape = facts("smollm2-135m")
    layers = tuple(replace(layer, weights_bytes=round(63.41 * MIB / 30)) for layer in shape.layers)
    head = round(28.69 * MIB)
    return replace(shape, layers=layers, head_bytes=head, embedding_bytes=head, file_bytes=98362432)


def cards(*free_gib: float, kind: str = "CUDA", vendor: str = "nvidia", first: int = 0) -> tuple[Gpu, ...]:
    return tuple(
        Gpu(
            index=first + index,
            vendor=vendor,
            name="card",
            uuid=f"GPU-{first + index}",
            total_bytes=round((free + 0.5) * GIB),
            free_bytes=round(free * GIB),
            bandwidth_gb_s=1000.0,
            engine_devices=(f"{kind}{index}",),
        )
        for index, free in enumerate(free_gib)
    )


def machine_of(gpus: Sequence[Gpu], ram_gib: float = 64) -> Machine:
    host = Host(ram_bytes=round(ram_gib * GIB), ram_available_bytes=round(ram_gib * GIB))
    return Machine(captured_at="2025-01-01T00:00:00Z", source="simulated", host=host, gpus=tuple(gpus))


def planned(model: ModelFacts, gpus: Sequence[Gpu], wants: Wants | None = None) -> tuple[Candidate, ...]:
    return ollama_candidates(model, machine_of(gpus), gpus, wants or Wants())


def layers(candidate: Candidate) -> list[int]:
    """Layers on each card, the head counted as one, then those in RAM."""
    return [*(device.layers + device.head for device in candidate.devices), candidate.host.layers]


class TestRecordedRuns:
    """Two software Vulkan devices of 2 GiB without a driver's context, and SmolLM2-135M."""

    TWO = cards(2, 2, kind="Vulkan", vendor="other")
    MARGIN = Wants(ctx_tokens=4096, headroom_bytes=1024 * MIB, offload=True)
    MANY = replace(MARGIN, ctx_tokens=8192, parallel=10)

    @pytest.fixture(autouse=True)
    def no_context(self, monkeypatch: pytest.MonkeyPatch) -> None:
        kind = DeviceKind(runtime_bytes=0, pipeline=True, computes_host_layers=True)
        monkeypatch.setitem(memory._KINDS, "Vulkan", kind)

    def test_the_prediction_is_the_one_it_logged(self) -> None:
        assert f"{predicted_bytes(recorded_model(), 4096, 1) / MIB:.1f}" == "183.8"
        assert f"{predicted_bytes(recorded_model(), 8192, 10) / GIB:.1f}" == "1.8"

    def test_by_itself_it_takes_the_first_card(self) -> None:
        assert choose_cards(recorded_model(), self.TWO, 4096, 1).gpus == self.TWO[:1]

    @pytest.mark.parametrize(
        ("wants", "dealt"),
        [
            pytest.param(MARGIN, [16, 15, 0], id="spread: evenly by free memory"),
            pytest.param(replace(MARGIN, tensor_split=(3, 1)), [24, 7, 0], id="spread: 3,1"),
            pytest.param(replace(MARGIN, kv_type_k="q8_0", kv_type_v="q8_0"), [16, 15, 0], id="spread: q8_0"),
            pytest.param(replace(MARGIN, headroom_bytes=1950 * MIB), [15, 11, 5], id="spread: a margin of 1950 MiB"),
            pytest.param(MANY, [14, 16, 1], id="ten users: the margin keeps a layer off the cards"),
            pytest.param(replace(MANY, headroom_bytes=512 * MIB), [16, 15, 0], id="ten users: a smaller margin"),
        ],
    )
    def test_layers_are_dealt_as_it_dealt_them(self, wants: Wants, dealt: list[int]) -> None:
        assert layers(planned(recorded_model(), self.TWO, wants)[0]) == dealt

    def test_ten_users_are_too_much_for_one_card(self) -> None:
        assert choose_cards(recorded_model(), self.TWO, 8192, 10).gpus == self.TWO
        assert len(planned(recorded_model(), self.TWO, self.MANY)) == 1

    def test_caches_and_weights_are_those_it_allocated(self) -> None:
        spread, alone = planned(recorded_model(), self.TWO, self.MARGIN)
        allocated = {(0, 33.82, 48.0), (1, 58.28, 42.0)}
        assert {(d.gpu, round(d.weights_bytes / MIB, 2), d.kv_bytes / MIB) for d in spread.devices} == allocated
        (single,) = alone.devices
        assert (round(single.weights_bytes / MIB, 1), single.kv_bytes / MIB) == (92.1, 90.0)

    @pytest.mark.parametrize(
        ("wants", "batch"),
        [pytest.param(MARGIN, 512, id="4096 tokens"), pytest.param(MANY, 1024, id="81920 tokens, too much for 2048")],
    )
    def test_the_micro_batch_is_the_one_it_took(self, wants: Wants, batch: int) -> None:
        assert planned(recorded_model(), self.TWO, wants)[0].wants.ubatch == batch


@pytest.mark.parametrize(
    ("free_gib", "chosen"),
    [
        pytest.param((24, 24), [0], id="the first of equals"),
        pytest.param((20, 24), [1], id="the one with the most free memory"),
        pytest.param((6.0, 24), [1], id="one that holds it"),
        pytest.param((6.0, 6.0), [0, 1], id="all, when none holds it"),
        pytest.param((4.0,), [0], id="the only one, whether it holds it or not"),
    ],
)
def test_a_model_goes_to_one_card_if_eighty_percent_of_it_suffice(
    free_gib: tuple[float, ...], chosen: list[int]
) -> None:
    found = choose_cards(facts("llama-3.1-8b"), cards(*free_gib), 8192, 1)
    assert [gpu.index for gpu in found.gpus] == chosen


def test_eighty_percent_is_the_limit_to_the_byte() -> None:
    predicted = predicted_bytes(facts("llama-3.1-8b"), 8192, 1)
    enough = -(-predicted * 100 // 80)
    for free, count in ((enough, 1), (enough - 2, 2)):
        gpus = tuple(replace(gpu, free_bytes=free) for gpu in cards(8, 8))
        assert len(choose_cards(facts("llama-3.1-8b"), gpus, 8192, 1).gpus) == count


def test_the_prediction_knows_no_cache_type_and_no_window() -> None:
    model = facts("gpt-oss-20b", "MXFP4")
    expected = model.file_bytes + 2 * 24 * 8 * (2880 // 64) * 8192 * 3 * 2
    assert predicted_bytes(model, 8192, 3) == expected


def test_both_ways_are_shown_with_their_reasons() -> None:
    spread, alone = planned(facts("llama-3.1-8b"), cards(23.5, 23.5), Wants(ctx_tokens=8192))
    assert (spread.backend, spread.split_mode, spread.verdict) == ("ollama", "layer", "fits")
    assert (alone.split_mode, alone.verdict, [device.gpu for device in alone.devices]) == ("none", "fits", [0])
    assert spread.reasons[0].startswith("OLLAMA_SCHED_SPREAD=1: by itself Ollama would put it on gpu0 alone: ")
    assert alone.reasons[0] == "Ollama would put it on gpu0 alone: 5.58 GiB predicted, 80 % of 23.5 GiB free"


def test_a_model_too_large_for_one_card_has_one_way() -> None:
    (spread,) = planned(facts("llama-3.3-70b"), cards(23.5, 23.5), Wants(ctx_tokens=8192))
    assert spread.verdict == "fits"
    assert "more than 80 % of any card's free memory" in spread.reasons[0]


def test_split_mode_none_is_the_card_it_would_take() -> None:
    (alone,) = planned(facts("llama-3.1-8b"), cards(20, 24), Wants(ctx_tokens=8192, split_mode="none"))
    assert [device.gpu for device in alone.devices] == [1]


def test_what_does_not_fit_is_not_left_in_ram_unasked() -> None:
    gpus = cards(12, 12)
    (refused,) = planned(facts("llama-3.3-70b"), gpus)
    assert (refused.verdict, refused.host.layers) == ("does-not-fit", 0)
    assert refused.short_bytes > 0
    (allowed,) = planned(facts("llama-3.3-70b"), gpus, Wants(offload=True))
    assert allowed.verdict == "fits-with-offload"
    assert allowed.host.layers > 0


def test_cards_of_several_libraries_are_never_mixed() -> None:
    nvidia, amd = cards(24), cards(16, 16, kind="ROCm", vendor="amd", first=1)
    (spread, alone) = planned(facts("llama-3.1-8b"), (*nvidia, *amd))
    assert [device.gpu for device in spread.devices] == [1, 2]
    assert "Ollama never mixes ROCm and other cards in one model: gpu0 stays unused" in spread.reasons
    assert [device.gpu for device in alone.devices] == [0]


@pytest.mark.parametrize(
    ("gpus", "wants", "reason"),
    [
        pytest.param(
            (*cards(24, 24), *cards(16, kind="Vulkan", vendor="intel", first=2)),
            Wants(tensor_split=(1, 1, 1)),
            "3 proportions, where the model goes to gpu0, gpu1, and Ollama never mixes them with gpu2: "
            "give 2 with --gpus gpu0,gpu1",
            id="a card of another library",
        ),
        pytest.param(
            (*cards(24, 24), replace(cards(24, first=2)[0], problem="fallen off the bus")),
            Wants(tensor_split=(1, 1, 1)),
            "the model goes to gpu0, gpu1: give 2",
            id="a broken card",
        ),
        pytest.param(
            cards(24, 24), Wants(tensor_split=(3, 1), split_mode="none"), "goes to gpu0: leave it out", id="no split"
        ),
    ],
)
def test_proportions_are_those_of_the_cards_that_are_used(gpus: tuple[Gpu, ...], wants: Wants, reason: str) -> None:
    (refused,) = planned(facts("llama-3.1-8b"), gpus, wants)
    assert (refused.verdict, sum(layers(refused))) == ("illegal", 33)
    assert any(reason in each for each in refused.reasons), refused.reasons
    fixes = ollama_fixes(facts("llama-3.1-8b"), (), machine_of(gpus), gpus, wants)
    assert fixes[0].change == "without --tensor-split"


@pytest.mark.parametrize(
    ("gpus", "wants", "changes"),
    [
        pytest.param(
            cards(22.5, 22.5),
            Wants(ctx_tokens=16384),
            ["--ctx N", "--kv-type q8_0", "--quant Q3_K_M", "--offload allow"],
            id="less context, a smaller cache, a smaller file, the host",
        ),
        pytest.param(cards(48, 48), Wants(ctx_tokens=1 << 20), ["--ctx N"], id="a context that it would cut"),
        pytest.param((), Wants(ctx_tokens=1 << 20), ["--ctx N", "--ctx N --kv-type q8_0"], id="on the CPU"),
        pytest.param(cards(2), Wants(), ["--offload allow"], id="nothing but the host"),
    ],
)
def test_the_ways_out_were_planned_again(gpus: tuple[Gpu, ...], wants: Wants, changes: list[str]) -> None:
    model, smaller = facts("llama-3.3-70b"), [facts("llama-3.3-70b", "Q3_K_M"), facts("llama-3.3-70b", "Q8_0")]
    assert planned(model, gpus, wants)[0].verdict in ("does-not-fit", "illegal")
    fixes = ollama_fixes(model, smaller, machine_of(gpus), gpus, wants)
    assert [re.sub(r"--ctx \d+", "--ctx N", fix.change) for fix in fixes] == changes
    for fix in fixes:
        assert fix.candidate.backend == "ollama"
        assert fix.candidate.verdict in ("fits", "fits-with-offload")
        if fix.change.startswith("--ctx"):
            assert fix.candidate.ctx_tokens == int(fix.change.split()[1])


def test_nvidia_cards_are_cudas_whatever_another_llama_cpp_calls_them() -> None:
    gpus = cards(24, 24, kind="Vulkan")
    assert [device.device for device in planned(facts("llama-3.3-70b"), gpus)[0].devices] == ["CUDA0", "CUDA1"]


@pytest.mark.parametrize(
    ("gpu", "name"),
    [
        pytest.param(replace(cards(24)[0], vendor="other", engine_devices=("RPC0",)), "gpu0", id="an RPC device"),
        pytest.param(replace(cards(24)[0], problem="fallen off the bus"), "gpu0", id="a broken card"),
    ],
)
def test_what_ollama_cannot_drive_is_named(gpu: Gpu, name: str) -> None:
    (candidate,) = planned(facts("llama-3.1-8b"), [gpu])
    assert candidate.verdict == "unavailable"
    assert candidate.reasons == (f"Ollama cannot use {name}",)


def test_without_a_card_it_runs_on_the_cpu() -> None:
    (candidate,) = ollama_candidates(facts("llama-3.1-8b"), machine_of(()), (), Wants())
    assert (candidate.verdict, candidate.devices, candidate.backend) == ("fits", (), "ollama")


def test_four_users_get_the_whole_context_each() -> None:
    candidate = planned(facts("smollm2-135m"), cards(24), Wants(parallel=4))[0]
    assert (candidate.verdict, candidate.ctx_tokens, candidate.parallel) == ("fits", 8192, 4)


@pytest.mark.parametrize(
    ("architecture", "wants", "reason"),
    [
        pytest.param("llama", Wants(ctx_tokens=1 << 20), "131072 tokens at most", id="more than it was trained on"),
        pytest.param("qwen3next", Wants(parallel=4), "one user at a time", id="users, where there can be only one"),
        pytest.param("llama", Wants(kv_type_v="q8_0"), "one type for the whole KV cache", id="two types of cache"),
    ],
)
def test_what_ollama_would_change_in_silence_is_illegal(architecture: str, wants: Wants, reason: str) -> None:
    candidate = planned(replace(facts("llama-3.1-8b"), architecture=architecture), cards(24), wants)[0]
    assert candidate.verdict == "illegal"
    assert any(reason in each for each in candidate.reasons)


@pytest.mark.parametrize(
    ("free_gib", "wants", "batch"),
    [
        pytest.param((24,), Wants(ctx_tokens=4096), 512, id="short"),
        pytest.param((24,), Wants(ctx_tokens=8192), 1024, id="longer"),
        pytest.param((24,), Wants(ctx_tokens=98304), 1024, id="long, but the model needs the memory"),
        pytest.param((80,), Wants(ctx_tokens=65536), 2048, id="long"),
        pytest.param((80,), Wants(ctx_tokens=8192, parallel=8), 2048, id="all users together"),
        pytest.param((7.0,), Wants(ctx_tokens=8192), 512, id="a card that is full"),
        pytest.param((24,), Wants(ctx_tokens=8192, flash_attention="off"), 512, id="no flash attention"),
        pytest.param((7.5,), Wants(ctx_tokens=8192, flash_attention="off"), 256, id="none, and a small card"),
    ],
)
def test_the_micro_batch_follows_context_and_memory(free_gib: tuple[float, ...], wants: Wants, batch: int) -> None:
    assert planned(facts("llama-3.1-8b"), cards(*free_gib), wants)[0].wants.ubatch == batch


def test_the_largest_context_fits_and_the_next_does_not() -> None:
    gpus, wants = cards(12, 12), Wants(ctx_tokens=4096)
    largest = planned(facts("qwen2.5-7b"), gpus, wants)[0].max_ctx_tokens
    assert largest is not None
    assert largest > 4096
    model = replace(facts("qwen2.5-7b"), context_length=1 << 20)
    largest = planned(model, gpus, wants)[0].max_ctx_tokens or 0
    verdicts = [planned(model, gpus, replace(wants, ctx_tokens=largest + more))[0].verdict for more in (0, 256)]
    assert verdicts == ["fits", "does-not-fit"]


def test_a_simulated_machine_is_planned_too() -> None:
    machine = simulate("2x4090")
    candidates = ollama_candidates(facts("llama-3.3-70b"), machine, machine.gpus, Wants(ctx_tokens=8192))
    assert [candidate.verdict for candidate in candidates] == ["fits"]


SERVING = Serving(program=Path("/o"), model="m", name="m", host="127.0.0.1", port=8080, folder=Path("/m"))
DISPLAY_NOTE = "gpu1 drives a display: 1.00 GiB stay free on each card, since Ollama has one margin for all"


@pytest.mark.parametrize(
    ("displays", "wants", "margins_mib", "notes"),
    [
        pytest.param((False, False), Wants(), [256, 256], [], id="no display: the usual margin"),
        pytest.param((False, True), Wants(), [1024, 256], [DISPLAY_NOTE], id="one display: its margin on both cards"),
        pytest.param((True, False), Wants(split_mode="none"), [1024], [], id="the display card alone: its margin"),
        pytest.param((False, True), Wants(split_mode="none"), [256], [], id="another card alone: the usual one"),
        pytest.param((True, True), Wants(headroom_bytes=512 * MIB), [512, 512], [], id="the user's own counts"),
    ],
)
def test_ollama_is_told_the_largest_margin_of_its_cards(
    displays: tuple[bool, bool], wants: Wants, margins_mib: list[int], notes: list[str]
) -> None:
    gpus = tuple(replace(gpu, display=on) for gpu, on in zip(cards(20, 10), displays, strict=True))
    found = planned(facts("llama-3.1-8b"), gpus, wants)
    assert [candidate.wants.headroom_bytes // MIB for candidate in found] == margins_mib
    assert [reason for reason in found[0].reasons if "display" in reason] == notes
    for candidate, margin in zip(found, margins_mib, strict=True):
        env = build_launch(candidate, SERVING, environ={"HOME": "/root"}).env
        assert (env["LLAMA_ARG_FIT_TARGET"], env["OLLAMA_GPU_OVERHEAD"]) == (str(margin), str(margin * MIB))


def test_what_the_largest_margin_leaves_is_what_is_planned_on() -> None:
    gpus = cards(4, 4)
    shown = (replace(gpus[0], display=True), gpus[1])
    plain, kept = (planned(facts("llama-3.1-8b"), some)[0] for some in (gpus, shown))
    asked = planned(facts("llama-3.1-8b"), gpus, Wants(headroom_bytes=1024 * MIB))[0]
    assert (kept.verdict, kept.max_ctx_tokens, layers(kept)) == (asked.verdict, asked.max_ctx_tokens, layers(asked))
    assert (kept.max_ctx_tokens or 0) < (plain.max_ctx_tokens or 0)


@settings(max_examples=30, deadline=None)
@given(
    st.lists(st.floats(0.0, 40.0), min_size=0, max_size=4),
    st.sampled_from(["smollm2-135m", "llama-3.1-8b", "mixtral-8x7b"]),
    st.integers(256, 40000),
    st.booleans(),
    st.none() | st.lists(st.floats(0.01, 4.0), min_size=1, max_size=5).map(tuple),
)
def test_every_layer_is_somewhere_and_fits_keeps_its_promise(
    free_gib: list[float], model: str, ctx_tokens: int, offload: bool, proportions: tuple[float, ...] | None
) -> None:
    wants = Wants(ctx_tokens=ctx_tokens, offload=offload, tensor_split=proportions)
    for candidate in planned(facts(model), cards(*free_gib), wants):
        on_cards = sum(device.layers for device in candidate.devices)
        assert on_cards + candidate.host.layers == len(facts(model).layers)
        if candidate.verdict == "fits" and candidate.devices:
            assert candidate.host.layers == 0
            used = [device for device in candidate.devices if not device.idle]
            assert all(device.spare_bytes >= wants.headroom_bytes for device in used)
        assert offload or not free_gib or candidate.host.layers == 0
