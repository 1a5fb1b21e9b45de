"""Calibrated methods that were stopped between two blocks: what is finished is taken up, and the rest comes out the same."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import suppress
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from nybble import edits, tuner
from nybble.files.journal import Journal
from nybble.finished import Block, FinishedBlocks
from nybble.methods.steps.tuning import Standing
from nybble.run import quantize
from nybble.tuner import KeptTuning

METHODS = [
    *("gptq", "gptq:bias", "qronos", "gptq:block_tune=2", "awq+gptq", "sparsegpt", "gptq+static", "imatrix", "gptq:tune=2"),
    *("best:tune=2:tune_bits=4:block_tune=2", "guided"),
]


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
    path = tmp_path / "blocks" / "block-00001.safetensors"
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


def stopped_at_each(
    family: str, method: str, tiny: Callable[..., Any], windows: Any, folder: Path, monkeypatch: pytest.MonkeyPatch
) -> tuple[Any, list[tuple[str, int]]]:
    """(what comes of a run that is stopped whenever something was kept, all that was kept)."""
    keep, kept = FinishedBlocks.keep_arrays, list[tuple[str, int]]()

    def stops(self: FinishedBlocks, kind: str, number: int, *rest: Any) -> None:
        keep(self, kind, number, *rest)
        kept.append((kind, number))
        raise KeyboardInterrupt

    again = None
    while again is None:
        journal = Journal(folder / "journal", {})
        with monkeypatch.context() as patch, suppress(KeyboardInterrupt):
            patch.setattr(FinishedBlocks, "keep_arrays", stops)
            again = made(tiny(family), method, windows, FinishedBlocks(folder / "blocks", journal))
        journal.close()
    return again, kept


@pytest.mark.parametrize("method", ["awq+gptq", "smoothquant+gptq"])
def test_edits_are_not_looked_for_twice(
    method: str, tiny: Callable[..., Any], windows: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    whole = made(tiny("llama"), method, windows)
    real, looked = edits._choose, list[int]()
    monkeypatch.setattr(edits, "_choose", lambda *rest: (looked.append(rest[2]), real(*rest))[1])
    again, kept = stopped_at_each("llama", method, tiny, windows, tmp_path, monkeypatch)
    assert kept == [("edits", 0), ("edits", 1), *(("block", i) for i in range(4))]
    assert looked == sorted(looked), "each block once, in their order"
    assert len(looked) == 2 * looked.count(0)
    assert same(again, whole)
    assert again.provenance == whole.provenance
    assert [e.scale is None for e in again.edits] == [e.scale is None for e in whole.edits]


def test_windows_whose_tokens_are_weighed_are_not_weighed_twice(
    tiny: Callable[..., Any], windows: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    whole = made(tiny("gpt2"), "guided", windows)
    again, kept = stopped_at_each("gpt2", "guided", tiny, windows, tmp_path, monkeypatch)
    assert kept == [*(("fisher", i) for i in range(len(windows))), *(("block", i) for i in range(4))]
    assert same(again, whole)


TUNED = ["gptq:tune=4", "tune:block_tune=2:tune=4", "best:tune=4:tune_bits=4:block_tune=2:norms"]


@pytest.fixture
def every_step(monkeypatch: pytest.MonkeyPatch) -> None:
    """Each step of a tuning is kept."""
    monkeypatch.setattr(tuner, "PATIENCE", 0)


@pytest.mark.parametrize("method", TUNED)
def test_a_tuning_that_was_stopped_goes_on_from_its_step(
    method: str, tiny: Callable[..., Any], windows: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, every_step: None
) -> None:
    whole = made(tiny("gpt2"), method, windows)
    real, steps = KeptTuning.keep, list[int]()
    begun: list[int] = []

    def stops(self: KeptTuning, standing: Standing) -> None:
        real(self, standing)
        steps.append(standing.step)
        raise KeyboardInterrupt

    found = KeptTuning.find

    def watched(self: KeptTuning) -> Standing | None:
        standing = found(self)
        begun.append(0 if standing is None else standing.step)
        return standing

    monkeypatch.setattr(KeptTuning, "find", watched)
    for _ in range(5):
        journal = Journal(tmp_path / "journal", {})
        with monkeypatch.context() as patch:
            patch.setattr(KeptTuning, "keep", stops)
            try:
                again = made(tiny("gpt2"), method, windows, FinishedBlocks(tmp_path / "blocks", journal))
            except KeyboardInterrupt:
                assert len(list((tmp_path / "blocks").glob("tuning-*"))) == 1
        journal.close()
    assert steps == [1, 2, 3, 4]
    assert begun == [0, 1, 2, 3, 4]
    assert same(again, whole)
    assert again.provenance == whole.provenance


def test_a_damaged_tuning_goes_on_from_the_one_before(
    tiny: Callable[..., Any], windows: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, every_step: None
) -> None:
    kept = tmp_path / "blocks"
    journal = Journal(tmp_path / "journal", {})
    with monkeypatch.context() as patch:  # killed before the one before was removed
        patch.setattr(Path, "unlink", lambda *_, **__: None)
        whole = made(tiny("gpt2"), "gptq:tune=2", windows, FinishedBlocks(kept, journal))
    journal.close()
    (kept / ".tuning-00002.safetensors.abc.part").write_bytes(b"cut off")
    last = kept / "tuning-00002.safetensors"
    turned = bytearray(last.read_bytes())
    turned[-1] ^= 1
    last.write_bytes(bytes(turned))
    journal = Journal(tmp_path / "journal", {})
    finished = FinishedBlocks(kept, journal)
    again = made(tiny("gpt2"), "gptq:tune=2", windows, finished)
    journal.close()
    assert (finished.taken, finished.damaged) == (4, 1)
    assert same(again, whole)
    assert [path.name for path in kept.iterdir() if not path.name.startswith("block")] == ["tuning-00002.safetensors"]


def test_keeping_a_tuning_takes_a_small_share(
    tiny: Callable[..., Any], windows: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(tuner, "PATIENCE", 1e9)
    real, steps = KeptTuning.keep, list[int]()
    monkeypatch.setattr(KeptTuning, "keep", lambda self, standing: (steps.append(standing.step), real(self, standing))[1])
    journal = Journal(tmp_path / "journal", {})
    made(tiny("gpt2"), "gptq:tune=5", windows, FinishedBlocks(tmp_path / "blocks", journal))
    journal.close()
    assert steps == [1, 5], "the first, by which it is known how long that takes, and the last"
