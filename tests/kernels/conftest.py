"""Fixtures for the kernels: every instruction set of this machine, and random packed weights."""

from __future__ import annotations

import importlib
from collections.abc import Iterator
from types import ModuleType

import pytest

from nybble import kernels


@pytest.fixture
def native() -> ModuleType:
    if not kernels.native_available():
        pytest.skip("the C++ extension is not built, or NYBBLE_KERNELS=reference is set")
    return importlib.import_module("nybble.kernels._native")


@pytest.fixture(params=["scalar", "avx2", "avx512"])
def instruction_set(request: pytest.FixtureRequest, native: ModuleType) -> Iterator[str]:
    """Runs a test once per instruction set; the one in use before is put back."""
    before = native.instruction_set()
    if request.param not in native.instruction_sets():
        pytest.skip(f"this machine has no {request.param}")
    native.select(request.param)
    yield request.param
    native.select(before)
