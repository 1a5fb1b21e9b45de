"""Journals, locks and pieces: what was finished is believed, what is not what was written never is."""

from __future__ import annotations

import os
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from nybble.errors import InputError, OutputError, UsageError
from nybble.files import pieces
from nybble.files.job import Job, has_begun, is_published, job_folder, open_job, sweep
from nybble.files.journal import Journal, read_journal
from nybble.files.pieces import PieceFile

FACTS = {"format": "int4:g64", "file model.safetensors": [10, 20]}
RECORDS = [{"pieces": [[f"w{i}", "ab", [[i, 2]], [True, 0.0, 0.0, None]]]} for i in range(5)]


def make(path: Path, records: list[dict] = RECORDS) -> bytes:  # type: ignore[type-arg]
    journal = Journal(path, FACTS)
    for record in records:
        journal.append(record)
    journal.close()
    return path.read_bytes()


def test_what_was_appended_is_read_again(tmp_path: Path) -> None:
    before = make(tmp_path / "journal")
    journal = Journal(tmp_path / "journal", FACTS)
    journal.close()
    assert journal.records == RECORDS
    assert journal.damaged == 0
    assert (tmp_path / "journal").read_bytes() == before


def test_cut_off_anywhere_it_is_a_journal_of_less(tmp_path: Path) -> None:
    path = tmp_path / "journal"
    whole = make(path)
    for length in range(len(whole)):
        path.write_bytes(whole[:length])
        journal = Journal(path, FACTS)
        journal.close()
        assert journal.damaged == 0
        assert journal.records == RECORDS[: max(0, whole[:length].count(b"\n") - 1)]
        assert path.read_bytes().endswith(b"\n")


@settings(deadline=None, max_examples=1000)
@given(place=st.integers(min_value=0), bit=st.integers(0, 7))
def test_a_flipped_bit_is_never_believed(place: int, bit: int, tmp_path_factory: pytest.TempPathFactory) -> None:
    path = tmp_path_factory.getbasetemp() / "flipped"
    path.unlink(missing_ok=True)
    whole = bytearray(make(path))
    whole[place % len(whole)] ^= 1 << bit
    path.write_bytes(bytes(whole))
    try:
        journal = Journal(path, FACTS)
    except InputError as error:
        assert "--restart" in str(error)  # noqa: PT017
        return
    journal.close()
    lost = [record for record in RECORDS if record not in journal.records]
    assert all(record in RECORDS for record in journal.records)
    assert lost
    assert journal.damaged or lost == RECORDS[-1:] or lost == RECORDS


@pytest.mark.parametrize(
    ("facts", "message"),
    [
        ({**FACTS, "format": "int8"}, r"another format \('int4:g64', now 'int8'\)"),
        ({**FACTS, "file model.safetensors": [10, 21]}, r"another file model.safetensors \(\[10, 20\], now \[10, 21\]\)"),
        ({"format": "int4:g64"}, "now None"),
    ],
)
def test_a_journal_of_something_else(facts: dict[str, object], message: str, tmp_path: Path) -> None:
    before = make(tmp_path / "journal")
    with pytest.raises(UsageError, match=message):
        Journal(tmp_path / "journal", facts)
    assert (tmp_path / "journal").read_bytes() == before


def test_pieces_are_taken_up_and_compared(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(pieces, "BATCH_BYTES", 100)
    data = np.random.default_rng(0).integers(0, 256, 1000).astype(np.uint8)

    def opened() -> tuple[Journal, PieceFile]:
        journal = Journal(tmp_path / "journal", FACTS)
        return journal, PieceFile(tmp_path / "file", 1000, journal)

    journal, file = opened()
    for i in range(0, 800, 80):
        file.write(f"p{i}", [(i, data[i : i + 50].data), (i + 50, data[i + 50 : i + 80].data)], i)
    file.close()
    journal.close()
    journal, file = opened()
    assert file.notes == {f"p{i}": i for i in range(0, 800, 80)}
    file.write("last", [(800, data[800:].data)])
    file.finish(data[:4].tobytes())
    file.close()
    journal.close()
    assert (tmp_path / "file").read_bytes() == data.tobytes()
    for place in np.random.default_rng(1).integers(0, 1000, 200):
        turned = data.copy()
        turned[place] ^= 1 << int(place) % 8
        (tmp_path / "file").write_bytes(turned.tobytes())
        journal, file = opened()
        file.close()
        journal.close()
        assert file.damaged == 1
        spoilt = "last" if place >= 800 else f"p{place // 80 * 80}"
        assert {f"p{i}" for i in range(0, 800, 80)} | {"last"} == {*file.notes, spoilt}


def test_a_job_gives_its_output_a_name_when_it_is_whole(tmp_path: Path) -> None:
    target = tmp_path / "deep" / "out"
    with open_job(target, FACTS) as job:
        job.place.write_text("whole")
        assert not target.exists()
        job.publish()
    assert target.read_text() == "whole"
    assert [path.name for path in target.parent.iterdir()] == ["out"]


def end(target: Path, error: BaseException, work: Callable[[Job], object] = lambda job: None) -> None:
    """A job that does some work and ends with an error."""
    with open_job(target, FACTS) as job:
        work(job)
        raise error


@pytest.mark.parametrize(
    ("error", "stays"), [(OutputError("full"), True), (InputError("wrong"), False), (KeyboardInterrupt(), True)]
)
def test_what_stays_of_a_job_that_failed(error: BaseException, stays: bool, tmp_path: Path) -> None:
    target = tmp_path / "deep" / "out"
    with pytest.raises(type(error)):
        end(target, error)
    assert not (tmp_path / "deep").exists()
    with pytest.raises(type(error)):
        end(target, error, lambda job: job.journal.append(RECORDS[0]))
    assert has_begun(target) == stays
    assert (tmp_path / "deep").exists() == stays


def test_an_earlier_output_comes_back_when_replacing_it_was_cut_short(tmp_path: Path) -> None:
    target = tmp_path / "out"
    target.mkdir()
    (target / "config.json").write_text("old")

    def half(job: Job) -> None:
        job.journal.append(RECORDS[0])
        os.rename(target, job.folder / "replaced")  # what a kill between two renames leaves

    with pytest.raises(KeyboardInterrupt):
        end(target, KeyboardInterrupt(), half)
    assert not target.exists()
    with open_job(target, FACTS):
        assert (target / "config.json").read_text() == "old"
    assert (target / "config.json").read_text() == "old"


def test_a_job_that_was_killed_when_it_was_over(tmp_path: Path) -> None:
    target = tmp_path / "out"

    def whole(job: Job) -> None:
        job.place.write_text("whole")
        job.publish()

    with pytest.raises(KeyboardInterrupt):
        end(target, KeyboardInterrupt(), whole)
    assert is_published(target)
    with open_job(target, FACTS) as job:
        assert job.published
    assert not job_folder(target).exists()
    job_folder(target).mkdir()
    (job_folder(target) / "lock").touch()
    sweep(target)
    assert not job_folder(target).exists()


@pytest.mark.parametrize("names", [["notes.txt"], ["out"], ["lock", "notes.txt"], ["journal", "out"]])
def test_a_folder_of_somebody_else_is_left_alone(names: list[str], tmp_path: Path) -> None:
    target = tmp_path / "out"
    job_folder(target).mkdir()
    for name in names:
        (job_folder(target) / name).write_text("mine")
    with pytest.raises(OutputError, match="is there, and nybble did not make it"):
        end(target, KeyboardInterrupt())
    assert {path.name: path.read_text() for path in job_folder(target).iterdir()} == dict.fromkeys(names, "mine")


def test_a_file_in_the_folders_place(tmp_path: Path) -> None:
    job_folder(tmp_path / "out").write_text("mine")
    with pytest.raises(OutputError, match=r"out\.part is a file"):
        end(tmp_path / "out", KeyboardInterrupt())
    assert job_folder(tmp_path / "out").read_text() == "mine"


HOLD = """
import sys, time
from nybble.files.job import open_job
with open_job(sys.argv[1], {}):
    print("mine", flush=True)
    time.sleep(float(sys.argv[2]))
"""


def test_one_works_and_nine_say_so(tmp_path: Path, environment: dict[str, str]) -> None:
    command = [sys.executable, "-c", HOLD, str(tmp_path / "out"), "60"]
    first = subprocess.Popen(command, env=environment, stdout=subprocess.PIPE, text=True)
    assert first.stdout is not None
    assert first.stdout.readline() == "mine\n"
    for _ in range(9):
        began = time.monotonic()
        in_use = rf"is in use by process {first.pid} on .*; wait for it, or stop it"
        with pytest.raises(OutputError, match=in_use), open_job(tmp_path / "out", {}):
            pass
        assert time.monotonic() - began < 1
    first.kill()
    first.communicate()
    with open_job(tmp_path / "out", {}):  # a dead process holds nothing
        pass


def test_ten_at_once(tmp_path: Path, environment: dict[str, str]) -> None:
    command = [sys.executable, "-c", HOLD, str(tmp_path / "out"), "8"]
    pipe = subprocess.PIPE
    running = [subprocess.Popen(command, env=environment, stdout=pipe, stderr=pipe, text=True) for _ in range(10)]
    said = [process.communicate(timeout=60) for process in running]
    assert sum(out == "mine\n" for out, _ in said) == 1
    assert sum("is in use by process" in err for _, err in said) == 9
    assert not job_folder(tmp_path / "out").exists()


def test_what_a_journal_says_is_read_without_opening_it(tmp_path: Path) -> None:
    make(tmp_path / "journal")
    assert read_journal(tmp_path / "journal") == (FACTS, RECORDS)
    assert read_journal(tmp_path / "nothing") == ({}, [])
