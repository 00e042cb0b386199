"""Popular claims about several cards, beside what the planner computes: writes docs/popular-claims.md.

python -m benchmarks.claims           writes the page
python -m benchmarks.claims --check   exits with 1 where the page is not what the planner says now
"""

from __future__ import annotations

import csv
import sys
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, replace
from functools import cache
from pathlib import Path
from typing import Any

from mgpu.machine.simulate import simulate
from mgpu.machine.snapshot import Link, Machine
from mgpu.models.facts import ModelFacts
from mgpu.models.shape import facts_from_shape
from mgpu.models.vllm_shape import facts_for_vllm
from mgpu.planning.candidates import Candidate
from mgpu.planning.plan import llama_cpp_candidates
from mgpu.planning.predicted import predicted
from mgpu.planning.speed import Range, Speed, floored, interval
from mgpu.planning.vllm_candidates import vllm_candidates
from mgpu.planning.vllm_memory import VllmWants
from mgpu.planning.wants import Wants
from mgpu.profile import load_profile
from mgpu.units import GIB, gib

REPOSITORY = Path(__file__).parents[1]
PAGE = REPOSITORY / "docs" / "popular-claims.md"
DATA = Path(__file__).with_name("claims.yaml")
MEASURED = REPOSITORY / "tests" / "data" / "measured.csv"
_MOST_CARDS = 32
# Nearer predictions than that are equal.
_EQUAL = 1.05
_TITLES = {"llama.cpp": "llama.cpp", "vllm": "vLLM"}
_HEAD = """# Popular claims, planned

Written by `make claims` from `benchmarks/claims.yaml`; a test holds the page to what the planner says. The claims are
those of popular articles about computers with several cards. Every plan is for {ctx} tokens of context and one user,
with an f16 KV cache, unless its row says otherwise; "most possible" is the physical bound, the card's bandwidth over
the bytes that a token reads. GiB are those of all cards together: what the plan needs (the memory it keeps free
included) and what the driver leaves of idle cards. Host memory is unknown here: offload assumes two channels of DDR5
and enough of it.
"""
_CTX = 8192


@dataclass(frozen=True, slots=True, kw_only=True)
class Planned:
    """One way and what the planner makes of it."""

    way: Mapping[str, Any]
    machine: Machine
    facts: ModelFacts
    candidate: Candidate

    @property
    def runs(self) -> bool:
        """Whether it could be started."""
        return self.candidate.runs

    @property
    def tokens_s(self) -> Range | None:
        """One user's speed or, of several users, that of all together."""
        speed = self.candidate.speed
        return speed.aggregate_tok_s if self.candidate.parallel > 1 else speed.decode_tok_s

    @property
    def speed(self) -> Speed:
        """What is predicted; of what does not fit as if there were room."""
        if self.runs:
            return self.candidate.speed
        roomy = replace(self.candidate, verdict="fits")
        return predicted(roomy, self.facts, self.machine.gpus, self.machine.host, self.machine.links).speed

    @property
    def words(self) -> str:
        """The machine, the quantisation and how the model is divided."""
        parts = [f"{self.way['machine']}, {self.way['quantisation']}", _TITLES[self.candidate.backend]]
        if self.candidate.tensor_parallel > 1:
            parts.append(f"tensor parallel {self.candidate.tensor_parallel}")
        elif self.candidate.pipeline_parallel > 1:
            parts.append(f"pipeline of {self.candidate.pipeline_parallel}")
        elif len(self.candidate.devices) > 1:
            parts.append(f"{self.candidate.split_mode} split")
        parts += ["NVLink"] if self.way.get("nvlink") else []
        parts += [f"{self.candidate.parallel} users"] if self.candidate.parallel > 1 else []
        parts += [f"{self.candidate.ctx_tokens} tokens"] if self.candidate.ctx_tokens != _CTX else []
        return ", ".join(parts)


def main(arguments: list[str]) -> int:
    """Write the page, or compare it; returns the exit code."""
    text = page()
    if arguments == ["--check"]:
        return 0 if PAGE.exists() and PAGE.read_text() == text else 1
    PAGE.parent.mkdir(exist_ok=True)
    PAGE.write_text(text)
    print(f"written: {PAGE.relative_to(REPOSITORY)}")
    return 0


def page() -> str:
    """Return the page's text."""
    import yaml

    claims = yaml.safe_load(DATA.read_text())
    return "\n".join([_HEAD.format(ctx=_CTX), *(line for claim in claims for line in _section(claim))])


def _section(claim: Mapping[str, Any]) -> Iterator[str]:
    ways = [_plan(claim["model"], way) for way in claim["ways"]]
    own = [each for each in ways if not each.way.get("instead")]
    yield f"## “{claim['claim']}”\n"
    yield f"**{_verdict(claim, own, [each for each in ways if each not in own])}**\n"
    yield "| plan | GiB needed of free | verdict | most possible | predicted |"
    yield "|---|---|---|---|---|"
    yield from (_row(each) for each in ways)
    yield ""
    for each in ways:
        yield f"- {each.words}: {_memory(each)}"
        yield from (f"  - {sum_}" for sum_ in _sums(each))
    for row in claim.get("measured", ()):
        yield f"- measured: {_measured(row)}"
    yield ""


def _plan(model: str, way: Mapping[str, Any]) -> Planned:
    machine = simulate(str(way["machine"]))
    if way.get("nvlink"):
        machine = replace(machine, links=(Link(a=0, b=1, kind="NVLink", p2p=True),))
    profile = load_profile(model).profile
    shared = {"ctx_tokens": way.get("ctx", _CTX), "parallel": way.get("users", 1)}
    if way.get("engine") == "vllm":
        source = next(each for each in profile.vllm if each.quantisation == way["quantisation"])
        facts = facts_for_vllm(model, profile.model, source.quantisation, source=source.repository)
        wants = VllmWants(**shared, tensor_parallel=way.get("tensor_parallel"), all_cards=True)
        found = vllm_candidates(facts, wants, machine.gpus, machine.host, machine.links)
    else:
        facts = facts_from_shape(model, profile.model, way["quantisation"])
        split = way.get("split", "layer") if len(machine.gpus) > 1 else None
        wishes = Wants(**shared, split_mode=split, offload=way.get("offload", False))
        found = llama_cpp_candidates(facts, machine, machine.gpus, wishes)
    return Planned(way=way, machine=machine, facts=facts, candidate=found[0])


def _verdict(claim: Mapping[str, Any], own: list[Planned], instead: list[Planned]) -> str:
    """What the plans say of the claim, in one sentence or two."""
    claimed = claim["claimed"]
    if "tok_s" in claimed:
        low, high = claimed["tok_s"]
        return _verdict_on_speed(low, high, own)
    if "loss" in claimed:
        low, high = claimed["loss"]
        return _verdict_on_loss(low, high, own, instead)
    if "slowest" in claimed:
        return _verdict_on_slowest(own[0], own[1])
    return _verdict_on_room(own[0], claim["model"], claimed["grow"])


def _verdict_on_speed(low: float, high: float, own: list[Planned]) -> str:
    said = f"{low:g}" if low == high else f"{low:g} to {high:g}"
    least_said = f"{'' if low == high else 'even '}{low:g} tokens/s"
    bounds = [bound for each in own if (bound := each.speed.bound_tok_s)]
    most = max(bounds, default=None)
    times = f"{low / most:.1f} times what is physically possible ({floored(most)})" if most and low > most else ""
    if not any(each.runs for each in own):
        least = min(own, key=lambda each: each.candidate.short_bytes)
        return f"No: it does not fit, {_short(least)}." + (f" If it did, {least_said} were {times}." if times else "")
    if times:
        return f"No: {least_said} are {times}."
    found = [each.tokens_s for each in own if each.runs and each.tokens_s]
    if not found:
        return f"Not above the physical bound{f' of {floored(most)}' if most else ''}; no speed is predicted."
    best = max(found, key=lambda each: each.likely)
    if low > best.high:
        return f"No: {interval(best)} tokens/s are predicted, not {said}."
    if high < best.low:
        return f"It is more: {interval(best)} tokens/s are predicted."
    return f"Yes: {interval(best)} tokens/s are predicted."


def _verdict_on_loss(low: float, high: float, own: list[Planned], in_turn: list[Planned]) -> str:
    (base, *others), (alone, split) = own, in_turn
    told = []
    inside = True
    for each in others:
        gain = _gain(each, base)
        loss = 100 * (1 - gain / each.way["ideal"])
        inside &= low <= loss <= high
        over = "NVLink" if each.way.get("nvlink") else "PCIe"
        told.append(f"{gain:.2f} times one card over {over} ({loss:.0f} % lost of the ideal {each.way['ideal']})")
    verdict = "Yes" if inside else "No, not for cards that work at the same time"
    kept = f"Two cards in turn (a layer split) give {_gain(split, alone):.2f} times one card."
    return f"{verdict}: two cards give {', '.join(told)}. {kept}"


def _gain(more: Planned, less: Planned) -> float:
    assert more.tokens_s
    assert less.tokens_s
    return more.tokens_s.likely / less.tokens_s.likely


def _verdict_on_slowest(mixed: Planned, slow: Planned) -> str:
    assert mixed.tokens_s
    assert slow.tokens_s
    true = mixed.tokens_s.likely <= slow.tokens_s.likely * _EQUAL
    speeds = f"{interval(mixed.tokens_s)} tokens/s, {interval(slow.tokens_s)} on two of the smaller"
    return f"{'Yes' if true else 'No'}, with tensor parallelism: {speeds}; {'; '.join(mixed.candidate.reasons)}."


def _verdict_on_room(asked: Planned, model: str, card: str) -> str:
    if asked.runs:
        return "Yes: it fits."
    for count in range(len(asked.machine.gpus) + 1, _MOST_CARDS + 1):
        if _plan(model, {**asked.way, "machine": f"{count}x{card}"}).runs:
            return f"No: {_short(asked)}. {count} of these cards are the fewest that hold it."
    return f"No: {_short(asked)}."


def _row(each: Planned) -> str:
    candidate = each.candidate
    verdict = {"fits": "fits", "fits-with-offload": "fits with offload"}.get(candidate.verdict, "**does not fit**")
    bound = each.speed.bound_tok_s
    cells = [
        each.words + (" (instead)" if each.way.get("instead") else ""),
        f"{_gib(_needed(each))} of {_gib(_free(each))}",
        verdict,
        floored(bound) if bound and candidate.parallel == 1 else "",
        f"{interval(each.tokens_s)} tokens/s" if each.tokens_s and each.runs else "",
    ]
    return f"| {' | '.join(cells)} |"


def _memory(each: Planned) -> str:
    """The sum of what is needed on the cards."""
    devices = [device for device in each.candidate.devices if not device.idle]
    parts = {
        "weights": sum(device.weights_bytes for device in devices),
        "KV": sum(device.kv_bytes for device in devices),
        "compute": sum(device.compute_bytes for device in devices),
        "runtime": sum(device.runtime_bytes for device in devices),
        "kept free": each.candidate.wants.headroom_bytes * len(devices),
    }
    memory = " + ".join(f"{_gib(size, 2)} {what}" for what, size in parts.items())
    text = f"{memory} = {_gib(sum(parts.values()), 2)} GiB"
    if kept := each.candidate.host.words(len(each.facts.layers)):
        text += f"; {kept} in host memory"
    return text


def _sums(each: Planned) -> tuple[str, ...]:
    """The sums of the speed, as the planner explains them; of what does not fit the bound alone."""
    if each.runs:
        return tuple(line for line in each.speed.sums if not line.startswith("prompt:"))
    basis = (each.speed.basis or "").partition(";")[0]
    return (f"physical bound if it fitted: {basis}",) if basis else ()


def _needed(each: Planned) -> int:
    used = [device for device in each.candidate.devices if not device.idle]
    return sum(device.total_bytes + each.candidate.wants.headroom_bytes for device in used)


def _free(each: Planned) -> int:
    return sum(device.free_bytes for device in each.candidate.devices)


def _short(each: Planned) -> str:
    return f"{gib(each.candidate.short_bytes)} short on {each.way['machine']}"


def _gib(size_bytes: int, digits: int = 1) -> str:
    return f"{size_bytes / GIB:.{digits}f}"


def _measured(row_id: str) -> str:
    row = _rows()[row_id]
    users = "" if row["concurrency"] == "1" else f" of {row['concurrency']} users together"
    split = {"none": "", "tensor": ", tensor parallel" if row["engine"] == "vllm" else ", tensor split"}
    link = f", {row['pcie_or_nvlink']}" if "NVLink" in row["pcie_or_nvlink"] else ""
    host = ", with layers in host memory" if row["offload"] == "1" else ""
    what = f"{row['model']} {row['quant']} on {row['gpu_list']}, {row['engine']}"
    what += split.get(row["split"], f", {row['split']} split") + host + link
    return f"{what}: {float(row['decode_tok_s']):g} tokens/s{users} (<{row['source_url']}>)"


@cache
def _rows() -> Mapping[str, Mapping[str, str]]:
    with MEASURED.open(encoding="utf-8", newline="") as file:
        return {row["row_id"]: row for row in csv.DictReader(file)}


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
