"""The page: one self-contained HTML file that needs no network and trusts nothing that it shows.

Every text goes through Jinja's escaping; data for the script is JSON in an element that is not executed; the one script
is allowed by its hash in a Content-Security-Policy that forbids everything else, remote or inline. Names of models,
variants and layers and the generated texts may be hostile.
"""

from __future__ import annotations

import base64
import hashlib
import json
import re
from dataclasses import dataclass
from importlib import resources
from typing import Any

from jinja2 import Environment, StrictUndefined
from markupsafe import Markup

from nybble.evaluate.record import LayerRecord, Record
from nybble.report import judge as bounds
from nybble.report.drawing import PALETTE, Plot, inline_svg
from nybble.report.figures import format_megabytes, format_percent, format_significant, number
from nybble.report.judge import (
    FAMILIES,
    choose,
    compare_zero_point,
    count_runs,
    engine_seconds,
    find_baseline,
    find_family,
    has_random_weights,
    judge_variant,
    list_warnings,
    name_variants,
    state_verdict,
)
from nybble.report.plots import collect_errors, colour_error, legend_families, pick_low_bit, shorten_layer, span_errors
from nybble.report.table import summary_table

LEVEL_WORDS = {
    "good": "good",
    "noticeable": "noticeable",
    "broken": "broken",
    "unknown": "not measured",
    "baseline": "reference",
}


@dataclass(frozen=True)
class Sample:
    """A generated text beside fp32's: `same` is their common beginning, `rest` what follows it."""

    same: str
    rest: str
    remark: str


def clean_text(value: object) -> str:
    """Text fit for HTML: control characters but line feed and tab become U+FFFD.

    So do half surrogate pairs, and the characters that turn the direction of what follows them.
    """
    return re.sub(
        r"[\x00-\x08\x0b-\x1f\x7f-\x9f\u202a-\u202e\u2066-\u2069\ud800-\udfff\ufdd0-\ufdef\ufffe\uffff]",
        "\ufffd",
        str(value),
    )


def embed_json(value: Any) -> Markup:
    """JSON that may stand inside a script element: no character in it can end the element or break a line of script."""
    text = json.dumps(value, separators=(",", ":"), allow_nan=False)
    for character in "<>&":
        text = text.replace(character, f"\\u{ord(character):04x}")
    return Markup(text)  # U+2028 and U+2029 are escaped by json.dumps already: it writes ASCII


def render_page(records: list[Record], plots: dict[str, Plot]) -> str:
    """The whole page as text."""
    baseline = find_baseline(records)
    judgements = [judge_variant(r, baseline) for r in records]
    folder = resources.files(__package__) / "templates"
    script = _read(folder / "report.js")
    digest = base64.b64encode(hashlib.sha256(script.encode()).digest()).decode()
    environment = Environment(
        autoescape=True, undefined=StrictUndefined, trim_blocks=True, lstrip_blocks=True, finalize=_finalize
    )
    template = environment.from_string(_read(folder / "report.html.j2"))
    groups: list[list[Any]] = []
    table = summary_table(records)
    for column in table.columns:
        if groups and groups[-1][0] == column.group:
            groups[-1][1] += 1
        else:
            groups.append([column.group, 1])
    return template.render(
        csp=f"default-src 'none'; img-src data:; style-src 'unsafe-inline'; "
        f"script-src 'sha256-{digest}'; base-uri 'none'; form-action 'none'",
        style=Markup(_read(folder / "report.css")),
        script=Markup(script),
        model=records[0].run.model.get("name", "model"),
        verdict=state_verdict(records, judgements),
        tiles=list_tiles(records),
        provenance=describe_run(records[0]) + describe_engine(records),
        random=has_random_weights(records),
        runs=count_runs(records),
        table=table,
        groups=groups,
        families=legend_families(records),
        level_words=LEVEL_WORDS,
        warnings=list_warnings(records, judgements),
        judged=any(j.level in ("good", "noticeable", "broken") for j in judgements),
        finding=compare_zero_point(records),
        notes=collect_notes(records),
        svg={
            name: Markup(inline_svg(plot)) for name, plot in plots.items() if name in ("memory", "speed", "quality", "histograms")
        },
        plots=plots,
        quality_missing=explain_missing_quality(records),
        explorer=embed_json(collect_explorer(records)) if any(r.layers for r in records) else None,
        explored=pick_low_bit(records, judgements),
        names=name_variants(records),
        heat=build_heat(records),
        samples=collect_samples(records),
        prompt=records[0].run.prompt,
        bounds=bounds,
        text=records[0].run.text,
        by_engine=any(r.engine for r in records),
        new_tokens=records[0].run.new_tokens,
        repeats=records[0].run.repeats,
        seed=records[0].run.seed,
    )


def _read(path: Any) -> str:
    return str(path.read_text(encoding="utf-8")).replace("\r\n", "\n")


def _finalize(value: object) -> object:
    return value if isinstance(value, Markup) else clean_text(value) if isinstance(value, str) else value


def describe_run(record: Record) -> list[tuple[str, str]]:
    """(term, words) of where the figures come from."""
    run, model, machine = record.run, record.run.model, record.run.machine
    count = model.get("parameters")
    parameters = f", {count / 1e6:,.1f} M parameters" if isinstance(count, int | float) and not isinstance(count, bool) else ""
    rows = [("Model", f"{model.get('name', '?')} ({model.get('architecture', '?')}{parameters})")]
    if model.get("blake3"):
        rows.append(("BLAKE3", str(model["blake3"])[:16]))
    if run.text:
        text = run.text
        stride = f" every {text['stride']}" if text.get("stride") else ""
        rows.append(("Text", f"{text.get('name', '?')}, {_count(text.get('tokens'))} tokens"))
        rows.append(
            (
                "Protocol",
                f"{text.get('protocol', '?')}, windows of {_count(text.get('window'))}{stride}, "
                f"{_count(text.get('scored_tokens'))} tokens scored, "
                f"KL over {_count(text.get('kl_tokens'))}",
            )
        )
    else:
        rows.append(("Text", "none: quality was not measured"))
    memory = machine.get("memory_bytes")
    gigabytes = f", {memory / 1e9:.0f} GB" if isinstance(memory, int | float) else ""
    bandwidth = machine.get("bandwidth_bytes_per_second")
    reading = f", reads {bandwidth / 1e9:.1f} GB/s" if isinstance(bandwidth, int | float) else ""
    rows.append(
        (
            "Machine",
            f"{machine.get('cpu', '?')}, {machine.get('cores', '?')} cores{gigabytes}{reading}, {machine.get('system', '?')}",
        )
    )
    rows.append(("Threads", str(run.threads)))
    rows.append(("Seed", str(run.seed)))
    rows.append(("Versions", ", ".join(f"{name} {version}" for name, version in run.versions.items())))
    rows.append(("Date", str(run.created)))
    return rows


def describe_engine(records: list[Record]) -> list[tuple[str, str]]:
    """(term, words) of how the engine decoded; nothing where it decoded none."""
    engines = [r.engine for r in records if r.engine]
    if not engines:
        return []
    facts = dict.fromkeys(f"{e.cache} cache, {e.instruction_set}, {e.threads} threads" for e in engines)
    rounded = any(e.activations == "int8" for e in engines)
    activations = "activations rounded to int8 where weights have codes" if rounded else "float activations"
    return [("Engine", f"{activations}; {'; '.join(facts)}")]


def _count(value: object) -> str:
    return f"{value:,}" if isinstance(value, int) and not isinstance(value, bool) else "?"


def list_tiles(records: list[Record]) -> list[tuple[str, str, str]]:
    """(label, figure, comparison) of the variant that the verdict names; none when there is no such variant."""
    baseline = find_baseline(records)
    chosen = choose(records, [judge_variant(r, baseline) for r in records])
    if chosen is None or baseline is None:
        return []
    record = records[chosen]
    tiles = [("Weights", f"{format_megabytes(record.weight_bytes)} MB", f"fp32 {format_megabytes(baseline.weight_bytes)} MB")]
    torch, torch_reference = format_significant(record.seconds_50_tokens), format_significant(baseline.seconds_50_tokens)
    own, reference = engine_seconds(record), engine_seconds(baseline)
    if own and reference:
        beside = f"fp32 {format_significant(reference)} s; torch {torch}, fp32 {torch_reference}"
        tiles.append((f"{record.run.new_tokens} tokens, engine", f"{format_significant(own)} s", beside))
    elif number(record.seconds_50_tokens) and number(baseline.seconds_50_tokens):
        tiles.append((f"{record.run.new_tokens} tokens, torch", f"{torch} s", f"fp32 {torch_reference} s"))
    if number(record.perplexity) and number(baseline.perplexity):
        tiles.append(("Perplexity", f"{record.perplexity:.2f}", f"fp32 {baseline.perplexity:.2f}"))
    if number(record.top1_agreement) is not None:
        tiles.append(
            (
                "Same top token",
                f"{format_percent(record.top1_agreement)} %",
                f"mean KL {format_significant(record.kl_mean, 2)} nats",
            )
        )
    return tiles


def explain_missing_quality(records: list[Record]) -> str:
    """Why there is no plot of quality."""
    if has_random_weights(records):
        return (
            "The weights are random, so quality has no meaning and was not measured: "
            "these figures are good for speed and memory only."
        )
    return "Quality was not measured in this run, so there is nothing to plot against bits per weight."


def collect_notes(records: list[Record]) -> list[tuple[str, list[str]]]:
    """(note, names of the variants that bear it), in order of first appearance."""
    notes: dict[str, list[str]] = {}
    for name, record in zip(name_variants(records), records, strict=True):
        for note in record.notes:
            notes.setdefault(str(note), []).append(name)
    return list(notes.items())


def collect_explorer(records: list[Record]) -> dict[str, Any]:
    """What the script draws: per variant its layers' histograms, and the index of the outline to lay over them."""
    baseline = find_baseline(records)
    return {
        "baseline": next((i for i, r in enumerate(records) if r is baseline), None),
        "variants": [
            {
                "name": clean_text(name),
                "family": find_family(record),
                "layers": [
                    _pack(
                        "whole model",
                        record.format,
                        record.bpw,
                        None,
                        None,
                        record.model_histogram_limit,
                        record.model_histogram,
                    )
                ]
                + [
                    _pack(
                        layer.name,
                        layer.format,
                        layer.bpw,
                        layer.relative_error,
                        layer.shape,
                        layer.histogram_limit,
                        layer.histogram,
                        describe_account(layer),
                    )
                    for layer in record.layers
                ],
            }
            for name, record in zip(name_variants(records), records, strict=True)
        ],
    }


def _pack(
    name: str,
    spec: str,
    bpw: float,
    error: float | None,
    shape: tuple[int, int] | None,
    limit: float,
    counts: list[int],
    account: str = "",
) -> dict[str, Any]:
    details = [clean_text(spec), f"{number(bpw) or 0:.2f} bits per weight"]
    if shape:
        details.insert(0, " × ".join(str(n) for n in shape))
    if error is not None:
        details.append(f"relative error {format_significant(error)}")
    if account:
        details.append(account)
    return {"n": clean_text(name), "d": ", ".join(details), "l": number(limit) or 0, "h": counts}


def describe_account(layer: LayerRecord) -> str:
    """What a calibrated method did to a layer, in words; empty for the others."""
    before, after = number(layer.loss_of_rounding), number(layer.loss)
    if before is None or after is None:
        return ""
    words = [f"error of its outputs {format_significant(after)} (rounding: {format_significant(before)})"]
    if layer.damping:
        words.append(f"damping {layer.damping:g}")
    if layer.dead_columns:
        words.append(f"{layer.dead_columns} dead columns")
    if layer.rows_fallen_back:
        words.append(f"{layer.rows_fallen_back} rows rounded")
    return ", ".join(words)


def build_heat(records: list[Record]) -> dict[str, Any] | None:
    """The heat map: rows of (colour, text colour, short value, tooltip), names of columns, stops of the colour bar."""
    variants, layers, rows = collect_errors(records)
    span = span_errors(rows)
    if span is None:
        return None
    names = name_variants(records)
    cells = []
    for layer, row in zip(layers, rows, strict=True):
        line = []
        for i, error in zip(variants, row, strict=True):
            if error is None:
                line.append(("", "", "", f"{layer}, {names[i]}: not stored"))
                continue
            colour = colour_error(error, span)
            luminance = sum(w * int(colour[k : k + 2], 16) for w, k in ((0.299, 1), (0.587, 3), (0.114, 5)))
            short = f"{error:.0e}".replace("e-0", "e-").replace("e+00", "") if error else "0"
            line.append(
                (
                    colour,
                    "#101418" if luminance > 135 else "#f4f6f8",
                    short,
                    f"{layer}, {names[i]}: {format_significant(error)}",
                )
            )
        cells.append((shorten_layer(layer), line))
    steps = [span[0] + (span[1] - span[0]) * k / 12 for k in range(13)]
    return {
        "names": [names[i] for i in variants],
        "rows": cells,
        "stops": ", ".join(colour_error(10**s, span) for s in steps),
        "ends": (
            format_significant(10 ** span[0], 2),
            format_significant(10 ** ((span[0] + span[1]) / 2), 2),
            format_significant(10 ** span[1], 2),
        ),
    }


def split_sample(text: str, reference: str | None) -> Sample:
    """Where a text first leaves fp32's."""
    if reference is None:
        return Sample(text, "", "")
    if text == reference:
        return Sample(text, "", "same as fp32")
    place = next((k for k, (a, b) in enumerate(zip(text, reference, strict=False)) if a != b), min(len(text), len(reference)))
    return Sample(text[:place], text[place:], f"differs from character {place + 1}")


def collect_samples(records: list[Record]) -> list[dict[str, Any]]:
    """One card a variant that has generated anything."""
    baseline = find_baseline(records)
    cards = []
    for name, record in zip(name_variants(records), records, strict=True):
        if record.sample_greedy is None and record.sample_top_k is None:
            continue
        reference = (
            baseline.sample_greedy
            if baseline is not None and record is not baseline and baseline.run.prompt == record.run.prompt
            else None
        )
        greedy = split_sample(record.sample_greedy, reference) if record.sample_greedy is not None else None
        cards.append(
            {
                "name": name,
                "family": find_family(record),
                "greedy": greedy,
                "top_k": record.sample_top_k,
                "level": judge_variant(record, baseline).level,
            }
        )
    return cards


assert set(FAMILIES) <= set(PALETTE), "every family needs a colour"
