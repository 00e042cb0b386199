"""What must hold of every plan, whatever the model, the machine and the wishes."""

from __future__ import annotations

import functools
import json
import math
import re
import subprocess
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

from hypothesis import given, settings
from hypothesis import strategies as st

from mgpu.backends import load_backend
from mgpu.backends.backend import Launch, Serving
from mgpu.machine.cards import catalogue
from mgpu.machine.simulate import simulate
from mgpu.machine.snapshot import Gpu, Host, Machine, to_json, value_from_json
from mgpu.models.facts import ModelFacts
from mgpu.models.shape import facts_from_shape
from mgpu.models.vllm_shape import facts_for_vllm
from mgpu.planning.batching import aggregate_tok_s
from mgpu.planning.candidates import Candidate
from mgpu.planning.decode import decode_seconds
from mgpu.planning.ollama_candidates import ollama_candidates
from mgpu.planning.plan import llama_cpp_candidates
from mgpu.planning.predicted import work_of
from mgpu.planning.vllm_candidates import vllm_candidates
from mgpu.planning.vllm_memory import VllmWants
from mgpu.planning.wants import Wants
from mgpu.profile import load_profile, shipped_profile_folder
from mgpu.units import GIB, MIB
from tests.fakes import llama_server_options, vllm_options
from tests.fakes.devices import real_llama_server

ENGINES = ("llama.cpp", "vllm", "ollama")
PROFILES = tuple(sorted(path.stem for path in shipped_profile_folder().glob("*.yaml")))
NVIDIA = tuple(
    card.full_name for card in catalogue() if card.vendor == "nvidia" and float(card.compute_capability or 0) >= 7
)
AMD = tuple(card.full_name for card in catalogue() if card.vendor == "amd")


@functools.cache
def facts_of(profile: str, engine: str, place: int) -> ModelFacts:
    """One of the profile's forms for the engine."""
    found = load_profile(profile).profile
    if engine == "vllm" and found.vllm:
        source = found.vllm[place % len(found.vllm)]
        return facts_for_vllm(profile, found.model, source.quantisation, source=source.repository)
    names = tuple(found.quantisations)
    return facts_from_shape(profile, found.model, names[place % len(names)])


@functools.cache
def machine_of(names: tuple[str, ...]) -> Machine:
    return simulate("+".join(names) or "none")


@st.composite
def machines(draw: st.DrawFn, *, least: int = 0) -> Machine:
    names = draw(st.lists(st.sampled_from(draw(st.sampled_from((NVIDIA, AMD)))), min_size=least, max_size=4))
    if draw(st.booleans()):
        names = names[:1] * len(names)
    machine = machine_of(tuple(names))
    gpus = tuple(
        replace(
            gpu,
            free_bytes=int((gpu.free_bytes or 0) * draw(st.sampled_from((1.0, 1.0, 0.9, 0.4)))),
            display=draw(st.sampled_from((None, False, True))),
        )
        for gpu in machine.gpus
    )
    ram = draw(st.sampled_from((None, 16 * GIB, 256 * GIB)))
    return replace(machine, gpus=gpus, host=Host(ram_bytes=ram, ram_available_bytes=ram))


@st.composite
def wishes(draw: st.DrawFn, engine: str) -> Wants:
    basics = Wants(
        ctx_tokens=draw(st.sampled_from((None, 256, 4096, 8192, 20_000))),
        parallel=draw(st.integers(1, 9)),
        headroom_bytes=draw(st.sampled_from((0, 256 * MIB, 2 * GIB))),
    )
    if engine == "vllm":
        kind = draw(st.sampled_from(("f16", "fp8")))
        return VllmWants(
            ctx_tokens=basics.ctx_tokens,
            parallel=basics.parallel,
            headroom_bytes=basics.headroom_bytes,
            kv_type_k=kind,
            kv_type_v=kind,
            enforce_eager=draw(st.booleans()),
        )
    kind = draw(st.sampled_from(("f16", "q8_0", "q4_0")))
    return replace(
        basics,
        kv_type_k=kind,
        kv_type_v=kind,
        ubatch=draw(st.sampled_from((128, 512, 2048))),
        flash_attention="auto" if kind != "f16" else draw(st.sampled_from(("auto", "off"))),
        split_mode=draw(st.sampled_from((None, None, "layer", "tensor", "none"))),
        offload=draw(st.booleans()),
    )


Case = tuple[str, ModelFacts, Machine, Wants]


@st.composite
def cases(draw: st.DrawFn, *, least: int = 0, engines: Sequence[str] = ENGINES) -> Case:
    engine = draw(st.sampled_from(engines))
    facts = facts_of(draw(st.sampled_from(PROFILES)), engine, draw(st.integers(0, 5)))
    return engine, facts, draw(machines(least=least)), draw(wishes(engine))


def candidates(engine: str, facts: ModelFacts, machine: Machine, wants: Wants) -> tuple[Candidate, ...]:
    gpus: tuple[Gpu, ...] = machine.gpus
    if engine == "vllm":
        assert isinstance(wants, VllmWants)
        return vllm_candidates(facts, wants, gpus, machine.host)
    if engine == "ollama":
        return ollama_candidates(facts, machine, gpus, wants)
    return llama_cpp_candidates(facts, machine, gpus, wants)


def taken(candidate: Candidate) -> int:
    return sum(device.total_bytes for device in candidate.devices) + candidate.host.total_bytes


@settings(max_examples=200, deadline=None)
@given(cases())
def test_parts_sum_to_totals_and_verdicts_follow_from_them(case: Case) -> None:
    for candidate in candidates(*case):
        devices = candidate.devices
        for device in devices:
            parts = (device.weights_bytes, device.kv_bytes, device.compute_bytes, device.runtime_bytes)
            assert all(part >= 0 for part in parts)
            assert device.total_bytes == sum(parts)
            assert device.spare_bytes == device.free_bytes - device.total_bytes
            assert not (device.idle and device.total_bytes)
        assert len({device.gpu for device in devices}) == len(devices)
        if candidate.verdict in ("fits", "fits-with-offload"):
            assert not candidate.short_bytes
            assert all(device.spare_bytes >= 0 for device in devices if not device.idle)
        if candidate.verdict == "does-not-fit":
            assert candidate.short_bytes > 0 or candidate.reasons
        if candidate.backend == "llama.cpp" and candidate.split_mode != "tensor" and candidate.verdict != "illegal":
            layers = sum(device.layers for device in devices) + candidate.host.layers
            assert layers == len(case[1].layers)


def test_more_context_never_uses_less() -> None:
    compared, alone = 0, 0

    @settings(max_examples=150, deadline=None)
    @given(cases(engines=("llama.cpp", "ollama")), st.integers(256, 30_000), st.integers(1, 30_000))
    def check(case: Case, tokens: int, more: int) -> None:
        nonlocal compared, alone
        engine, facts, machine, wants = case
        short, long = (
            candidates(engine, facts, machine, replace(wants, ctx_tokens=ctx, offload=False))
            for ctx in (tokens, tokens + more)
        )
        longer = {shape_of(each): each for each in long}
        for each in short:
            other = longer.get(shape_of(each))
            # Ollama computes less of a prompt at once where the context is long, and keeps less of a window for it.
            if other is None or each.wants.ubatch != other.wants.ubatch:
                alone += 1
                continue
            compared += 1
            assert taken(each) <= taken(other)
            assert sum(d.kv_bytes for d in each.devices) <= sum(d.kv_bytes for d in other.devices)
        assert any(each.verdict == "fits" for each in short) or not any(each.verdict == "fits" for each in long)

    check()
    assert compared > 2 * alone


def shape_of(candidate: Candidate) -> tuple[object, ...]:
    """How the model is divided, and over which cards."""
    return candidate.split_mode, tuple(device.gpu for device in candidate.devices if not device.idle)


@settings(max_examples=60, deadline=None)
@given(cases(engines=("vllm",), least=1), st.integers(256, 30_000), st.integers(1, 30_000))
def test_more_context_never_begins_to_fit_with_vllm(case: Case, tokens: int, more: int) -> None:
    engine, facts, machine, wants = case
    short, long = (
        candidates(engine, facts, machine, replace(wants, ctx_tokens=ctx)) for ctx in (tokens, tokens + more)
    )
    assert any(each.verdict == "fits" for each in short) or not any(each.verdict == "fits" for each in long)


def grown(machine: Machine, places: Sequence[int], more_mib: int) -> Machine:
    """The machine with so much more memory on these cards."""

    def with_more(gpu: Gpu) -> Gpu:
        more = more_mib * MIB
        return replace(gpu, total_bytes=(gpu.total_bytes or 0) + more, free_bytes=(gpu.free_bytes or 0) + more)

    gpus = tuple(with_more(gpu) if place in places else gpu for place, gpu in enumerate(machine.gpus))
    return replace(machine, gpus=gpus)


def still_fits(case: Case, larger: Machine) -> bool:
    """Whether what fits or runs on the case's machine does so on the larger one."""
    engine, facts, machine, wants = case
    before, after = (candidates(engine, facts, each, wants) for each in (machine, larger))
    fits = all(any(each.verdict == "fits" for each in some) for some in (before, after))
    runs = all(any(each.runs for each in some) for some in (before, after))
    return (fits or not any(each.verdict == "fits" for each in before)) and (
        runs or not any(each.runs for each in before)
    )


@settings(max_examples=200, deadline=None)
@given(cases(least=1), st.integers(0, 3), st.integers(1, 48 * 1024))
def test_a_larger_card_never_makes_what_fits_unfit(case: Case, place: int, more_mib: int) -> None:
    machine = case[2]
    assert still_fits(case, grown(machine, [place % len(machine.gpus)], more_mib))


@settings(max_examples=60, deadline=None)
@given(cases(least=1), st.integers(1, 48 * 1024))
def test_larger_cards_never_make_what_fits_unfit(case: Case, more_mib: int) -> None:
    machine = case[2]
    assert still_fits(case, grown(machine, range(len(machine.gpus)), more_mib))


@settings(max_examples=150, deadline=None)
@given(cases(least=1), st.data())
def test_another_card_with_more_memory_never_makes_what_fits_unfit(case: Case, data: st.DataObject) -> None:
    machine = case[2]
    place = data.draw(st.integers(0, len(machine.gpus) - 1), label="place")
    own = machine.gpus[place]
    names = NVIDIA if own.vendor == "nvidia" else AMD
    sizes = {name: machine_of((name,)).gpus[0] for name in names}
    larger = [card for card in sizes.values() if (card.total_bytes or 0) >= (own.total_bytes or 0) + GIB]
    if larger:
        card = data.draw(st.sampled_from(larger), label="card")
        card = replace(card, index=own.index, engine_devices=own.engine_devices, display=own.display)
        gpus = tuple(card if gpu is own else gpu for gpu in machine.gpus)
        assert still_fits(case, replace(machine, gpus=gpus))


@settings(max_examples=150, deadline=None)
@given(cases(least=2))
def test_equal_cards_may_change_places(case: Case) -> None:
    engine, facts, machine, wants = case
    alike = tuple(replace(machine.gpus[0], index=gpu.index, engine_devices=gpu.engine_devices) for gpu in machine.gpus)
    order = tuple(reversed(alike))
    turned = tuple(
        replace(gpu, engine_devices=own.engine_devices) for gpu, own in zip(order, alike, strict=True)
    )  # an engine counts them in its order
    one = candidates(engine, facts, replace(machine, gpus=alike), wants)
    other = candidates(engine, facts, replace(machine, gpus=turned), wants)
    assert [summed(each) for each in one] == [summed(each) for each in other]


def summed(candidate: Candidate) -> tuple[object, ...]:
    """What a candidate is, but for which of its cards is which."""
    devices = [(device.layers, device.head, device.total_bytes, device.spare_bytes) for device in candidate.devices]
    shape = (candidate.tensor_parallel, candidate.pipeline_parallel, candidate.replicas, candidate.split_mode)
    return candidate.verdict, shape, candidate.ctx_tokens, candidate.max_ctx_tokens, candidate.short_bytes, devices


@settings(max_examples=200, deadline=None)
@given(cases())
def test_no_speed_exceeds_its_bound(case: Case) -> None:
    _, facts, machine, _ = case
    for candidate in candidates(*case):
        speed, bound = candidate.speed, candidate.speed.bound_tok_s
        assert bound is None or 0 < bound < math.inf
        for found, most in (
            (speed.decode_tok_s, bound),
            (speed.aggregate_tok_s, bound and bound * candidate.parallel),
            (speed.prefill_tok_s, None),
        ):
            if found:
                assert 0 < found.low <= found.likely <= found.high
                assert most is None or found.high <= most
        if bound and candidate.devices:  # nor do the sums, of which the range is cut off at the bound
            used = [machine.gpus[device.gpu] for device in candidate.devices if not device.idle]
            work = work_of(candidate, facts, used)
            assert 1 / decode_seconds(work) <= bound
            assert aggregate_tok_s(work) <= bound * work.users


@settings(max_examples=100, deadline=None)
@given(cases())
def test_a_candidate_goes_through_json_unharmed(case: Case) -> None:
    for candidate in candidates(*case):
        text = json.dumps(to_json(candidate), allow_nan=False)
        data = json.loads(text)
        wants = value_from_json(type(candidate.wants), data["wants"], "wants")
        again = value_from_json(Candidate, {**data, "wants": to_json(Wants())}, "candidate")
        assert replace(again, wants=wants) == candidate


@functools.cache
def real_flags() -> frozenset[str]:
    """Every flag in the help of the llama-server that is installed."""
    words = [str(real_llama_server()), "--help"]
    text = subprocess.run(words, capture_output=True, text=True, timeout=60, check=True).stdout
    return frozenset(re.findall(r"(?:^|[,\s])(--?[a-z][a-z0-9-]*)", text))


def argv_of(candidate: Candidate) -> tuple[str, ...]:
    return launched(candidate).argv


def launched(candidate: Candidate) -> Launch:
    serving = Serving(
        program=Path("engine"), model="model", name="name", host="127.0.0.1", port=8080, folder=Path("folder")
    )
    return load_backend(candidate.backend).launch(candidate, serving)


@settings(max_examples=150, deadline=None)
@given(cases(engines=("llama.cpp",)))
def test_llama_server_takes_every_plan_by_its_own_help(case: Case) -> None:
    for candidate in candidates(*case):
        if candidate.verdict == "illegal":
            continue
        argv = argv_of(candidate)
        names = [device.device for device in candidate.devices if not device.idle]
        read, asked = llama_server_options.parse(argv[1:], {"": names}.__getitem__)
        assert asked is None
        assert read.ctx_tokens >= candidate.ctx_tokens * candidate.parallel
        assert read.slots == candidate.parallel
        assert list(read.devices or ()) == names
        assert read.kv_type == (candidate.wants.kv_type_k, candidate.wants.kv_type_v)
        assert {word for word in argv if word.startswith("-") and not word[1:].isdecimal()} <= real_flags()


@settings(max_examples=150, deadline=None)
@given(cases(engines=("vllm",)))
def test_vllm_takes_every_plan_by_its_recorded_help(case: Case) -> None:
    for candidate in candidates(*case):
        if candidate.verdict == "illegal":
            continue
        read = vllm_options.parse(argv_of(candidate)[1:], old=False)
        assert (read.tensor, read.pipeline, read.replicas) == (
            candidate.tensor_parallel,
            candidate.pipeline_parallel,
            candidate.replicas,
        )
        assert read.max_model_len == candidate.ctx_tokens
        assert read.model == "model"


@functools.cache
def ollama_variables() -> frozenset[str]:
    """Every setting that Ollama logs when it starts."""
    log = (Path(__file__).parents[1] / "data" / "logs" / "ollama" / "one.log").read_text()
    (line,) = [line for line in log.splitlines() if "server config" in line]
    return frozenset(re.findall(r"(OLLAMA_[A-Z_]+):", line))


@functools.cache
def real_variables() -> frozenset[str]:
    """Every variable in the help of the llama-server that is installed, which Ollama's llama-server reads, too."""
    words = [str(real_llama_server()), "--help"]
    text = subprocess.run(words, capture_output=True, text=True, timeout=60, check=True).stdout
    return frozenset(re.findall(r"LLAMA_ARG_[A-Z0-9_]+", text))


@settings(max_examples=150, deadline=None)
@given(cases(engines=("ollama",)))
def test_ollama_takes_every_plan_by_the_settings_it_logs(case: Case) -> None:
    for candidate in candidates(*case):
        if candidate.verdict in ("illegal", "unavailable"):
            continue
        launch = launched(candidate)
        assert launch.argv[1:] == ("serve",)
        own = {name for name in launch.env if name.startswith("OLLAMA_")}
        assert own <= ollama_variables()
        assert {name for name in launch.env if name.startswith("LLAMA_ARG_")} <= real_variables()
        assert launch.env["OLLAMA_CONTEXT_LENGTH"] == str(candidate.ctx_tokens)
        assert launch.env["OLLAMA_NUM_PARALLEL"] == str(candidate.parallel)
