"""QTensor: the plain value between method and file."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest

from nybble.formats import QTensor, parse_format
from nybble.formats.base import not_finite


@pytest.fixture
def tensor() -> QTensor:
    fmt = parse_format("int4:g64,asym")
    weight = np.random.default_rng(1).standard_normal((3, 100)).astype(np.float32)
    params = fmt.fit(weight)
    return QTensor(fmt, fmt.encode(weight, params), params)


def test_shape_and_size(tensor: QTensor) -> None:
    assert tensor.shape == (3, 100)
    assert tensor.bpw * 300 == pytest.approx(8 * sum(array.nbytes for array in tensor.stored().values()))


def test_stored_and_read_back(tensor: QTensor) -> None:
    read = QTensor.from_stored(tensor.format, tensor.stored(), tensor.shape)
    assert np.array_equal(read.decode(), tensor.decode())


def test_arrays_that_do_not_fit_are_refused(tensor: QTensor) -> None:
    stored = tensor.stored()
    with pytest.raises(ValueError, match=r"stores \['codes', 'scale', 'zero'\], got \['codes', 'scale'\]"):
        QTensor.from_stored(tensor.format, {k: v for k, v in stored.items() if k != "zero"}, (3, 100))
    with pytest.raises(ValueError, match=r"scale is float32 \(3, 2\), .* needs float16"):
        QTensor.from_stored(tensor.format, {**stored, "scale": stored["scale"].astype(np.float32)}, (3, 100))
    with pytest.raises(ValueError, match=r"codes is uint8 \(3, 50\), .* needs uint8 \(3, 51\)"):
        QTensor.from_stored(tensor.format, stored, (3, 102))


def test_codes_are_a_matrix(tensor: QTensor) -> None:
    with pytest.raises(ValueError, match="a weight is a matrix"):
        QTensor(tensor.format, tensor.codes[0], tensor.params)


@pytest.mark.parametrize("dtype", [np.float16, np.float32, np.float64])
def test_numbers_that_are_not_finite_are_counted(dtype: Any) -> None:
    with np.errstate(over="ignore"):
        every = np.arange(1 << 16, dtype=np.uint16).view(np.float16).astype(dtype)
    assert not_finite(every) == 2048  # the largest exponent: two infinities and 2,046 NaNs
    assert not_finite(every.reshape(256, 256).T[:, ::3]) == int((~np.isfinite(every.reshape(256, 256).T[:, ::3])).sum())
    assert not_finite(every[np.isfinite(every)]) == 0
