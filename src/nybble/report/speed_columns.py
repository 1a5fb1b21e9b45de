"""Columns of speed: the engine's, then those of torch's `generate` beside them."""

from __future__ import annotations

from nybble.evaluate.record import Record
from nybble.report.column import Column, of_engine, ratio
from nybble.report.figures import MISSING, format_megabytes, format_percent, format_significant, number


def _title_spread(record: Record, _: Record | None) -> str:
    return _spread_of(record.seconds_50_tokens_runs)


def _title_engine_spread(record: Record, _: Record | None) -> str:
    return _spread_of(record.engine.seconds_50_tokens_runs) if record.engine else ""


def _spread_of(values: list[float] | None) -> str:
    runs = [r for r in values or [] if number(r) is not None]
    return f"{len(runs)} runs, {format_significant(min(runs))} to {format_significant(max(runs))} s" if runs else ""


def _title_limit(record: Record, _: Record | None) -> str:
    limit, own = number(record.limit_tokens_per_second), number(record.tokens_per_second)
    if not limit:
        return ""
    share = f"; reached {own / limit:.0%}" if own else ""
    return f"memory bandwidth allows {format_significant(limit)} tokens/s{share}"


def _title_share(record: Record, _: Record | None) -> str:
    engine = record.engine
    if engine is None:
        return ""
    read = f"{format_megabytes(engine.bytes_per_token)} MB read per token"
    return f"{read}; above 100 % they come from the processor's caches" if engine.bandwidth_share > 1 else read


def _engine_speedup(record: Record, baseline: Record | None) -> float | None:
    if record.engine is None or baseline is None or baseline.engine is None:
        return None
    return ratio(baseline.engine.seconds_50_tokens, record.engine.seconds_50_tokens)


SPEED_COLUMNS = (
    Column(
        "load",
        "Engine speed",
        "load",
        "s",
        "From the file on disk to a decoder that is ready.",
        of_engine("load_seconds"),
        format_significant,
        "low",
        main=False,
        by="engine",
    ),
    Column(
        "start",
        "Engine speed",
        "from start",
        "s",
        "From the start of a new process to the first new token: Python, imports, loading, prompt.",
        of_engine("start_seconds"),
        format_significant,
        "low",
        main=False,
        by="engine",
    ),
    Column(
        "first",
        "Engine speed",
        "first token",
        "s",
        "From the prompt to the first new token, the model loaded and warm.",
        of_engine("first_token_seconds"),
        format_significant,
        "low",
        main=False,
        by="engine",
    ),
    Column(
        "seconds",
        "Engine speed",
        "{new} tokens",
        "s",
        "Prompt in, new tokens out, greedy, one sequence, decoded by nybble's engine; median of the timed runs.",
        of_engine("seconds_50_tokens"),
        format_significant,
        "low",
        title=_title_engine_spread,
        by="engine",
    ),
    Column(
        "rate",
        "Engine speed",
        "rate",
        "tok/s",
        "New tokens over those seconds of the engine.",
        of_engine("tokens_per_second"),
        format_significant,
        "high",
        by="engine",
    ),
    Column(
        "speedup",
        "Engine speed",
        "vs fp32",
        "×",
        "Seconds of fp32 over seconds of the variant, both by the engine: above 1 is faster.",
        _engine_speedup,
        lambda v: MISSING if number(v) is None else f"{v:.2f}",
        "high",
        by="engine",
    ),
    Column(
        "bandwidth",
        "Engine speed",
        "bandwidth",
        "%",
        "Bytes of weights and cache that the engine reads per second of decoding, over what the memory was measured to give; "
        "above 100 the processor's caches hold them.",
        of_engine("bandwidth_share"),
        format_percent,
        "",
        title=_title_share,
        by="engine",
    ),
    Column(
        "prefill",
        "Engine speed",
        "prefill",
        "tok/s",
        "Tokens of the prompt that the engine reads per second.",
        of_engine("prefill_tokens_per_second"),
        format_significant,
        "high",
        main=False,
        by="engine",
    ),
    Column(
        "batch8",
        "Engine speed",
        "batch 8",
        "tok/s",
        "New tokens per second of eight texts decoded together.",
        of_engine("batch8_tokens_per_second"),
        format_significant,
        "high",
        main=False,
        by="engine",
    ),
    Column(
        "torch_load",
        "torch speed",
        "load",
        "s",
        "From the file on disk to a torch model that is ready.",
        lambda r, b: r.load_seconds,
        format_significant,
        "low",
        main=False,
        by="torch",
    ),
    Column(
        "torch_first",
        "torch speed",
        "first token",
        "s",
        "From the prompt to the first new token, the model loaded and warm.",
        lambda r, b: r.first_token_seconds,
        format_significant,
        "low",
        main=False,
        by="torch",
    ),
    Column(
        "torch_seconds",
        "torch speed",
        "{new} tokens",
        "s",
        "The same through torch's generate: prompt in, new tokens out, greedy, one sequence; median of the timed runs.",
        lambda r, b: r.seconds_50_tokens,
        format_significant,
        "low",
        title=_title_spread,
        by="torch",
    ),
    Column(
        "torch_rate",
        "torch speed",
        "rate",
        "tok/s",
        "New tokens over those seconds of torch.",
        lambda r, b: r.tokens_per_second,
        format_significant,
        "high",
        title=_title_limit,
        by="torch",
    ),
    Column(
        "torch_speedup",
        "torch speed",
        "vs fp32",
        "×",
        "Seconds of fp32 over seconds of the variant, both by torch: above 1 is faster.",
        lambda r, b: ratio(b.seconds_50_tokens if b else None, r.seconds_50_tokens),
        lambda v: MISSING if number(v) is None else f"{v:.2f}",
        "high",
        by="torch",
    ),
    Column(
        "torch_prefill",
        "torch speed",
        "prefill",
        "tok/s",
        "Tokens of the prompt read per second.",
        lambda r, b: r.prefill_tokens_per_second,
        format_significant,
        "high",
        main=False,
        by="torch",
    ),
)
