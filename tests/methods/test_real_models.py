"""Calibrated methods on trained models: every layer's outputs are nearer to the float ones than by plain rounding."""

from __future__ import annotations

from functools import cache
from pathlib import Path

import pytest

import nybble
from nybble import demo
from nybble.demo.text import calibration_text

DATA = Path(__file__).parents[3] / "shared" / "data"
WINDOWS, WINDOW = 8, 128


@cache
def model_and_text(name: str) -> tuple[Path, str]:
    if name == "stdlib-gpt2-6m":
        return demo.model_folder(), calibration_text()[:400_000]
    folder = DATA / "models" / name
    if not folder.exists():
        pytest.skip(f"{folder} is not there")
    return folder, (DATA / "text" / "tinystories" / "validation_first1000.txt").read_text(encoding="utf-8")[:400_000]


SLOW = pytest.mark.slow


@pytest.mark.parametrize(
    ("name", "spec"),
    [
        pytest.param("stdlib-gpt2-6m", "int4:g64", marks=SLOW),
        ("stdlib-gpt2-6m", "int3:g64"),
        pytest.param("stdlib-gpt2-6m", "int2:g64", marks=SLOW),
        ("stories260k-llama", "int4:g64"),
        ("stories260k-llama", "int3:g64"),
        ("stories260k-llama", "int2:g64"),
    ],
)
def test_gptq_loses_less_than_rounding_in_every_layer(name: str, spec: str) -> None:
    model, text = model_and_text(name)
    result = nybble.quantize(model, spec, "gptq", text, windows=WINDOWS, window=WINDOW)
    assert len(result.accounts) >= 24
    for layer, account in result.accounts.items():
        if layer == "transformer.wpe.weight":  # only looked up: it has no inputs to calibrate on
            assert account.loss == account.loss_of_rounding
        else:
            assert 0 < account.loss < account.loss_of_rounding, layer
