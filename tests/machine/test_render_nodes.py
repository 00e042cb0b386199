"""The nodes of one maker's cards, and who may use them."""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest

from mgpu.machine.inspection_reader import inspect_machine
from mgpu.machine.render_nodes import render_nodes
from mgpu.machine.sysfs import AMD, INTEL

Tree = Callable[..., Path]
ROOT = Path(__file__).parents[2]
CARDS = {
    "renderD128": ("0000:00:02.0", "0x8086"),  # integrated
    "renderD129": ("0000:03:00.0", "0x8086"),
    "renderD130": ("0000:06:00.0", "0x1002"),
    "renderD131": ("0000:09:00.0", "0x8086"),
}


@pytest.fixture
def cards(tree: Tree) -> Path:
    return tree(
        {
            **{f"sys/devices/pci0000:00/{address}/vendor": f"{vendor}\n" for address, vendor in CARDS.values()},
            **{f"dev/dri/{node}": "" for node in CARDS},
        },
        {f"sys/class/drm/{node}/device": f"sys/devices/pci0000:00/{address}" for node, (address, _) in CARDS.items()},
    )


@pytest.mark.parametrize(
    ("vendor", "nodes"),
    [
        pytest.param(INTEL, ("/dev/dri/renderD129", "/dev/dri/renderD131"), id="Intel's cards, not its processor's"),
        pytest.param(AMD, ("/dev/dri/renderD130",), id="AMD's"),
        pytest.param(0x10DE, (), id="nobody's"),
    ],
)
def test_the_nodes_of_a_makers_cards_are_found(cards: Path, vendor: int, nodes: tuple[str, ...]) -> None:
    assert render_nodes(cards, vendor) == (nodes, True if nodes else None)


def test_a_node_that_is_not_there_may_not_be_used(cards: Path) -> None:
    (cards / "dev/dri/renderD131").unlink()
    assert render_nodes(cards, INTEL)[1] is False
    assert render_nodes(cards, AMD)[1] is True


def test_a_node_that_is_closed_to_this_user_may_not_be_used(cards: Path) -> None:
    (cards / "dev/dri/renderD129").chmod(0)
    look = f"from mgpu.machine.render_nodes import *; print(render_nodes(Path({str(cards)!r}), {INTEL})[1])"
    command = [sys.executable, "-c", f"from pathlib import Path; {look}"]
    if os.geteuid() == 0:  # root may open everything, unless that is taken from it
        command = ["setpriv", "--bounding-set=-dac_override,-dac_read_search", *command]
    told = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=True)
    assert told.stdout == "False\n"


def test_both_makers_nodes_are_in_the_inspection(cards: Path) -> None:
    found = inspect_machine(cards)
    assert (found.intel.render_nodes, found.intel.render_accessible) == (
        ("/dev/dri/renderD129", "/dev/dri/renderD131"),
        True,
    )
    assert (found.amd.render_nodes, found.amd.render_accessible) == (("/dev/dri/renderD130",), True)
