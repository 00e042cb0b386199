"""Fitting the constants of decoding again, so that each source can be predicted from all the others."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Iterator, Sequence

from mgpu.planning.decode import decode_seconds
from mgpu.planning.prediction import predict, slowed
from mgpu.planning.speed_constants import VALUES, Values
from tests.planning.measured_rows import MeasuredRow
from tests.planning.measured_scores import Recorder

# What one would assume of a kind of card or build that nobody had measured: that it is like the others.
_NEUTRAL = {
    "llama.cpp weights, HBM": 1.0,
    "weights, LPDDR": 1.0,
    "vLLM weights, CDNA": 1.0,
    "llama.cpp layer, AMD": 80.0,
    "llama.cpp layer, Ada and later": 1.0,
    "llama.cpp layer, no tensor cores": 1.0,
    "llama.cpp layer, before 2025": 1.0,
    "vLLM layer dense, CDNA": 30.0,
    "vLLM layer experts, CDNA": 75.0,
    "hop, before 2025": 40.0,
    "llama.cpp cut, experts": 10.0,
    "llama.cpp KV, ROCm": 0.88,
    "llama.cpp KV, other": 0.88,
    "llama.cpp KV, no flash attention": 0.88,
    "power shift": 0.1,
}
# Not fitted: taken from a document, or the width of the interval.
_GIVEN = ("spread", "power spread", "host", "link", "llama.cpp reduction, ", "vLLM user", "vLLM compute")
# A row that is further off than this says more about itself than about the constants.
_OUTLIER = 0.5
_STEPS = (0.25, 0.06)
# How strongly a constant is held where it starts: rows that hardly depend on it do not move it far.
_HELD = 0.01


def left_out(rows: Sequence[MeasuredRow]) -> Iterator[tuple[str, Values]]:
    """Yield each source with the constants fitted to the rows of all others."""
    for source in sorted({row.source for row in rows}):
        yield source, fitted([row for row in rows if row.source != source])


def in_parts(rows: Sequence[MeasuredRow], *, parts: int = 5) -> Iterator[tuple[list[MeasuredRow], Values]]:
    """Yield parts of `rows`, whole configurations each, with the constants fitted to the rows of the other parts."""
    configurations = sorted({_configuration(row) for row in rows})
    for part in range(parts):
        held = set(configurations[part::parts])
        own = [row for row in rows if _configuration(row) in held]
        yield own, fitted([row for row in rows if _configuration(row) not in held])


def fitted(rows: Sequence[MeasuredRow]) -> Values:
    """Return the constants for which `rows` are predicted best, every source counting as the root of its rows.

    One constant after the other is moved as long as that helps; where no row depends on one it keeps the neutral
    value.
    """
    values = {**VALUES, **_NEUTRAL}
    counts = Counter(row.source for row in rows)
    weights = [counts[row.source] ** -0.5 for row in rows]
    reads = [_read_by(row, values) for row in rows]
    touched = {name: [i for i, names in enumerate(reads) if name in names] for name in values}
    names = [name for name in values if touched[name] and not name.startswith(_GIVEN)]
    losses = [_loss(row, values) for row in rows]
    started = dict(values)

    def gain(name: str, value: float) -> tuple[float, list[float]]:
        tried = {**values, name: value}
        new = [_loss(rows[i], tried) for i in touched[name]]
        better = sum(weights[i] * (losses[i] - loss) for i, loss in zip(touched[name], new, strict=True))
        held = _HELD * (math.log(value / started[name]) ** 2 - math.log(values[name] / started[name]) ** 2)
        return better - held, new

    for step in _STEPS:
        moved = True
        while moved:
            moved = False
            for name in names:
                for factor in (1 + step, 1 / (1 + step)):
                    value = values[name] * factor
                    better, new = gain(name, value)
                    if better > 1e-3 and not _impossible(name, value):
                        values[name] = value
                        for i, loss in zip(touched[name], new, strict=True):
                            losses[i] = loss
                        moved = True
                        break
    return values


def _configuration(row: MeasuredRow) -> tuple[str, str, str, str]:
    return row.source, row.cards, row.model, row.quantisation


def _loss(row: MeasuredRow, values: Values) -> float:
    seconds = decode_seconds(row.work, values) * slowed(row.work, values)
    return min(abs(math.log(seconds * row.tok_s)), _OUTLIER)


def _impossible(name: str, value: float) -> bool:
    return ("weights" in name or "KV" in name) and value >= 1


def _read_by(row: MeasuredRow, values: Values) -> set[str]:
    recorder = Recorder(values)
    predict(row.work, recorder)
    return recorder.read
