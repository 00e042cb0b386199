"""What a lane of PCI Express carries, by generation (the specification's table)."""

from __future__ import annotations

TRANSFERS_GT_S = {1: 2.5, 2: 5.0, 3: 8.0, 4: 16.0, 5: 32.0, 6: 64.0}
# Bits of data in the bits that are sent: 8b/10b, 128b/130b, and FLITs of 242 bytes in 256.
_CODING = {1: 8 / 10, 2: 8 / 10, 3: 128 / 130, 4: 128 / 130, 5: 128 / 130, 6: 242 / 256}


def lane_gb_s(gen: int | None) -> float | None:
    """Return the raw GB/s of one lane in one direction; None for a generation that is not known."""
    transfers = TRANSFERS_GT_S.get(gen or 0)
    return None if transfers is None or gen is None else transfers * _CODING[gen] / 8
