"""Checks of whether the driver is right for the cards and the engines."""

from __future__ import annotations

from typing import Any

import pytest

from mgpu.doctor.check import Check
from mgpu.doctor.checks.driver_fit import driver_flavour, driver_too_new_for_gpu, driver_too_old
from mgpu.machine.inspection import Inspection, InstalledEngine
from tests.doctor.drivers import P40, RTX_5090, beside_kepler, engine, kepler, undriven, version, without_last
from tests.doctor.inspections import H100, healthy, verdict


@pytest.mark.parametrize(
    ("check", "inspection", "purpose", "expected"),
    [
        pytest.param(driver_too_new_for_gpu, kepler(on_disk_version="580.95.05"), {}, "", id="nor is 580 its last"),
        pytest.param(driver_flavour, beside_kepler(healthy(2)), {}, "", id="nor the closed module what it needs"),
        pytest.param(
            driver_too_new_for_gpu, undriven(2, P40, on_disk_version="590.48.01"), {}, "fail", id="P40 and 590"
        ),
        pytest.param(driver_too_new_for_gpu, healthy(2, P40), {}, "info", id="P40 and 580: the last branch"),
        pytest.param(driver_too_new_for_gpu, version(healthy(2, P40), "535.129.03"), {}, "", id="P40 and 535"),
        pytest.param(driver_too_new_for_gpu, version(healthy(), "610.43.02"), {}, "", id="4090 and 610"),
        pytest.param(driver_too_new_for_gpu, version(healthy(1, P40), None), {}, "skip", id="version unknown"),
        pytest.param(
            driver_too_old, version(healthy(engines=engine()), "575.57.08"), {}, "fail", id="CUDA 13 needs 580"
        ),
        pytest.param(
            driver_too_old,
            version(healthy(engines=engine(cuda=12080)), "525.60.13"),
            {},
            "",
            id="the oldest driver of CUDA 12 runs all of CUDA 12",
        ),
        pytest.param(
            driver_too_old,
            version(healthy(1, P40, engines=engine("ollama", None)), "550.54"),
            {},
            "fail",
            id="Ollama, P40",
        ),
        pytest.param(
            driver_too_old,
            version(healthy(engines=engine("ollama", None)), "550.54"),
            {},
            "",
            id="Ollama, 4090 and 550",
        ),
        pytest.param(
            driver_too_old,
            version(healthy(engines=engine()), "575.57.08"),
            {"backend": "llama.cpp"},
            "",
            id="another engine is meant",
        ),
        pytest.param(driver_too_old, healthy(engines=engine(cuda=None)), {}, "skip", id="vLLM's CUDA is unknown"),
        pytest.param(
            driver_too_old,
            version(healthy(engines=engine("llama.cpp", cuda=13000)), "575.57.08"),
            {},
            "fail",
            id="llama.cpp with the runtime of CUDA 13",
        ),
        pytest.param(
            driver_too_old,
            healthy(engines=engine("llama.cpp", cuda=12000)),
            {},
            "",
            id="llama.cpp with that of CUDA 12",
        ),
        pytest.param(
            driver_too_old,
            healthy(engines=engine("llama.cpp", cuda=None)),
            {},
            "",
            id="llama.cpp without code for CUDA",
        ),
        pytest.param(
            driver_too_old,
            healthy(
                engines=(InstalledEngine(backend="llama.cpp", architectures=("sm_86",), architectures_known=True),)
            ),
            {},
            "skip",
            id="llama.cpp's CUDA is unknown",
        ),
        pytest.param(driver_too_old, version(healthy(engines=engine()), None), {}, "skip", id="driver unknown"),
        pytest.param(
            driver_flavour,
            without_last(healthy(2, RTX_5090, driver={"open_module": False})),
            {},
            "fail",
            id="5090, closed",
        ),
        pytest.param(
            driver_flavour, healthy(1, P40, driver={"open_module": True}), {}, "fail", id="P40 and the open module"
        ),
        pytest.param(driver_flavour, healthy(2, driver={"open_module": False}), {}, "", id="4090 runs with both"),
        pytest.param(driver_flavour, healthy(1, H100, driver={"open_module": None}), {}, "skip", id="flavour unread"),
    ],
)
def test_what_is_said_of_a_driver_that_does_not_fit(
    check: Check, inspection: Inspection, purpose: dict[str, Any], expected: str
) -> None:
    assert verdict(check, inspection, **purpose) == expected
