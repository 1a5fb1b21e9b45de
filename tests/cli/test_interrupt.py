"""Ctrl-C, SIGTERM and SIGKILL in the middle of the work: one line, nothing half-written, no process left behind."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from nybble.demo import model_folder

pytestmark = pytest.mark.skipif(not Path("/proc/self/cmdline").exists(), reason="finds the processes through /proc")

COMPARE = ("compare", "--variants", "fast", "--windows", "4", "--repeats", "1", "-o", "out")
Start = Callable[..., "subprocess.Popen[str]"]


@pytest.fixture
def start(tmp_path: Path, environment: dict[str, str]) -> Iterator[Start]:
    """Starts nybble in the background, its temporary files in `tmp`; ends what a failed test leaves running."""
    (tmp_path / "tmp").mkdir()
    started: list[subprocess.Popen[str]] = []

    def command(*arguments: str) -> subprocess.Popen[str]:
        started.append(
            subprocess.Popen(
                [sys.executable, "-m", "nybble", *arguments],
                stdout=subprocess.PIPE,
                stderr=subprocess.PIPE,
                text=True,
                cwd=tmp_path,
                env={**environment, "TMPDIR": str(tmp_path / "tmp")},
            )
        )
        return started[-1]

    yield command
    for process in started:
        process.kill()
        process.communicate()


def workers(folder: Path, kind: str = "") -> list[int]:
    """Ids of the measuring processes (of one kind) whose job lies below a folder."""
    found = []
    for entry in Path("/proc").iterdir():
        if entry.name.isdigit():
            try:
                words = (entry / "cmdline").read_bytes().decode(errors="replace").split("\0")
            except OSError:  # it ended meanwhile
                continue
            if "nybble.evaluate.worker" in words and kind in ("", *words) and any(str(folder) in word for word in words):
                found.append(int(entry.name))
    return found


def left_in(folder: Path) -> list[str]:
    """What lies in a folder of temporary files, but for the cache folder that importing torch makes there."""
    return [path.name for path in folder.iterdir() if not path.name.startswith("torchinductor_")]


def wait_for(condition: Callable[[], object], process: subprocess.Popen[str] | None = None, seconds: float = 60) -> None:
    end = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < end, "it did not come"
        assert process is None or process.poll() is None, process.communicate()[1] if process else ""
        time.sleep(0.02)


def measuring(folder: Path, kind: str) -> Callable[[], bool]:
    """True once a worker of this kind is past its imports: it has mapped torch's library."""

    def ready() -> bool:
        for pid in workers(folder, kind):
            try:
                if "libtorch_cpu" in Path(f"/proc/{pid}/maps").read_text():
                    return True
            except OSError:
                continue
        return False

    return ready


def loaded_torch(process: subprocess.Popen[str]) -> Callable[[], bool]:
    return lambda: "libtorch_cpu" in Path(f"/proc/{process.pid}/maps").read_text()


def check_interrupted(process: subprocess.Popen[str], folder: Path, names: set[str]) -> None:
    stderr = process.communicate(timeout=90)[1]
    assert process.returncode == 130, stderr
    assert stderr.splitlines()[-1].startswith("nybble: error: interrupted")
    assert "Traceback" not in stderr
    assert {path.name for path in folder.iterdir()} == names
    assert left_in(folder / "tmp") == []
    wait_for(lambda: not workers(folder), seconds=1)


@pytest.mark.parametrize("sent", [signal.SIGINT, signal.SIGTERM], ids=["SIGINT", "SIGTERM"])
@pytest.mark.parametrize("kind", ["quality", "measure"])
def test_compare(sent: signal.Signals, kind: str, start: Start, tmp_path: Path) -> None:
    process = start(*COMPARE)
    wait_for(measuring(tmp_path, kind), process)
    process.send_signal(sent)
    check_interrupted(process, tmp_path, {"tmp"})


def test_an_earlier_output_survives_an_interrupted_one(start: Start, tmp_path: Path) -> None:
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "results.jsonl").write_text("an earlier comparison")
    process = start(*COMPARE, "--force")
    wait_for(measuring(tmp_path, "quality"), process)
    process.send_signal(signal.SIGINT)
    check_interrupted(process, tmp_path, {"tmp", "out"})
    assert [path.name for path in (tmp_path / "out").iterdir()] == ["results.jsonl"]
    assert (tmp_path / "out" / "results.jsonl").read_text() == "an earlier comparison"


@pytest.mark.parametrize("sent", [signal.SIGINT, signal.SIGTERM], ids=["SIGINT", "SIGTERM"])
def test_quantize_with_the_model_in_memory(sent: signal.Signals, start: Start, tmp_path: Path) -> None:
    calibrated = ("--method", "gptq", "--calibrate", "self", "--windows", "2")
    process = start("quantize", str(model_folder()), "--to", "int4:g64", *calibrated, "-o", "out")
    wait_for(loaded_torch(process), process)
    process.send_signal(sent)
    check_interrupted(process, tmp_path, {"tmp"})


@pytest.mark.parametrize("sent", [signal.SIGINT, signal.SIGTERM], ids=["SIGINT", "SIGTERM"])
def test_quantize_goes_on(sent: signal.Signals, start: Start, tmp_path: Path) -> None:
    command = ("quantize", str(model_folder()), "--to", "int4:g64", "--method", "hqq", "--threads", "1", "-o", "out")
    process = start(*command)
    wait_for((tmp_path / "out.part" / "out").exists, process)
    process.send_signal(sent)
    stderr = process.communicate(timeout=90)[1]
    assert process.returncode == 130, stderr
    assert stderr.splitlines()[-1] == "nybble: error: interrupted; no half-written output was left behind"
    assert not (tmp_path / "out").exists()
    left = {path.name for path in tmp_path.iterdir()}
    if left != {"tmp"}:  # something was finished
        assert left == {"tmp", "out.part"}
        assert stderr.splitlines()[-2] == f"stopped; the same command goes on from {tmp_path / 'out.part'}"
    again = start(*command)
    assert again.wait(90) == 0
    whole = start(*command[:-1], "whole")
    assert whole.wait(90) == 0
    assert (tmp_path / "out" / "model.safetensors").read_bytes() == (tmp_path / "whole" / "model.safetensors").read_bytes()
    assert {path.name for path in tmp_path.iterdir()} == {"tmp", "out", "whole"}


def test_compare_measures_nothing_twice(start: Start, tmp_path: Path) -> None:
    command = ("compare", "--variants", "fp32,int8", "--windows", "4", "--repeats", "1", "-o", "out")
    journal = tmp_path / "out.part" / "journal"
    process = start(*command)
    wait_for(lambda: journal.exists() and b"record" in journal.read_bytes(), process)
    process.send_signal(signal.SIGINT)
    stderr = process.communicate(timeout=90)[1]
    assert process.returncode == 130, stderr
    assert f"stopped; the same command goes on from {tmp_path / 'out.part'}" in stderr
    process = start(*command[:-4], "--repeats", "2", "-o", "out")
    assert "holds a run with another way of timing" in process.communicate(timeout=90)[1]
    process = start(*command)
    stderr = process.communicate(timeout=120)[1]
    assert process.returncode == 0, stderr
    assert "1 variants are measured" in stderr
    records = [json.loads(line) for line in (tmp_path / "out" / "results.jsonl").read_text().splitlines()]
    assert [record["variant"] for record in records] == ["fp32", "int8:channel"]
    assert records[0]["run"] == records[1]["run"]
    assert {path.name for path in tmp_path.iterdir()} == {"tmp", "out"}
    assert not [path for path in (tmp_path / "out").iterdir() if path.name.startswith("nybble-")]


def test_workers_die_with_a_killed_parent(start: Start, tmp_path: Path) -> None:
    process = start(*COMPARE)
    wait_for(measuring(tmp_path, "measure"), process)
    assert len(workers(tmp_path)) == 2  # the one that measures, and the one that makes the variants
    process.kill()
    process.wait()
    wait_for(lambda: not workers(tmp_path), seconds=5)


@pytest.mark.parametrize(("kind", "what"), [("quality", "quality"), ("measure", "fp32")])
def test_killed_worker(kind: str, what: str, start: Start, tmp_path: Path) -> None:
    process = start(*COMPARE)
    wait_for(measuring(tmp_path, kind), process)
    os.kill(workers(tmp_path, kind)[0], signal.SIGKILL)
    stderr = process.communicate(timeout=90)[1]
    assert process.returncode == 1
    last = stderr.splitlines()[-1]
    assert last.startswith(f"nybble: error: the process measuring {what} was ended by SIGKILL")
    assert "Traceback" not in stderr
    assert [path.name for path in tmp_path.iterdir()] == ["tmp"]
    assert left_in(tmp_path / "tmp") == []
    assert workers(tmp_path) == []


@pytest.mark.parametrize("size", [1, 2])
def test_one_of_several_processes_takes_nothing_apart(size: int, environment: dict[str, str]) -> None:
    """Where torchrun started it, no thread of another library can fall over an interpreter that is half gone."""
    lines = ("import atexit, sys", "from nybble.cli import main", "atexit.register(print, 'apart')", "main()")
    command = [sys.executable, "-c", "\n".join(lines), "formats"]
    several = {**environment, "WORLD_SIZE": str(size)}
    done = subprocess.run(command, env=several, capture_output=True, text=True, check=False)
    assert done.returncode == 0
    assert "int4" in done.stdout
    assert ("apart" in done.stdout) == (size == 1)
