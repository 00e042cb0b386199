"""`mgpu plan MODEL --machine A --machine B`: machines side by side, before one is bought."""

from __future__ import annotations

import shlex
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any

from mgpu.cli.options import PlannerOptions
from mgpu.cli.prices import parse_prices, without_price
from mgpu.cli.result import Result
from mgpu.errors import MgpuError, NoAnswer, UsageError

if TYPE_CHECKING:
    from mgpu.cli.machine_plans import MachinePlans
    from mgpu.cli.prepare import Asked
    from mgpu.cli.prepared import Prepared
    from mgpu.machine.snapshot import Machine
    from mgpu.planning.advice import Choice, Standing, Statement
    from mgpu.planning.candidates import Candidate

MOST_MACHINES = 16
# Whom the second column is for, where nobody says how many.
_USERS = 8
# The context of each of them where a machine cannot give them all more at once: one question and a short answer.
_SHORT_CTX_TOKENS = 2048


@dataclass(frozen=True, slots=True, kw_only=True)
class Compared:
    """The answer: how each machine stands, and what can be said of them. `without_price` says which cards have no price
    though others do. `prepared` are the plans that the candidates are from."""

    name: str
    users: int
    standings: tuple[Standing, ...]
    statements: tuple[Statement, ...]
    prices: Mapping[str, float]
    without_price: tuple[str, ...]
    prepared: Mapping[Candidate, Prepared]


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
        exit_code=0 if any(standing.runs for standing in compared.standings) else 1,
        simulated=True,
        warnings=(*warnings, *dict.fromkeys(_warnings(asked))),
        errors=tuple(_refusals(model, compared)),
        told=True,
    )


def _refusals(model: str, compared: Compared) -> Iterator[NoAnswer]:
    """Where no machine runs the model: of each why, as its plan alone would say."""
    if any(standing.runs for standing in compared.standings):
        return
    for standing in compared.standings:
        candidate = standing.one.candidate
        reasons = "; ".join(candidate.reasons[:1]) or "there is no room for it"
        offload = "; with --offload allow it would run" if standing.one.runs else ""
        yield NoAnswer(
            f"{compared.name} does not fit {standing.name}: {reasons}{offload}",
            code="illegal" if candidate.verdict == "illegal" else "does-not-fit",
            hint=f"mgpu plan {shlex.quote(model)} --machine {shlex.quote(standing.name)} shows ways out",
        )


def _asked(model: str, options: PlannerOptions, machine: str, engine_arguments: Sequence[str]) -> Asked:
    from mgpu.cli.prepare import ask_about

    try:
        (asked,) = ask_about((model,), options, machine=machine, engine_arguments=engine_arguments)
    except MgpuError as error:
        error.message = f"--machine {machine[:40]}: {error.message.removeprefix(f'--machine {machine!r} ')}"
        raise
    return asked


def _refuse_twins(machines: Sequence[tuple[str, Machine]]) -> None:
    for place, (text, machine) in enumerate(machines):
        for before, other in machines[:place]:
            if replace(machine, captured_at="") == replace(other, captured_at=""):
                same = "twice" if text == before else f"and {before}, which is the same machine"
                raise UsageError(f"--machine names {text} {same}", hint="name each machine once")


def _compared(asked: Sequence[tuple[str, Asked]], options: PlannerOptions, prices: Mapping[str, float]) -> Compared:
    from mgpu.cli.machine_plans import MachinePlans
    from mgpu.planning.advice import price_of, statements

    users = options.users or _USERS
    prepared: dict[Candidate, Prepared] = {}
    machines = [MachinePlans(name=name, asked=each, options=options, prepared=prepared) for name, each in asked]
    usual = [machine.usual() for machine in machines]
    least = min((choice.file_bytes for choice in usual if choice.fits), default=None)
    alone = [machine.standing(choice, least) for machine, choice in zip(machines, usual, strict=True)]
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
        prepared=prepared,
    )


def _together(machines: Sequence[MachinePlans], alone: Sequence[Standing], users: int) -> list[Choice | None]:
    """The best way for several users on each machine: with the same context, unless the user says how much."""
    pairs = [(machine, standing.one) for machine, standing in zip(machines, alone, strict=True)]
    if users == 1:
        return [None for _ in pairs]

    def planned(ctx_tokens: int | None) -> list[Choice | None]:
        return [machine.together(one, users, ctx_tokens=ctx_tokens) if one.fits else None for machine, one in pairs]

    whole = planned(None)
    short = any(one.fits and not _all_at_once(many, one) for (_, one), many in zip(pairs, whole, strict=True))
    return planned(_SHORT_CTX_TOKENS) if short and machines[0].options.ctx is None else whole


def _all_at_once(many: Choice | None, one: Choice) -> bool:
    """Whether all users have the context that one alone would have, at the same time."""
    return many is not None and many.candidate.ctx_tokens >= one.candidate.ctx_tokens and not many.some_wait


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
        "runs": standing.runs,
        "quant": standing.one.candidate.quant,
        "power_limit_w": standing.watts,
        "price": price if compared.prices else None,
        "one_user": shown(standing.one),
        "users": shown(standing.many),
        "one_card": shown(standing.one_card),
        "largest": shown(standing.largest),
        "usual": shown(standing.usual),
    }
