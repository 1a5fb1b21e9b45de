"""The kernels touch no byte past their arrays: each array ends, or begins, at a page that cannot be read or written."""

from __future__ import annotations

import os
import subprocess
import sys

import pytest

pytestmark = pytest.mark.skipif(sys.platform != "linux", reason="guard pages are set up through Linux's mprotect")

CHILD = """
import ctypes, mmap, sys
import numpy as np
from nybble import kernels
from nybble.kernels import arguments, reference

libc = ctypes.CDLL(None, use_errno=True)
libc.mprotect.argtypes = [ctypes.c_void_p, ctypes.c_size_t, ctypes.c_int]
pages = []


def guarded(values):
    # A copy between two pages that cannot be read, hard against the one behind it or, with "begin", the one before.
    page = mmap.PAGESIZE
    size = -(-max(1, values.nbytes) // page) * page
    memory = mmap.mmap(-1, size + 2 * page)
    start = ctypes.addressof(ctypes.c_char.from_buffer(memory))
    for guard in (start, start + page + size):
        assert libc.mprotect(guard, page, 0) == 0, "mprotect refused"
    pages.append(memory)
    offset = page + (0 if sys.argv[1] == "begin" else size - values.nbytes)
    copy = np.frombuffer(memory, dtype=values.dtype, count=values.size, offset=offset)
    copy[:] = values.ravel()
    return copy.reshape(values.shape)


if sys.argv[1] == "past":
    ctypes.string_at(guarded(np.zeros(64, dtype=np.uint8)).ctypes.data, 65)
if sys.argv[1] == "before":
    ctypes.string_at(guarded(np.zeros(mmap.PAGESIZE, dtype=np.uint8)).ctypes.data - 1, 1)

random = np.random.default_rng(0)
shapes = [(1, 1, 64), (2, 7, 7), (3, 33, 8), (16, 64, 64), (17, 96, 32), (2, 172, 64), (1, 21, 7), (5, 768, 64), (18, 44, 16)]
for bits in range(1, 9):
    for rows, columns, block in shapes:
        codes = random.integers(0, 1 << bits, (rows, columns), dtype=np.uint8)
        packed = guarded(kernels.pack(guarded(codes), bits))
        assert (kernels.unpack(packed, columns, bits) == codes).all()
        blocks = -(-columns // block)
        scale = guarded(random.random((rows, blocks)).astype(np.float16))
        offset = guarded(random.random((rows, blocks)).astype(np.float32))
        for levels, shifted in ((np.arange(1 << bits) - 1.0, bits % 2 == 0), (random.normal(size=1 << bits), bits % 4 < 2)):
            table = guarded(levels.astype(np.float32))
            weight = arguments.weight(packed, columns, bits, table, block, scale, offset, shifted)
            wanted = np.empty((rows, columns), dtype=np.float32)
            reference.decode(weight, wanted)
            assert (kernels.decode(*weight) == wanted).all()
            assert (kernels.gather(guarded(np.array([rows - 1])), *weight) == wanted[-1:]).all()
            laid = kernels.lay(*weight, threads=2)
            found = guarded(np.zeros((rows, columns), dtype=np.float32))
            laid.gather(guarded(np.arange(rows)), found)
            assert (found == wanted).all()
            for count in (1, 2, 5, 9):
                x = guarded(random.normal(size=(count, columns)).astype(np.float32))
                y = guarded(np.zeros((count, rows), dtype=np.float32))
                for threads in (1, 2):
                    laid.product(x, y, True, threads)
                    assert np.allclose(y, x @ wanted.T, rtol=1e-4, atol=1e-4)
                    laid.product(x, y, False, threads)
                steps = -(-columns // 64)
                codes, scales = np.zeros((count, 64 * steps), dtype=np.int8), np.zeros((count, steps), dtype=np.float32)
                if kernels.native():
                    kernels.native().quantize_activations(x, guarded(codes), guarded(scales))
            if laid.holds_codes and (len(levels) == 16 or levels[0] == -1):
                back = [guarded(np.zeros_like(a)) for a in (packed, scale, offset)]
                laid.restore(*back, 2)
                assert all((a == b).all() for a, b in zip(back, (packed, scale, offset), strict=True))
for rows, columns, _ in shapes:
    values = random.normal(size=(rows, columns)).astype(np.float32)
    halves, tops = values.astype(np.float16), (values.view(np.uint32) >> 16).astype(np.uint16)
    for kind, stored in (("f32", values), ("f16", halves), ("bf16", tops)):
        for source in (stored, np.ascontiguousarray(stored.T)):
            laid = kernels.lay_floats(guarded(source), kind, source is not stored, threads=2)
            for count in (1, 9):
                x = guarded(random.normal(size=(count, columns)).astype(np.float32))
                y = guarded(np.zeros((count, rows), dtype=np.float32))
                laid.product(x, y, True, 2)
                assert np.allclose(y, x @ values.T, rtol=0.05, atol=0.2)
for block, run, low, high, shifted, count in ((32, 256, 0, 63, True, 16), (16, 256, -32, 31, False, 8), (32, 32, 1, 1, False, 9)):
    levels = np.arange(count) * 1.0 if shifted or count == 8 else random.normal(size=count).cumsum() ** 3
    how = (guarded(np.sort(levels).astype(np.float32)), block, run, low, high, shifted, 1,
           guarded(np.array([[count - 1, 0], [count, 0.5]], np.float32)), guarded(np.array([high, high + 3], np.float32)))
    for rows, runs in ((1, 1), (5, 3), (2, 8), (17, 1)):
        weight = guarded(random.normal(size=(rows, runs * run)).astype(np.float32))
        importance = guarded(random.random((1, runs * run)).astype(np.float32))
        outs = [guarded(np.zeros(shape, dtype)) for shape, dtype in (
            ((rows, runs * run), np.uint8), ((rows, runs), np.uint16), ((rows, runs * run // block), np.int8),
            ((rows, runs), np.uint16), ((rows, runs * run // block), np.int8))]
        found = kernels.search(weight, kernels.Search(*how), importance)
        if kernels.native():
            kernels.native().search(weight, importance, *how, *outs[:3], *(outs[3:] if shifted else (None, None)), 2)
            assert (outs[0] == found.codes).all()
for columns, block in ((1, 1), (7, 3), (33, 16), (90, 32)):
    weight, scale = (guarded(random.normal(size=(3, n)).astype(np.float32)) for n in (columns, -(-columns // block)))
    codes = guarded(np.zeros((3, columns), np.uint8))
    for levels in (np.arange(8) - 4.0, np.sort(random.normal(size=16))):
        found = kernels.nearest(weight, guarded(levels.astype(np.float32)), block, scale, scale)
        if kernels.native():
            kernels.native().nearest(weight, guarded(levels.astype(np.float32)), block, scale, scale, codes, 2)
            assert (codes == found).all()
for rows, columns, block in ((1, 5, 5), (3, 96, 32), (17, 64, 16)):
    weight = guarded(random.normal(size=(rows, columns)).astype(np.float32))
    codes = guarded(np.zeros((rows, columns), np.uint8))
    scale, shift = (guarded(np.zeros((rows, columns // block), np.float32)) for _ in range(2))
    for rule in ("range", "ends", "away"):
        found = kernels.round_blocks(weight, 4, block, rule)[0]
        if kernels.native():
            kernels.native().round_blocks(weight, 4, block, rule, codes, scale, shift, 2)
            assert (codes == found).all()
print("read", kernels.instruction_set())
"""


def _child(instruction_set: str, mode: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, "-c", CHILD, mode],
        env={**os.environ, "NYBBLE_KERNELS": instruction_set},
        capture_output=True,
        text=True,
        timeout=120,
    )


@pytest.mark.parametrize("end", ["end", "begin"])
def test_no_kernel_reads_or_writes_past_its_arrays(end: str, instruction_set: str) -> None:
    done = _child(instruction_set, end)
    assert (done.returncode, done.stdout) == (0, f"read {instruction_set}\n"), done.stderr[-2000:]


@pytest.mark.parametrize("end", ["past", "before"])
def test_the_guard_page_does_stop_a_read(end: str) -> None:
    assert _child("reference", end).returncode < 0
