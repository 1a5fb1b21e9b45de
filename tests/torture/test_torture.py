"""A slice of `make torture`: jobs killed and hindered at some of the calls that change the disk."""

from __future__ import annotations

import importlib.util
import sys
from collections.abc import Iterator
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest


def _script() -> ModuleType:
    spec = importlib.util.spec_from_file_location("torture", Path(__file__).with_name("torture.py"))
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules["torture"] = module
    spec.loader.exec_module(module)
    return module


torture = _script()


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Iterator[dict[str, Any]]:
    """A process that runs commands with faults, and a small model with a text."""
    work = tmp_path_factory.mktemp("torture")
    try:
        library = torture.build(work)
    except RuntimeError as error:
        pytest.skip(str(error))
    text = work / "text.txt"
    text.write_text(torture.TEXT, encoding="utf-8")
    server = torture.Server(library, work)
    yield {"work": work, "server": server, "tasks": torture.tasks(torture.small_model(work / "model"), text)}
    server.close()


@pytest.mark.parametrize(("kind", "every", "shots"), [("rtn", 19, 2), ("gguf", 31, 1)])
def test_pieces(kind: str, every: int, shots: int, place: dict[str, Any]) -> None:
    job = torture.Torture(place["tasks"][kind], place["server"], place["work"])
    assert job.calls > 40, "what counts is counted"
    for _, attack in torture.attacks(job, every, shots, seed=1):
        attack()


@pytest.mark.parametrize(("kind", "call"), [("folder", 20), ("gptq", 9), ("gptq", -2), ("tune", 75), ("train", 30)])
def test_one_call(kind: str, call: int, place: dict[str, Any]) -> None:
    """Counted from the last where it is negative: there a job takes its folder away."""
    job = torture.Torture(place["tasks"][kind], place["server"], place["work"])
    assert job.calls > abs(call)
    job.kill_at(call if call > 0 else job.calls + call)
