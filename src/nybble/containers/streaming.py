"""A container written tensor by tensor, or a run of rows at a time: the model is never held, and what is finished stays finished.

A container that can be written so has

    stream        (contents, options) -> Stream: where everything will stand, before anything is made

Its `write` is the same in one go. What is finished is in the job's journal (files/job.py); a job that was stopped anywhere goes
on from there, to the same bytes.
"""

from __future__ import annotations

import math
import os
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any, TypeVar

import numpy as np
from numpy.typing import NDArray

from nybble.errors import OutputError
from nybble.files.job import Job
from nybble.files.pieces import PieceFile
from nybble.models.checkpoint import digest_rows

ROWS_WEIGHTS = 1 << 22
"""Weights of a run of rows: enough to make the work for each one small beside it."""

Arrays = Mapping[str, NDArray[Any]]
Item = TypeVar("Item")
Result = TypeVar("Result")


@dataclass(frozen=True)
class Group:
    """Arrays of the file that come from one tensor."""

    name: str
    """Of the tensor."""
    shape: tuple[int, ...]
    make: Callable[[slice | None], Arrays]
    """Makes the arrays by their names in the file: all of it (None), or those parts of all of them that come from some rows."""
    by_rows: bool = False
    """Whether rows may be made apart; then each array's first dimension is the tensor's rows."""

    def parts(self, weights: int = ROWS_WEIGHTS) -> list[slice | None]:
        """The runs of rows, of about so many weights, that it is made in, in order; [None] where it is made at once."""
        rows, rest = (self.shape or (1,))[0], math.prod(self.shape[1:])
        whole = digest_rows(self.shape)  # the source is hashed on the way
        step = max(1, weights // max(1, rest) // whole) * whole
        if not self.by_rows or rows <= step:
            return [None]
        return [slice(start, min(rows, start + step)) for start in range(0, rows, step)]

    def key(self, part: slice | None) -> str:
        """Name of a piece in the journal."""
        return self.name if part is None else f"{self.name}[{part.start}:{part.stop}]"


@dataclass(frozen=True)
class Stream:
    """A file before it is written."""

    file: str
    """Its name in the container's folder; "" for a container that is one file."""
    groups: Sequence[Group]
    places: Mapping[str, tuple[int, int]]
    """Name of an array -> (where it begins, bytes)."""
    size: int
    head: Callable[[Mapping[str, Any]], bytes]
    """What stands before the arrays, given the provenance: always as long."""
    finish: Callable[[Path, Mapping[str, Any]], None] = lambda folder, provenance: None
    """Write the other files of the folder, given the provenance."""

    def runs(self, group: Group, part: slice | None, arrays: Arrays) -> list[tuple[int, memoryview]]:
        """Where the bytes of arrays that were made belong. Raises ValueError for arrays that are not as long as was said."""
        found = []
        for name, array in arrays.items():
            start, size = self.places[name]
            data = _bytes(array)
            if part is None:
                expected = size
            else:
                row = size // group.shape[0]
                start, expected = start + part.start * row, (part.stop - part.start) * row
            if data.nbytes != expected:
                raise ValueError(f"{name} of {group.name} has {data.nbytes} bytes, not {expected}")
            found.append((start, data))
        return found


Watch = Callable[[str, "slice | None", Any], Any]
"""Called in order with (tensor, rows, the note of a piece or None where it has just been made); what it returns for the last is
noted with the piece."""


def write_stream(path: Path, stream: Stream, provenance: Mapping[str, Any]) -> None:
    """All of a stream at once: into an empty folder, or to a file. Raises OutputError, and whatever making a tensor raises."""
    file = path / stream.file if stream.file else path
    try:
        with open(file, "wb") as out:
            out.write(stream.head(provenance))
            for group in stream.groups:
                for part in group.parts():
                    for start, data in stream.runs(group, part, group.make(part)):
                        out.seek(start)
                        out.write(data)
            out.truncate(stream.size)
            out.flush()
            os.fsync(out.fileno())
    except OSError as error:
        if isinstance(error, OutputError):
            raise
        raise OutputError(f"cannot write {path} ({stream.size:,} bytes): {error.strerror or error}") from error
    if stream.file:
        stream.finish(path, provenance)


def run_stream(
    job: Job,
    stream: Stream,
    watch: Watch,
    provenance: Callable[[], Mapping[str, Any]],
    progress: Callable[[int, int], None] = lambda done, total: None,
    threads: int = 1,
    rows_weights: int = ROWS_WEIGHTS,
) -> int:
    """Make what is not finished yet of a job's output, all but its name; returns how many pieces an earlier run had finished
    and were damaged. `progress` is told the pieces. Raises OutputError, and whatever making a tensor raises."""
    folder = job.place if stream.file else job.folder
    folder.mkdir(exist_ok=True)
    pieces = PieceFile(folder / (stream.file or job.target.name), stream.size, job.journal)
    try:
        work = [(group, part) for group in stream.groups for part in group.parts(rows_weights)]
        jobs: Iterator[tuple[tuple[Group, slice | None], Arrays | Callable[[], Arrays | None] | None]] = (
            ((group, part), None if group.key(part) in pieces.notes else partial(group.make, part)) for group, part in work
        )
        for done, ((group, part), arrays) in enumerate(made_ahead(jobs, threads)):
            if arrays is None:
                watch(group.name, part, pieces.notes[group.key(part)])
            else:
                pieces.write(group.key(part), stream.runs(group, part, arrays), watch(group.name, part, None))
            progress(done + 1, len(work))
        known = provenance()
        pieces.finish(stream.head(known))
    except KeyboardInterrupt:
        pieces.flush()  # nothing is lost
        raise
    finally:
        pieces.close()
    if stream.file:
        stream.finish(folder, known)
    return pieces.damaged


def made_ahead(jobs: Iterable[tuple[Item, Result | Callable[[], Result]]], threads: int) -> Iterator[tuple[Item, Result]]:
    """(item, result) in order; a result that is still to be made is a function, and a few of them are made ahead, in threads."""
    waiting: deque[tuple[Item, Result | Future[Result]]] = deque()
    ahead = 0
    with ThreadPoolExecutor(threads) as pool:
        try:
            for item, job in jobs:
                waiting.append((item, pool.submit(job) if callable(job) else job))
                ahead += callable(job)
                while waiting and (ahead > threads or not isinstance(waiting[0][1], Future)):
                    first, result = waiting.popleft()
                    ahead -= isinstance(result, Future)
                    yield first, result.result() if isinstance(result, Future) else result
            while waiting:
                first, result = waiting.popleft()
                yield first, result.result() if isinstance(result, Future) else result
        finally:
            for _, result in waiting:
                if isinstance(result, Future):
                    result.cancel()


def _bytes(array: NDArray[Any]) -> memoryview:
    """The bytes of an array as files have them: little-endian, in C order."""
    little = np.ascontiguousarray(array.astype(array.dtype.newbyteorder("<"), copy=False))
    return little.reshape(-1).view(np.uint8).data if little.size else memoryview(b"")
