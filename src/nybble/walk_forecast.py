"""What a calibrated method will take, said before the work: memory, disk and time; and how to stay within a memory limit.

Memory is counted from shapes: the blocks' weights, the second moments of their inputs (K^2 doubles), what choosing codes takes
beside, one window's activations a thread, and the hidden states of all windows where they are not kept on disk. The factors were
measured (docs/large.md says how near they come).
"""

from __future__ import annotations

import math
import time
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from torch import nn

from nybble.calibrate.blocks import find_blocks
from nybble.calibrate.fisher import windows_at_once
from nybble.calibrate.statistics import Statistics
from nybble.calibrate.workers import Workers
from nybble.errors import BlocksError, UsageError
from nybble.forecast import check_disk, said, size_text
from nybble.formats import parse_format
from nybble.methods import Method
from nybble.methods.steps.choose import SLAB_ROWS, choose
from nybble.methods.steps.settings import Settings
from nybble.models.packed import replaceable
from nybble.plan import Plan

LEAST_ON_DISK = 1 << 28
"""Bytes of hidden states that are never worth a file."""
SHARE = 0.25
"""Of the memory that is free, which hidden states may take where no limit is given."""
TRIED = (256, 768)
"""Columns of the two matrices that are tried to know the time; the larger its columns, the longer a weight takes."""
LARGE = 10**8
"""Weights of a model whose codes are tried on as many rows as are worked on together, which takes a second."""
TUNED = 4 + 2 * 13
"""Bytes on disk of a weight that is tuned together with all others: where it begins; and its position, two means of slopes and
its best code, twice while one file takes another's place."""
LOGITS = 11
"""Arrays of tokens by vocabulary that there are at most while a window's logits are drawn from and taken back; 10.2 measured."""
MARGIN = 1.1
"""Memory that is taken beyond what is counted: pages of files, what the allocator keeps."""


@dataclass(frozen=True)
class WalkForecast:
    """What a walk will take, and how it stays within its limit."""

    threads: int
    on_disk: bool
    """Whether hidden states are kept in a file."""
    memory: int
    """Bytes, this process as it stands included."""
    disk: int
    """Bytes beside the output, on the way."""
    reads: int
    writes: int
    free: int
    seconds: float | None
    """None: of a method that does not go block by block."""

    def __str__(self) -> str:
        where = f"; {size_text(self.disk)} more on the way" if self.disk else ""
        return said(self.reads, self.writes, self.free, self.memory, self.seconds) + where


@dataclass(frozen=True)
class _Matrix:
    rows: int
    columns: int

    @property
    def weights(self) -> int:
        return self.rows * self.columns


def forecast_walk(
    model: nn.Module,
    plan: Plan,
    method: Method,
    windows: tuple[int, int],
    target: Path,
    reads: int,
    standing: int,
    limit: int | None,
    threads: int | None,
    held: bool,
    put_together: bool,
) -> WalkForecast:
    """Choose threads, and where hidden states are kept, so that a calibrated method stays within `limit` bytes of memory, and say
    what it will take.

    `model` needs no weights; `windows` are (windows, tokens of one); `standing` is what the process takes before. `held`: the
    method holds the whole float model; `put_together`: the container has its arrays on disk once more before they are written.
    Raises UsageError, with the figure, where it cannot stay within; OutputError where the disk has no room.
    """
    settings = method.settings
    try:
        _, blocks = find_blocks(model)
    except BlocksError:  # it is worked on as a whole
        blocks = [model]
    width = int(getattr(model.config.get_text_config(), "hidden_size", 0))  # type: ignore[union-attr, operator]
    streams = 2 if settings.float_stream else 1
    states = 4 * windows[0] * windows[1] * width * streams
    most = threads or torch.get_num_threads()
    free_memory = limit - standing if limit is not None else _available()
    small = states <= max(LEAST_ON_DISK, SHARE * free_memory)
    places = (False,) if held else (False, True) if small else (True,)
    ways = [(n, on_disk) for on_disk in places for n in _fewer(most)]
    together = settings.tunes_together(parse_format(row.format or "").bits for row in plan.packed if row.method != "cast")
    need = 0
    parts = sum(3 if row.tensor.role == "query, key and value" else 1 for row in plan.packed)
    counts = 4 * windows[0] * windows[1] * parts if settings.fisher else 0  # how much tokens count, for each part of rows
    for count, on_disk in ways:
        need = 2 * counts + _memory(model, blocks, settings, windows, width, count, held, together) + (0 if on_disk else states)
        need = int(MARGIN * need)
        if limit is None or standing + need <= limit:
            break
    else:
        why = " (this method looks at the whole model at once)" if held else ""
        raise UsageError(
            f"this takes {size_text(standing + need)} of memory{why}, --memory allows {size_text(limit or 0)}; give fewer or "
            "shorter windows (--windows, --window), another method, or more memory"
        )
    kept = sum(-(-row.bits // 8) for row in plan.packed)  # the blocks that are finished, beside the output
    tuned = sum(math.prod(row.tensor.shape) for row in plan.packed if row.method != "cast") if together else 0
    disk = kept * (2 if put_together else 1) + (states if on_disk else 0) + TUNED * tuned + counts
    free = check_disk(target, plan.bytes, disk)
    seconds = _seconds(blocks, plan, method, windows, count) if settings.blockwise else None
    return WalkForecast(count, on_disk, standing + need, disk, reads, plan.bytes, free, seconds)


def check_whole(model: nn.Module, standing: int, limit: int | None) -> None:
    """Raise UsageError where a limit of memory does not allow a model to be held in float32, so that it can write text."""
    need = standing + int(MARGIN * _floats(model))
    if limit is not None and need > limit:
        raise UsageError(
            f"a model that writes its own calibration text takes {size_text(need)} of memory, --memory allows "
            f"{size_text(limit)}; give a text (--calibrate FILE)"
        )


def _fewer(most: int) -> Iterable[int]:
    while most > 1:
        yield most
        most //= 2
    yield 1


def _matrices(module: nn.Module) -> list[_Matrix]:
    """Every matrix of a module that could be packed, once."""
    found = {}
    for part in module.modules():
        weight = part._parameters.get("weight")
        if weight is not None and replaceable(part):
            rows, columns = weight.shape if replaceable(part) in (nn.Linear, nn.Embedding) else weight.T.shape
            found[id(weight)] = _Matrix(int(rows), int(columns))
    return list(found.values())


def _floats(module: nn.Module) -> int:
    """Bytes of a module's weights in float32."""
    return 4 * sum(parameter.numel() for parameter in module.parameters())


def _memory(
    model: nn.Module,
    blocks: Sequence[nn.Module],
    settings: Settings,
    windows: tuple[int, int],
    width: int,
    threads: int,
    held: bool,
    together: bool,
) -> int:
    """Bytes beside hidden states."""
    tokens = windows[1]
    inside = {id(parameter) for block in blocks for parameter in block.parameters()}
    outside = 4 * sum(parameter.numel() for parameter in model.parameters() if id(parameter) not in inside)
    largest = max(blocks, key=_floats)
    matrices = _matrices(largest)
    inner = max((matrix.rows for matrix in matrices), default=width)
    activations = threads * 4 * tokens * (8 * width + 3 * inner)
    copies = 2 if settings.float_stream or settings.activations == "static" else 1
    tuned = (6 if settings.block_tune else 0) * _floats(largest)
    block = copies * _floats(largest) + activations + tuned + max((_choosing(m, settings, threads) for m in matrices), default=0)
    rest = [_Matrix(*map(int, t.shape)) for t in model.parameters() if t.dim() == 2 and id(t) not in inside]
    others = max((8 * each.weights + _choosing(each, settings, threads) for each in rest), default=0)
    weighing = _weighing(model, blocks, settings, windows, width, threads, activations) if settings.fisher else 0
    if not held:
        return max(outside + activations, block, others, outside + _floats(largest) + weighing)
    return _floats(model) * (6 if together else 2) + max(block, others, weighing)


def _weighing(
    model: nn.Module,
    blocks: Sequence[nn.Module],
    settings: Settings,
    windows: tuple[int, int],
    width: int,
    threads: int,
    activations: int,
) -> int:
    """Bytes that hidden states between all blocks take, their slopes, and what a block, or the logits, need to be taken back."""
    count, tokens = windows
    at_once = min(count, windows_at_once(len(blocks), tokens, width, threads))
    states = 4 * at_once * tokens * width * (len(blocks) + 2 * settings.fisher)
    vocabulary = int(getattr(model.config.get_text_config(), "vocab_size", 0))  # type: ignore[union-attr, operator]
    return states + max(3 * activations, LOGITS * 4 * tokens * vocabulary * threads)


def _choosing(matrix: _Matrix, settings: Settings, threads: int) -> int:
    """Bytes that the statistics of a matrix's inputs, and choosing its codes, take at most."""
    if not settings.blockwise:
        return 52 * matrix.weights
    square = matrix.columns**2
    crossed = 2 if settings.target > 0 else 1
    searched = settings.scales != "range" or settings.target > 0 or settings.refine > 0
    summing = (16 + 4 * (threads + 2)) * square * crossed
    slab = min(max(-(-matrix.rows // 256) * 128, SLAB_ROWS[0]), SLAB_ROWS[1], matrix.rows) * matrix.columns * 8 * threads
    factors, weights, slabs = (3.5, 36, 16) if searched else (2.2, 36 if settings.prunes else 12, 9)
    made = 8 * square * crossed + int(8 * factors * square) + weights * matrix.weights + slabs * slab
    return max(summing, made)


def _seconds(blocks: Sequence[nn.Module], plan: Plan, method: Method, windows: tuple[int, int], threads: int) -> float:
    """From what a product and choosing the codes of two small matrices take."""
    settings = method.settings
    tokens = windows[0] * windows[1]
    matrices = [matrix for block in blocks for matrix in _matrices(block)]
    with Workers(threads) as workers:
        a = torch.ones(512, 512)
        work = list(range(4 * threads))
        workers.each(lambda _: a @ a, work)
        began = time.perf_counter()
        workers.each(lambda _: a @ a, work)
        rate = 2 * 512**3 * len(work) / max(1e-6, time.perf_counter() - began)
        row = next((row for row in plan.packed if row.tensor.kind != "embedding" and row.method != "cast"), None)
        tried = 2 * SLAB_ROWS[1] if sum(matrix.weights for matrix in matrices) > LARGE else 2 * SLAB_ROWS[0]
        base, slope = (0.0, 0.0) if row is None else _rounding(str(row.format), settings, workers, tried)
    passes = 1 + 2.4 * (1 + (settings.target > 0)) + settings.float_stream + 2 * (settings.edit != "none")
    passes += (settings.activations == "static") + (2 + 2 * settings.fisher if settings.fisher else 0)
    weights = sum(matrix.weights for matrix in matrices)
    groups = {(index, matrix.columns): matrix.columns for index, block in enumerate(blocks) for matrix in _matrices(block)}
    products = 2 * tokens * weights * passes + 2 * tokens * sum(k * k for k in groups.values()) * (1 + 2 * (settings.target > 0))
    bits = [parse_format(row.format or "").bits for row in plan.packed if row.method != "cast"]
    steps = settings.tune * settings.tunes_together(bits) + settings.block_tune * any(map(settings.tunes, bits))
    tuning = 6 * steps * settings.batch * windows[1] * weights
    packed = [row.tensor.shape for row in plan.packed if row.method != "cast"]
    rounding = sum(rows * columns * (base + slope * columns) for rows, columns in packed)
    factors = sum(k**3 for k in groups.values())
    return (products + tuning + 4 * factors) / rate + rounding


def _rounding(spec: str, settings: Settings, workers: Workers, rows: int) -> tuple[float, float]:
    """(seconds a weight, more of them for each column that a row has) of choosing codes."""
    chance = np.random.default_rng(0)
    fmt = parse_format(spec)
    took = []
    for columns in (TRIED[0], *TRIED):  # the first time pays for what is compiled and imported
        weight = chance.standard_normal((rows, columns), np.float32)
        moment = torch.eye(columns, dtype=torch.float64)
        stats = Statistics([moment], [moment.clone()] if settings.target > 0 else None, 1)
        began = time.perf_counter()
        choose(weight, fmt, settings, stats, workers.each)
        took.append((time.perf_counter() - began) / weight.size)
    slope = max(0.0, (took[2] - took[1]) / (TRIED[1] - TRIED[0]))
    return max(0.0, took[1] - slope * TRIED[0]), slope


def _available() -> int:
    """Bytes of memory that are free, as far as the system says."""
    try:
        with open("/proc/meminfo", encoding="ascii") as file:
            found = next(line for line in file if line.startswith("MemAvailable:"))
        return int(found.split()[1]) * 1024
    except (OSError, StopIteration, ValueError):
        return 1 << 33
