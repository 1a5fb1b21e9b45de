"""Calibration from several documents: files of them, windows that lie in one, datasets of the hub."""

from __future__ import annotations

import json
import sys
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest

import nybble
import nybble.demo
from nybble.calibrate.hub_datasets import hub_documents
from nybble.calibrate.windows import calibration_windows, read_documents, read_text
from nybble.errors import InputError, UsageError


def test_documents_of_files(tmp_path: Path) -> None:
    (tmp_path / "a.jsonl").write_text('{"text": "one\u2028two"}\n\n{"text": "three"}\n', encoding="utf-8")
    (tmp_path / "a.json").write_text(json.dumps(["one", "two"]), encoding="utf-8")
    (tmp_path / "a.txt").write_text("one\n\ntwo", encoding="utf-8")
    assert read_documents(tmp_path / "a.jsonl") == ["one\u2028two", "three"]
    assert read_documents(tmp_path / "a.json") == ["one", "two"]
    assert read_documents(tmp_path / "a.txt") == ["one\n\ntwo"]
    assert read_text(tmp_path / "a.json") == "one\n\ntwo"
    (tmp_path / "b.json").write_text('["", " "]', encoding="utf-8")
    with pytest.raises(InputError, match="is empty"):
        read_documents(tmp_path / "b.json")


@pytest.mark.parametrize("bos", [None, 1])
def test_every_window_lies_in_one_document(bos: int | None) -> None:
    documents = [np.arange(start, start + size) for start, size in ((100, 9), (200, 25), (300, 4), (400, 10))]
    windows = calibration_windows(documents, 64, bos, 100, 5)
    text = windows if bos is None else windows[:, 1:]
    assert {tuple(row // 100) for row in text} <= {(n,) * text.shape[1] for n in (1, 2, 3, 4)}
    assert (np.diff(text, axis=1) == 1).all()
    assert len(windows) == (1 + 5 + 0 + 2 if bos is None else 2 + 6 + 1 + 2)
    if bos is not None:
        assert (windows[:, 0] == bos).all()
    some = calibration_windows(documents, 64, bos, 3, 5, seed=1)
    assert len(some) == 3
    assert {row.tobytes() for row in some} <= {row.tobytes() for row in windows}


def test_documents_that_are_too_short() -> None:
    with pytest.raises(InputError, match="no document fills a calibration window of 8 tokens, the longest of 2 has 7; pack them"):
        calibration_windows([np.arange(7), np.arange(3)], 64, None, 4, 8)


def test_quantize_without_packing() -> None:
    texts = ["short", "def f(x):\n    return x + 1\n" * 40]
    folder = nybble.demo.model_folder()
    packed = nybble.quantize(folder, "int4:g64", "imatrix", texts, windows=4, window=32)
    apart = nybble.quantize(folder, "int4:g64", "imatrix", texts, windows=4, window=32, packing=False)
    hashes = [q.provenance["calibration"]["sha256"] for q in (packed, apart)]
    assert hashes[0] != hashes[1]
    with pytest.raises(InputError, match="no document fills"):
        nybble.quantize(folder, "int4:g64", "imatrix", ["short", "too"], windows=4, window=32, packing=False)


def library(rows: list[dict[str, Any]], seen: list[Any]) -> Any:
    """What stands in for the package `datasets`, which reads the hub."""

    def load_dataset(name: str, config: str | None, **options: Any) -> Any:
        seen.append((name, config, options))
        if name == "missing":
            raise FileNotFoundError("Couldn't find any data file\nat missing")
        return iter(rows)

    return SimpleNamespace(load_dataset=load_dataset)


def test_a_dataset_of_the_hub(monkeypatch: pytest.MonkeyPatch) -> None:
    seen: list[Any] = []
    rows = [{"id": i, "text": f"document {i}"} for i in range(100)]
    monkeypatch.setitem(sys.modules, "datasets", library(rows, seen))
    assert hub_documents("hub:owner/name::test", characters=25) == ["document 0", "document 1", "document 2"]
    assert len(hub_documents("hub:owner/name:config")) == 100
    assert seen == [
        ("owner/name", None, {"split": "test", "streaming": True}),
        ("owner/name", "config", {"split": "train", "streaming": True}),
    ]
    with pytest.raises(InputError, match=r"hub:missing: the dataset cannot be had \(Couldn't find any data file at missing\)"):
        hub_documents("hub:missing")


@pytest.mark.parametrize(
    ("rows", "message"),
    [
        ([], "the dataset is empty"),
        ([{"a": "x", "b": "y"}], "no column 'text' among a, b"),
        ([{"only": " "}], "the documents of column 'only' are empty"),
    ],
)
def test_datasets_without_text(rows: list[dict[str, Any]], message: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "datasets", library(rows, []))
    with pytest.raises(InputError, match=message):
        hub_documents("hub:some")


def test_what_the_hub_needs(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "datasets", None)
    with pytest.raises(InputError, match="pip install datasets, or give a file"):
        hub_documents("hub:some")
    with pytest.raises(UsageError, match="is not hub:NAME"):
        hub_documents("hub:a:b:c:d")


def test_the_command(nybble_command: Callable[..., Any], tmp_path: Path) -> None:
    (tmp_path / "a.json").write_text(json.dumps(["short", "too"]), encoding="utf-8")
    arguments = ["quantize", nybble.demo.model_folder(), "--to", "int4:g64", "--method", "gptq", "-o", tmp_path / "out"]
    done = nybble_command(*arguments, "--calibrate", tmp_path / "a.json", "--by-document")
    assert done.returncode != 0
    assert "no document fills a calibration window of 512 tokens" in done.stderr
    assert not (tmp_path / "out").exists()
