"""Calibrated methods that were stopped between two blocks: what is finished is taken up, and the rest comes out the same."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from nybble.files.journal import Journal
from nybble.finished import Block, FinishedBlocks
from nybble.run import quantize

METHODS = ["gptq", "gptq:bias", "qronos", "gptq:block_tune=2", "awq+gptq", "sparsegpt", "gptq+static", "imatrix"]


@pytest.fixture
def windows(ids: Any) -> Any:
    return np.asarray(ids)


def made(model: Any, method: str, windows: Any, finished: FinishedBlocks | None = None) -> Any:
    fmt = "int8:channel" if "static" in method else "int4:g32"
    return quantize(model, fmt, method, windows, finished=finished)


def same(mine: Any, its: Any) -> bool:
    first, second = mine.model().state_dict(), its.model().state_dict()
    return list(first) == list(second) and all(
        first[name].numpy().tobytes() == second[name].numpy().tobytes() for name in first if hasattr(first[name], "numpy")
    )


@pytest.mark.parametrize("method", METHODS)
def test_what_was_stopped_comes_out_the_same(
    method: str, tiny: Callable[..., Any], windows: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    whole = made(tiny("gpt2"), method, windows)
    real = FinishedBlocks.keep

    def stops(self: FinishedBlocks, index: int, block: Block) -> None:
        real(self, index, block)
        raise KeyboardInterrupt

    blocks = 0
    for _ in range(5):
        journal = Journal(tmp_path / "journal", {})
        finished = FinishedBlocks(tmp_path / "blocks", journal)
        with monkeypatch.context() as patch:
            patch.setattr(FinishedBlocks, "keep", stops)
            try:
                made(tiny("gpt2"), method, windows, finished)
            except KeyboardInterrupt:
                blocks += 1
        journal.close()
    assert blocks == 4, "a tiny GPT-2 has two blocks and two tables"
    journal = Journal(tmp_path / "journal", {})
    finished = FinishedBlocks(tmp_path / "blocks", journal)
    again = made(tiny("gpt2"), method, windows, finished)
    journal.close()
    assert finished.taken == blocks
    assert same(again, whole)
    assert again.accounts == whole.accounts
    assert again.provenance == whole.provenance
    assert again.changed == whole.changed


def test_a_damaged_block_is_made_again(tiny: Callable[..., Any], windows: Any, tmp_path: Path) -> None:
    journal = Journal(tmp_path / "journal", {})
    whole = made(tiny("llama"), "gptq", windows, FinishedBlocks(tmp_path / "blocks", journal))
    journal.close()
    path = tmp_path / "blocks" / "00001.safetensors"
    data = path.read_bytes()
    for place in np.random.default_rng(0).integers(0, len(data), 5):
        turned = bytearray(data)
        turned[place] ^= 1
        path.write_bytes(bytes(turned))
        journal = Journal(tmp_path / "journal", {})
        finished = FinishedBlocks(tmp_path / "blocks", journal)
        again = made(tiny("llama"), "gptq", windows, finished)
        journal.close()
        assert (finished.taken, finished.damaged) == (3, 1)
        assert same(again, whole)


def test_what_is_tuned_together_keeps_no_blocks(tiny: Callable[..., Any], windows: Any, tmp_path: Path) -> None:
    journal = Journal(tmp_path / "journal", {})
    made(tiny("gpt2"), "gptq:tune=2", windows, FinishedBlocks(tmp_path / "blocks", journal))
    journal.close()
    assert not (tmp_path / "blocks").exists()
