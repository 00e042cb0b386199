"""A setting of two cards, and a measurement in it."""

from __future__ import annotations

from dataclasses import replace

from mgpu.planning.measurements import MeasuredCard, Measurement, Setting

CARD = MeasuredCard(uuid="GPU-1", name="NVIDIA GeForce RTX 3090", power_limit_w=350.0)
SETTING = Setting(
    engine="llama.cpp",
    build="b10434",
    flags=("-fa on", "-sm layer"),
    cards=(CARD, replace(CARD, uuid="GPU-2")),
    cpu=None,
    model="sha256:1234",
    quantisation="Q4_K_M",
)
MEASURED = Measurement(setting=SETTING, depth_tokens=1024, users=1, tok_s=18.0, measured_at="2026-08-01T12:00:00Z")
