"""What `write_report` leaves on disk: complete, safe to open, the same every time, or nothing."""

from __future__ import annotations

import base64
import dataclasses
import hashlib
import json
import os
import re
import xml.etree.ElementTree as ElementTree
from collections import Counter
from collections.abc import Callable
from dataclasses import replace
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import matplotlib
import pytest
from hostile import HOSTILE, poison

from nybble.errors import InputError, OutputError
from nybble.evaluate.record import LayerRecord, Record, read_results
from nybble.report import write_report
from nybble.report.drawing import PALETTE, clean_label
from nybble.report.markdown import escape, render_markdown
from nybble.report.page import clean_text, embed_json, render_page, split_sample

PLOTS = ("overview", "memory", "speed", "quality", "histograms", "layers", "errors")


class Elements(HTMLParser):
    """Counts elements, and keeps scripts, ids and everything that could load or run something."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.tags: Counter[str] = Counter()
        self.scripts: list[tuple[str | None, str]] = []
        self.ids: list[str] = []
        self.references: list[str] = []
        self.handlers: list[str] = []
        self.policy = ""
        self._script: str | None = None
        self._inside = False
        self.feed(text)

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags[tag] += 1
        values = dict(attrs)
        self.ids += [v for k, v in attrs if k == "id" and v]
        self.handlers += [k for k, _ in attrs if k.startswith("on")]
        self.references += [v or "" for k, v in attrs if k in ("src", "href", "xlink:href", "action", "srcset", "data")]
        if values.get("http-equiv") == "Content-Security-Policy":
            self.policy = values.get("content") or ""
        if tag == "script":
            self._inside, self._script = True, values.get("type")
            self.scripts.append((self._script, ""))

    def handle_endtag(self, tag: str) -> None:
        if tag == "script":
            self._inside = False

    def handle_data(self, data: str) -> None:
        if self._inside:
            kind, text = self.scripts[-1]
            self.scripts[-1] = (kind, text + data)


@pytest.fixture(scope="module")
def page(tmp_path_factory: pytest.TempPathFactory, _all_records: list[Record]) -> Path:
    html = tmp_path_factory.mktemp("report") / "report.html"
    write_report(_all_records, html)
    return html


def test_writes_page_markdown_and_every_plot_twice(page: Path) -> None:
    expected = {"report.html", "report.md", "plots"}
    assert {p.name for p in page.parent.iterdir()} == expected
    assert {p.name for p in (page.parent / "plots").iterdir()} == {f"{n}.{k}" for n in PLOTS for k in ("svg", "png")}
    for name in PLOTS:
        svg = (page.parent / "plots" / f"{name}.svg").read_bytes()
        assert ElementTree.fromstring(svg).tag == "{http://www.w3.org/2000/svg}svg"
        assert b"var(--" not in svg
        assert (page.parent / "plots" / f"{name}.png").read_bytes().startswith(b"\x89PNG\r\n\x1a\n")
    assert page.stat().st_size < 3_000_000


def test_returns_what_it_wrote_page_first(tmp_path: Path, records: list[Record]) -> None:
    written = write_report(records[:1], tmp_path / "new" / "folder" / "page.html")
    assert written[:2] == [tmp_path / "new/folder/page.html", tmp_path / "new/folder/page.md"]
    assert sorted(written) == sorted(p for p in tmp_path.rglob("*") if p.is_file())


def test_same_records_same_bytes(tmp_path: Path, records: list[Record], page: Path) -> None:
    before = dict(matplotlib.rcParams)
    again = write_report(records, tmp_path / "report.html")
    assert dict(matplotlib.rcParams) == before
    for path in again:
        assert path.read_bytes() == (page.parent / path.relative_to(tmp_path)).read_bytes(), path.name


def test_page_forbids_everything_but_its_own_script(page: Path) -> None:
    elements = Elements(page.read_text("utf-8"))
    code = [text for kind, text in elements.scripts if kind is None]
    assert len(code) == 1
    digest = base64.b64encode(hashlib.sha256(code[0].encode()).digest()).decode()
    assert elements.policy == (
        "default-src 'none'; img-src data:; style-src 'unsafe-inline'; "
        f"script-src 'sha256-{digest}'; base-uri 'none'; form-action 'none'"
    )
    assert not elements.handlers
    assert all(r.startswith(("#", "data:image/svg+xml,", "plots/")) for r in elements.references), elements.references


def test_ids_are_unique_and_references_resolve(page: Path) -> None:
    text = page.read_text("utf-8")
    elements = Elements(text)
    doubles = [i for i, n in Counter(elements.ids).items() if n > 1]
    assert not doubles
    wanted = {r[1:] for r in elements.references if r.startswith("#")} | set(re.findall(r"url\(#([^)]+)\)", text))
    assert wanted <= set(elements.ids)


def test_inline_plots_follow_the_theme(page: Path) -> None:
    text = page.read_text("utf-8")
    drawings = re.findall(r'<svg class="plot" viewBox.*?</svg>', text, flags=re.DOTALL)
    plots = [d for d in drawings if "<title" in d]
    assert len(plots) == 4
    for drawing in plots:
        assert not [c for c in PALETTE.values() if c in drawing]
        assert "var(--p-ink)" in drawing
        assert "font-family" not in drawing
        assert "#000000" not in drawing
        assert "#ffffff" not in drawing
    for name in PALETTE:
        assert text.count(f"--p-{name}:") == 2, f"--p-{name} needs a light and a dark value"


def test_page_says_what_was_found(page: Path) -> None:
    text = page.read_text("utf-8")
    for part in (
        "nf4:g64,dq is the smallest variant", "int2:g64: its perplexity is 50.40 times", "Zero point beats absmax",
        "position embedding kept in fp16", "2026-03-01T10:20:30Z", "Example CPU", "torch 2.13.0", "windows of 512",
        "differs from character",
        "same as fp32", "Here: <b>paper</b>",
    ):  # fmt: skip
        assert part.replace("'", "&#39;") in text, part
    sections = ("results", "warnings", "memory", "speed", "quality", "weights", "errors", "texts", "reading")
    order = [text.index(f'<section id="{name}"') for name in sections]
    assert order == sorted(order)


def test_explorer_holds_every_variant_and_layer(page: Path, records: list[Record]) -> None:
    (data,) = (json.loads(t) for kind, t in Elements(page.read_text("utf-8")).scripts if kind == "application/json")
    assert [v["name"] for v in data["variants"]] == [r.variant for r in records]
    assert data["baseline"] == 0
    for variant, record in zip(data["variants"], records, strict=True):
        assert [layer["n"] for layer in variant["layers"]] == ["whole model", *(layer.name for layer in record.layers)]
        assert variant["layers"][3]["h"] == record.layers[2].histogram


def check_harmless(text: str, expected: Elements) -> None:
    found = Elements(text)
    assert found.tags == expected.tags
    assert not found.handlers
    assert found.policy == expected.policy
    assert [kind for kind, _ in found.scripts] == [kind for kind, _ in expected.scripts]
    assert all(r.startswith(("#", "data:image/svg+xml,", "plots/")) for r in found.references)


@pytest.mark.parametrize("text", HOSTILE, ids=range(len(HOSTILE)))
def test_hostile_texts_make_no_element(records: list[Record], text: str) -> None:
    expected = Elements(render_page(poison(records, ("plain",) * 4), {}))
    hostile = poison(records, (text,) * 4)
    check_harmless(render_page(hostile, {}), expected)
    markdown = render_markdown(hostile, {})
    assert not re.search(r"<[a-zA-Z/!]", markdown)
    rows = [line for line in markdown.splitlines() if line.startswith("|")]
    assert len({len(re.findall(r"(?<!\\)\|", row)) for row in rows}) == 1


def test_hostile_texts_in_a_whole_report(tmp_path: Path, records: list[Record]) -> None:
    write_report(poison(records, HOSTILE), tmp_path / "report.html")
    text = (tmp_path / "report.html").read_text("utf-8")
    assert set(Elements(text).tags) <= PAGE_TAGS | DRAWING_TAGS
    assert len(Elements(text).scripts) == 2
    assert not Elements(text).handlers
    (tmp_path / "report.md").read_text("utf-8")
    for svg in (tmp_path / "plots").glob("*.svg"):
        tags = {e.tag.removeprefix("{http://www.w3.org/2000/svg}") for e in ElementTree.fromstring(svg.read_bytes()).iter()}
        known = DRAWING_TAGS | {"svg", "style", "clipPath", "linearGradient"}
        assert {t for t in tags if not t.startswith("{")} <= known | {"metadata", "image"}, svg.name


PAGE_TAGS = {
    "html", "head", "meta", "title", "link", "style", "body", "header", "p", "strong", "h1", "dl", "div", "dt",
    "dd", "b", "span", "details", "summary", "nav", "a", "main", "section", "h2", "h3", "sup", "ul", "li", "i",
    "table", "thead", "tr", "td", "th", "button", "small", "tbody", "label", "select", "svg", "noscript", "script",
    "article", "pre", "bdi", "mark", "q", "code",
}  # fmt: skip
DRAWING_TAGS = {"title", "g", "path", "use", "text", "tspan", "defs", "clippath", "rect"}


def test_embedded_json_cannot_leave_its_element() -> None:
    value = {"x": "</script><!--&\u2028\u2029\ud800"}
    text = embed_json(value)
    assert not set("<>&\u2028\u2029\ud800") & set(text)
    assert json.loads(text) == value


def test_labels_of_plots_are_short_and_drawable() -> None:
    assert clean_label("int4:g64") == "int4:g64"
    assert clean_label("a\n\x00漢") == "a???"
    long = clean_label("x" * 300, 20)
    assert len(long) == 20
    assert "…" in long


def test_markdown_escapes() -> None:
    assert escape("a|b\n<i>*x*</i> http://e.org") == r"a\|b &lt;i&gt;\*x\*&lt;/i&gt; http:&#47;&#47;e.org"


def test_markdown_has_table_warnings_and_plots(page: Path, records: list[Record]) -> None:
    text = page.with_suffix(".md").read_text("utf-8")
    rows = [line for line in text.splitlines() if line.startswith("| ")]
    assert len(rows) == 2 + len(records)
    assert all(f"| {r.variant} |" in text for r in records)
    assert "- **broken**: int3:g64" in text
    assert "perplexity (± se)" in rows[0]
    for name in PLOTS:
        assert f"](plots/{name}.png)" in text
        assert f"](plots/{name}.svg)" in text


def test_samples_are_split_where_they_leave_fp32() -> None:
    assert split_sample("abcd", "abxd") == split_sample("abcd", "abyy")
    split = split_sample("abcd", "abxd")
    assert (split.same, split.rest, split.remark) == ("ab", "cd", "differs from character 3")
    assert split_sample("abc", "abc").remark == "same as fp32"
    assert split_sample("ab", "abc").remark == "differs from character 3"
    assert split_sample("abc", None).same == "abc"


NOTHING: dict[str, Any] = {f.name: None for f in dataclasses.fields(Record) if "None" in str(f.type)}


@pytest.mark.parametrize("count", [1, 3])
def test_nothing_measured(tmp_path: Path, records: list[Record], change: Callable[..., list[Record]], count: int) -> None:
    bare = change(records[:count], run={"text": None, "prompt": None}, layers=[], model_histogram=[], **NOTHING)
    write_report(bare, tmp_path / "report.html")
    assert {p.name for p in (tmp_path / "plots").iterdir()} == {"memory.svg", "memory.png"}
    text = (tmp_path / "report.html").read_text("utf-8")
    for part in (
        "Speed was not measured",
        "Quality was not measured",
        "No histograms were recorded",
        "No texts were generated",
    ):
        assert part in text
    assert "None" not in re.sub(r"<(script|style).*?</\1>", "", text, flags=re.DOTALL)


def test_random_weights_are_marked_and_have_no_plot_of_quality(
    tmp_path: Path, records: list[Record], change: Callable[..., list[Record]]
) -> None:
    model = {**records[0].run.model, "random_weights": True}
    quality = dict.fromkeys(("perplexity", "perplexity_se", "kl_mean", "kl_se", "kl_p99", "top1_agreement"))
    random = change(records[:4], run={"model": model, "text": None}, **quality)
    write_report(random, tmp_path / "report.html")
    text = (tmp_path / "report.html").read_text("utf-8")
    assert "<strong>Random weights</strong>" in text
    assert "The weights are random, so quality has no meaning" in text
    assert "Random weights: good for speed and memory only." in (tmp_path / "report.md").read_text("utf-8")
    assert not (tmp_path / "plots" / "quality.svg").exists()


@pytest.mark.parametrize("chosen", [slice(0, 1), slice(6, 7), slice(3, 8)], ids=["fp32", "one", "no-fp32"])
def test_few_records(tmp_path: Path, records: list[Record], chosen: slice) -> None:
    write_report(records[chosen], tmp_path / "report.html")
    text = (tmp_path / "report.html").read_text("utf-8")
    assert all(r.variant in text for r in records[chosen])


def test_records_older_than_the_engine_are_reported_as_before(
    tmp_path: Path, records: list[Record], change: Callable[..., list[Record]]
) -> None:
    lines = []
    for record in change(records[:8], engine=None):
        data = json.loads(record.to_line())
        del data["engine"]
        lines.append(json.dumps(data))
    (tmp_path / "results.jsonl").write_text("\n".join(lines), encoding="utf-8")
    write_report(read_results(tmp_path / "results.jsonl"), tmp_path / "report.html")
    text = (tmp_path / "report.html").read_text("utf-8")
    assert "engine" not in re.sub(r"<(script|style).*?</\1>", "", text, flags=re.DOTALL)
    assert "torch&#39;s generate writes 50 tokens" in text


def test_the_page_labels_both_speeds(page: Path) -> None:
    text = page.read_text("utf-8")
    for part in (
        "and the engine writes 50 tokens in", "(torch&#39;s generate:", "50 tokens, engine", "Engine speed", "torch speed",
        "activations rounded to int8 where weights have codes; f16 cache, avx512vnni, 2 threads",
    ):  # fmt: skip
        assert part in text, part
    assert "engine: 50 tokens (s)" in page.with_suffix(".md").read_text("utf-8")


def test_runs_mixed_are_said(tmp_path: Path, records: list[Record]) -> None:
    other = replace(records[1], run=replace(records[1].run, id="another"))
    write_report([records[0], other], tmp_path / "report.html")
    assert "<strong>2 runs mixed</strong>" in (tmp_path / "report.html").read_text("utf-8")
    assert "come from 2 runs" in (tmp_path / "report.md").read_text("utf-8")


def test_plots_of_an_earlier_report_do_not_stay(tmp_path: Path, records: list[Record]) -> None:
    write_report(records[:3], tmp_path / "report.html")
    (tmp_path / "plots" / "mine.txt").write_text("kept")
    write_report([replace(r, **NOTHING) for r in records[:3]], tmp_path / "report.html")
    names = {p.name for p in (tmp_path / "plots").iterdir()}
    assert "quality.svg" not in names
    assert {"mine.txt", "memory.svg"} <= names


def test_empty_and_malformed_records(tmp_path: Path, records: list[Record]) -> None:
    with pytest.raises(InputError, match="no records"):
        write_report([], tmp_path / "report.html")
    bad: list[tuple[dict[str, Any], str]] = [
        ({"perplexity": "<b>"}, r"record 1: perplexity is '<b>', not a number"),
        ({"weight_bytes": None}, "weight_bytes is None"),
        ({"variant": 3}, "variant is 3, not a text"),
        (
            {"engine": replace(records[0].engine, seconds_50_tokens="<b>")},
            r"record 1: the engine's seconds_50_tokens is '<b>', not float",
        ),
        ({"engine": replace(records[0].engine, seconds_50_tokens_runs=[None])}, r"seconds_50_tokens_runs is \[None\]"),
        ({"engine": replace(records[0].engine, cache=3)}, "cache is 3, not str"),
        ({"model_histogram": ["1"]}, "histogram of 'the model'"),
        ({"layers": [LayerRecord("w", 0, "linear", (1, 1), "x", 4, 0.1, 1.0, [-1])]}, "histogram of 'w'"),
    ]
    for fields, message in bad:
        with pytest.raises(InputError, match=message):
            write_report([replace(records[0], **fields)], tmp_path / "report.html")
    assert not list(tmp_path.iterdir())


def test_where_it_cannot_write(tmp_path: Path, records: list[Record]) -> None:
    with pytest.raises(OutputError, match="is a folder"):
        write_report(records[:1], tmp_path)
    with pytest.raises(OutputError, match=r"another suffix than \.md"):
        write_report(records[:1], tmp_path / "report.md")
    (tmp_path / "file").write_text("x")
    with pytest.raises(OutputError, match="cannot write the report to"):
        write_report(records[:1], tmp_path / "file" / "report.html")
    (tmp_path / "plots").write_text("in the way")
    with pytest.raises(OutputError, match="cannot write the report to"):
        write_report(records[:1], tmp_path / "report.html")
    assert {p.name for p in tmp_path.iterdir()} == {"file", "plots"}


def test_full_disk_leaves_nothing(tmp_path: Path, records: list[Record], monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "report.html").write_text("old")
    real, calls = os.fdopen, []

    def fail(*arguments: Any, **named: Any) -> Any:
        calls.append(1)
        if len(calls) == 3:
            os.close(arguments[0])
            raise OSError(28, "No space left on device")
        return real(*arguments, **named)

    monkeypatch.setattr(os, "fdopen", fail)
    with pytest.raises(OutputError, match="No space left on device"):
        write_report(records[:1], tmp_path / "report.html")
    assert (tmp_path / "report.html").read_text() == "old"
    assert [p.name for p in tmp_path.rglob("*") if p.is_file()] == ["report.html"]


def test_text_cannot_turn_the_direction_of_the_page() -> None:
    assert clean_text("a\u202eb\u2066c\x00\x1b\ud800\td\n") == "a\ufffdb\ufffdc\ufffd\ufffd\ufffd\td\n"
