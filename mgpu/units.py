"""Sizes as people type and read them: `8k` tokens, `20GiB`, and bytes back to text."""

from __future__ import annotations

import re

from mgpu.errors import UsageError

KIB = 1024
MIB = 1024**2
GIB = 1024**3

_BYTES = {"": 1, "b": 1}
for _power, _letter in enumerate("kmgt", start=1):
    _BYTES |= {_letter: 1024**_power, f"{_letter}ib": 1024**_power, f"{_letter}b": 1000**_power}
_TOKENS = {"": 1, "k": 1024, "m": 1024**2}
_NUMBER = re.compile(r"\s*(\d{1,15}(?:\.\d{1,6})?)\s*([a-z]{0,3})\s*", re.ASCII)


def parse_bytes(text: str, *, option: str) -> int:
    """Return `512MiB`, `20GiB`, `1.5g` or `1000000` as bytes (k, m, g, t alone are binary).

    Raises UsageError naming `option`.
    """
    return _parse(text, _BYTES, option, "a size such as 512MiB or 2GiB")


def parse_tokens(text: str, *, option: str) -> int:
    """Return `8k` (8192), `32768` or `1m` as a positive count of tokens.

    Raises UsageError naming `option`.
    """
    tokens = _parse(text, _TOKENS, option, "a number of tokens such as 8192 or 8k")
    if tokens < 1:
        raise UsageError(f"{option} {text!r} is not positive; it wants a number of tokens such as 8192 or 8k")
    return tokens


def _parse(text: str, units: dict[str, int], option: str, wanted: str) -> int:
    match = _NUMBER.fullmatch(text.lower())
    if not match and re.fullmatch(r"\s*\d{16,}\s*[a-z]{0,3}\s*", text.lower(), re.ASCII):
        raise UsageError(f"{option} {text[:24]}{'…' * (len(text) > 24)} is too large; it wants {wanted}")
    if not match or match[2] not in units:
        raise UsageError(f"{option} {text!r} is not {wanted}")
    return int(float(match[1]) * units[match[2]]) if "." in match[1] else int(match[1]) * units[match[2]]


def gib(size_bytes: int | float) -> str:
    """Return bytes as GiB with as many digits as matter: `21.7 GiB`, `0.55 GiB`, `0.04 GiB`."""
    value = size_bytes / GIB
    return f"{value:.1f} GiB" if abs(value) >= 9.95 else f"{value:.2f} GiB"


def seconds(duration_s: float) -> str:
    """Return a duration as people say it: `0.4 s`, `38 s`, `12 min`, `4 h`, `3 d`."""
    for limit, unit_s, unit in ((99.5, 1, "s"), (5940, 60, "min"), (172_800, 3600, "h")):
        if duration_s < limit:
            value = duration_s / unit_s
            return f"{value:.1f} {unit}" if value < 9.95 else f"{value:.0f} {unit}"
    return f"{duration_s / 86_400:.0f} d"
