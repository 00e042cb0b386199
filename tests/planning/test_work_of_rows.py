"""What a plan takes a token to read, against the same model in the rows that the constants were fitted to."""

from __future__ import annotations

import pytest

from mgpu.cli.options import Backend, PlannerOptions
from mgpu.cli.prepare import prepare
from mgpu.planning.predicted import work_of
from mgpu.planning.work import Work
from tests.planning.measured_rows import MeasuredRow, measured_rows

pytestmark = pytest.mark.usefixtures("nothing_on_disk")


def rows_of(engine: str, model: str, quantisation: str) -> list[MeasuredRow]:
    named = engine, model, quantisation.lower()
    return [row for row in measured_rows(2)[0] if (row.engine, row.model, row.quantisation.lower()) == named]


def planned_work(profile: str, engine: str, quantisation: str) -> tuple[Work, int, bool]:
    """The work, the depth, and whether all layers read the whole context."""
    options = PlannerOptions(backend=Backend(engine), quant=quantisation, ctx="8192")
    plan = prepare(profile, options, machine="8xH200").plan
    by_index = {gpu.index: gpu for gpu in plan.machine.gpus}
    candidate = plan.chosen
    used = [by_index[device.gpu] for device in candidate.devices if not device.idle]
    whole = not any(layer.sliding_window for layer in plan.model.layers)
    return work_of(candidate, plan.model, used), candidate.ctx_tokens, whole


def totals(work: Work) -> tuple[float, float, float]:
    shares = [share for stage in work.stages for share in stage.shares]
    return (
        sum(share.weights_bytes for share in shares),
        sum(share.expert_bytes for share in shares),
        sum(share.kv_bytes for share in shares),
    )


@pytest.mark.parametrize(
    ("engine", "model", "quantisation", "profile", "quant", "within"),
    [
        pytest.param("llama.cpp", "Llama-3-70B", "Q4_K_M", "llama-70b", "Q4_K_M", 0.02, id="70B"),
        pytest.param("llama.cpp", "Llama-3-8B", "Q4_K_M", "llama-8b", "Q4_K_M", 0.02, id="8B"),
        pytest.param("llama.cpp", "Mistral-24B", "Q4_K_M", "mistral-small-24b", "Q4_K_M", 0.02, id="24B"),
        pytest.param("llama.cpp", "Qwen3-14B", "Q4_K_M", "qwen3-14b", "Q4_K_M", 0.02, id="14B"),
        pytest.param("llama.cpp", "Gemma-3-27B", "Q4_K_M", "gemma-3-27b", "Q4_K_M", 0.02, id="a tied head"),
        pytest.param("llama.cpp", "gpt-oss-120b", "MXFP4", "gpt-oss-120b", "MXFP4", 0.02, id="experts"),
        pytest.param("llama.cpp", "gpt-oss-20b", "MXFP4", "gpt-oss-20b", "MXFP4", 0.02, id="few experts"),
        pytest.param("vllm", "Llama-3-8B", "BF16", "llama-8b", "bf16", 0.02, id="vLLM, 16 bits"),
        pytest.param("vllm", "Qwen3-32B", "FP8", "qwen3-32b", "fp8", 0.02, id="vLLM, FP8"),
        # The rows of AWQ do not give a size, and are taken to have 4.25 bits for a parameter; it is 4.16.
        pytest.param("vllm", "Llama-3-70B", "AWQ-4bit", "llama-70b", "awq", 0.025, id="vLLM, four bits"),
        pytest.param("vllm", "Qwen3-30B-A3B", "GPTQ-4bit", "qwen3-30b-a3b", "gptq", 0.02, id="vLLM, experts"),
        pytest.param("vllm", "gpt-oss-120b", "MXFP4", "gpt-oss-120b", "mxfp4", 0.02, id="vLLM, MXFP4"),
    ],
)
def test_a_plan_reads_what_the_rows_do(
    engine: str, model: str, quantisation: str, profile: str, quant: str, within: float
) -> None:
    rows = rows_of(engine, model, quantisation)
    assert rows
    work, depth_tokens, whole = planned_work(profile, engine, quant)
    weights, experts, cache = totals(work)
    for row in rows:
        their_weights, their_experts, their_cache = totals(row.work)
        assert weights == pytest.approx(their_weights, rel=within)
        assert work.layers == row.work.layers
        assert (work.experts, work.experts_used) == (row.work.experts, row.work.experts_used)
        if row.work.experts:  # the rows have what is left of the file
            assert experts == pytest.approx(their_experts, rel=0.21)
        if whole and row.depth_tokens:
            assert cache / depth_tokens == pytest.approx(their_cache / row.depth_tokens, rel=0.001)
        assert work.active_parameters == pytest.approx(
            row.work.active_parameters, rel=0.15 if row.work.experts else 0.02
        )
        assert work.quantised is row.work.quantised
