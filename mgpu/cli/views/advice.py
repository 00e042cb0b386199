"""The screen for one model on several machines: a row for each, and what can be said of them."""

from __future__ import annotations

import textwrap
from collections.abc import Callable, Iterator
from typing import TYPE_CHECKING

from mgpu.cli.views.ways import shape_words, split_words
from mgpu.cli.views.words import card_name, plain_table, width_of
from mgpu.planning.advice import Choice
from mgpu.planning.choice import TITLES
from mgpu.planning.speed import interval

if TYPE_CHECKING:
    from rich.console import RenderableType
    from rich.table import Table

    from mgpu.cli.advice import Compared
    from mgpu.planning.advice import Standing

_WORDS = {
    "fits": ("fits", "green"),
    "fits-with-offload": ("offload", "yellow"),
    "does-not-fit": ("does not fit", "red"),
    "illegal": ("illegal", "red"),
    "unavailable": ("does not fit", "red"),
}
_INDENT = 12

# What a column shows of a machine, by its heading.
_Column = tuple[str, str, "Callable[[Standing], RenderableType]"]


def advice_screen(compared: Compared, width: int) -> Iterator[RenderableType]:
    """Yield the whole screen of `mgpu plan MODEL --machine A --machine B`."""
    from rich.text import Text

    count = len(compared.standings)
    runs = sum(standing.runs for standing in compared.standings)
    some = ("both" if count == 2 else f"all {count}") if runs == count else f"{runs or 'none'} of {count}"
    contexts = _contexts(compared)
    tokens = f" with {contexts[0]} tokens" if len(contexts) == 1 else ""
    heading = f"{compared.name}{tokens} runs on {some} machines"
    yield from (
        Text(line, style="bold")
        for line in ([f"{heading}   SIMULATED"] if len(heading) + 12 <= width else [heading, "SIMULATED"])
    )
    yield ""
    yield from _tables(compared, width)
    yield ""
    for label, text in _notes(compared):
        first, *more = textwrap.wrap(text, max(width - _INDENT, 30), break_on_hyphens=False, break_long_words=False)
        yield f"  {label:<9} {first}"
        yield from (f"{'':{_INDENT}}{line}" for line in more)


def speed_cell(choice: Choice | None) -> str:
    """Return what all users of a choice get together: an interval and, where some wait, the number of the others; "?"
    where nothing is predicted, "-" where it does not run."""
    if choice is None or not choice.runs:
        return "-"
    users = f" ({choice.users})" if choice.users < choice.candidate.parallel else ""
    return f"{interval(choice.all_tokens_s)}{users}" if choice.all_tokens_s else "?"


def _tables(compared: Compared, width: int) -> Iterator[RenderableType]:
    from rich.text import Text

    def machine(standing: Standing) -> str:
        return card_name(standing.name)

    def verdict(standing: Standing) -> Text:
        word, style = _WORDS[standing.one.candidate.verdict]
        return Text(word, style=style)

    names: list[_Column] = [("machine", "left", machine), ("", "left", verdict)]
    if len(_contexts(compared)) > 1:
        names.append(("tokens", "right", lambda each: str(each.one.candidate.ctx_tokens)))
    ways: list[_Column] = [
        ("quantisation", "left", lambda each: (each.one.candidate.quant or "?") if each.one.runs else "-"),
        ("engine", "left", lambda each: _way(each, each.one) if each.one.runs else "-"),
    ]
    rates: list[_Column] = [("1 user", "right", lambda each: speed_cell(each.one))]
    if compared.users > 1:
        rates.append((_users_heading(compared), "right", lambda each: speed_cell(each.many)))
    rates.append(("W", "right", lambda each: _number(each.watts) if each.machine.gpus else "-"))
    if compared.prices:
        rates.append(("price", "right", lambda each: _number(each.price)))
        rates.append(("per 1000", "right", _per_1000))
    wide = [*names, *ways, *rates]
    if width_of(table := _table(compared, wide)) <= width:
        yield table
        return
    yield _table(compared, [*names, *ways])
    yield ""
    yield _table(compared, [names[0], *rates])


def _table(compared: Compared, columns: list[_Column]) -> Table:
    table = plain_table([(heading, justify) for heading, justify, _ in columns], wrapping="machine")
    for standing in compared.standings:
        table.add_row(*(cell(standing) for _, _, cell in columns))
    return table


def _way(standing: Standing, choice: Choice) -> str:
    """The engine and how it divides the model over the cards."""
    words = split_words(choice.candidate) if not choice.cards else shape_words(choice.candidate)
    if choice.cards == 1 < len(standing.machine.gpus):
        words = "one card"
    return ", ".join(filter(None, (TITLES[choice.candidate.backend], words)))


def _number(value: float | None) -> str:
    return "?" if value is None else f"{value:.0f}"


def _per_1000(standing: Standing) -> str:
    rates = [rate for rate in (standing.one_per_1000, standing.many_per_1000) if rate is not None]
    return " / ".join(f"{rate:.1f}" if rate < 9.95 else f"{rate:.0f}" for rate in rates) or "-"


def _notes(compared: Compared) -> Iterator[tuple[str, str]]:
    for standing in compared.standings:
        yield from (("note", f"{standing.name}: {text}") for text in _remarks(standing))
    if short := _short_context(compared):
        yield "note", f"{compared.users} users with {short} tokens each: not every machine has room for more"
    waiting = {each.many.users for each in compared.standings if each.many and each.many.some_wait}
    for users in sorted(waiting):
        yield "note", f"({users}): room for {users} of {compared.users} users at once; the others wait"
    for statement in compared.statements:
        prefix = "" if statement.kind in ("other-machine", "money") else f"{statement.machine}: "
        yield "advice", f"{prefix}{statement.text}"
    yield "tokens/s", f"with the context full, {_users(compared.users)}"
    yield "W", "the cards' power limits together: a snapshot's own, else the defaults"
    if compared.prices:
        whom = "of one user" if compared.users == 1 else f"of one user / of {compared.users} users"
        yield "per 1000", f"likely tokens/s {whom} for each 1000 of the price"
    if compared.without_price:
        yield "price", f'not given: {", ".join(compared.without_price)}; add --price "{compared.without_price[0]}=…"'


def _contexts(compared: Compared) -> list[int]:
    """The contexts that one user gets, each once."""
    return sorted({standing.one.candidate.ctx_tokens for standing in compared.standings})


def _short_context(compared: Compared) -> int | None:
    """The context of each of several users, where it is less than one alone has."""
    short = {each.many.candidate.ctx_tokens for each in compared.standings if each.many}
    return max(short) if short and max(short) < max(_contexts(compared)) else None


def _users_heading(compared: Compared) -> str:
    short = _short_context(compared)
    return f"{compared.users} users" + (f",\n{short} each" if short else "")


def _users(users: int) -> str:
    return "one user" if users == 1 else f"one user and {users} users together"


def _remarks(standing: Standing) -> Iterator[str]:
    """Why a machine does not run it, what it costs the users, and what else the machine has room for."""
    one, many, other = standing.one.candidate, standing.many, standing.largest
    reasons = list(one.reasons)
    if one.verdict == "fits-with-offload" and not standing.offload:
        yield "; ".join([*reasons[:1], "only with --offload allow"])
    elif one.verdict != "fits":
        yield from reasons[:1]
    else:
        yield from (reason for reason in reasons if reason.startswith("context lowered") or "was not checked" in reason)
    if standing.usual:
        yield f"alone it would be planned with {_spoken(standing.usual)}; compared in {one.quant}"
    if other:
        yield f"{'it has room for' if standing.one.fits else 'it would fit with'} {_spoken(other)}"
    if many is None:
        return
    candidate = many.candidate
    changed = [candidate.quant] if candidate.quant != one.quant else []
    changed += [_way(standing, many)] if _way(standing, many) != _way(standing, standing.one) else []
    if changed:
        yield f"{candidate.parallel} users with {', '.join(map(str, changed))}"


def _spoken(choice: Choice) -> str:
    speed = f" ({interval(choice.tokens_s)} tokens/s)" if choice.tokens_s else ""
    return f"{choice.candidate.quant or 'it'}{speed}"
