"""Mutants of valid files: none crashes, hangs, takes much memory, or gives an error that is not ours; and those who watch see."""

from __future__ import annotations

from pathlib import Path
from random import Random

import fuzz
import good
import mutants
import mutate
import pytest


def test_five_thousand_mutants() -> None:
    result = fuzz.run(5000, seed=7)
    assert result.clean, result.report()
    assert sum(result.counts.values()) == result.mutants == 5000
    assert all(result.counts[f"{kind} accepted"] for kind in ("gguf", "config", "index", "safetensors")), result.report()


@pytest.mark.slow
@pytest.mark.timeout(1800)
def test_a_hundred_thousand_mutants() -> None:
    result = fuzz.run(100_000, seed=2)
    print(result.report())
    assert result.clean, result.report()
    assert sum(result.counts.values()) == 100_000
    assert result.longest[0] < fuzz.SECONDS


def test_the_valid_files_are_accepted(tmp_path: Path) -> None:
    """What is mutated is read, and decoded where it is a whole model."""
    for kind, seeds in fuzz.make_seeds(tmp_path).items():
        for seed in seeds:
            whole = kind == "gguf" or seed.folder.name in mutants.WHOLE
            assert fuzz.try_one(seed, decoded=whole) is None, seed.folder


def test_a_mutant_follows_from_its_number(tmp_path: Path) -> None:
    (tmp_path / "a").mkdir()
    (tmp_path / "b").mkdir()
    one, other = fuzz.make_seeds(tmp_path / "a"), fuzz.make_seeds(tmp_path / "b")
    for index in range(200):
        assert fuzz.mutant(one, 3, index)[1] == fuzz.mutant(other, 3, index)[1]
    assert fuzz.mutant(one, 3, 5)[1] != fuzz.mutant(one, 4, 5)[1]


def test_the_numbers_of_a_gguf_file_are_found() -> None:
    data = good.gguf_model()
    fields, head = mutate.gguf_fields(data)
    assert data[fields[3] : fields[3] + 8] == len("general.architecture").to_bytes(8, "little")
    assert head == data.rindex(b"output.weight") + len("output.weight") + 4 + 16 + 4 + 8
    changed = [at for at in fields if mutate.damage(data, Random(at), head, (at,))]
    assert len(changed) == len(fields) > 150


SABOTAGE = """
import os, sys, time
sys.path.insert(0, {folder!r})
import fuzz

real = fuzz.try_one

def try_one(seed, decoded):
    index = int.from_bytes(worker.progress[:8], "little") if worker is not None else -1
    {action}
    return real(seed, decoded)

class Worker(fuzz.Worker):
    def __init__(self, *arguments):
        global worker
        super().__init__(*arguments)
        worker = self

worker = None
fuzz.try_one = try_one
fuzz.Worker = Worker
fuzz.main()
"""
ACTIONS = {
    "a crash": ("if index == 30: os.abort()", {"crashes": [(30, "SIGABRT")]}),
    "a hang": ("while index == 30: pass", {"hangs": [(30, "s of processor time")]}),
    "other errors and much memory": (
        "{20: dict, 30: lambda: {}['x'], 41: lambda: bytearray(100 << 20)}.get(index, int)()",
        {"failures": [(30, "KeyError"), (41, "MemoryError")]},
    ),
}


@pytest.mark.parametrize("name", ACTIONS)
def test_what_must_not_come_is_seen(name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    action, expected = ACTIONS[name]
    monkeypatch.setattr(fuzz, "SECONDS", 0.5)  # of the one who watches
    program = tmp_path / "sabotage.py"
    program.write_text(SABOTAGE.format(folder=str(Path(__file__).parent), action=action))
    result = fuzz.run(60, seed=7, workers=2, program=str(program))
    assert not result.clean
    for where in ("crashes", "hangs", "failures"):
        found, wanted = sorted(getattr(result, where)), expected.get(where, [])
        assert [index for index, _ in found] == [index for index, _ in wanted], result.report()
        assert all(what in why for (_, what), (_, why) in zip(wanted, found, strict=True)), result.report()


def test_messages_are_short_lines() -> None:
    fuzz.check_message("a line", 6)
    for wrong in ("two\nlines", "\x1b[2J", "a" * 2000):
        with pytest.raises(ValueError, match="a message that is no short line"):
            fuzz.check_message(wrong, 6)
