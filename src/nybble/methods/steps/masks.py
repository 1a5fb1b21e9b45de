"""Which weights become zero: those of the lowest scores, over a matrix, over each row, or in every run of so many columns."""

from __future__ import annotations

import torch
from torch import Tensor

from nybble.errors import UsageError
from nybble.formats import Format
from nybble.methods.steps.settings import Settings


def check_zero(fmt: Format) -> None:
    """Raise UsageError for a format that may not hold a zero exactly: with offsets, none of its values has to be one."""
    levels = fmt.levels if fmt.name != "fp32" else (0.0,)
    if fmt.shifted or getattr(fmt, "asymmetric", False) or 0.0 not in levels:
        raise UsageError(
            f"format {fmt} has offsets, or no level at zero: pruned weights need one, as int4:g64, nf4 and fp16 have"
        )


def runs_of(settings: Settings) -> tuple[int, int] | None:
    """(weights kept, columns of a run), or None where zeros may lie anywhere."""
    if settings.pattern == "free":
        return None
    kept, _, columns = settings.pattern.partition("of")
    return int(kept), int(columns)


def kept_in_matrix(scores: Tensor, settings: Settings) -> Tensor:
    """bool, like scores [N, K]: what stays where the whole matrix is one (or every run by itself)."""
    if runs_of(settings):
        return kept_in_rows(scores, settings)
    return _highest(scores.reshape(1, -1), settings.sparsity).reshape(scores.shape)


def kept_in_rows(scores: Tensor, settings: Settings) -> Tensor:
    """bool, like scores [N, K]: what stays where every row has as many zeros as the others (or every run of columns)."""
    runs = runs_of(settings)
    if runs is None:
        return _highest(scores, settings.sparsity)
    kept, columns = runs
    rows, width = scores.shape
    padded = torch.nn.functional.pad(scores, (0, -width % columns), value=-1.0).reshape(rows, -1, columns)
    best = padded.argsort(dim=-1, descending=True, stable=True)[..., :kept]
    keep = torch.zeros(padded.shape, dtype=torch.bool).scatter_(-1, best, True)
    return keep.reshape(rows, -1)[:, :width].contiguous()


def _highest(scores: Tensor, sparsity: float) -> Tensor:
    """bool [N, K]: the highest of each row, of equal ones the first."""
    rows, width = scores.shape
    count = width - round(width * sparsity)
    best = scores.argsort(dim=-1, descending=True, stable=True)[:, :count]
    return torch.zeros((rows, width), dtype=torch.bool).scatter_(1, best, True)
