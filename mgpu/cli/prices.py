"""`--price "RTX 4090=1800"`: what cards cost, in the user's own currency."""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping, Sequence
from typing import TYPE_CHECKING, Any

from mgpu.errors import UsageError

if TYPE_CHECKING:
    from mgpu.machine.snapshot import Gpu
    from mgpu.planning.candidates import Candidate

_EXAMPLE = '--price "RTX 4090=1800"'
_AMOUNT = re.compile(r"\d{1,9}(\.\d{1,2})?", re.ASCII)
_SHOWN = 60


def parse_prices(texts: Sequence[str], gpus: Iterable[Gpu]) -> tuple[dict[str, float], tuple[str, ...]]:
    """Return the prices by the names that `mgpu.planning.advice.price_key` gives to `gpus`, and what to tell the user
    of those that no card has.

    Raises UsageError for what is no price or 0, for a card that is neither in the catalogue nor among `gpus`, and for a
    second price of one card.
    """
    from mgpu.planning.advice import price_key

    names = {gpu.name.lower(): price_key(gpu) for gpu in gpus}
    prices: dict[str, float] = {}
    for text in texts:
        card, _, amount = text.rpartition("=")
        if not card.strip() or not _AMOUNT.fullmatch(amount.strip()):
            raise UsageError(
                f"--price {_shorter(text)!r} is not a card and what it costs: a plain number, without a currency",
                hint=_EXAMPLE,
            )
        if not float(amount):
            raise UsageError(
                f"--price {_shorter(text)!r}: for nothing there is no rate of tokens for the money",
                hint=f"leave it out, or say what it would cost: {_EXAMPLE}",
            )
        name = names.get(card.strip().lower()) or _known(card.strip())
        if name in prices:
            raise UsageError(f"--price names the {name} twice", hint=f'--price "{name}={amount.strip()}" once')
        prices[name] = float(amount)
    unused = [name for name in prices if name not in names.values()]
    return prices, tuple(f"--price {name}: no machine here has one" for name in unused)


def price_data(prices: Mapping[str, float], gpus: Sequence[Gpu], candidate: Candidate) -> dict[str, Any]:
    """Return what the cards cost and what one user and all users get for it, as `--json` has it."""
    from mgpu.planning.advice import Choice, per_1000, price_of

    choice = Choice(candidate=candidate, file_bytes=0)
    total = price_of(gpus, prices)
    return {
        "total": total,
        "one_user_tok_s_per_1000": per_1000(choice.sure_tokens_s, total),
        "users_tok_s_per_1000": per_1000(choice.all_sure_tokens_s, total),
        "without_price": without_price(prices, gpus),
    }


def price_words(data: Mapping[str, Any], users: int) -> str:
    """Return `price_data` in one line."""
    if data["total"] is None:
        missing = data["without_price"]
        return f"unknown: no --price for {', '.join(missing)}" if missing else "no card, no price"
    rates = ((data["one_user_tok_s_per_1000"], "one user"), (data["users_tok_s_per_1000"], f"{users} users"))
    told = [f"{rate:.1f} tokens/s per 1000 for {whom}" for rate, whom in rates[: 1 if users == 1 else 2] if rate]
    return "; ".join([f"{data['total']:g}", *told])


def without_price(prices: Mapping[str, float], gpus: Iterable[Gpu]) -> list[str]:
    """Return the cards whose price is not known, each once."""
    from mgpu.planning.advice import price_key

    return sorted({price_key(gpu) for gpu in gpus} - prices.keys())


def _known(text: str) -> str:
    """The catalogue's name of a card."""
    from mgpu.machine.cards import find_card

    try:
        return find_card(text).name
    except UsageError as error:
        raise UsageError(f"--price {_shorter(text)!r}: {error.message}", code=error.code, hint=_EXAMPLE) from None


def _shorter(text: str) -> str:
    return text if len(text) <= _SHOWN else text[:_SHOWN] + "…"
