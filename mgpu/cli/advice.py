"""`mgpu plan MODEL --machine A --machine B`: machines side by side, before one is bought."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any

from mgpu.cli.options import PlannerOptions
from mgpu.cli.prices import parse_prices, without_price
from mgpu.cli.result import Result
from mgpu.errors import MgpuError, UsageError
from mgpu.planning.wants import Goal

if TYPE_CHECKING:
    from mgpu.cli.prepare import Asked, Prepared
    from mgpu.machine.snapshot import Machine
    from mgpu.models.forms import Weights
    from mgpu.planning.advice import Choice, Standing, Statement
    from mgpu.planning.candidates import Candidate

MOST_MACHINES = 16
# Whom the second column is for, where nobody says how many.
_USERS = 8
# The context of each of them where a machine cannot give them all more at once: one question and a short answer.
_SHORT_CTX_TOKENS = 2048


@dataclass(frozen=True, slots=True, kw_only=True)
class Compared:
    """The answer: how each machine stands, and what can be said of them. `allowed` says that the user allows layers in
    host memory, `without_price` which cards have no price though others do. `prepared` are the plans that the
    candidates are from."""

    name: str
    users: int
    standings: tuple[Standing, ...]
    statements: tuple[Statement, ...]
    prices: Mapping[str, float]
    without_price: tuple[str, ...]
    allowed: bool
    prepared: Mapping[Candidate, Prepared]

    def runs_on(self, standing: Standing) -> bool:
        """Whether the model runs there, as far as the user allows."""
        return standing.one.fits or (self.allowed and standing.one.runs)


def compare_machines(
    model: str,
    options: PlannerOptions,
    machines: Sequence[str],
    *,
    prices: Sequence[str],
    engine_arguments: Sequence[str] = (),
) -> Result:
    """Return how `model` does on each of `machines`. Raises UsageError for what goes with one machine only, for a
    machine that is named twice and for a wrong price, and what `prepare` raises, naming the machine."""
    from mgpu.cli.views.advice import advice_screen

    if len(machines) > MOST_MACHINES:
        raise UsageError(f"{len(machines)} machines are more than the {MOST_MACHINES} that are compared")
    asked = [(text, _asked(model, options, text, engine_arguments)) for text in machines]
    _refuse_twins([(text, each.machine) for text, each in asked])
    gpus = [gpu for _, each in asked for gpu in each.machine.gpus]
    known, warnings = parse_prices(prices, gpus)
    compared = _compared(asked, options, known)
    return Result(
        command="plan",
        data=_data(compared, asked[0][1]),
        screen=lambda width: advice_screen(compared, width),
        exit_code=0 if any(map(compared.runs_on, compared.standings)) else 1,
        simulated=True,
        warnings=(*warnings, *dict.fromkeys(_warnings(asked))),
    )


def _asked(model: str, options: PlannerOptions, machine: str, engine_arguments: Sequence[str]) -> Asked:
    from mgpu.cli.prepare import ask_about

    try:
        (asked,) = ask_about((model,), options, machine=machine, engine_arguments=engine_arguments)
    except MgpuError as error:
        error.message = f"--machine {machine[:40]}: {error.message.removeprefix(f'--machine {machine!r} ')}"
        raise
    # Another machine may have any engine, and what is on this one's disk is not on that one's.
    ways = {
        name: replace(way, engine=None, running=None, remarks=())
        for name, way in asked.ways.items()
        if name != "ollama" or "llama.cpp" not in asked.ways  # which it runs, on fewer cards
    }
    return replace(asked, ways=ways)


def _refuse_twins(machines: Sequence[tuple[str, Machine]]) -> None:
    for place, (text, machine) in enumerate(machines):
        for before, other in machines[:place]:
            if replace(machine, captured_at="") == replace(other, captured_at=""):
                same = "twice" if text == before else f"and {before}, which is the same machine"
                raise UsageError(f"--machine names {text} {same}", hint="name each machine once")


def _compared(asked: Sequence[tuple[str, Asked]], options: PlannerOptions, prices: Mapping[str, float]) -> Compared:
    from mgpu.planning.advice import price_of, statements

    users = options.users or _USERS
    prepared: dict[Candidate, Prepared] = {}
    machines = [_Machine(name=name, asked=each, options=options, prepared=prepared) for name, each in asked]
    alone = [machine.alone() for machine in machines]
    standings = [
        replace(standing, many=many, price=price_of(standing.machine.gpus, prices))
        for standing, many in zip(alone, _together(machines, alone, users), strict=True)
    ]
    missing = without_price(prices, (gpu for _, each in asked for gpu in each.machine.gpus)) if prices else []
    return Compared(
        name=asked[0][1].model.name,
        users=users,
        standings=tuple(standings),
        statements=statements(standings, users),
        prices=prices,
        without_price=tuple(missing),
        allowed=options.offload == "allow",
        prepared=prepared,
    )


def _together(machines: Sequence[_Machine], alone: Sequence[Standing], users: int) -> list[Choice | None]:
    """The best way for several users on each machine: with the same context, unless the user says how much."""
    pairs = [(machine, standing.one) for machine, standing in zip(machines, alone, strict=True)]
    if users == 1:
        return [None for _ in pairs]

    def planned(ctx_tokens: int | None) -> list[Choice | None]:
        return [
            machine.together(users, at_most=one.file_bytes, ctx_tokens=ctx_tokens) if one.fits else None
            for machine, one in pairs
        ]

    whole = planned(None)
    short = any(one.fits and not _all_at_once(many, one) for (_, one), many in zip(pairs, whole, strict=True))
    return planned(_SHORT_CTX_TOKENS) if short and machines[0].options.ctx is None else whole


def _all_at_once(many: Choice | None, one: Choice) -> bool:
    """Whether all users have the context that one alone would have, at the same time."""
    if many is None or many.candidate.ctx_tokens < one.candidate.ctx_tokens:
        return False
    return not any(reason.endswith("others wait") for reason in many.candidate.reasons)


@dataclass(frozen=True, slots=True, kw_only=True)
class _Machine:
    """Plans one model on one machine, or on one of its cards, in the largest of its quantisations that fits."""

    name: str
    asked: Asked
    options: PlannerOptions
    prepared: dict[Candidate, Prepared]

    def alone(self) -> Standing:
        """What it makes of the model for one user."""
        from mgpu.planning.advice import Standing

        one = self._largest(self.asked, 1, Goal.latency)
        one_card = self._on_one_card(one) if one.fits else None
        return Standing(name=self.name, machine=self.asked.machine, one=one, one_card=one_card)

    def together(self, users: int, *, at_most: int, ctx_tokens: int | None = None) -> Choice | None:
        """The best way for several users, in a file of at most that size; None where it does not fit."""
        asked = self.asked if ctx_tokens is None else _with_ctx(self.asked, ctx_tokens)
        many = self._largest(asked, users, self.options.goal or Goal.throughput, at_most=at_most)
        return many if many.fits else None

    def _on_one_card(self, several: Choice) -> Choice | None:
        """The best way on a single card, where the machine has more; of each kind of card one is tried."""
        gpus = self.asked.machine.gpus
        kinds = {(gpu.name, gpu.total_bytes, gpu.free_bytes): gpu for gpu in gpus}
        if len(gpus) < 2 or several.cards < 2:
            return None
        alone = [self.asked.on((gpu,), self.asked.machine.host) for gpu in kinds.values()]
        found = [self._largest(each, 1, Goal.latency, at_most=several.file_bytes) for each in alone if each]
        return max(found, key=_rank, default=None)

    def _largest(self, asked: Asked, users: int, goal: Goal, *, at_most: int | None = None) -> Choice:
        """The way in the largest quantisation that fits, of at most that size; else the preferred one with layers in
        host memory, or as it misses."""
        from mgpu.planning.advice import EQUAL_SIZE

        asked = _for_users(asked, users, goal)
        forms = [(name, form) for name, way in asked.ways.items() for form in _forms(asked, name)]
        sizes = sorted({form.facts.file_bytes for _, form in forms}, reverse=True)
        room = sum(gpu.free_bytes or gpu.total_bytes or 0 for gpu in asked.machine.gpus)
        cards = any(way.gpus for way in asked.ways.values())
        for size in sizes:
            if not cards or size > room or size > (at_most or size):
                continue
            equal = [(name, form) for name, form in forms if size * EQUAL_SIZE <= form.facts.file_bytes <= size]
            choice = self._planned(asked, equal)
            if choice.fits:
                return choice
        preferred = [(name, way.weights[0]) for name, way in asked.ways.items()]
        on_host = self._planned(_with_offload(asked), [each for each in preferred if each[0] != "vllm"])
        return on_host if on_host.runs else self._planned(asked, preferred)

    def _planned(self, asked: Asked, forms: Sequence[tuple[str, Weights]]) -> Choice:
        from mgpu.planning.advice import Choice

        ordered = sorted(forms, key=lambda form: -form[1].facts.file_bytes)
        weights = {name: tuple(form for owner, form in ordered if owner == name) for name in dict.fromkeys(asked.ways)}
        ways = {name: replace(way, weights=weights[name]) for name, way in asked.ways.items() if weights[name]}
        prepared = replace(asked, ways=ways or asked.ways).planned(fixes=False)
        choice = Choice(candidate=prepared.plan.chosen, file_bytes=prepared.plan.model.file_bytes)
        self.prepared[choice.candidate] = prepared
        return choice


def _rank(choice: Choice) -> tuple[bool, bool, int, float]:
    speed = choice.tokens_s
    return choice.fits, choice.runs, choice.file_bytes, speed.likely if speed else 0.0


def _for_users(asked: Asked, users: int, goal: Goal) -> Asked:
    from mgpu.planning.vllm_memory import VllmWants

    ways = {}
    for name, way in asked.ways.items():
        wants = replace(way.wants, parallel=users)
        ways[name] = replace(way, wants=replace(wants, goal=goal) if isinstance(wants, VllmWants) else wants)
    return replace(asked, options=replace(asked.options, parallel=users, goal=goal), ways=ways)


def _with_ctx(asked: Asked, ctx_tokens: int) -> Asked:
    ways = {name: replace(way, wants=replace(way.wants, ctx_tokens=ctx_tokens)) for name, way in asked.ways.items()}
    return replace(asked, ways=ways)


def _with_offload(asked: Asked) -> Asked:
    """Layers may stay in host memory, with the engines that can do that."""
    ways = {
        name: replace(way, wants=replace(way.wants, offload=True)) for name, way in asked.ways.items() if name != "vllm"
    }
    return replace(asked, ways=ways or asked.ways)


def _forms(asked: Asked, backend: str) -> Iterator[Weights]:
    """The model in all its quantisations for one engine; with --quant, and for what is no profile, in that one."""
    preferred = asked.ways[backend].weights
    profile = asked.model.profile
    if profile and asked.options.quant is None and backend != "vllm":
        # A file on this machine's disk is no reason for another machine to take it.
        preferred = tuple(asked.model.in_quantisation(backend, name) for name in profile.quantisations)
    yield from (replace(form, path=None) if profile else form for form in preferred)


def _warnings(asked: Sequence[tuple[str, Asked]]) -> Iterator[str]:
    for _, each in asked:
        yield from each.warnings
        for way in each.ways.values():
            yield from (form.unconfirmed for form in way.weights if form.unconfirmed)


def _data(compared: Compared, asked: Asked) -> dict[str, Any]:
    from mgpu.machine.snapshot import to_json

    facts = next(iter(asked.ways.values())).weights[0].facts
    return {
        "model": {
            "name": compared.name,
            "architecture": facts.architecture,
            "parameters": facts.parameters,
            "active_parameters": facts.active_parameters,
            "layers": len(facts.layers),
            "context_length": facts.context_length,
        },
        "users": compared.users,
        "prices": [{"card": card, "price": price} for card, price in compared.prices.items()],
        "machines": [_machine_data(compared, standing) for standing in compared.standings],
        "advice": [to_json(statement) for statement in compared.statements],
    }


def _machine_data(compared: Compared, standing: Standing) -> dict[str, Any]:
    from mgpu.cli.plan import candidate_data
    from mgpu.machine.snapshot import to_json

    def shown(choice: Choice | None) -> dict[str, Any] | None:
        if choice is None:
            return None
        return candidate_data(compared.prepared[choice.candidate], choice.candidate)

    price = {
        "total": standing.price,
        "one_user_tok_s_per_1000": standing.one_per_1000,
        "users_tok_s_per_1000": standing.many_per_1000,
        "without_price": without_price(compared.prices, standing.machine.gpus),
    }
    return {
        "machine": standing.name,
        "snapshot": to_json(standing.machine),
        "verdict": standing.one.candidate.verdict,
        "runs": compared.runs_on(standing),
        "quant": standing.one.candidate.quant,
        "power_limit_w": standing.watts,
        "price": price if compared.prices else None,
        "one_user": shown(standing.one),
        "users": shown(standing.many),
        "one_card": shown(standing.one_card),
    }
