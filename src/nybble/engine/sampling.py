"""The next token from logits: what sampling means here, in plain numpy. sample.cpp is its fast twin.

The steps and their order are those of transformers' `generate`, so that the same settings mean the same distribution:

    repetition penalty   a logit of a token seen before is divided when positive, multiplied when negative (CTRL, section 4.1)
    temperature          logits / temperature; 0 ends here with the largest logit
    top-k                the k largest logits stay
    top-p                of those, the fewest largest ones whose probabilities reach p together
    min-p                of those, the ones at least min_p times as probable as the likeliest
    choice               inverse transform: the first token, in order of ids, whose cumulative probability exceeds u

The penalty comes first because it changes logits, which the temperature scales. The temperature comes before the cuts: top-p
and min-p then cut the distribution that is drawn from, and top-k does not depend on it. Each cut works on what the cuts
before it left, made to sum to 1 again. Ties are decided: of equal logits the lower id is the larger, so top-k keeps exactly
k tokens (transformers keeps all that equal the k-th).

Everything is computed in float64. Python and C++ differ by the rounding of exp and of sums, which moves the choice only when
u or p falls within about 1e-15 of a border.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from nybble.errors import NumericError, UsageError

MOST_TEMPERATURE = 100.0
MOST_PENALTY = 100.0


@dataclass(frozen=True)
class Sampling:
    """How to choose a token. The default is greedy: always the likeliest. Raises UsageError for a value out of range."""

    temperature: float = 0.0
    """0 to 100: 0 is greedy, 1 the model's own distribution, more is flatter."""
    top_k: int = 0
    """Tokens to choose from; 0 for all."""
    top_p: float = 1.0
    """Above 0 to 1: the share of probability to choose from; 1 for all."""
    min_p: float = 0.0
    """0 to 1: the least probability, as a share of the likeliest token's; 0 for all."""
    repetition_penalty: float = 1.0
    """0.01 to 100: above 1 makes tokens that were seen rarer; 1 for none."""

    def __post_init__(self) -> None:
        _check("temperature", self.temperature, 0.0, MOST_TEMPERATURE, "0 is greedy, 1 the model's own distribution")
        if isinstance(self.top_k, bool) or not isinstance(self.top_k, int) or not 0 <= self.top_k < 1 << 63:
            raise UsageError(f"top_k is {self.top_k!r}; it must be a whole number, 0 for all tokens or from 1 up")
        _check("top_p", self.top_p, 0.0, 1.0, "1 keeps all tokens", above=True)
        _check("min_p", self.min_p, 0.0, 1.0, "0 keeps all tokens")
        _check("repetition_penalty", self.repetition_penalty, 1 / MOST_PENALTY, MOST_PENALTY, "1 changes nothing")

    @property
    def greedy(self) -> bool:
        """Whether nothing is drawn: the token does not depend on u."""
        return self.temperature == 0.0


def choose(logits: NDArray[np.float32], history: Sequence[int] | NDArray[np.int64], sampling: Sampling, u: float) -> int:
    """The next token's id, from logits float32 [V], the ids seen so far (prompt included) and u in [0, 1).

    Raises NumericError when a logit is NaN or +infinity, or all are -infinity (a single -infinity rules its token out);
    UsageError when u or an id of `history` is out of range.
    """
    values = np.asarray(logits, dtype=np.float64)
    if values.ndim != 1 or not values.size:
        raise UsageError(f"logits have shape {list(values.shape)}; one row with a value for every token is needed")
    if not 0.0 <= u < 1.0:
        raise UsageError(f"u is {u}; it must be at least 0 and less than 1")
    _check_finite(values)
    values = _penalize(values, np.asarray(history, dtype=np.int64), sampling.repetition_penalty)
    if sampling.greedy:
        return int(np.argmax(values))  # the first of equal ones

    weights = np.exp((values - values.max()) / sampling.temperature)  # [V], the largest is 1
    kept = np.arange(values.size)  # ids, ascending
    if 0 < sampling.top_k < kept.size:
        kept = np.sort(_ranked(values)[: sampling.top_k])
    if sampling.top_p < 1.0:
        ranked = kept[_ranked(weights[kept])]
        reached = np.cumsum(weights[ranked]) >= sampling.top_p * np.cumsum(weights[kept])[-1]
        kept = np.sort(ranked[: int(np.argmax(reached)) + 1 if reached.any() else None])
    kept = kept[weights[kept] >= sampling.min_p]

    cumulative = np.cumsum(weights[kept])
    place = int(np.searchsorted(cumulative, u * cumulative[-1], side="right"))
    return int(kept[min(place, kept.size - 1)])


def _ranked(values: NDArray[np.float64]) -> NDArray[np.intp]:
    """Places of the values, largest first, equal ones in order."""
    return np.argsort(-values, kind="stable")


def _penalize(values: NDArray[np.float64], history: NDArray[np.int64], penalty: float) -> NDArray[np.float64]:
    seen = np.unique(history)  # once each, however often a token came
    if seen.size and not (seen[0] >= 0 and seen[-1] < values.size):
        wrong = int(seen[0] if seen[0] < 0 else seen[-1])
        raise UsageError(f"token {wrong} was seen, but the logits are of tokens 0 to {values.size - 1}")
    out = values.copy()
    out[seen] = np.where(values[seen] > 0, values[seen] / penalty, values[seen] * penalty)
    return out


def _check_finite(values: NDArray[np.float64]) -> None:
    wrong = np.flatnonzero(np.isnan(values) | np.isposinf(values))
    if wrong.size:
        first = int(wrong[0])
        raise NumericError(
            f"{wrong.size} of {values.size} logits are not finite, the first is {values[first]} of token {first}; "
            "the model's weights or its file are damaged"
        )
    if np.isneginf(values).all():
        raise NumericError(f"all {values.size} logits are -infinity, so there is no token to choose")


def _check(name: str, value: float, least: float, most: float, hint: str, above: bool = False) -> None:
    """Raise UsageError unless least <= value <= most (least < value with `above`)."""
    number = isinstance(value, int | float) and not isinstance(value, bool)
    if not number or math.isnan(value) or not least <= value <= most or (above and value == least):
        span = f"above {least:g} to {most:g}" if above else f"{least:g} to {most:g}"
        raise UsageError(f"{name} is {value!r}; it must be a number from {span} ({hint})")


__all__ = ["Sampling", "choose"]
