"""All columns of the table: one place for how each figure is computed, named and written.

1 MB is 10^6 bytes. A value that was not measured is written as an en dash.
"""

from __future__ import annotations

from collections.abc import Callable

from nybble.evaluate.record import Record
from nybble.report.column import Column, of_engine, ratio, signed_megabytes
from nybble.report.figures import (
    MISSING,
    format_difference,
    format_megabytes,
    format_percent,
    format_perplexity,
    format_significant,
    number,
)
from nybble.report.speed_columns import SPEED_COLUMNS


def _growth(record: Record) -> float | None:
    after, before = record.memory_after_load_bytes, record.memory_before_bytes
    return None if after is None or before is None else after - before


def _detail_growth(record: Record, _: Record | None) -> str:
    growth = _growth(record)
    return "" if growth is None else signed_megabytes(growth)


def _title_memory(record: Record, _: Record | None) -> str:
    if record.memory_before_bytes is None:
        return ""
    return f"{format_megabytes(record.memory_before_bytes)} MB before the model was loaded; below: growth by loading"


def _title_engine_memory(record: Record, _: Record | None) -> str:
    before = record.engine.memory_before_bytes if record.engine else None
    return "" if before is None else f"{format_megabytes(before)} MB before the model was loaded; below: growth by loading"


def _detail_engine_growth(record: Record, _: Record | None) -> str:
    engine = record.engine
    if engine is None or engine.memory_after_load_bytes is None or engine.memory_before_bytes is None:
        return ""
    return signed_megabytes(engine.memory_after_load_bytes - engine.memory_before_bytes)


def _spread(value: float | None, text: Callable[[float | None], str]) -> str:
    return "" if number(value) is None or value == 0 else f"±{text(value)}"


def _change(record: Record, baseline: Record | None) -> float | None:
    factor = ratio(record.perplexity, baseline.perplexity if baseline else None)
    return None if factor is None else factor - 1


COLUMNS = (
    Column(
        "bpw",
        "Size",
        "bits",
        "per weight",
        "Everything stored for the quantized weights (codes, scales, offsets), over their number.",
        lambda r, b: r.bpw,
        lambda v: MISSING if number(v) is None else f"{v:.2f}",
        "low",
    ),
    Column(
        "weights",
        "Size",
        "weights",
        "MB",
        "All tensors of the loaded model as they lie in memory, parts kept in float included.",
        lambda r, b: r.weight_bytes,
        format_megabytes,
        "low",
    ),
    Column(
        "share",
        "Size",
        "of fp32",
        "%",
        "Bytes of the weights over those of fp32.",
        lambda r, b: ratio(r.weight_bytes, b.weight_bytes if b else None),
        format_percent,
        "low",
    ),
    Column(
        "file",
        "Size",
        "file",
        "MB",
        "The weight file on disk, header included.",
        lambda r, b: r.file_bytes,
        format_megabytes,
        "low",
        main=False,
    ),
    Column(
        "resident",
        "Memory",
        "loaded",
        "MB",
        "Resident memory of a fresh process of torch after loading; below it the growth by loading.",
        lambda r, b: r.memory_after_load_bytes,
        format_megabytes,
        "low",
        detail=_detail_growth,
        title=_title_memory,
        by="torch",
    ),
    Column(
        "peak",
        "Memory",
        "peak",
        "MB",
        "Highest resident memory from loading through generation.",
        lambda r, b: r.memory_peak_bytes,
        format_megabytes,
        "low",
        by="torch",
    ),
    Column(
        "cleanup",
        "Memory",
        "cleanup",
        "MB",
        "Resident memory after the model was deleted and freed memory was given back.",
        lambda r, b: r.memory_after_cleanup_bytes,
        format_megabytes,
        "",
        main=False,
        by="torch",
    ),
    Column(
        "engine_resident",
        "Memory",
        "loaded",
        "MB",
        "Resident memory of a fresh process of the engine after loading; below it the growth by loading.",
        of_engine("memory_after_load_bytes"),
        format_megabytes,
        "low",
        main=False,
        detail=_detail_engine_growth,
        title=_title_engine_memory,
        by="engine",
    ),
    *SPEED_COLUMNS,
    Column(
        "perplexity",
        "Quality",
        "perplexity",
        "± se",
        "exp of the mean loss per token of the text under the stated protocol; lower is better.",
        lambda r, b: r.perplexity,
        format_perplexity,
        "low",
        detail=lambda r, b: _spread(r.perplexity_se, lambda v: format_significant(v, 2)),
    ),
    Column(
        "change",
        "Quality",
        "change",
        "%",
        "Difference of the perplexity to that of fp32.",
        _change,
        format_difference,
        "",
    ),
    Column(
        "kl",
        "Quality",
        "mean KL",
        "nats ± se",
        "Kullback-Leibler divergence of the variant's next-token distribution from the float model's; 0 is equal.",
        lambda r, b: r.kl_mean,
        format_significant,
        "low",
        detail=lambda r, b: _spread(r.kl_se, lambda v: format_significant(v, 2)),
    ),
    Column(
        "kl_p99",
        "Quality",
        "KL p99",
        "nats",
        "99th percentile of the per-token divergence: how bad the worst tokens are.",
        lambda r, b: r.kl_p99,
        format_significant,
        "low",
        main=False,
    ),
    Column(
        "top1",
        "Quality",
        "same top 1",
        "%",
        "Tokens whose most likely successor is the float model's.",
        lambda r, b: r.top1_agreement,
        format_percent,
        "high",
    ),
    Column(
        "quantize",
        "Making",
        "quantize",
        "s",
        "Choosing the codes and writing the file.",
        lambda r, b: r.quantize_seconds,
        format_significant,
        "low",
        main=False,
    ),
)
