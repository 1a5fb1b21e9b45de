"""Round to nearest: every weight gets the representable value nearest to it.

    rtn        scales from the plain range of each block (absmax; minimum and maximum when asymmetric)
    rtn:mse    scales searched for the least squared error, weighted by the mean square of each input column when
               calibration statistics are given

The floor that every other method is measured against. It needs no data and takes seconds.
"""

from __future__ import annotations

from typing import Any

import numpy as np

from nybble.formats import Format, QTensor

OPTIONS = frozenset({"mse"})


def uses_importance(options: frozenset[str]) -> bool:
    """Only the search weighs columns."""
    return "mse" in options


def quantize(
    weight: np.ndarray[Any, Any], fmt: Format, options: frozenset[str], importance: np.ndarray[Any, Any] | None
) -> QTensor:
    """QTensor of a float32 weight [N, K]. Raises NumericError as the format does."""
    if "mse" not in options or fmt.is_cast:
        params = fmt.fit(weight)
    else:
        params = fmt.fit(weight, np.ones(weight.shape[1], np.float32) if importance is None else importance)
    return QTensor(fmt, fmt.encode(weight, params), params)
