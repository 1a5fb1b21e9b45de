"""Fixtures for the kernels: every instruction set of this machine, and weights as the formats store them."""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from types import ModuleType

import numpy as np
import pytest

from nybble import kernels
from nybble.kernels import arguments, reference

INSTRUCTION_SETS = ("scalar", "avx2", "avx2vnni", "avx512", "avx512vnni")


@pytest.fixture
def native() -> ModuleType:
    found = kernels.native()
    if found is None:
        pytest.skip("the C++ extension is not built, or NYBBLE_KERNELS=reference is set")
    return found


@pytest.fixture(params=INSTRUCTION_SETS)
def instruction_set(request: pytest.FixtureRequest, native: ModuleType) -> Iterator[str]:
    """Runs a test once per instruction set; the one in use before is put back."""
    before = native.instruction_set()
    if request.param not in native.instruction_sets():
        pytest.skip(f"this machine has no {request.param}")
    native.select(request.param)
    yield request.param
    native.select(before)


@pytest.fixture
def each_set(native: ModuleType) -> Iterator[Callable[[], Iterator[str]]]:
    """Call it to walk over the instruction sets of this machine inside one test."""
    before = native.instruction_set()

    def walk() -> Iterator[str]:
        for name in native.instruction_sets():
            native.select(name)
            yield name

    yield walk
    native.select(before)


@dataclass(frozen=True)
class Kind:
    """A family of weights: how wide codes are, and what they stand for."""

    bits: int
    levels: str = "whole"
    """whole: code - 2**(bits - 1). from 0: the code itself. table: as many random levels."""
    offset: str = ""
    """"": none. zero: whole numbers, zero points. any: any values. shift: any values, added after the scale."""

    def __str__(self) -> str:
        return "-".join(filter(None, (f"{self.bits}bit", self.levels, self.offset)))


KINDS = (
    *(Kind(bits) for bits in range(2, 9)),
    *(Kind(bits, "from 0", "zero") for bits in range(2, 9)),
    Kind(4, "table"), Kind(3, "from 0", "any"),
    *(Kind(bits, "from 0", "shift") for bits in (2, 4, 5, 8)), Kind(3, "whole", "shift"),
)  # fmt: skip


def make_packed(
    kind: Kind, rows: int, columns: int, block: int, seed: int = 0, half: bool = True, one: bool = False, power: bool = False
) -> arguments.Packed:
    """A random weight. one: one scale for all. power: scales are powers of two, offsets whole numbers, shifts quarters."""
    random = np.random.default_rng((seed, kind.bits, rows, columns, block))
    count = 1 << kind.bits
    levels = np.arange(count) - (count // 2 if kind.levels == "whole" else 0.0)
    if kind.levels == "table":
        levels = np.sort(random.uniform(-1, 1, count))
    shape = (1, 1) if one else (rows, -(-columns // min(block, columns)))
    dtype = np.float16 if half else np.float32
    scale = 2.0 ** random.integers(-2, 2, shape) if power else random.uniform(0.01, 0.1, shape) * random.choice([-1, 1], shape)
    offset = None
    if kind.offset == "zero":
        offset = random.integers(0, count, shape).astype(dtype)
    elif kind.offset == "shift" and power:
        offset = (random.integers(-8, 8, shape) / 4).astype(dtype)
    elif kind.offset in ("any", "shift"):
        offset = random.normal(size=shape).astype(dtype)
    codes = random.integers(0, count, (rows, columns), dtype=np.uint8)
    packed = np.empty((rows, kernels.row_bytes(columns, kind.bits)), dtype=np.uint8)
    reference.pack(codes, packed, kind.bits)
    shifted = kind.offset == "shift"
    return arguments.weight(packed, columns, kind.bits, levels.astype(np.float32), block, scale.astype(dtype), offset, shifted)


@pytest.fixture(params=KINDS, ids=str)
def kind(request: pytest.FixtureRequest) -> Kind:
    """Every family of weights that the product kernels know."""
    found = request.param
    assert isinstance(found, Kind)
    return found


@pytest.fixture(scope="session")
def packed() -> Callable[..., arguments.Packed]:
    return make_packed


@pytest.fixture(scope="session")
def of_kind() -> type[Kind]:
    return Kind


@pytest.fixture(scope="session")
def python() -> Callable[..., subprocess.CompletedProcess[str]]:
    """Runs a program text in a new Python, with the environment variables that are given."""
    inherited = {name: value for name, value in os.environ.items() if name != "NYBBLE_KERNELS"}

    def run(code: str, **environment: str) -> subprocess.CompletedProcess[str]:
        return subprocess.run(
            [sys.executable, "-c", code],
            env={**inherited, **environment},
            capture_output=True,
            text=True,
            timeout=120,
            check=False,
        )

    return run
