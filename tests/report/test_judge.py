"""The sentences and levels that a reader acts on."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import replace

import pytest

from nybble.evaluate.record import HISTOGRAM_BINS, LayerRecord, Record
from nybble.report import judge as judge_module
from nybble.report.judge import (
    choose,
    compare_zero_point,
    find_baseline,
    find_family,
    judge_variant,
    list_warnings,
    measure_span,
    name_variants,
    state_verdict,
)


def pick(records: list[Record], variant: str) -> Record:
    return next(r for r in records if r.variant == variant)


def verdict_of(records: list[Record]) -> str:
    return state_verdict(records, [judge_variant(r, records[0]) for r in records])


def levels(records: list[Record]) -> dict[str, str]:
    baseline = find_baseline(records)
    return {r.variant: judge_variant(r, baseline).level for r in records}


def test_levels_of_the_default_variants(records: list[Record]) -> None:
    found = levels(records)
    assert found["fp32"] == "baseline"
    assert {v for v, level in found.items() if level == "broken"} == {"int3:g64", "int2:g64"}
    assert {v for v, level in found.items() if level == "noticeable"} == {
        "int4:g64", "int4:g64,asym", "nf4:g64", "nf4:g64,dq", "fp4:g64",
    }  # fmt: skip


@pytest.mark.parametrize(
    ("kl", "factor", "level"),
    [
        (0.0999, 1.0, "noticeable"),
        (0.1001, 1.0, "broken"),
        (0.0199, 1.0, "good"),
        (0.0201, 1.0, "noticeable"),
        (0.0, 1.49, "noticeable"),
        (0.0, 1.51, "broken"),
        (0.0, 1.04, "good"),
        (None, 1.06, "noticeable"),
        (math.nan, 1.0, "broken"),
        (0.0, math.inf, "broken"),
    ],
)
def test_bounds(records: list[Record], kl: float | None, factor: float, level: str) -> None:
    baseline = records[0]
    assert baseline.perplexity is not None
    record = replace(records[5], kl_mean=kl, perplexity=baseline.perplexity * factor)
    judgement = judge_variant(record, baseline)
    assert judgement.level == level
    assert bool(judgement.reasons) == (level != "good")


def test_lost_quality_is_said_and_random_weights_are_not_blamed(
    records: list[Record], change: Callable[..., list[Record]]
) -> None:
    lost = replace(records[5], kl_mean=None, perplexity=None)
    assert judge_variant(lost, records[0]).level == "unknown"
    assert "not measured, or not finite" in judge_variant(lost, records[0]).reasons[0]
    random = change(records, perplexity=None, kl_mean=None)
    assert all(not judge_variant(r, random[0]).reasons for r in random)


def test_verdict_names_the_smallest_within_the_bound_and_the_broken(records: list[Record]) -> None:
    baseline = find_baseline(records)
    judgements = [judge_variant(r, baseline) for r in records]
    chosen = choose(records, judgements)
    assert chosen is not None
    assert records[chosen].variant == "nf4:g64,dq"
    within = [r for r, j in zip(records, judgements, strict=True) if j.level in ("good", "noticeable")]
    assert records[chosen].weight_bytes == min(r.weight_bytes for r in within)
    verdict = state_verdict(records, judgements)
    assert verdict.startswith("nf4:g64,dq is the smallest variant whose mean KL stays within 0.1 nats (0.038)")
    assert "12.9 % of fp32's 23.6 MB" in verdict
    assert baseline is not None
    own, reference = records[chosen].engine, baseline.engine
    assert own is not None
    assert reference is not None
    ratio = reference.seconds_50_tokens / own.seconds_50_tokens
    assert f"the engine writes 50 tokens in {own.seconds_50_tokens:.4f} s, {ratio:.2f} times as fast as fp32 there" in verdict
    assert f"(torch's generate: {records[chosen].seconds_50_tokens:.3f} s, 9.7 times as long)" in verdict
    assert "The smallest without a noticeable loss is int8:tensor" in verdict
    assert verdict.endswith("int3:g64 and int2:g64 are broken and should not be used.")


def test_verdict_without_quality_speaks_of_size_and_speed(records: list[Record], change: Callable[..., list[Record]]) -> None:
    random = change(records, perplexity=None, kl_mean=None)
    verdict = state_verdict(random, [judge_variant(r, random[0]) for r in random])
    assert verdict.startswith("Quality was not measured. The smallest variant is int2:g64 with 1.67 MB")
    assert "the fastest in the engine is int2:g64" in verdict
    assert "broken" not in verdict


def test_verdict_speaks_of_torch_where_the_engine_did_not_decode(
    records: list[Record], change: Callable[..., list[Record]]
) -> None:
    old = change(records, engine=None)
    assert "torch's generate writes 50 tokens in 0.220 s, 2.24 times as fast as fp32" in verdict_of(old)
    half = [old[0], *records[1:]]  # ratios never mix the two
    assert "torch's generate writes 50 tokens in 0.220 s, 2.24 times as fast as fp32" in verdict_of(half)
    assert "engine" not in verdict_of(half)
    random = change(old, perplexity=None, kl_mean=None)
    assert "the fastest in torch's generate is int2:g64" in verdict_of(random)


def test_verdict_when_every_variant_is_broken(records: list[Record]) -> None:
    bad = [records[0], records[-1]]
    verdict = state_verdict(bad, [judge_variant(r, bad[0]) for r in bad])
    assert verdict.startswith("No variant keeps its mean KL within 0.1 nats")
    assert "int2:g64 is broken" in verdict


def test_warnings_put_the_broken_first(records: list[Record]) -> None:
    rows = list_warnings(records, [judge_variant(r, records[0]) for r in records])
    assert [level for _, level, _ in rows] == ["broken"] * 2 + ["noticeable"] * 5
    assert "int2:g64: its perplexity is 50.40 times that of fp32 (bound 1.5)" in rows[1][2]


def test_zero_point_wins(records: list[Record]) -> None:
    finding = compare_zero_point(records)
    assert finding is not None
    assert finding.startswith("Zero point beats absmax")
    assert "11 % lower" in finding


def test_zero_point_loses_because_weights_are_symmetric(records: list[Record]) -> None:
    worse = [replace(r, kl_mean=0.004) if r.format == "int8:tensor,asym" else r for r in records]
    finding = compare_zero_point(worse)
    assert finding is not None
    assert finding.startswith("Zero point does not beat absmax")
    assert "nearly symmetric around zero" in finding


def test_zero_point_loses_although_weights_are_one_sided(records: list[Record]) -> None:
    counts = [0] * (HISTOGRAM_BINS // 2) + [5] * (HISTOGRAM_BINS // 2)
    layers = [replace(layer, histogram=counts) for layer in records[0].layers]
    worse = [replace(records[0], layers=layers)] + [
        replace(r, kl_mean=0.004) if r.format == "int8:tensor,asym" else r for r in records[1:]
    ]
    finding = compare_zero_point(worse)
    assert finding is not None
    assert "symmetric" not in finding
    assert "of 26 layers" in finding


def test_zero_point_needs_both(records: list[Record]) -> None:
    assert compare_zero_point([r for r in records if r.format != "int8:tensor"]) is None


def test_span_of_a_histogram() -> None:
    counts = [0] * HISTOGRAM_BINS
    counts[0] = counts[71] = 3
    layer = LayerRecord("w", 0, "linear", (2, 3), "fp32", 32, 0.0, 4.8, counts)
    assert measure_span(layer) == pytest.approx((-4.8, 2.4))
    assert measure_span(replace(layer, histogram=[0] * HISTOGRAM_BINS)) is None


@pytest.mark.parametrize(
    ("spec", "bpw", "family"),
    [
        ("fp32", 32, "float"), ("bf16", 16, "float"), ("int8", 8, "int8"), ("int6:g32", 6.5, "int8"),
        ("int4:g64,asym", 4.5, "int4"), ("int3:g64", 3.25, "low"), ("int2:g32", 2.5, "low"),
        ("nf4:g64,dq", 4.13, "codebook"), ("q4_k", 4.5, "codebook"), ("q8_0", 8.5, "int8"), ("q2_k", 2.63, "low"),
    ],
)  # fmt: skip
def test_families(records: list[Record], spec: str, bpw: float, family: str) -> None:
    assert find_family(replace(records[0], format=spec, bpw=bpw)) == family


def test_same_variant_of_two_runs_gets_two_names(records: list[Record]) -> None:
    other = replace(records[0], run=replace(records[0].run, id="zzzzzzzz"))
    assert name_variants([records[0], other, records[0], records[1]]) == [
        "fp32 (5f0c2a)", "fp32 (zzzzzz)", "fp32 (5f0c2a) #2", "fp16",
    ]  # fmt: skip


def test_noticeable_lies_below_broken() -> None:
    assert judge_module.KL_NOTICEABLE < judge_module.KL_BOUND
    assert 1 < judge_module.PERPLEXITY_NOTICEABLE < judge_module.PERPLEXITY_FACTOR
