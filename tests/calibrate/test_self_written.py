"""Calibration windows that the model writes itself."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch

import nybble
from nybble.calibrate.self_written import BATCH, written_windows
from nybble.errors import NumericError, UsageError


def test_windows_are_the_models_own_and_the_seeds(tiny: Callable[..., Any]) -> None:
    model = tiny("llama")
    windows = written_windows(model, BATCH + 3, 12, seed=5)
    assert windows.shape == (BATCH + 3, 12)
    assert windows.dtype == np.int64
    assert len({row.tobytes() for row in windows}) == len(windows)
    np.testing.assert_array_equal(windows, written_windows(model, BATCH + 3, 12, seed=5))
    assert (windows != written_windows(model, BATCH + 3, 12, seed=6)).any()
    threads = torch.get_num_threads()
    torch.set_num_threads(2 if threads == 1 else 1)
    np.testing.assert_array_equal(windows, written_windows(model, BATCH + 3, 12, seed=5))
    torch.set_num_threads(threads)


def test_tokens_are_as_frequent_as_predicted(tiny: Callable[..., Any]) -> None:
    """The second token of many windows that begin alike, against the model's own chances of it."""
    model = tiny("gpt2")
    begin = model.config.bos_token_id
    with torch.no_grad():
        model.get_output_embeddings().weight.mul_(20)  # chances that differ
        chances = model(torch.tensor([[begin]])).logits[0, -1].softmax(-1).numpy()
    windows = written_windows(model, 2000, 2, seed=0)
    assert (windows[:, 0] == begin).all()
    found = np.bincount(windows[:, 1], minlength=len(chances)) / len(windows)
    assert chances.max() > 2 / len(chances)
    assert np.abs(found - chances).max() < 5 * np.sqrt(chances.max() / len(windows))


def test_a_method_takes_them(tiny: Callable[..., Any]) -> None:
    result = nybble.quantize(tiny("gpt2"), "int4:g32", "gptq", "self", windows=4, window=8)
    assert result.provenance["calibration"]["windows"] == 4
    assert result.accounts


@pytest.mark.parametrize(
    ("name", "arguments", "message"),
    [
        ("bert", (2, 8), "writes no text of its own; give calibration text"),
        ("gpt2", (2, 10_000), "calibration windows of 10000 tokens: the model's context allows 2 to"),
        ("gpt2", (0, 8), "0 calibration windows asked for"),
    ],
)
def test_refusals(name: str, arguments: tuple[int, int], message: str, tiny: Callable[..., Any]) -> None:
    with pytest.raises(UsageError, match=message):
        written_windows(tiny(name), *arguments)


def test_a_model_that_predicts_nan(tiny: Callable[..., Any]) -> None:
    model = tiny("gpt2")
    with torch.no_grad():
        model.get_output_embeddings().weight.fill_(float("nan"))
    with pytest.raises(NumericError, match="not finite"):
        written_windows(model, 2, 4)
