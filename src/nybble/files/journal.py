"""A journal: what of a long job is done, line by line, in a file that survives a kill at any moment.

The first line says which job it is (its facts), every other one what has been finished. A line is JSON behind the first 16 hex
digits of its SHA-256; it is on disk before `append` returns. A last line that was cut off never happened; a line that is not
what was written is counted as damaged and never believed, so what it spoke of is done again.
"""

from __future__ import annotations

import json
import os
from collections.abc import Mapping
from hashlib import sha256
from pathlib import Path
from typing import Any

from nybble.errors import InputError, OutputError, UsageError, shown

VERSION = 1
DIGITS = 16
MOST_BYTES = 1 << 28


class Journal:
    """An open journal."""

    def __init__(self, path: Path, facts: Mapping[str, Any]) -> None:
        """Open the journal of a job, or begin one. `facts`: name -> what the result depends on, as JSON has it.

        Raises UsageError, naming what differs, for a journal of another job, InputError for one whose first line is damaged,
        OutputError where the file cannot be written.
        """
        self.path = path
        self.records: list[dict[str, Any]] = []
        """What was finished before, oldest first."""
        self.damaged = 0
        """Lines that were not what had been written."""
        self.appended = False
        """Whether anything was finished since."""
        first = {"journal": VERSION, "facts": json.loads(json.dumps(dict(facts)))}
        try:
            lines = _lines(path)
            if lines:
                self._take_up(lines, first["facts"])
            if not lines or self.damaged or not path.read_bytes().endswith(b"\n"):
                _replace(path, b"".join(map(_line, (first, *self.records))))
            self._file = open(path, "ab", buffering=0)  # noqa: SIM115  # it stays open
        except OSError as error:
            if isinstance(error, OutputError):
                raise
            raise OutputError(f"cannot write {path}: {error.strerror or error}") from error

    def _take_up(self, lines: list[bytes], facts: dict[str, Any]) -> None:
        head = _read(lines[0])
        if head is None or head.get("journal") != VERSION or not isinstance(head.get("facts"), dict):
            raise InputError(f"{self.path} is damaged in its first line: --restart begins anew, so does removing its folder")
        check_same(self.path.parent, head["facts"], facts)
        found = [_read(line) for line in lines[1:]]
        self.records = [record for record in found if record is not None]
        self.damaged = len(found) - len(self.records)

    def append(self, record: Mapping[str, Any]) -> None:
        """Add a line. What it speaks of must be on disk already."""
        line = _line(record)
        try:
            if self._file.write(line) != len(line):
                raise OSError(0, "only a part of a line was written")
            os.fsync(self._file.fileno())
        except OSError as error:
            raise OutputError(f"cannot write {self.path}: {error.strerror or error}") from error
        self.appended = True

    def close(self) -> None:
        """Close the file; it stays."""
        self._file.close()


def read_journal(path: Path) -> tuple[dict[str, Any], list[dict[str, Any]]]:
    """(facts, what was finished) of whatever job; damaged lines are left out. Raises nothing."""
    try:
        lines = [_read(line) for line in _lines(path)]
    except (OSError, InputError):
        return {}, []
    head = lines[0] if lines and lines[0] is not None else {}
    facts = head.get("facts")
    return facts if isinstance(facts, dict) else {}, [record for record in lines[1:] if record is not None]


def check_same(where: Path, was: Mapping[str, Any], now: Mapping[str, Any]) -> None:
    """Raise UsageError, naming the first thing that differs in the order of `now`, where a job that was begun is another one."""
    for name in (*now, *(name for name in was if name not in now)):
        if was.get(name) != now.get(name):
            raise UsageError(
                f"{where} holds a run with another {name} "
                f"({shown(was.get(name))}, now {shown(now.get(name))}): give the same again, another folder, or --restart"
            )


def _lines(path: Path) -> list[bytes]:
    """Whole lines of a journal; none where there is no journal. One whose first line was never finished has not begun."""
    if not path.exists():
        return []
    if path.stat().st_size > MOST_BYTES:
        raise InputError(f"{path} has {path.stat().st_size} bytes, no journal has: remove {path.parent}")
    return path.read_bytes().split(b"\n")[:-1]


def _line(record: Mapping[str, Any]) -> bytes:
    text = json.dumps(record, sort_keys=True, separators=(",", ":")).encode()
    return sha256(text).hexdigest()[:DIGITS].encode() + b" " + text + b"\n"


def _read(line: bytes) -> dict[str, Any] | None:
    """A record, or None for a line that is not what was written."""
    digest, _, text = line.partition(b" ")
    if sha256(text).hexdigest()[:DIGITS].encode() != digest:
        return None
    found = json.loads(text)
    return found if isinstance(found, dict) else None


def _replace(path: Path, content: bytes) -> None:
    part = path.with_name(f".{path.name}.part")
    with open(part, "wb") as file:
        file.write(content)
        file.flush()
        os.fsync(file.fileno())
    os.replace(part, path)
    sync_folder(path.parent)


def sync_folder(folder: Path) -> None:
    """Have the names in a folder, or the bytes of a file, reach the disk."""
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def sync_tree(path: Path) -> None:
    """Have a file, or all files and names in a folder, reach the disk."""
    for each in [path, *path.rglob("*")] if path.is_dir() else [path]:
        sync_folder(each)
