"""What came of a race: the figures of every racer over all rounds, and the JSON line that holds them.

A turn is what one process measured once. A figure of a racer is the median over its turns; the best and all turns are
kept beside it. The ratio to the baseline is taken round by round first, so that both sides met the same machine.
"""

from __future__ import annotations

import statistics
from dataclasses import dataclass, field
from typing import Any

from nybble.bench.adapters import OURS
from nybble.bench.racers import Racer
from nybble.bench.traffic import bytes_per_token
from nybble.bench.workload import NEW, PREFILL, Workload

BASELINES = (("torch", "fp32"), (OURS, "fp32"), ("llama.cpp", "F16"))
"""Whose speed the others are compared with, and whose text is the float model's: the first that races."""
LOWER_IS_BETTER = ("_s", "_bytes", "seconds_50")
DIGITS = 5


@dataclass
class Standing:
    """One racer: its turns so far, or why it has none."""

    racer: Racer
    turns: list[dict[str, Any]] = field(default_factory=list)
    rounds: list[int] = field(default_factory=list)
    """Round of each turn."""
    bandwidths: list[float] = field(default_factory=list)
    """Bytes per second that memory reads at, of each turn: the higher of two readings, right before it and right after. A shared
    machine may change that by half within seconds, so a share is only worth something within its turn."""
    failed: str | None = None

    @property
    def facts(self) -> dict[str, Any]:
        """`weight_bytes`, `token_bytes`, `cache_element_bytes`, `version`: the same in every turn."""
        return self.turns[-1]


@dataclass(frozen=True)
class Race:
    """A finished race."""

    model: str
    threads: int
    rounds: int
    repeats: int
    exact: bool
    workload: Workload
    cached_numbers: int
    """Keys and values that the model caches for one position."""
    loads: tuple[float, ...]
    """The machine's load average (1 minute) at the start of each round; empty where it is not known."""
    machine: dict[str, Any]
    created: str
    standings: tuple[Standing, ...]
    skipped: tuple[str, ...]
    """A line for each peer that could not take part, and for each racer that failed."""

    @property
    def finished(self) -> list[Standing]:
        """Racers with figures, in the order they were named."""
        return [standing for standing in self.standings if standing.turns and standing.failed is None]

    @property
    def baseline(self) -> Standing:
        """Whom the others are compared with."""
        by_name = {(s.racer.runtime, s.racer.format): s for s in self.finished}
        return next((by_name[name] for name in BASELINES if name in by_name), self.finished[0])

    @property
    def bandwidths(self) -> tuple[float, float]:
        """The least and the largest of all turns."""
        found = [each for standing in self.finished for each in standing.bandwidths]
        return min(found), max(found)

    def token_bytes(self, standing: Standing) -> int:
        """Bytes that a new token of this racer reads: weights, and the cache at its average length."""
        facts, work = standing.facts, self.workload
        cached = self.cached_numbers * facts["cache_element_bytes"]
        return bytes_per_token(facts["token_bytes"], cached, work.prompt_tokens, work.new_tokens)

    def figures(self, standing: Standing) -> dict[str, list[float]]:
        """Figure -> its value in each turn."""
        columns: dict[str, list[float]] = {}
        for number, turn, bandwidth in zip(standing.rounds, standing.turns, standing.bandwidths, strict=True):
            for name, value in self._figures_of(standing, number, turn, bandwidth).items():
                columns.setdefault(name, []).append(value)
        return columns

    def _figures_of(self, standing: Standing, number: int, turn: dict[str, Any], bandwidth: float) -> dict[str, float]:
        work = self.workload
        plain = ("load_s", "first_token_s", "memory_before_load_bytes", "memory_loaded_bytes", "memory_peak_bytes")
        found = {name: turn[name] for name in plain if turn.get(name) is not None}
        if "decode_s" in turn:
            found["tokens_per_second"] = work.new_tokens / turn["decode_s"]
            rate = self.token_bytes(standing) * found["tokens_per_second"]
            found["bandwidth_share"] = rate / bandwidth
            other = dict(zip(self.baseline.rounds, self.baseline.turns, strict=True)).get(number)
            if other is not None:
                found["ratio_to_baseline"] = other["decode_s"] / turn["decode_s"]
            if work.new_tokens == NEW:
                found["seconds_50"] = turn["decode_s"]
        if "prefill_s" in turn:
            found["prefill_tokens_per_second"] = work.prefill_tokens / turn["prefill_s"]
            if work.prefill_tokens == PREFILL:
                found["prefill_512_s"] = turn["prefill_s"]
        for rows, seconds in turn.get("batch_s", {}).items():
            found[f"batch{rows}_tokens_per_second"] = int(rows) * work.new_tokens / seconds
        return found

    def line(self, standing: Standing) -> dict[str, Any]:
        """One JSON record: medians under their own names, then `best` and `turns` of each figure."""
        figures = self.figures(standing)
        facts, work, baseline = standing.facts, self.workload, self.baseline
        medians = {name: statistics.median(values) for name, values in figures.items()}
        best = {name: (min if name.endswith(LOWER_IS_BETTER) else max)(values) for name, values in figures.items()}
        record: dict[str, Any] = {
            "peer": standing.racer.runtime,
            "format": standing.racer.label,
            "spec": standing.racer.format,
            "threads": self.threads,
            **({"exact": self.exact} if standing.racer.runtime == OURS else {}),
            **_rounded(medians),
            "weight_bytes": facts["weight_bytes"],
            "bytes_per_token": self.token_bytes(standing),
            "bandwidth_bytes_per_second": round(statistics.median(standing.bandwidths)),
            "tokens_as_float": count_equal(facts["tokens"], baseline.facts["tokens"]),
            "baseline": str(baseline.racer),
            "prompt_tokens": work.prompt_tokens,
            "new_tokens": work.new_tokens,
            "prefill_tokens": work.prefill_tokens,
            "rounds": len(standing.turns),
            "repeats": self.repeats,
            "version": facts["version"],
            "model": self.model,
            "machine": self.machine,
            "created": self.created,
            "best": _rounded(best),
            "turns": {name: [_round(value) for value in values] for name, values in figures.items()},
        }
        if self.loads:
            record["load_average"] = round(statistics.median(self.loads), 2)
        return record


def count_equal(tokens: list[int], reference: list[int]) -> int:
    """How many leading tokens are the same."""
    pairs = zip(tokens, reference, strict=False)
    return next((i for i, (a, b) in enumerate(pairs) if a != b), min(len(tokens), len(reference)))


def _round(value: float) -> float:
    return value if isinstance(value, int) else round(value, DIGITS)


def _rounded(figures: dict[str, float]) -> dict[str, float]:
    return {name: _round(value) for name, value in figures.items()}
