"""Which kernels run: NYBBLE_KERNELS, the numpy path without an extension, forks and callers in several threads."""

from __future__ import annotations

import os
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from subprocess import CompletedProcess
from types import ModuleType

import numpy as np
import pytest

from nybble import kernels

Python = Callable[..., CompletedProcess[str]]
SHOW = "from nybble import kernels; print(kernels.instruction_set(), kernels.native_available())"


def test_the_environment_chooses(instruction_set: str, python: Python) -> None:
    assert python(SHOW, NYBBLE_KERNELS=instruction_set).stdout == f"{instruction_set} True\n"


def test_the_best_one_is_the_default(native: ModuleType, python: Python) -> None:
    assert python(SHOW).stdout == f"{native.instruction_sets()[-1]} True\n"


def test_the_reference_can_be_chosen_and_computes(python: Python) -> None:
    code = """
import numpy as np
from nybble import kernels
codes = np.arange(8, dtype=np.uint8).reshape(2, 4)
packed = kernels.pack(codes, 3)
arguments = (packed, 4, 3, np.arange(8, dtype=np.float32), 2, np.full((2, 2), 0.5, dtype=np.float32))
assert (kernels.unpack(packed, 4, 3) == codes).all()
assert kernels.decode(*arguments).tolist() == [[0, 0.5, 1, 1.5], [2, 2.5, 3, 3.5]]
assert kernels.gather(np.array([1]), *arguments).tolist() == [[2, 2.5, 3, 3.5]]
laid = kernels.lay(*arguments, threads=2)
x = np.full((1, 4), 127, dtype=np.float32)
assert kernels.product(x, laid, threads=2).tolist() == kernels.product(x, laid, exact=False).tolist() == [[381, 1397]]
assert kernels.rows_of(laid, np.array([1])).tolist() == [[2, 2.5, 3, 3.5]]
assert kernels.read_bandwidth(1 << 20) > 0
print(kernels.instruction_set(), kernels.native_available())
"""
    done = python(code, NYBBLE_KERNELS="reference")
    assert (done.stdout, done.stderr) == ("reference False\n", "")


def test_without_the_extension_numpy_does_the_work(python: Python) -> None:
    hide = "import sys; sys.modules['nybble.kernels._native'] = None; "
    assert python(hide + SHOW).stdout == "reference False\n"
    asked = python(hide + SHOW, NYBBLE_KERNELS="scalar")
    assert "NYBBLE_KERNELS=scalar needs the C++ extension" in asked.stderr


def test_an_unknown_name_is_a_usage_error(python: Python) -> None:
    done = python(SHOW, NYBBLE_KERNELS="avx51")
    assert "UsageError: unknown value of NYBBLE_KERNELS 'avx51'; did you mean avx512" in done.stderr


def test_torch_is_not_imported(python: Python) -> None:
    assert python("import sys; from nybble import kernels; print('torch' in sys.modules)").stdout == "False\n"


def _weight() -> tuple[object, ...]:
    random = np.random.default_rng(1)
    packed = random.integers(0, 256, (4096, 64), dtype=np.uint8)
    return (packed, 128, 4, np.arange(16, dtype=np.float32) - 8, 64, random.random((4096, 2)).astype(np.float32))


def test_callers_in_several_threads_get_the_same_answer(native: ModuleType) -> None:
    weight = _weight()
    x = np.random.default_rng(2).normal(size=(2, 128)).astype(np.float32)
    laid = kernels.lay(*weight)  # type: ignore[arg-type]
    for exact in (True, False):
        wanted = kernels.product(x, laid, exact)

        def answer(_: int, exact: bool = exact, wanted: bytes = wanted.tobytes()) -> bool:
            again = kernels.lay(*weight, threads=2)  # type: ignore[arg-type]
            same = kernels.product(x, laid, exact, threads=2).tobytes(), kernels.product(x, again, exact, threads=2).tobytes()
            return set(same) == {wanted}

        with ThreadPoolExecutor(4) as pool:
            assert all(pool.map(answer, range(100)))


@pytest.mark.skipif(not hasattr(os, "fork"), reason="no fork on this system")
def test_a_forked_child_makes_its_own_threads(native: ModuleType, python: Python) -> None:
    code = """
import os, warnings
import numpy as np
from nybble import kernels
warnings.simplefilter("ignore")  # Python 3.12 warns about forking with threads, which is the point here
packed = np.full((4096, 64), 0x99, dtype=np.uint8)
weight = (packed, 128, 4, np.arange(16, dtype=np.float32) - 8, 128, np.ones((1, 1), dtype=np.float32))
x = np.ones((1, 128), dtype=np.float32)
assert (kernels.product(x, kernels.lay(*weight, threads=3), threads=3) == 128).all()
child = os.fork()
if child == 0:
    os._exit(0 if (kernels.product(x, kernels.lay(*weight, threads=3), threads=3) == 128).all() else 1)
print(os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]))
"""
    assert python(code).stdout == "0\n"
