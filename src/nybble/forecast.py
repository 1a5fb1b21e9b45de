"""What writing a model will take, said before the work: memory, disk and time; and how to stay within a memory limit."""

from __future__ import annotations

import math
import os
import re
import shutil
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from nybble.containers.contents import Contents
from nybble.containers.streaming import ROWS_WEIGHTS, Group, Stream
from nybble.errors import OutputError, UsageError
from nybble.files.job import job_folder
from nybble.formats import parse_format
from nybble.methods import Method

FEWEST_WEIGHTS = 1 << 18
"""Of a piece: smaller ones save no memory worth having."""
SAMPLE_WEIGHTS = 1 << 18
BYTES_A_WEIGHT = {"range": 20, "search": 52, "hqq": 36}
"""Memory while a weight is made, by how scales are found: its float32, temporaries, what comes of it, a copy that lies the other
way (measured beyond the float32 for int4 in groups: 8, 37 and 22)."""
COPY_BYTES_A_WEIGHT = 8
"""The same for a tensor that is carried over or cast."""
BATCH_BYTES = 1 << 26
UNITS = {unit: 1000**power for power, unit in enumerate(("", "K", "M", "G", "T"))}
UNITS |= {f"{unit}I": 1 << 10 * power for power, unit in enumerate(("", "K", "M", "G", "T")) if power}
SIZE = re.compile(r"(\d+(?:\.\d+)?)\s*((?:[KMGT]I?)?)B?")


@dataclass(frozen=True)
class Forecast:
    """What a job will take."""

    threads: int
    """Tensors that are made at once."""
    rows_weights: int
    """Weights of a piece of a tensor whose rows may be made apart."""
    memory: int
    """Bytes, this process as it stands included."""
    largest: str
    """The tensor that takes most of them at once, where rows may not be made apart; empty: none stands out."""
    reads: int
    writes: int
    free: int
    """Bytes of the disk that the output goes to."""
    seconds: float | None
    """None: no weight of it could be tried."""

    def __str__(self) -> str:
        return said(self.reads, self.writes, self.free, self.memory, self.seconds)


def forecast(
    stream: Stream,
    contents: Contents,
    method: Method,
    target: Path,
    threads: int,
    limit: int | None,
    reads: int,
    tried: Stream | None = None,
) -> Forecast:
    """Choose threads and sizes of pieces so that a stream of `contents` stays within `limit` bytes of memory, and say what it
    will take. `reads`: bytes of the source; `tried`: what to know the time from, if not the stream. Raises UsageError, with the
    figure, where it cannot stay within; OutputError where the disk has no room.
    """
    standing = resident()
    plans = [(n, ROWS_WEIGHTS >> k) for n, k in ((threads, 0), (threads, 2), (1, 2), (1, 4), (1, 6))]
    need, largest = 0, ""
    for n, weights in plans:
        need, largest = _memory(stream, contents, method, n, max(FEWEST_WEIGHTS, weights))
        if limit is None or standing + need <= limit:
            break
    else:
        why = f"; most of it for {largest}, whose rows depend on each other or change places" if largest else ""
        raise UsageError(f"this takes {size_text(standing + need)} of memory, --memory allows {size_text(limit or 0)}{why}")
    free = check_disk(target, stream.size)
    weights = max(FEWEST_WEIGHTS, weights)
    return Forecast(n, weights, standing + need, largest, reads, stream.size, free, _seconds(tried or stream, n))


def check_disk(target: Path, size: int, more: int = 0) -> int:
    """Bytes that the disk of an output of `size` bytes has free; `more` are needed beside it while it is made. Raises
    OutputError, with the figure, where it has no room for them; what an earlier run left there counts as room."""
    parent = next(path for path in target.absolute().parents if path.exists())
    free = shutil.disk_usage(parent).free
    part = job_folder(target)
    taken = sum(file.stat().st_blocks * 512 for file in part.rglob("*") if file.is_file()) if part.is_dir() else 0
    if free + taken < size + more + BATCH_BYTES // 64:
        raise OutputError(
            f"{target} takes about {size_text(size)}{f', and {size_text(more)} on the way' if more else ''}, {parent} has "
            f"{size_text(free + taken)} free; make room, or write somewhere else (-o)"
        )
    return free


def said(reads: int, writes: int, free: int, memory: int, seconds: float | None) -> str:
    """A forecast in one line."""
    took = "" if seconds is None else f", about {duration(seconds)}"
    return (
        f"reads {size_text(reads)}, writes {size_text(writes)} ({size_text(free)} free), takes up to {size_text(memory)} of "
        f"memory{took}"
    )


def _memory(stream: Stream, contents: Contents, method: Method, threads: int, weights: int) -> tuple[int, str]:
    """(bytes that pieces under way take at most, the tensor that is to blame where it is made at once)."""
    costs = []
    for group in stream.groups:
        size = math.prod(group.shape)
        at_once = min(size, max(weights, math.prod(group.shape[1:]))) if group.by_rows else size
        costs.append((at_once * _bytes_a_weight(group, contents, method), group.name if at_once == size > weights else ""))
    costs.sort(reverse=True)
    # so many are being made, and one more is being written
    under_way = sum(cost for cost, _ in costs[:threads]) + (costs[0][0] // 4 if costs else 0)
    return under_way + BATCH_BYTES // 4, costs[0][1] if costs else ""


def _bytes_a_weight(group: Group, contents: Contents, method: Method) -> int:
    if group.name not in contents.packed:
        return COPY_BYTES_A_WEIGHT
    cast = parse_format(contents.packed[group.name][0]).is_cast and not method.settings.prunes
    return BYTES_A_WEIGHT["range" if cast else method.settings.scales]


def _seconds(stream: Stream, threads: int) -> float | None:
    """From some rows of the largest tensor that has any: what they take, as many times as there are weights."""
    apart = [group for group in stream.groups if group.by_rows and len(group.shape) == 2]
    if not apart:
        return None
    group = max(apart, key=lambda each: math.prod(each.shape))
    rows = min(group.shape[0], max(1, SAMPLE_WEIGHTS // group.shape[1]))
    tried: Callable[[slice | None], object] = group.make
    tried(slice(0, 1))  # what is imported or compiled on the first call
    began = time.perf_counter()
    tried(slice(0, rows))
    rate = rows * group.shape[1] / max(1e-6, time.perf_counter() - began)
    return sum(math.prod(each.shape) for each in stream.groups) / rate / threads


def parse_size(text: str) -> int:
    """Bytes of `2GB`, `1.5 GiB`, `500M`. Raises UsageError for what is none."""
    match = SIZE.fullmatch(text.strip().upper())
    if match is None:
        raise UsageError(f"{text!r} is no size; give one like 2GB or 1.5GiB")
    return int(float(match[1]) * UNITS[match[2]])


def size_text(size: int) -> str:
    """For a person: `1.23 GB`."""
    value, unit = float(size), "bytes"
    for larger in ("kB", "MB", "GB", "TB"):
        if value < 1000:
            break
        value, unit = value / 1000, larger
    return f"{value:.3g} {unit}"


def duration(seconds: float) -> str:
    """For a person: `40 s`, `12 min`, `3.5 h`."""
    if seconds < 1:
        return "1 s"
    if seconds < 100:
        return f"{seconds:.0f} s"
    return f"{seconds / 60:.0f} min" if seconds < 6000 else f"{seconds / 3600:.1f} h"


def resident() -> int:
    """Bytes of memory that this process holds; 0 where the system does not say."""
    try:
        with open("/proc/self/statm", encoding="ascii") as file:
            return int(file.read().split()[1]) * os.sysconf("SC_PAGE_SIZE")
    except (OSError, ValueError, IndexError):
        return 0
