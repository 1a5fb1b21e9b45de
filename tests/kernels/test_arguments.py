"""Wrong arguments are refused with the value and the limit, before any kernel runs."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest

from nybble import kernels

LEVELS = np.arange(16, dtype=np.float32) - 8


def good() -> dict[str, Any]:
    return {
        "packed": np.zeros((4, 50), dtype=np.uint8),
        "columns": 100,
        "bits": 4,
        "levels": LEVELS,
        "block": 64,
        "scale": np.ones((4, 2), dtype=np.float16),
        "offset": None,
        "shifted": False,
    }


def test_the_good_arguments_are_accepted() -> None:
    assert kernels.decode(**good()).shape == (4, 100)
    assert kernels.row_bytes(100, 3) == 38


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"bits": 0}, "bits must be a whole number from 1 to 8, got 0"),
        ({"bits": 9}, "bits must be a whole number from 1 to 8, got 9"),
        ({"bits": True}, "bits must be a whole number"),
        ({"columns": -1}, "columns must be a whole number from 0"),
        ({"columns": 98}, "packed rows of 98 columns at 4 bits have 49 bytes, got 50"),
        ({"block": 0}, "block must be a whole number from 1"),
        ({"packed": np.zeros((4, 50), dtype=np.int8)}, "packed must be uint8, got int8"),
        ({"packed": np.zeros(200, dtype=np.uint8)}, "packed must have 2 dimensions"),
        ({"packed": np.zeros((4, 100), dtype=np.uint8)[:, ::2]}, "packed must be C-contiguous and aligned"),
        ({"packed": [[0]]}, "packed must be a numpy array of uint8, got list"),
        ({"levels": LEVELS[:8]}, "levels must have 16 values for 4 bits, got 8"),
        ({"levels": LEVELS.astype(np.float64)}, "levels must be float32, got float64"),
        ({"levels": np.full(16, np.nan, dtype=np.float32)}, "levels must be finite, got nan"),
        ({"scale": np.ones((4, 1), dtype=np.float16)}, r"scale must have shape \(4, 2\)"),
        ({"scale": np.ones((1, 1), dtype=np.float16)}, r"scale must have shape \(4, 2\)"),
        ({"scale": np.ones((4, 2))}, "scale must be float16 or float32, got float64"),
        ({"offset": np.ones((2, 4), dtype=np.float16)}, r"offset must have shape \(4, 2\)"),
    ],
)
def test_a_weight_that_does_not_fit(change: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        kernels.decode(**{**good(), **change})
    with pytest.raises(ValueError, match=message):
        kernels.lay(**{**good(), **change})


def test_a_code_that_is_too_large_is_named_with_its_place() -> None:
    codes = np.zeros((3, 9), dtype=np.uint8)
    codes[1, 7] = 16
    with pytest.raises(ValueError, match=r"code 16 at row 1, column 7 is above 15 \(4 bits\)"):
        kernels.pack(codes, 4)


@pytest.mark.parametrize("row", [-1, 4])
def test_a_row_out_of_range(row: int) -> None:
    with pytest.raises(IndexError, match=f"row {row} at position 1 is out of range for 4 rows"):
        kernels.gather(np.array([0, row]), **good())
    with pytest.raises(IndexError, match=f"row {row} at position 1 is out of range for 4 rows"):
        kernels.rows_of(kernels.lay(**good()), np.array([0, row]))


def test_activations_of_another_width() -> None:
    with pytest.raises(ValueError, match="x must have 100 columns like the weight, got 99"):
        kernels.product(np.zeros((1, 99), dtype=np.float32), kernels.lay(**good()))


@pytest.mark.parametrize(
    ("x", "message"),
    [
        (np.zeros((1, 100)), "x must be float32, got float64"),
        (np.zeros(100, dtype=np.float32), "x must have 2 dimensions"),
        (np.zeros((1, 200), dtype=np.float32)[:, ::2], "x must be C-contiguous and aligned"),
        ([[0.0] * 100], "x must be a numpy array of float32, got list"),
    ],
)
def test_activations_that_do_not_fit(x: Any, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        kernels.product(x, kernels.lay(**good()))
    with pytest.raises(ValueError, match=message):
        kernels.quantize_activations(x)


def test_float_weights_that_do_not_fit() -> None:
    with pytest.raises(ValueError, match="kind must be f32, f16, bf16, got 'f8'"):
        kernels.lay_floats(np.zeros((2, 2), dtype=np.float32), "f8")
    with pytest.raises(ValueError, match="values must be uint16, got float16"):
        kernels.lay_floats(np.zeros((2, 2), dtype=np.float16), "bf16")
    with pytest.raises(ValueError, match="values must have 2 dimensions"):
        kernels.lay_floats(np.zeros(2, dtype=np.float32), "f32")


def test_an_unaligned_view_is_refused() -> None:
    x = np.zeros(401, dtype=np.uint8)[1:].view(np.float32).reshape(1, 100)
    assert not x.flags.aligned
    with pytest.raises(ValueError, match="x must be C-contiguous and aligned"):
        kernels.product(x, kernels.lay(**good()))


@pytest.mark.parametrize("threads", [0, -1, 5000, 1.5])
def test_threads_out_of_range(threads: Any) -> None:
    with pytest.raises(ValueError, match="threads must be a whole number from 1 to 1024"):
        kernels.decode(**good(), threads=threads)
    with pytest.raises(ValueError, match="threads must be a whole number from 1 to 1024"):
        kernels.lay(**good(), threads=threads)
    with pytest.raises(ValueError, match="threads must be a whole number from 1 to 1024"):
        kernels.product(np.zeros((1, 100), dtype=np.float32), kernels.lay(**good()), threads=threads)


def test_a_read_only_packed_weight_is_fine() -> None:
    arguments = good()
    for name in ("packed", "levels", "scale"):
        arguments[name].flags.writeable = False
    try:
        for exact in (True, False):
            got = kernels.product(np.ones((1, 100), dtype=np.float32), kernels.lay(**arguments), exact)
            np.testing.assert_allclose(got, [[-800.0] * 4], rtol=1e-6)
    finally:
        LEVELS.flags.writeable = True


def test_the_extension_itself_refuses_shapes_that_would_leave_its_memory(native: Any) -> None:
    arguments = good()
    arguments["scale"] = np.ones((4, 1), dtype=np.float16)
    with pytest.raises(ValueError, match="scale and offset must be"):
        native.decode(**arguments, out=np.empty((4, 100), dtype=np.float32), threads=1)


def test_the_extension_itself_refuses_arrays_of_the_wrong_size(native: Any) -> None:
    laid = kernels.lay(**good())
    x, packed, scale = np.zeros((2, 100), dtype=np.float32), np.zeros((4, 50), dtype=np.uint8), np.ones((4, 2), dtype=np.float16)
    with pytest.raises(ValueError, match="x or y has the wrong shape"):
        laid.product(x, np.empty((2, 3), dtype=np.float32), True, 1)
    with pytest.raises(ValueError, match="x or y has the wrong shape"):
        laid.product(x[:, :64].copy(), np.empty((2, 4), dtype=np.float32), True, 1)
    with pytest.raises(ValueError, match="out has the wrong shape"):
        laid.gather(np.array([0]), np.empty((2, 100), dtype=np.float32))
    with pytest.raises(IndexError, match="row out of range"):
        laid.gather(np.array([4]), np.empty((1, 100), dtype=np.float32))
    with pytest.raises(ValueError, match="packed has the wrong shape"):
        laid.restore(packed[:3].copy(), scale, None, 1)
    for wrong in (scale.astype(np.float32), scale[:, :1].copy()):
        with pytest.raises(ValueError, match="scale has the wrong shape or type"):
            laid.restore(packed, wrong, None, 1)
    with pytest.raises(ValueError, match="scale has the wrong shape or type"):
        laid.restore(packed, scale, scale, 1)
    with pytest.raises(ValueError, match="codes or scale has the wrong shape"):
        native.quantize_activations(x, np.zeros((2, 64), dtype=np.int8), np.zeros((2, 2), dtype=np.float32))
    with pytest.raises(ValueError, match="threads out of range"):
        laid.product(x, np.empty((2, 4), dtype=np.float32), True, 0)
