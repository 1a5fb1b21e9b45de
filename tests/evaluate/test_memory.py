"""Memory figures of this very process: they rise by what is allocated and fall when it is given back."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

from nybble.evaluate import memory

MIB = 1024**2

# In a process of its own: what other tests left behind in this one could hide or feign the change.
ALLOCATE = """
from nybble.evaluate import memory
memory.release()
memory.reset_peak()
before = memory.resident_bytes()
pieces = [b"x" * 100_000 for _ in range(2000)]  # 200 MB, each piece below malloc's threshold of mapping
held = memory.resident_bytes()
last = pieces.pop()  # lies on top of the heap, so that only trimming gives back what is below
del pieces
memory.release()
after, peak = memory.resident_bytes(), memory.peak_bytes()
reset = memory.reset_peak()
print(before, held, after, peak, memory.peak_bytes(), int(reset))
"""

linux_only = pytest.mark.skipif(not sys.platform.startswith("linux"), reason="resident set and its peak: Linux only")


@linux_only
def test_allocation_is_seen_and_released() -> None:
    shown = subprocess.run([sys.executable, "-c", ALLOCATE], capture_output=True, text=True, check=True).stdout
    before, held, after, peak, new_peak, reset = (int(word) for word in shown.split())
    assert 190e6 < held - before < 260e6
    assert after - before < 30e6
    assert peak >= held - MIB
    if reset:  # a container can forbid it
        assert new_peak < peak - 150e6


@linux_only
def test_resident_and_peak_are_of_this_process() -> None:
    resident, peak = memory.resident_bytes(), memory.peak_bytes()
    assert resident is not None
    assert peak is not None
    assert 5 * MIB < resident <= peak + MIB


def test_unknown_systems_say_none_rather_than_guess(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sys, "platform", "sunos5")
    assert memory.resident_bytes() is None
    assert memory.peak_bytes() is None
    memory.release()


@linux_only
def test_machine() -> None:
    found = memory.machine()
    assert set(found) == {"cpu", "cores", "memory_bytes", "system"}
    assert found["cpu"]
    assert found["system"]
    assert found["cores"] >= 1
    assert found["memory_bytes"] > 100 * MIB


def test_memory_needs_no_torch() -> None:
    modules = "nybble.evaluate.memory, nybble.calibrate.windows, nybble.demo.text"
    code = f"import sys, {modules}; print('torch' in sys.modules)"
    source = Path(memory.__file__).parents[2]
    shown = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, check=True, env={"PYTHONPATH": str(source)}
    ).stdout
    assert shown.strip() == "False"
