"""What the NVIDIA cards of one family have in common that no driver tells, by the names that the driver gives them."""

from __future__ import annotations

import re
from dataclasses import dataclass


@dataclass(frozen=True, slots=True, kw_only=True)
class Family:
    """Facts of a family, all False of cards that are not known.

    `geforce`: a GeForce or TITAN, to which the driver grants less than to others. `peers`: for workstations or
    datacentres; to two equal ones it grants peer access. `whole_window`: BAR1 covers the memory as the card is sold.
    `hbm`: its memory has room for ECC's bits beside the data. `mig`: it can be cut into instances.
    `keeps_link_speed`: its PCIe link does not slow down at idle. `several_bridges`: it takes more than one NVLink
    bridge, and works with one.
    """

    geforce: bool = False
    peers: bool = False
    whole_window: bool = False
    hbm: bool = False
    mig: bool = False
    keeps_link_speed: bool = False
    several_bridges: bool = False


def family(name: str) -> Family:
    """Return the family of the card of that name ("NVIDIA A100-SXM4-80GB")."""
    return next((facts for names, facts in _FAMILIES if re.search(names, name, re.IGNORECASE)), Family())


# The first row that fits decides. Mining cards (P102-100, CMP 170HX) are in none.
_FAMILIES = (
    (r"\bTITAN V\b", Family(geforce=True, hbm=True)),
    (r"GeForce|TITAN", Family(geforce=True)),
    (
        r"\b(A100|A800|H100|H200|H800)\b.*(PCIe|NVL\b|Active)",
        Family(peers=True, whole_window=True, hbm=True, mig=True, keeps_link_speed=True, several_bridges=True),
    ),
    (
        r"\b(A100|A800|H100|H200|H800|B200)\b",
        Family(peers=True, whole_window=True, hbm=True, mig=True, keeps_link_speed=True),
    ),
    (r"\b(A30|H20|B100|B300|G[BH][23]00)\b", Family(peers=True, whole_window=True, hbm=True, mig=True)),
    (r"\b(Tesla [PV]100|V100)\b", Family(peers=True, whole_window=True, hbm=True)),
    (r"\bQuadro (GP100|GV100)\b", Family(peers=True, hbm=True, several_bridges=True)),
    (r"\bL40S\b", Family(peers=True, whole_window=True, keeps_link_speed=True)),
    (r"\b(A10G?|A40|L4|L40|P40)\b", Family(peers=True, whole_window=True)),
    # Small windows for ever (T4, A2, A16), or one that a mode of the card makes large (RTX A6000).
    (
        r"\b(Tesla|Quadro|RTX A\d{3,4}|RTX PRO|RTX \d[05]00|A\d{1,3}[GX]?|[BHV]\d{2,3}|L\d{1,2}S?|T4G?)\b",
        Family(peers=True),
    ),
)
