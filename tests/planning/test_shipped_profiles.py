"""Every model that ships, on machines from none to eight cards: a plan that adds up, whatever the verdict."""

from __future__ import annotations

import pytest

from mgpu.cli.options import PlannerOptions
from mgpu.cli.prepare import prepare
from mgpu.planning.candidates import Candidate
from mgpu.profile import shipped_profile_folder

MACHINES = ("2x4090", "4090+4080", "4x3090", "2x5090", "8xH100", "3060-ti", "none")
PROFILES = sorted(path.stem for path in shipped_profile_folder().glob("*.yaml"))
RUN = ("fits", "fits-with-offload")

pytestmark = pytest.mark.usefixtures("nothing_on_disk")


def check(candidate: Candidate, names: list[str]) -> None:
    """The parts are sizes, the sums are theirs, and the verdict follows from them."""
    for device in candidate.devices:
        parts = (device.weights_bytes, device.kv_bytes, device.compute_bytes, device.runtime_bytes)
        assert min(parts) >= 0
        assert device.total_bytes == sum(parts)
        assert device.spare_bytes == device.free_bytes - device.total_bytes
        assert device.gpu >= len(names) or device.name == names[device.gpu]  # a way out may be one more card
    used = [device for device in candidate.devices if not device.idle]
    assert candidate.verdict in (*RUN, "does-not-fit", "illegal", "unavailable")
    assert (candidate.short_bytes > 0) == (candidate.verdict == "does-not-fit")
    if candidate.verdict in RUN:
        assert all(device.spare_bytes >= 0 for device in used)
        assert candidate.ctx_tokens > 0
    else:
        assert candidate.reasons
    if candidate.verdict == "fits" and candidate.devices:
        assert not candidate.host.layers
        assert candidate.max_ctx_tokens is None or candidate.max_ctx_tokens >= candidate.ctx_tokens
    speed = candidate.speed
    for each, bound in (
        (speed.decode_tok_s, speed.bound_tok_s),
        (speed.aggregate_tok_s, speed.bound_tok_s and speed.bound_tok_s * candidate.parallel),
    ):
        assert each is None or 0 < each.low <= each.likely <= each.high
        assert each is None or bound is None or each.high <= bound


@pytest.mark.parametrize("machine", MACHINES)
def test_every_profile_is_planned(machine: str) -> None:
    verdicts = {}
    for profile in PROFILES:
        prepared = prepare(profile, PlannerOptions(), machine=machine)
        plan = prepared.plan
        names = [gpu.name for gpu in plan.machine.gpus]
        for candidate in plan.candidates:
            check(candidate, names)
            assert all(device.gpu < len(names) for device in candidate.devices)
        for fix in plan.fixes:
            check(fix.candidate, names)
            assert fix.candidate.verdict in RUN
        assert (plan.best is None) == (plan.chosen.verdict not in RUN)
        assert (plan.best is None) or not plan.fixes
        verdicts[profile] = plan.chosen.verdict
    assert verdicts["smollm2-135m"] == "fits"
    if machine == "8xH100":
        assert set(verdicts.values()) == {"fits"}
    elif machine != "none":
        assert verdicts["llama-405b"] == "does-not-fit"
    if machine == "3060-ti":
        assert verdicts["qwen3-32b"] == "does-not-fit"
