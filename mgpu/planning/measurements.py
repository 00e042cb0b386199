"""Speeds that were measured on this machine, and what they say about the next plan.

A measurement counts for exactly the setting it was made in: another engine build, another flag, another card or
another power limit is another setting, and nothing is carried over. Within a setting a measurement at one depth
shifts the prediction for another by the same factor.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass

from mgpu.planning.speed import Range

# What runs of one setting differ by from time to time, where only one was made.
_REPEATABLE = 0.03
# How much less is known for each doubling of the depth away from where it was measured.
_PER_DOUBLING = 0.02


@dataclass(frozen=True, slots=True, kw_only=True)
class MeasuredCard:
    """A card as it was: `power_limit_w` is None where the driver does not say."""

    uuid: str | None
    name: str
    power_limit_w: float | None = None


@dataclass(frozen=True, slots=True, kw_only=True)
class Setting:
    """What a speed depends on. `build` is the engine's version, `flags` those that change speed, in a fixed order;
    `cards` in the engine's order; `model` names the file's content (its checksum, or its name and size)."""

    engine: str
    build: str | None
    flags: tuple[str, ...]
    cards: tuple[MeasuredCard, ...]
    model: str
    quantisation: str | None

    @property
    def certain(self) -> bool:
        """Whether it can be recognised again: without a build or a card's identity it could be any."""
        return bool(self.build) and all(card.uuid for card in self.cards)


@dataclass(frozen=True, slots=True, kw_only=True)
class Measurement:
    """One measured speed: `tok_s` of all `users` together at a mean depth of `depth_tokens`. `measured_at` is ISO 8601
    in UTC."""

    setting: Setting
    depth_tokens: int
    users: int
    tok_s: float
    measured_at: str


def narrowed(
    predict: Callable[[int], Range | None],
    measurements: Sequence[Measurement],
    setting: Setting,
    *,
    depth_tokens: int,
    users: int,
    bound_tok_s: float | None,
) -> Range | None:
    """Return the range for `depth_tokens` after what was measured in the same `setting` with as many `users`.

    `predict` gives the prediction at a depth; without measurements that count it is returned as it is. With them, the
    prediction is shifted by measured over predicted at the nearest depth (the median of several), and is as wide as
    these differ, wider the further the depth. No end exceeds `bound_tok_s`, of all users together. None where
    `predict` says nothing.
    """
    predicted = predict(depth_tokens)
    own = [
        each
        for each in measurements
        if setting.certain and each.setting == setting and each.users == users and each.tok_s > 0
    ]
    if predicted is None or not own:
        return predicted
    away = min(_doublings(each.depth_tokens, depth_tokens) for each in own)
    nearest = [each for each in own if _doublings(each.depth_tokens, depth_tokens) == away]
    there = predict(nearest[0].depth_tokens)
    if there is None:
        return predicted
    rates = sorted(each.tok_s for each in nearest)
    shift = _middle(rates) / there.likely
    spread = max(_REPEATABLE, rates[-1] / _middle(rates) - 1, _middle(rates) / rates[0] - 1) + _PER_DOUBLING * away
    likely = predicted.likely * shift
    most = math.inf if bound_tok_s is None else bound_tok_s
    return Range(low=min(most, likely / (1 + spread)), likely=min(most, likely), high=min(most, likely * (1 + spread)))


def measurement_to_json(measurement: Measurement) -> dict[str, object]:
    """Return `measurement` as plain dicts, lists and scalars."""
    return asdict(measurement)


def measurement_from_json(data: object) -> Measurement:
    """Return the measurement that `measurement_to_json` wrote.

    Raises ValueError, saying what is wrong, for anything else: a record that is only partly understood counts for
    nothing.
    """
    record = _record(data, "measurement", ("setting", "depth_tokens", "users", "tok_s", "measured_at"))
    names = ("engine", "build", "flags", "cards", "model", "quantisation")
    setting = _record(record["setting"], "setting", names)
    cards = [
        _record(card, "card", ("uuid", "name", "power_limit_w")) for card in _listed(setting["cards"], "setting.cards")
    ]
    return Measurement(
        setting=Setting(
            engine=_text(setting["engine"], "engine"),
            build=_text_or_none(setting["build"], "build"),
            flags=tuple(_text(flag, "flag") for flag in _listed(setting["flags"], "setting.flags")),
            cards=tuple(
                MeasuredCard(
                    uuid=_text_or_none(card["uuid"], "uuid"),
                    name=_text(card["name"], "name"),
                    power_limit_w=None if card["power_limit_w"] is None else _number(card["power_limit_w"], "power"),
                )
                for card in cards
            ),
            model=_text(setting["model"], "model"),
            quantisation=_text_or_none(setting["quantisation"], "quantisation"),
        ),
        depth_tokens=int(_number(record["depth_tokens"], "depth_tokens")),
        users=int(_number(record["users"], "users")),
        tok_s=_number(record["tok_s"], "tok_s"),
        measured_at=_text(record["measured_at"], "measured_at"),
    )


def _doublings(a_tokens: int, b_tokens: int) -> float:
    """How often one depth has to be doubled to be the other; the first 512 tokens are alike."""
    return abs(math.log2(max(512, a_tokens) / max(512, b_tokens)))


def _middle(ordered: Sequence[float]) -> float:
    half = len(ordered) // 2
    return ordered[half] if len(ordered) % 2 else (ordered[half - 1] + ordered[half]) / 2


def _record(data: object, what: str, names: tuple[str, ...]) -> dict[str, object]:
    if not isinstance(data, dict) or set(data) != set(names):
        raise ValueError(f"a {what} has {', '.join(names)} and nothing else")
    return data


def _listed(data: object, what: str) -> list[object]:
    if not isinstance(data, (list, tuple)):
        raise ValueError(f"{what} is not a list")
    return list(data)


def _text(data: object, what: str) -> str:
    if not isinstance(data, str):
        raise ValueError(f"{what} is not text")
    return data


def _text_or_none(data: object, what: str) -> str | None:
    return None if data is None else _text(data, what)


def _number(data: object, what: str) -> float:
    """A finite number that is not negative: what is measured cannot be."""
    if isinstance(data, bool) or not isinstance(data, (int, float)) or not 0 <= data < 1e15:
        raise ValueError(f"{what} is not a number that could have been measured")
    return data
