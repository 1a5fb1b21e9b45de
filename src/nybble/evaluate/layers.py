"""What a variant does to the weights themselves: error and histogram per layer and over the whole model."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from typing import Any

import numpy as np
from numpy.typing import NDArray

from nybble.evaluate.record import HISTOGRAM_BINS, LayerRecord
from nybble.formats import QTensor
from nybble.plan import Plan

SIGMAS = 6.0
"""Histograms reach to this many standard deviations, or to the largest weight when that is nearer."""


def histogram_limit(weights: Iterable[NDArray[np.float32]]) -> float:
    """The limit of a histogram over these weights together."""
    largest, squares, count = 0.0, 0.0, 0
    for weight in weights:
        largest = max(largest, float(np.abs(weight).max(initial=0.0)))
        squares += float(np.vdot(weight, weight))
        count += weight.size
    return min(largest, SIGMAS * (squares / max(1, count)) ** 0.5) or 1.0


def histogram(weight: NDArray[np.float32], limit: float) -> NDArray[np.int64]:
    """Counts in HISTOGRAM_BINS equal bins over [-limit, limit]; what lies outside goes to the end bins."""
    position = (weight.ravel() + np.float32(limit)) * np.float32(HISTOGRAM_BINS / (2 * limit))
    bins = np.clip(position, 0, HISTOGRAM_BINS - 1).astype(np.int64)
    return np.bincount(bins, minlength=HISTOGRAM_BINS)


@dataclass
class LayerObserver:
    """Collects layer records while a plan is carried out: pass `observe` to `quantize_by_plan`."""

    plan: Plan
    model_limit: float
    """Of the whole model's histogram; the same for all variants."""
    layer_limits: dict[str, float]
    layers: list[LayerRecord] = field(default_factory=list)
    model_counts: NDArray[np.int64] = field(default_factory=lambda: np.zeros(HISTOGRAM_BINS, np.int64))

    def observe(self, name: str, weight: NDArray[np.float32], tensor: QTensor) -> None:
        row = next(row for row in self.plan.packed if row.tensor.name == name)
        decoded = tensor.decode()
        error = decoded - weight
        energy = float(np.vdot(weight.astype(np.float64), weight))
        squared = float(np.vdot(error.astype(np.float64), error))
        self.model_counts += histogram(decoded, self.model_limit)
        self.layers.append(
            LayerRecord(
                name=name,
                block=row.tensor.block,
                kind=row.tensor.kind,
                shape=tensor.shape,
                format=str(tensor.format),
                bpw=tensor.bpw,
                relative_error=squared / energy if energy else 0.0,
                histogram_limit=self.layer_limits[name],
                histogram=histogram(decoded, self.layer_limits[name]).tolist(),
            )
        )

    def add_accounts(self, accounts: Mapping[str, Any]) -> None:
        """Add what a calibrated method says of each weight (`Account`), by name."""
        fields = ("loss_of_rounding", "loss", "damping", "dead_columns", "rows_fallen_back")
        self.layers = [
            dataclasses.replace(layer, **{key: getattr(accounts[layer.name], key) for key in fields})
            if layer.name in accounts
            else layer
            for layer in self.layers
        ]
