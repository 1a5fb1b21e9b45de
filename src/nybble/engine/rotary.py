"""Rotary positions: radians a position for each pair of a head's dimensions (Su et al., arXiv 2104.09864), from config.json."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

import numpy as np

from nybble.errors import InputError, shown


def frequencies(config: Mapping[str, Any], dimensions: int) -> tuple[float, ...]:
    """One float32 a pair, dimensions * partial_rotary_factor / 2 of them.

    Knows the plain form, `linear` (positions divided by a factor) and `llama3` (long waves divided, short ones kept, a
    smooth passage between). Raises InputError for other kinds of scaling.
    """
    settings = dict(config.get("rope_parameters") or config.get("rope_scaling") or {})
    theta = float(settings.get("rope_theta") or config.get("rope_theta") or 10000.0)
    partial = float(settings.get("partial_rotary_factor") or config.get("partial_rotary_factor") or 1.0)
    rotated = int(dimensions * partial)
    exponent = np.arange(0, rotated, 2, dtype=np.float32) / np.float32(rotated)
    plain = (np.float32(1.0) / np.float32(theta) ** exponent).astype(np.float32)
    kind = settings.get("rope_type") or settings.get("type") or "default"
    if kind == "default":
        scaled = plain
    elif kind == "linear":
        if not settings.get("factor"):
            raise InputError("config.json has rotary positions of type 'linear' without 'factor'")
        scaled = plain / np.float32(settings["factor"])
    elif kind == "llama3":
        scaled = _llama3(plain, settings)
    else:
        raise InputError(f"config.json has rotary positions of type {shown(kind)}; the engine knows default, linear, llama3")
    return tuple(float(f) for f in scaled.astype(np.float32))


def _llama3(plain: np.ndarray[Any, np.dtype[np.float32]], settings: Mapping[str, Any]) -> np.ndarray[Any, np.dtype[np.float32]]:
    try:
        factor, context = float(settings["factor"]), float(settings["original_max_position_embeddings"])
        low, high = float(settings["low_freq_factor"]), float(settings["high_freq_factor"])
    except KeyError as error:
        raise InputError(f"config.json has rotary positions of type 'llama3' without {error}") from error
    wave = 2 * math.pi / plain
    smooth = np.clip((context / wave - low) / (high - low), 0, 1)
    return ((1 - smooth) * plain / factor + smooth * plain).astype(np.float32)
