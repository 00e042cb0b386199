"""Speeds that were measured on this machine, each with the setting that it was measured in.

A measurement counts for exactly that: another engine build, another flag, another card or another power limit is
another setting, and nothing is carried over.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass

from mgpu.machine.snapshot import Gpu, Host
from mgpu.planning.candidates import Candidate


@dataclass(frozen=True, slots=True, kw_only=True)
class MeasuredCard:
    """A card as it was: `power_limit_w` is None where the driver does not say."""

    uuid: str | None
    name: str
    power_limit_w: float | None = None


@dataclass(frozen=True, slots=True, kw_only=True)
class Setting:
    """What a speed depends on. `build` tells one build of the engine from another, `flags` are those that change speed,
    in a fixed order; `cards` in the engine's order; `cpu` is the processor where it computes something, else None;
    `model` names the file's content (its checksum, or its name and size)."""

    engine: str
    build: str | None
    flags: tuple[str, ...]
    cards: tuple[MeasuredCard, ...]
    cpu: str | None
    model: str
    quantisation: str | None

    @property
    def certain(self) -> bool:
        """Whether it can be recognised again: without a build or the identity of what computes it could be any."""
        return bool(self.build) and bool(self.cards or self.cpu) and all(card.uuid for card in self.cards)


@dataclass(frozen=True, slots=True, kw_only=True)
class Measurement:
    """One measured speed: `tok_s` of all `users` together at a mean depth of `depth_tokens`. `measured_at` is ISO 8601
    in UTC."""

    setting: Setting
    depth_tokens: int
    users: int
    tok_s: float
    measured_at: str


def setting_of(
    candidate: Candidate,
    *,
    model: str,
    quantisation: str | None,
    gpus: Sequence[Gpu],
    host: Host,
    build: str | None,
    arguments: Sequence[str] = (),
) -> Setting | None:
    """Return the setting that `candidate` would be measured in; None where it could not be recognised again.

    `gpus` are those it was planned on, `arguments` what the user hands on to the engine. The size of the context is no
    part of it: what is allocated and not filled is not read.
    """
    by_index = {gpu.index: gpu for gpu in gpus}
    used = [by_index[device.gpu] for device in candidate.devices if not device.idle]
    on_host = candidate.host.layers or candidate.host.expert_layers or candidate.wants.kv_on_host
    computes = not used or bool(on_host)
    if computes and not host.cpu:
        return None
    setting = Setting(
        engine=candidate.backend,
        build=build,
        flags=(*_flags(candidate, used), *arguments),
        cards=tuple(MeasuredCard(uuid=gpu.uuid, name=gpu.name, power_limit_w=gpu.power_limit_w) for gpu in used),
        cpu=f"{host.cpu}, {host.cores or 'unknown'} cores" if computes else None,
        model=model,
        quantisation=quantisation,
    )
    return setting if setting.certain else None


def _flags(candidate: Candidate, used: Sequence[Gpu]) -> Iterator[str]:
    """What changes the speed of a way to run a model, besides the cards and what the user hands on."""
    wants, host = candidate.wants, candidate.host
    yield f"split {candidate.split_mode}"
    yield f"tensor parallel {candidate.tensor_parallel}"
    yield f"pipeline parallel {candidate.pipeline_parallel}"
    yield f"replicas {candidate.replicas}"
    yield f"layers {', '.join(_layers(candidate, used)) or 'none'}"
    yield f"host layers {host.layers}"
    yield f"host experts {host.expert_layers}"
    yield f"KV {wants.kv_type_k} {wants.kv_type_v}{' on the host' if wants.kv_on_host else ''}"
    yield f"users {candidate.parallel}"
    yield f"micro-batch {wants.ubatch}"
    yield f"flash attention {wants.flash_attention}"
    if candidate.split_mode == "tensor" and wants.tensor_split:
        yield f"proportions {', '.join(f'{part:g}' for part in wants.tensor_split)}"


def _layers(candidate: Candidate, used: Sequence[Gpu]) -> Iterator[str]:
    """The layers on each kind of card, and the library that computes them: a llama-server may have several for the same
    card. On which of several equal cards a layer is does not change the speed; free memory and context do that."""
    counts: Counter[tuple[str, ...]] = Counter()
    heads = set()
    devices = [device for device in candidate.devices if not device.idle]
    for gpu, device in zip(used, devices, strict=True):
        library = () if candidate.backend == "vllm" else (device.device.rstrip("0123456789"),)
        kind = (gpu.name, f"{gpu.power_limit_w} W", *library)
        counts[kind] += device.layers
        heads |= {kind} if device.head else set()
    yield from (f"{count}{' + head' if kind in heads else ''} {' '.join(kind)}" for kind, count in counts.items())


def measurement_to_json(measurement: Measurement) -> dict[str, object]:
    """Return `measurement` as plain dicts, lists and scalars."""
    return asdict(measurement)


def measurement_from_json(data: object) -> Measurement:
    """Return the measurement that `measurement_to_json` wrote.

    Raises ValueError, saying what is wrong, for anything else: a record that is only partly understood counts for
    nothing.
    """
    record = _record(data, "measurement", ("setting", "depth_tokens", "users", "tok_s", "measured_at"))
    names = ("engine", "build", "flags", "cards", "cpu", "model", "quantisation")
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
            cpu=_text_or_none(setting["cpu"], "cpu"),
            model=_text(setting["model"], "model"),
            quantisation=_text_or_none(setting["quantisation"], "quantisation"),
        ),
        depth_tokens=int(_number(record["depth_tokens"], "depth_tokens")),
        users=int(_number(record["users"], "users")),
        tok_s=_number(record["tok_s"], "tok_s"),
        measured_at=_text(record["measured_at"], "measured_at"),
    )


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
