"""The table: values, how they are written, what is marked best."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace

import pytest

from nybble.evaluate.record import Record
from nybble.report import summary_table
from nybble.report.figures import (
    format_difference,
    format_megabytes,
    format_percent,
    format_perplexity,
    format_significant,
)
from nybble.report.table import Cell, Table


def cell(table: Table, variant: str, key: str) -> Cell:
    row = next(r for r in table.rows if r.name == variant)
    return row.cells[[c.key for c in table.columns].index(key)]


@pytest.mark.parametrize(
    ("value", "text"),
    [
        (None, "–"), (float("nan"), "–"), (0, "0"), (0.0123, "0.0123"), (3.1234, "3.12"), (31.26, "31.3"),
        (312.6, "313"), (1234.5, "1,234"), (0.00012, "1.2e-4"), (0.5, "0.500"),
        (-0.25, "-0.250"), (0.001, "0.00100"), (0.1, "0.100"),
    ],
)  # fmt: skip
def test_significant(value: float | None, text: str) -> None:
    assert format_significant(value) == text


def test_other_formats() -> None:
    assert [format_megabytes(v) for v in (3_051_000, 23_609_000, 412_345_678, 1_234_567_890, None)] == [
        "3.05", "23.6", "412.3", "1,235", "–",
    ]  # fmt: skip
    assert [format_difference(v) for v in (0.0213, -0.004, 0.00001, 49.4, None)] == [
        "+2.13",
        "−0.40",
        "0",
        "+4,940",
        "–",
    ]
    assert [format_perplexity(v) for v in (8.4123, 424.04, None)] == ["8.412", "424.0", "–"]
    assert format_percent(0.2649) == "26.5"


def test_differences_are_to_fp32(records: list[Record]) -> None:
    table = summary_table(records)
    fp32, nf4 = records[0], next(r for r in records if r.variant == "nf4:g64")
    assert fp32.seconds_50_tokens
    assert nf4.seconds_50_tokens
    assert fp32.engine
    assert nf4.engine
    assert fp32.perplexity
    assert nf4.perplexity
    assert cell(table, "nf4:g64", "share").value == nf4.weight_bytes / fp32.weight_bytes
    engine = fp32.engine.seconds_50_tokens / nf4.engine.seconds_50_tokens
    assert cell(table, "nf4:g64", "speedup").value == engine
    assert cell(table, "nf4:g64", "torch_speedup").value == fp32.seconds_50_tokens / nf4.seconds_50_tokens != engine
    assert cell(table, "nf4:g64", "change").value == pytest.approx(nf4.perplexity / fp32.perplexity - 1)
    assert cell(table, "fp32", "change").text == "0"
    assert cell(table, "fp32", "share").text == "100.0"


def test_growth_spread_and_limit_are_beside_the_figure(records: list[Record]) -> None:
    table = summary_table(records)
    resident = cell(table, "fp32", "resident")
    assert resident.detail == "+33.2"
    assert cell(table, "fp32", "torch_seconds").title.startswith("5 runs, 0.476 to 0.530 s")
    assert cell(table, "fp32", "seconds").title.startswith("5 runs, 0.0602 to 0.0675 s")
    assert "memory bandwidth allows" in cell(table, "fp32", "torch_rate").title
    assert cell(table, "fp32", "engine_resident").detail == "+27.0"
    share = cell(table, "fp32", "bandwidth")
    assert share.text == format_percent(share.value)
    assert share.title == "23.7 MB read per token; above 100 % they come from the processor's caches"
    assert cell(table, "int4:g64", "bandwidth").title == "3.20 MB read per token"
    assert cell(table, "int4:g64", "kl").detail == "±0.0018"


def test_best_is_never_a_broken_variant_nor_fp32s_own_quality(records: list[Record]) -> None:
    table = summary_table(records)
    for k, column in enumerate(table.columns):
        marked = [row for row in table.rows if row.cells[k].best]
        assert bool(marked) == bool(column.best), column.key
        assert all(row.judgement.level != "broken" for row in marked)
        if column.group == "Quality":
            assert all(row.name != "fp32" for row in marked)
    assert cell(table, "nf4:g64,dq", "weights").best
    assert not cell(table, "int2:g64", "weights").best
    smallest = next(r for r in records if r.variant == "nf4:g64,dq").weight_bytes
    tied = summary_table([replace(r, weight_bytes=smallest) if r.variant == "int2:g64" else r for r in records])
    assert cell(tied, "nf4:g64,dq", "weights").best
    assert not cell(tied, "int2:g64", "weights").best, "a broken one that ties"


def test_without_fp32_there_are_no_differences(records: list[Record]) -> None:
    table = summary_table(records[3:])
    for key in ("share", "speedup", "torch_speedup", "change"):
        assert {cell(table, row.name, key).text for row in table.rows} == {"–"}
    assert cell(table, "int8:tensor", "kl").text == "0.00190"


def test_one_record_marks_nothing(records: list[Record]) -> None:
    (row,) = summary_table(records[:1]).rows
    assert not any(c.best for c in row.cells)


def test_missing_values_are_dashes(records: list[Record], change: Callable[..., list[Record]]) -> None:
    table = summary_table([replace(records[1], memory_after_load_bytes=None, perplexity=None, kl_mean=None)])
    for key in ("resident", "perplexity", "kl"):
        assert cell(table, "fp16", key) == Cell(None, "–", "", cell(table, "fp16", key).title, False)


def test_the_engine_is_the_headline_and_torch_beside_it(records: list[Record]) -> None:
    columns = summary_table(records).columns
    main = [c for c in columns if c.main and c.group.endswith("speed")]
    assert [c.label for c in main] == [
        "engine: 50 tokens", "engine: rate", "engine: vs fp32", "engine: bandwidth", "torch: 50 tokens",
    ]  # fmt: skip
    assert {c.by for c in columns if c.group == "Memory"} == {"engine", "torch"}


def test_records_older_than_the_engine_show_torch_alone(records: list[Record], change: Callable[..., list[Record]]) -> None:
    columns = summary_table(change(records, engine=None)).columns
    assert not [c.key for c in columns if c.by == "engine" or c.group == "Engine speed"]
    assert {"torch_seconds", "torch_rate", "torch_speedup"} <= {c.key for c in columns if c.main}


def test_a_variant_that_the_engine_cannot_decode_has_dashes(records: list[Record]) -> None:
    table = summary_table([records[0], replace(records[1], engine=None)])
    for key in ("seconds", "rate", "speedup", "bandwidth", "prefill", "batch8", "engine_resident"):
        assert cell(table, "fp16", key).text == "–"
    assert cell(table, "fp16", "torch_seconds").value == records[1].seconds_50_tokens


def test_heading_follows_the_number_of_tokens(records: list[Record], change: Callable[..., list[Record]]) -> None:
    assert "50 tokens" in {c.header for c in summary_table(records).columns}
    assert "20 tokens" in {c.header for c in summary_table(change(records, run={"new_tokens": 20})).columns}


def test_short_form_has_what_a_terminal_needs(records: list[Record]) -> None:
    keys = [c.key for c in summary_table(records).columns if c.main]
    assert {
        "bpw",
        "weights",
        "share",
        "resident",
        "seconds",
        "speedup",
        "bandwidth",
        "torch_seconds",
        "perplexity",
        "kl",
        "top1",
    } <= set(keys)
    assert len(keys) <= 14
