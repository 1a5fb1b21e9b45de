"""The page as Chromium sees it: silent, on its own, sortable, in both themes and at both widths."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import pytest
from chromium import Browser, find_browser
from hostile import HOSTILE, poison

from nybble.evaluate.record import Record
from nybble.report import summary_table, write_report

pytestmark = [
    pytest.mark.browser,
    pytest.mark.skipif(find_browser() is None, reason="no chromium, chromium-browser or google-chrome on the PATH"),
]
# Brightness of the colour behind an element, 0 to 255.
BRIGHTNESS = "(e => getComputedStyle(e).{0}.match(/[0-9.]+/g).slice(0, 3).reduce((s, n) => s + +n / 3, 0))"


@pytest.fixture(scope="module")
def page(tmp_path_factory: pytest.TempPathFactory, _all_records: list[Record]) -> Path:
    html = tmp_path_factory.mktemp("report") / "report.html"
    write_report(_all_records, html)
    return html


@pytest.fixture(scope="module")
def browser() -> Iterator[Browser]:
    path = find_browser()
    assert path is not None
    with Browser(path) as opened:
        yield opened


@pytest.mark.parametrize("dark", [False, True], ids=["light", "dark"])
@pytest.mark.parametrize("width", [390, 1280])
def test_silent_alone_and_within_the_window(browser: Browser, page: Path, width: int, dark: bool) -> None:
    browser.open(page, width=width, dark=dark)
    assert browser.errors == []
    assert [url for url in browser.requests if not url.startswith("data:")] == [page.as_uri()]
    assert browser.evaluate("innerWidth") == width
    assert browser.evaluate("document.documentElement.scrollWidth") <= width
    assert browser.evaluate("document.body.scrollWidth") <= width
    page_brightness = browser.evaluate(f"{BRIGHTNESS.format('backgroundColor')}(document.body)")
    text_brightness = browser.evaluate(f"{BRIGHTNESS.format('color')}(document.body)")
    plot_text = browser.evaluate(f"{BRIGHTNESS.format('fill')}(document.querySelector('.figure svg text'))")
    assert (page_brightness < 60) == dark
    assert (text_brightness > 180) == dark
    assert (plot_text > 130) == dark
    picture = browser.picture()
    assert picture.startswith(b"\x89PNG")
    assert int.from_bytes(picture[16:20], "big") == width


def test_a_blocked_script_is_noticed(browser: Browser, page: Path) -> None:
    """The harness must see errors, or the silence above would mean nothing."""
    changed = page.with_name("changed.html")
    changed.write_text(page.read_text("utf-8").replace('"use strict";', '"use strict"; '), "utf-8")
    browser.open(changed)
    assert any("Content Security Policy" in error for error in browser.errors)


def column(browser: Browser, k: int) -> list[str]:
    values = browser.evaluate(f"[...document.querySelectorAll('#table tbody tr')].map(r => r.cells[{k}].dataset.v)")
    return [str(v) for v in values]


def test_table_sorts_by_mouse_and_keyboard(browser: Browser, page: Path, records: list[Record]) -> None:
    browser.open(page)
    original = column(browser, 0)
    heading = "document.querySelectorAll('#table thead tr')[1].cells[{}]"
    browser.evaluate(f"{heading.format(2)}.querySelector('button').click()")
    sizes = [float(v) for v in column(browser, 2)]
    assert sizes == sorted(r.weight_bytes for r in records)
    assert browser.evaluate(f"{heading.format(2)}.getAttribute('aria-sort')") == "ascending"
    browser.evaluate(f"{heading.format(2)}.querySelector('button').focus()")
    browser.press("Enter", 13)
    assert [float(v) for v in column(browser, 2)] == sorted(sizes, reverse=True)
    assert browser.evaluate(f"{heading.format(2)}.getAttribute('aria-sort')") == "descending"
    browser.evaluate(f"{heading.format(0)}.querySelector('button').click()")
    assert column(browser, 0) == original
    assert browser.evaluate("document.querySelectorAll('#table [aria-sort=none]').length") == len(summary_table(records).columns)


def test_what_was_not_measured_sorts_last(browser: Browser, tmp_path: Path, records: list[Record]) -> None:
    some = [replace(records[0], load_seconds=None), *records[1:4]]
    keys = [c.key for c in summary_table(some).columns]
    write_report(some, tmp_path / "report.html")
    browser.open(tmp_path / "report.html")
    for _ in range(2):
        browser.evaluate("document.querySelectorAll('#table button')[" + str(1 + keys.index("torch_load")) + "].click()")
        assert column(browser, 1 + keys.index("torch_load"))[-1] == ""


def test_explorer_draws_the_layer_that_is_chosen(browser: Browser, page: Path, records: list[Record]) -> None:
    browser.open(page)
    bars = "document.querySelectorAll('#layer-plot rect').length"
    assert browser.evaluate("document.getElementById('pick-variant').selectedOptions[0].textContent") == "nf4:g64,dq"
    browser.evaluate(
        "(() => { const v = document.getElementById('pick-variant');"
        "v.value = '12'; v.dispatchEvent(new Event('change'));"
        "const l = document.getElementById('pick-layer'); l.value = '5'; l.dispatchEvent(new Event('change')); })()"
    )
    layer = records[12].layers[4]
    assert browser.evaluate("document.getElementById('pick-layer').selectedOptions[0].textContent") == layer.name
    assert browser.evaluate(bars) == sum(n > 0 for n in layer.histogram)
    assert "int2:g64, 2.25 bits per weight" in browser.evaluate("document.getElementById('layer-details').textContent")
    browser.evaluate("document.getElementById('layer-next').click()")
    assert browser.evaluate(bars) == sum(n > 0 for n in records[12].layers[5].histogram)
    assert browser.errors == []


def test_hostile_texts_run_nothing(browser: Browser, tmp_path: Path, records: list[Record]) -> None:
    write_report(poison(records, HOSTILE), tmp_path / "report.html")
    browser.open(tmp_path / "report.html", width=390)
    assert browser.errors == []
    assert [url for url in browser.requests if not url.startswith("data:")] == [(tmp_path / "report.html").as_uri()]
    assert browser.evaluate("document.title").startswith("nybble compare: </script>")
    assert browser.evaluate("document.images.length") == 0
    assert browser.evaluate("document.documentElement.scrollWidth") <= 390
