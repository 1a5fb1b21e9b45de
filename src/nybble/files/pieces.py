"""A file of known size that is written piece by piece, in any order and over several runs.

A piece is some runs of bytes that belong together. It counts as finished when its bytes are on disk, have been read again, and
stand in the journal with their BLAKE3 digest; what another run finished is believed after the same comparison. Pieces go to the
disk in batches: waiting for it costs as much for a norm's gain as for a matrix.
"""

from __future__ import annotations

import errno
import os
import shutil
import time
from collections.abc import Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path
from typing import Any

from blake3 import blake3

from nybble.errors import OutputError
from nybble.files.folder import file_mode
from nybble.files.journal import Journal

PIECES = "pieces"
BATCH_BYTES, BATCH_SECONDS = 1 << 26, 10.0
READ_BYTES = 1 << 22

Run = tuple[int, memoryview]
"""(where in the file, bytes)."""


Piece = tuple[str, str, list[list[int]], Any]
"""(key, BLAKE3, [where, bytes] of each run, note)."""


class PieceFile:
    """The file, and which of its pieces are finished."""

    def __init__(self, path: Path, size: int, journal: Journal) -> None:
        """Open the file, or make it, with room for `size` bytes. Raises OutputError where the disk has none."""
        self.path, self.size, self.journal = path, size, journal
        self.notes: dict[str, Any] = {}
        """Key of a finished piece -> what was noted with it."""
        self.damaged = journal.damaged
        """What an earlier run had finished that is not what it was; it will be done again."""
        self._pending: list[Piece] = []
        self._waiting = 0
        self._batch: Future[None] | None = None
        self._thread = ThreadPoolExecutor(1)
        self._since = time.monotonic()
        try:
            self._file = os.open(path, os.O_RDWR | os.O_CREAT | getattr(os, "O_CLOEXEC", 0), 0o644)
        except OSError as error:
            raise self._failed(error) from error
        try:
            self._take_room()
            self._believe()
        except BaseException:
            os.close(self._file)
            raise

    def _take_room(self) -> None:
        there = os.fstat(self._file).st_size
        free = shutil.disk_usage(self.path.parent).free
        try:
            if there > self.size:  # of another layout, whose pieces are not in the journal
                os.ftruncate(self._file, 0)
            if hasattr(os, "posix_fallocate") and self.size:
                os.posix_fallocate(self._file, 0, self.size)
            else:
                os.ftruncate(self._file, self.size)
        except OSError as error:
            if error.errno == errno.ENOSPC:
                raise OutputError(
                    f"{self.path} takes {self.size:,} bytes, its disk has {free:,} free; make room, or write somewhere else (-o)"
                ) from error
            raise self._failed(error) from error

    def _believe(self) -> None:
        """Take up the pieces of earlier runs that are still what they were."""
        for record in self.journal.records:
            for key, digest, runs, note in record.get(PIECES, ()):
                if self._digest(runs) == digest:
                    self.notes[key] = note
                else:
                    self.notes.pop(key, None)
                    self.damaged += 1

    def write(self, key: str, runs: Sequence[Run], note: Any = None) -> None:
        """Write a piece. Its buffers are not needed afterwards. Raises OutputError."""
        digest = blake3()
        places = []
        try:
            for start, data in runs:
                digest.update(data)
                places.append([start, data.nbytes])
                done = 0
                while done < data.nbytes:
                    done += os.pwrite(self._file, data[done:], start + done)
        except OSError as error:
            raise self._failed(error) from error
        self._pending.append((key, digest.hexdigest(), places, note))
        self._waiting += sum(length for _, length in places)
        if self._waiting >= BATCH_BYTES or time.monotonic() - self._since > BATCH_SECONDS:
            self._begin_batch()

    def flush(self) -> None:
        """Have all pieces so far on disk and in the journal. Raises OutputError."""
        self._begin_batch()
        self._end_batch()

    def _begin_batch(self) -> None:
        """Send what waits to the disk, behind the back of who makes the next pieces."""
        self._end_batch()
        if self._pending:
            self._batch = self._thread.submit(self._sync, self._pending)
            self._pending, self._waiting, self._since = [], 0, time.monotonic()

    def _end_batch(self) -> None:
        batch, self._batch = self._batch, None
        if batch is not None:
            batch.result()

    def _sync(self, batch: Sequence[Piece]) -> None:
        try:
            os.fsync(self._file)
        except OSError as error:
            raise self._failed(error) from error
        for key, digest, runs, _ in batch:
            if self._digest(runs) != digest:
                raise OutputError(f"{self.path}: what was written of {key} does not read back; the disk may be failing")
        self.journal.append({PIECES: batch})
        self.notes.update({key: note for key, _, _, note in batch})

    def finish(self, head: bytes) -> None:
        """Write what stands before all pieces, and have the whole file on disk. Raises OutputError."""
        self.flush()
        try:
            done = 0
            while done < len(head):
                done += os.pwrite(self._file, head[done:], done)
            os.fchmod(self._file, file_mode())
            os.fsync(self._file)
        except OSError as error:
            raise self._failed(error) from error

    def close(self) -> None:
        """Close the file; what is not flushed is not finished."""
        self._thread.shutdown()
        os.close(self._file)

    def _digest(self, runs: Sequence[Sequence[int]]) -> str:
        digest = blake3()
        try:
            for start, length in runs:
                while length > 0:
                    data = os.pread(self._file, min(length, READ_BYTES), start)
                    if not data:
                        return ""
                    digest.update(data)
                    start, length = start + len(data), length - len(data)
        except OSError as error:
            raise self._failed(error) from error
        return digest.hexdigest()

    def _failed(self, error: OSError) -> OutputError:
        return OutputError(f"cannot write {self.path} ({self.size:,} bytes): {error.strerror or error}")
