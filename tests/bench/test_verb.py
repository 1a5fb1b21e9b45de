"""`nybble bench` as its user meets it, with real racers on the model that ships: one thread, one round, one repeat."""

from __future__ import annotations

import json
import re
import signal
import subprocess
import sys
import venv
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from nybble.bench.adapters import FILES, OURS, adapter_of
from nybble.bench.child import Children

Run = Callable[..., subprocess.CompletedProcess[str]]
SHORT = ("--threads", "1", "--rounds", "1", "--repeats", "1")
FIGURES = {
    "tokens_per_second",
    "seconds_50",
    "batch8_tokens_per_second",
    "prefill_512_s",
    "first_token_s",
    "weight_bytes",
}
"""What a race of several programs reads of a line."""


def progress_and_others(stderr: str) -> tuple[list[str], list[str]]:
    lines = stderr.splitlines()
    progress = [line for line in lines if re.match(r" *\d+%  ", line)]
    return progress, [line for line in lines if line not in progress]


@pytest.fixture(scope="module")
def raced(nybble_command: Run, tmp_path_factory: pytest.TempPathFactory) -> tuple[list[dict[str, Any]], Path, Path]:
    """(lines, output folder, work folder) of a race of the engine in two formats against torch in one."""
    root = tmp_path_factory.mktemp("raced")
    options = ("--formats", "f16,int4:g32", "--against", "torch:fp32", "--work", root / "work", "-o", root / "out", "--json")
    done = nybble_command("bench", *SHORT, *options)
    assert done.returncode == 0, done.stderr
    progress, others = progress_and_others(done.stderr)
    assert progress
    assert others == []
    return [json.loads(line) for line in done.stdout.splitlines()], root / "out", root / "work"


def test_a_line_a_racer_holds_what_a_race_reads(raced: tuple[list[dict[str, Any]], Path, Path]) -> None:
    lines, _, _ = raced
    assert [(line["peer"], line["format"]) for line in lines] == [("nybble", "f16"), ("nybble", "int4:g32"), ("torch", "fp32")]
    for line in lines:
        assert set(line) >= FIGURES
        assert all(isinstance(line[figure], int | float) and line[figure] > 0 for figure in FIGURES)
        assert line["threads"] == 1
        assert line["new_tokens"] == 50
        assert line["seconds_50"] == pytest.approx(50 / line["tokens_per_second"], rel=1e-2)
        assert 0 < line["load_s"] <= line["first_token_s"] < 120
        assert line["bandwidth_share"] > 0
        assert line["memory_before_load_bytes"] < line["memory_loaded_bytes"] <= line["memory_peak_bytes"]
        assert all(line[f"batch{rows}_tokens_per_second"] > 0 for rows in (1, 4, 16))
        assert line["turns"]["tokens_per_second"] == [line["tokens_per_second"]]
        assert line["baseline"] == "torch fp32"
    assert lines[0]["weight_bytes"] > 3 * lines[1]["weight_bytes"]
    assert lines[1]["bytes_per_token"] < lines[0]["bytes_per_token"] < lines[2]["bytes_per_token"]


def test_both_runtimes_run_the_same_model(raced: tuple[list[dict[str, Any]], Path, Path]) -> None:
    f16, _, torch = raced[0]
    assert torch["tokens_as_float"] == 50
    assert f16["tokens_as_float"] >= 20, "float16 and float32 of one model write the same text for long"


def test_the_output_folder_is_complete(raced: tuple[list[dict[str, Any]], Path, Path]) -> None:
    lines, out, _ = raced
    assert sorted(path.name for path in out.iterdir()) == ["bench.md", "decode.png", "results.jsonl"]
    assert [json.loads(line) for line in (out / "results.jsonl").read_text().splitlines()] == lines
    text = (out / "bench.md").read_text()
    assert "| nybble int4:g32 |" in text
    assert str(out) not in text


def test_the_work_folder_is_used_again(raced: tuple[list[dict[str, Any]], Path, Path], nybble_command: Run) -> None:
    _, _, work = raced
    (made,) = work.glob("*/nybble-int4-g32")
    before = (made / "model.safetensors").stat()
    done = nybble_command("bench", *SHORT, "--formats", "int4:g32", "--what", "decode", "--work", work)
    assert done.returncode == 0, done.stderr
    assert (made / "model.safetensors").stat().st_mtime_ns == before.st_mtime_ns
    assert "nybble int4:g32" in done.stdout
    assert "tokens/s" in done.stdout
    assert "GB/s" in done.stdout
    assert [path.name for path in work.rglob("*.part")] == []


@pytest.fixture(scope="session")
def bare_python(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A Python with its standard library and nothing else: no nybble, no numpy."""
    folder = tmp_path_factory.mktemp("bare")
    venv.create(folder, with_pip=False, symlinks=True)
    return folder / "bin" / "python"


def test_absent_peers_are_skipped_in_a_line_each(nybble_command: Run, bare_python: Path) -> None:
    peers = sorted(set(FILES) - {OURS})
    pythons = [word for peer in peers for word in ("--peer-python", f"{peer}={bare_python}")]
    options = ("--formats", "f16", "--what", "decode", "--json", "--against", ",".join(peers))
    done = nybble_command("bench", *SHORT, *options, *pythons)
    assert done.returncode == 0, done.stderr
    _, others = progress_and_others(done.stderr)
    assert len(others) == len(peers)
    for peer, line in zip(peers, others, strict=True):
        assert line.startswith(f"{peer} is skipped: no ")
        assert f"pip install {adapter_of(peer).install}" in line
    assert [json.loads(line)["peer"] for line in done.stdout.splitlines()] == [OURS]


def test_a_worker_of_a_peer_needs_nothing_but_the_standard_library(bare_python: Path, tmp_path: Path) -> None:
    children = Children(tmp_path, 1, {peer: str(bare_python) for peer in FILES if peer != OURS})
    for peer in FILES:
        found = children.run({"do": "check", "runtime": peer}, peer)["missing"]
        assert found == adapter_of(peer).missing() if peer == OURS else found == ", ".join(adapter_of(peer).modules)


WRONG = {
    "unknown peer": (("--against", "lama.cpp"), 2, "unknown peer 'lama.cpp'; did you mean llama.cpp"),
    "unknown format": (("--formats", "int9"), 2, "unknown format 'int9'"),
    "no rounds": (("--rounds", "0"), 2, "rounds is 0; the least is 1"),
    "unknown part": (("--what", "dance"), 2, "unknown part of the work load 'dance'"),
    "shape and model": (("--shape", "gpt2", "model"), 2, "give no MODEL"),
    "python without a name": (("--peer-python", "python"), 2, "is not NAME=PATH"),
    "python that is no program": (("--against", "torch", "--peer-python", "torch=no/python"), 2, "is not a program"),
    "no such folder": (("no/such/model/there",), 1, "no/such/model/there"),
}


@pytest.mark.parametrize("case", WRONG)
def test_wrong_input_is_one_line(case: str, nybble_command: Run, tmp_path: Path) -> None:
    arguments, code, words = WRONG[case]
    done = nybble_command("bench", *arguments, cwd=tmp_path)
    assert done.returncode == code, done.stderr
    (line,) = done.stderr.splitlines()
    assert line.startswith("nybble: error: ")
    assert words in line
    assert done.stdout == ""
    assert list(tmp_path.iterdir()) == []


def test_an_output_that_is_there_is_refused_before_any_work(nybble_command: Run, tmp_path: Path) -> None:
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "mine").write_text("")
    done = nybble_command("bench", "-o", tmp_path / "out")
    assert done.returncode == 1
    assert "is not empty" in done.stderr
    assert len(done.stderr.splitlines()) == 1


def test_the_parent_imports_no_torch(python_script: Callable[..., str]) -> None:
    program = """
import sys
import nybble.bench.race, nybble.cli.bench
print([name for name in ("torch", "transformers", "matplotlib") if name in sys.modules])
"""
    assert python_script(program).strip() == "[]"
    assert sys.executable


def test_an_interrupt_ends_the_workers_and_leaves_nothing(environment: dict[str, str], tmp_path: Path) -> None:
    (tmp_path / "scratch").mkdir()
    process = subprocess.Popen(
        [sys.executable, "-m", "nybble", "bench", "--formats", "int8", "--rounds", "1000", "--repeats", "1", "--threads", "1"],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        env={**environment, "TMPDIR": str(tmp_path / "scratch")},
    )
    with process:
        assert process.stdout is not None
        assert process.stderr is not None
        for line in process.stderr:
            if "round 2" in line:
                break
        process.send_signal(signal.SIGINT)
        words = process.stderr.read()
        assert process.wait(60) == 130
        assert process.stdout.read() == ""
    assert words.splitlines()[-1].startswith("nybble: error: interrupted")
    assert list((tmp_path / "scratch").iterdir()) == []
