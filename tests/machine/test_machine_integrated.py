from __future__ import annotations

import pytest

from mgpu.machine.integrated import is_integrated


@pytest.mark.parametrize(
    ("name", "gfx", "expected"),
    [
        ("Intel(R) UHD Graphics 770 (ADL-S GT1)", None, True),
        ("Intel(R) Iris(R) Xe Graphics (TGL GT2)", None, True),
        ("Intel(R) HD Graphics 4600", None, True),
        ("Intel(R) Arc(TM) Graphics (MTL)", None, True),
        ("Intel(R) Arc(TM) A770 Graphics", None, False),
        ("Intel(R) Iris(R) Xe MAX Graphics (DG1)", None, None),
        ("AMD Radeon 780M (RADV PHOENIX)", None, True),
        ("AMD Radeon 610M", None, True),
        ("AMD Radeon 890M Graphics", None, True),
        ("AMD Radeon 8060S Graphics", None, True),
        ("AMD Radeon Graphics (RADV RAPHAEL_MENDOCINO)", None, True),
        ("AMD Radeon Graphics (RADV NAVI44)", None, None),
        ("AMD Radeon Graphics", "gfx906", None),
        ("AMD Radeon Graphics", "gfx1036", True),
        ("AMD GPU [1002:1586]", "gfx1151", True),
        ("AMD Radeon RX Vega 11 Graphics", None, True),
        ("AMD Radeon RX 6800M", None, None),
        ("AMD Radeon RX 7900 XTX", "gfx1100", False),
        ("NVIDIA GeForce RTX 4090", None, False),
        ("NVIDIA GB10", None, None),
        ("NVIDIA Tegra NVIDIA Thor", None, None),
    ],
)
def test_a_name_tells_integrated_gpus_from_cards(name: str, gfx: str | None, expected: bool | None) -> None:
    assert is_integrated(name, gfx=gfx) is expected
