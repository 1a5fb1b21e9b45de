"""What the records say in words: which variant is usable, which is broken, and the sentences of the verdict.

Everything here is computed from the records alone; no figure is typed in. The bounds are stated once, with reasons:

- KL of k nats means, by Pinsker's inequality, that at most sqrt(k / 2) of the probability mass of the next token has
  moved elsewhere: 0.22 for KL_BOUND, 0.10 for KL_NOTICEABLE.
- A factor f in perplexity is ln(f) nats of extra loss per token: 0.41 for PERPLEXITY_FACTOR, 0.05 for
  PERPLEXITY_NOTICEABLE.

Leaves out: significance tests. A level is decided on the point estimate; the table shows the standard error beside it.
"""

from __future__ import annotations

import math
import re
from collections import Counter
from dataclasses import dataclass
from statistics import median

from nybble.evaluate.record import LayerRecord, Record
from nybble.report.figures import format_megabytes, format_percent, format_significant, number

PERPLEXITY_FACTOR = 1.5
KL_BOUND = 0.1
PERPLEXITY_NOTICEABLE = 1.05
KL_NOTICEABLE = 0.02

FAMILIES = {
    "float": "floating point",
    "int8": "8-bit integers",
    "int4": "4-bit integers",
    "codebook": "4-bit codebooks",
    "low": "3 bits and fewer",
}


@dataclass(frozen=True)
class Judgement:
    """How far one variant is from the float model."""

    level: str
    """`good`, `noticeable`, `broken`; `baseline` for the float model; `unknown` where quality was not measured."""
    reasons: tuple[str, ...]
    """One clause for each bound that was passed."""


def find_baseline(records: list[Record]) -> Record | None:
    """The first fp32 record: what all differences are against. None when there is none."""
    return next((r for r in records if r.format == "fp32"), None)


def name_variants(records: list[Record]) -> list[str]:
    """One name a record: its variant, with the run's id behind it where two records bear the same variant."""
    counts = Counter(r.variant for r in records)
    names = [r.variant if counts[r.variant] == 1 else f"{r.variant} ({str(r.run.id)[:6]})" for r in records]
    seen: Counter[str] = Counter()
    unique = []
    for name in names:
        seen[name] += 1
        unique.append(name if seen[name] == 1 else f"{name} #{seen[name]}")
    return unique


def find_family(record: Record) -> str:
    """Which family of formats a record belongs to, a key of FAMILIES; it decides the colour in every plot."""
    name = re.split(r"[:+]", record.format, maxsplit=1)[0]
    if name in ("fp32", "fp16", "bf16", "fp64"):
        return "float"
    integer = re.fullmatch(r"int(\d+)", name)
    bits = int(integer.group(1)) if integer else record.bpw
    if bits < 3.7:
        return "low"
    if integer:
        return "int4" if bits <= 4 else "int8"
    return "codebook" if bits < 6 else "int8"


def count_runs(records: list[Record]) -> int:
    """How many runs of compare the records come from."""
    return len({str(r.run.id) for r in records})


def judge_variant(record: Record, baseline: Record | None) -> Judgement:
    """Put one record on the scale good, noticeable, broken."""
    if record is baseline:
        return Judgement("baseline", ())
    kl = number(record.kl_mean)
    perplexity = number(record.perplexity)
    reference = number(baseline.perplexity) if baseline else None
    broken, noticeable = [], []
    for name, value in (("perplexity", record.perplexity), ("mean KL", record.kl_mean)):
        if value is not None and not math.isfinite(value):
            broken.append(f"its {name} is not finite")
    if perplexity is not None and reference:
        factor = perplexity / reference
        clause = f"its perplexity is {format_significant(factor, 4)} times that of fp32"
        if factor > PERPLEXITY_FACTOR:
            broken.append(f"{clause} (bound {PERPLEXITY_FACTOR:g})")
        elif factor > PERPLEXITY_NOTICEABLE:
            noticeable.append(f"{clause} (noticeable above {PERPLEXITY_NOTICEABLE:g})")
    if kl is not None:
        clause = f"its mean KL is {format_significant(kl)} nats"
        if kl > KL_BOUND:
            broken.append(f"{clause} (bound {KL_BOUND:g})")
        elif kl > KL_NOTICEABLE:
            noticeable.append(f"{clause} (noticeable above {KL_NOTICEABLE:g})")
    if broken:
        return Judgement("broken", tuple(broken))
    if noticeable:
        return Judgement("noticeable", tuple(noticeable))
    if kl is None and (perplexity is None or not reference):
        if reference or (baseline and baseline.kl_mean is not None):
            return Judgement("unknown", ("it has no figures of quality although fp32 has (not measured, or not finite)",))
        return Judgement("unknown", ())
    return Judgement("good", ())


def has_random_weights(records: list[Record]) -> bool:
    """Whether any record is of a model with random weights."""
    return any(bool(r.run.model.get("random_weights")) for r in records)


def choose(records: list[Record], judgements: list[Judgement]) -> int | None:
    """Index of the smallest variant (bytes of weights) whose KL is within KL_BOUND and that is not broken otherwise."""
    usable = [
        i
        for i, (r, j) in enumerate(zip(records, judgements, strict=True))
        if j.level in ("good", "noticeable") and number(r.kl_mean) is not None
    ]
    return min(usable, key=lambda i: (records[i].weight_bytes, i), default=None)


def state_verdict(records: list[Record], judgements: list[Judgement]) -> str:
    """One paragraph in plain words: the smallest usable variant, how it compares with fp32, and what is broken."""
    baseline = find_baseline(records)
    names = name_variants(records)
    sentences = []
    chosen = choose(records, judgements)
    measured = [i for i, r in enumerate(records) if r is not baseline and number(r.kl_mean) is not None]
    if chosen is not None:
        sentences.append(_describe_choice(records[chosen], names[chosen], judgements[chosen], baseline))
        good = [i for i, j in enumerate(judgements) if j.level == "good" and number(records[i].kl_mean) is not None]
        if judgements[chosen].level == "noticeable" and good:
            best = min(good, key=lambda i: (records[i].weight_bytes, i))
            sentences.append(
                f"The smallest without a noticeable loss is {names[best]}: "
                f"{format_megabytes(records[best].weight_bytes)} MB"
                f"{_share(records[best], baseline)}, mean KL {format_significant(records[best].kl_mean, 2)} nats."
            )
    elif measured:
        sentences.append(f"No variant keeps its mean KL within {KL_BOUND:g} nats of the float model.")
    else:
        sentences.append(_describe_sizes(records, names, baseline))
    broken = [names[i] for i, j in enumerate(judgements) if j.level == "broken"]
    if broken:
        sentences.append(f"{_join(broken)} {'is' if len(broken) == 1 else 'are'} broken and should not be used.")
    elif measured:
        sentences.append("No variant is broken.")
    return " ".join(s for s in sentences if s)


def _describe_choice(record: Record, name: str, judgement: Judgement, baseline: Record | None) -> str:
    text = (
        f"{name} is the smallest variant whose mean KL stays within {KL_BOUND:g} nats "
        f"({format_significant(record.kl_mean, 2)}): its weights take {format_megabytes(record.weight_bytes)} MB"
    )
    if baseline is None:
        return text + "; there is no fp32 record to compare with."
    if baseline.weight_bytes:
        share = format_percent(record.weight_bytes / baseline.weight_bytes)
        text += f", {share} % of fp32's {format_megabytes(baseline.weight_bytes)} MB"
    text += _describe_speed(record, baseline)
    return text + (". The loss is noticeable." if judgement.level == "noticeable" else ".")


def _describe_speed(record: Record, baseline: Record) -> str:
    """A clause with its seconds, by the engine where that decoded both records, and torch's beside them."""
    count = record.run.new_tokens
    torch, torch_reference = number(record.seconds_50_tokens), number(baseline.seconds_50_tokens)
    own, reference = engine_seconds(record), engine_seconds(baseline)
    if own and reference:
        text = f", and the engine writes {count} tokens in {format_significant(own)} s, {_compare_speed(own, reference)} there"
        return text + (f" (torch's generate: {format_significant(torch)} s, {_relate(own, torch)})" if torch else "")
    if torch and torch_reference:
        speed = _compare_speed(torch, torch_reference)
        return f", and torch's generate writes {count} tokens in {format_significant(torch)} s, {speed}"
    return ""


def _compare_speed(own: float, reference: float) -> str:
    ratio = reference / own
    return f"{ratio:.2f} times as fast as fp32" if ratio >= 0.995 else f"{1 / ratio:.2f} times as long as fp32 takes"


def _relate(engine: float, torch: float) -> str:
    ratio = torch / engine
    return f"{ratio:.1f} times as long" if ratio >= 1 else f"{1 / ratio:.1f} times as fast"


def engine_seconds(record: Record) -> float | None:
    """Seconds of the engine for the new tokens; None where it did not decode the variant."""
    return number(record.engine.seconds_50_tokens) if record.engine else None


def _describe_sizes(records: list[Record], names: list[str], baseline: Record | None) -> str:
    smallest = min(range(len(records)), key=lambda i: (records[i].weight_bytes, i))
    size = format_megabytes(records[smallest].weight_bytes)
    text = f"Quality was not measured. The smallest variant is {names[smallest]} with {size} MB of weights"
    text += _share(records[smallest], baseline)
    by_engine = {i: seconds for i, r in enumerate(records) if (seconds := engine_seconds(r))}
    by_torch = {i: seconds for i, r in enumerate(records) if (seconds := number(r.seconds_50_tokens))}
    timed, what = (by_engine, "the engine") if by_engine else (by_torch, "torch's generate")
    if timed:
        fastest = min(timed, key=lambda i: (timed[i], i))
        text += (
            f"; the fastest in {what} is {names[fastest]} with {format_significant(timed[fastest])} s "
            f"for {records[fastest].run.new_tokens} tokens"
        )
    return text + "."


def _share(record: Record, baseline: Record | None) -> str:
    if baseline is None or record is baseline or not baseline.weight_bytes:
        return ""
    return f", {format_percent(record.weight_bytes / baseline.weight_bytes)} % of fp32's"


def _join(names: list[str]) -> str:
    return names[0] if len(names) == 1 else f"{', '.join(names[:-1])} and {names[-1]}"


def list_warnings(records: list[Record], judgements: list[Judgement]) -> list[tuple[str, str, str]]:
    """(variant's name, level, sentence) of each variant that is broken, noticeable, or unexpectedly without quality."""
    order = {"broken": 0, "noticeable": 1, "unknown": 2}
    rows = [
        (name, j.level, f"{name}: {' and '.join(j.reasons)}.")
        for name, j in zip(name_variants(records), judgements, strict=True)
        if j.reasons
    ]
    return sorted(rows, key=lambda row: order[row[1]])


def compare_zero_point(records: list[Record]) -> str | None:
    """A sentence on `int8:tensor` (absmax) against `int8:tensor,asym` (zero point): which loses less, and why if not
    the second. None unless both were measured."""
    pairs = [
        (a, z)
        for a in records
        for z in records
        if a.format == "int8:tensor"
        and z.format == "int8:tensor,asym"
        and a.method == z.method
        and a.run.id == z.run.id
        and number(a.kl_mean) is not None
        and number(z.kl_mean) is not None
    ]
    if not pairs:
        return None
    absmax, zero = pairs[0]
    kl_absmax, kl_zero = number(absmax.kl_mean) or 0.0, number(zero.kl_mean) or 0.0
    figures = f"mean KL {format_significant(kl_zero)} nats with a zero point, {format_significant(kl_absmax)} with absmax"
    noise = math.hypot(number(absmax.kl_se) or 0.0, number(zero.kl_se) or 0.0)
    if kl_zero < kl_absmax:
        share = format_percent(1 - kl_zero / kl_absmax, 0)
        text = f"Zero point beats absmax per tensor at 8 bits: {figures} ({share} % lower)"
        close = (
            f", though the difference is within one standard error ({format_significant(noise, 2)})"
            if kl_absmax - kl_zero < noise
            else ""
        )
        return text + close + "."
    more = f" ({format_percent(1 - kl_absmax / kl_zero, 0)} % lower with absmax)" if kl_zero > kl_absmax else ""
    text = f"Zero point does not beat absmax per tensor at 8 bits: {figures}{more}."
    return f"{text} {_explain_zero_point(records, absmax, zero)}".strip()


def _explain_zero_point(records: list[Record], absmax: Record, zero: Record) -> str:
    """Why an own offset did not help, from the ranges that the histograms of the float weights span."""
    baseline = find_baseline(records)
    spans = [span for layer in (baseline.layers if baseline else []) if (span := measure_span(layer)) is not None]
    if spans:
        # Step of absmax: 2 max|w| / 254. Step with a zero point: (max - min) / 255.
        gain = median((2 * max(-low, high) / 254) / ((high - low) / 255) for low, high in spans)
        smaller, bits = format_percent(max(1 - 1 / gain, 0)), max(math.log2(gain), 0)
        if math.log2(gain) < 0.5:
            return (
                f"The weights are nearly symmetric around zero: in the median layer the range from lowest to highest "
                f"makes the step only {smaller} % smaller than twice the largest magnitude does ({bits:.2f} bits, "
                f"to the resolution of the histogram), so a zero point has almost nothing to win."
            )
    pairs = [(a.relative_error, z.relative_error) for a, z in zip(absmax.layers, zero.layers, strict=False) if a.name == z.name]
    if not pairs:
        return ""
    lower = sum(z < a for a, z in pairs)
    return (
        f"Its squared weight error is lower in {lower} of {len(pairs)} layers; "
        f"the error of the weights does not decide the loss of the model alone."
    )


def measure_span(layer: LayerRecord) -> tuple[float, float] | None:
    """(lowest, highest) weight of a layer to the resolution of its histogram; None when it is empty or one-sided."""
    filled = [i for i, count in enumerate(layer.histogram) if count]
    if not filled or layer.histogram_limit <= 0:
        return None
    step = 2 * layer.histogram_limit / len(layer.histogram)
    low = min(filled[0] * step - layer.histogram_limit, 0.0)
    high = max((filled[-1] + 1) * step - layer.histogram_limit, 0.0)
    return low, high
