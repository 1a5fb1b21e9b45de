"""What nobody raised on purpose: memory that is not given, a disk that is full somewhere. One line, and the work stays."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from nybble.demo import model_folder

FAILS = """
import sys, threading
import nybble.files.pieces
import {module}
nybble.files.pieces.BATCH_BYTES = 20_000
real, calls, lock = {module}.{name}, [0], threading.Lock()
def failing(*arguments, **more):
    with lock:
        calls[0] += 1
    if calls[0] >= {at}:
        raise {error}
    return real(*arguments, **more)
{module}.{name} = failing
from nybble.cli import main
main()
"""
NUMPY = 'MemoryError("Unable to allocate 7.45 GiB for an array with shape (1000000000,) and data type float64")'
TORCH = (
    "RuntimeError(\"[enforce fail at alloc_cpu.cpp:124] err == 0. DefaultCPUAllocator: can't allocate memory: "
    'you tried to allocate 8000000000 bytes. Error code 12 (Cannot allocate memory)")'
)


def nybble(folder: Path, *arguments: str, program: str = "from nybble.cli import main; main()") -> Any:
    command = [sys.executable, "-c", program, *arguments]
    return subprocess.run(command, cwd=folder, capture_output=True, text=True, timeout=120)


@pytest.mark.parametrize(
    ("module", "name", "at", "error", "arguments"),
    [
        ("nybble.converting", "Work._matrix", 12, NUMPY, ("--to", "int4:g64", "--method", "hqq")),
        ("nybble.converting", "Work._matrix", 5, NUMPY, ("--to", "int4:g64", "--file", "gptq")),
        (
            *("nybble.walk", "choose", 6, TORCH),
            ("--to", "int4:g64", "--method", "gptq", "--calibrate", "text.txt", "--windows", "2", "--window", "32"),
        ),
    ],
)
def test_memory_that_is_not_given_loses_nothing(
    module: str, name: str, at: int, error: str, arguments: tuple[str, ...], tmp_path: Path
) -> None:
    (tmp_path / "text.txt").write_text("def f(x):\n    return x * 2\n\n\n" * 200)
    command = ("quantize", str(model_folder()), *arguments, "-o")
    failing = FAILS.format(module=module, name=name, at=at, error=error)
    done = nybble(tmp_path, *command, "out", program=failing)
    *_, remark, last = done.stderr.splitlines()
    assert done.returncode == 1
    assert last.startswith("nybble: error: out of memory (")
    assert "allocate" in last
    assert "--memory" in last
    assert "Traceback" not in done.stderr
    assert remark == f"stopped; the same command goes on from {tmp_path / 'out.part'}"
    assert not (tmp_path / "out").exists()
    again = nybble(tmp_path, *command, "out")
    assert again.returncode == 0, again.stderr
    assert f"going on with what is in {tmp_path / 'out.part'}" in again.stderr
    assert nybble(tmp_path, *command, "whole").returncode == 0
    for file in (tmp_path / "whole").iterdir():
        assert (tmp_path / "out" / file.name).read_bytes() == file.read_bytes(), file.name
    assert {path.name for path in tmp_path.iterdir()} == {"out", "whole", "text.txt"}


def test_a_full_disk_anywhere_is_no_bug_to_report(tmp_path: Path) -> None:
    failing = FAILS.format(
        module="pathlib", name="Path.write_text", at=1, error='OSError(28, "No space left on device", "scratch/text.txt")'
    )
    done = nybble(tmp_path, "compare", "--variants", "fp32,int8", "-o", "out", program=failing)
    assert done.returncode == 1
    assert done.stderr.splitlines()[-1] == "nybble: error: cannot write scratch/text.txt: No space left on device"
    assert list(tmp_path.iterdir()) == []


def test_a_bug_is_said_to_be_one(tmp_path: Path) -> None:
    failing = FAILS.format(module="nybble.converting", name="Work._matrix", at=1, error='RuntimeError("two plus two")')
    done = nybble(tmp_path, "quantize", str(model_folder()), "--to", "int4:g64", "-o", "out", program=failing)
    assert done.returncode == 1
    assert "internal error, please report it: RuntimeError: two plus two" in done.stderr.splitlines()[-1]
    assert list(tmp_path.iterdir()) == []
