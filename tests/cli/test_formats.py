"""`nybble formats` as its user meets it, and the page that shows its table."""

from __future__ import annotations

import json
import re
import xml.etree.ElementTree as ElementTree
from collections.abc import Callable
from pathlib import Path
from subprocess import CompletedProcess

import matplotlib.image
import pytest

from nybble.cli.formats import markdown_table
from nybble.containers import find_container
from nybble.formats import format_names, parse_format
from nybble.formats.explain import explain_all
from nybble.formats.floating import OTHERS

Run = Callable[..., CompletedProcess[str]]
DOCS = Path(__file__).parents[2] / "docs"


def succeed(done: CompletedProcess[str]) -> str:
    assert done.returncode == 0, done.stderr
    assert done.stderr == ""
    assert "\x1b" not in done.stdout
    return done.stdout


@pytest.fixture(scope="module")
def table(nybble_command: Run) -> str:
    return succeed(nybble_command("formats"))


def test_the_table_has_a_row_for_every_format(table: str) -> None:
    head, below = table.split("─\n")
    rows = {line.split()[0]: line for line in below.split("\n\n")[0].splitlines()}
    assert {name.split(":")[0].split(",")[0] for name in rows} == {*format_names(), *OTHERS}
    assert "bits per" in head
    assert "±65504" in rows["fp16"]
    assert "±448" in rows["fp8_e4m3"]
    assert "±57344" in rows["fp8_e5m2"]
    assert rows["int4:g64"].split()[1:5] == ["awq,", "compressed-tensors,", "gptq", "4"]
    assert rows["int4:g64"].endswith(" 4.2500")
    assert rows["q4_k"].split()[1] == "gguf"
    assert max(map(len, table.splitlines())) <= 140


def test_single_formats(nybble_command: Run) -> None:
    shown = succeed(nybble_command("formats", "int4:g64", "nf4", "q4_k", "fp16"))
    parts = shown.split("\n\n")
    assert [part.split(":")[0] for part in parts[::2]] == ["int4", "nf4", "q4_k", "fp16"]
    assert "-8 -7 -6 -5 -4 -3 -2 -1 0 1 2 3 4 5 6 7" in parts[0]
    assert "codes 256, scale 16 (float16)" in parts[0]
    assert "4.2500 bits per weight of a [768, 768] matrix, 313,344 bytes" in parts[0]
    assert "|w - value| <= 0.500001 |scale|" in parts[0]
    assert "halfway to the even one" in " ".join(parts[0].split())
    assert parts[1].splitlines()[0].strip().count("|") == 16
    assert "dmin" in parts[4]
    assert "5 bits of exponent, 10 of mantissa" in parts[6]
    pictures = [line for part in parts[1::2] for line in part.splitlines()[:1]]
    assert {len(line) for line in pictures} == {74}
    assert max(map(len, shown.splitlines())) <= 110


def test_what_needs_no_torch_and_no_matplotlib(python_script: Callable[..., str]) -> None:
    program = """
import sys
sys.argv = ["nybble", "formats", *sys.argv[1:]]
from nybble.cli import main
try:
    main()
except SystemExit as end:
    assert not end.code, end.code
assert not {"torch", "transformers", "matplotlib", "pydantic"} & set(sys.modules), "formats imported what it does not need"
"""
    assert "fp16" in python_script(program)
    assert "|w - value|" in python_script(program, "int4:g64", "nf4")


def test_json(nybble_command: Run) -> None:
    facts = {row["spec"]: row for row in json.loads(succeed(nybble_command("formats", "--json")))}
    assert {row.spec for row in explain_all()} == set(facts)
    assert facts["fp16"]["floating"]["largest"] == 65504
    assert facts["int4:g64"]["levels"] == list(range(-8, 8))
    assert facts["fp64"]["count"] == 2**64 - 2**53 - 1
    one = json.loads(succeed(nybble_command("formats", "nf4,dq", "--json")))
    assert [row["bits_per_weight"] for row in one] == [parse_format("nf4:g64,dq").bits_per_weight((768, 768))]


@pytest.mark.parametrize("spec", ["int9", "fp8_e4m2", "int4:g63", "fp64:g64", "", "q4_k_m"])
def test_unknown_names(spec: str, nybble_command: Run) -> None:
    done = nybble_command("formats", "int4:g64", spec)
    assert done.returncode == 2
    assert done.stdout == ""
    assert done.stderr.startswith("nybble: error: ")
    assert len(done.stderr.splitlines()) == 1
    if spec == "q4_k_m":
        assert "did you mean q4_k" in done.stderr


def test_pictures(tmp_path: Path, nybble_command: Run) -> None:
    png, svg, again = (tmp_path / name for name in ("levels.png", "levels.SVG", "again.svg"))
    assert "levels.png" in succeed(nybble_command("formats", "-o", png))
    assert png.read_bytes().startswith(b"\x89PNG\r\n\x1a\n")
    height, width, _ = matplotlib.image.imread(png).shape
    assert width > 1000
    assert height > 1000
    few = ("formats", "int4:g64", "nf4", "fp16", "int8,asym")
    shown = succeed(nybble_command(*few, "-o", svg))
    assert "nf4:g64: 4 bits, 16 levels" in shown
    succeed(nybble_command(*few, "-o", again))
    assert svg.read_bytes() == again.read_bytes()
    texts = "".join(ElementTree.parse(svg).getroot().itertext())
    assert all(spec in texts for spec in ("int4:g64", "nf4:g64", "fp16", "int8:channel,asym", "floats"))
    assert svg.stat().st_size < 200_000


def test_pictures_that_cannot_be_drawn(tmp_path: Path, nybble_command: Run) -> None:
    done = nybble_command("formats", "-o", tmp_path / "levels.gif")
    assert (done.returncode, done.stdout) == (2, "")
    assert "give a name that ends in .svg or .png" in done.stderr
    (tmp_path / "file").write_text("x")
    done = nybble_command("formats", "-o", tmp_path / "file" / "levels.png")
    assert done.returncode == 1
    assert "cannot write the picture to" in done.stderr
    assert len(done.stderr.splitlines()) == 1


def test_the_page_has_the_table_of_the_code() -> None:
    """After a change: `nybble formats --markdown` between the marks, `nybble formats -o docs/images/formats.png`."""
    page = (DOCS / "formats.md").read_text(encoding="utf-8")
    found = re.search("<!-- formats -->\n(.*)\n<!-- /formats -->", page, re.DOTALL)
    assert found is not None
    assert found.group(1).splitlines() == markdown_table(explain_all())
    for picture in re.findall(r"!\[.*?\]\((.*?)\)", page):
        assert (DOCS / picture).read_bytes().startswith(b"\x89PNG\r\n\x1a\n")


def test_where_is_what_the_containers_say() -> None:
    for line in markdown_table(explain_all())[2:]:
        spec, where = (cell.strip().strip("`") for cell in line.split("|")[1:3])
        if spec in OTHERS or where in ("all containers", "nybble only"):
            continue
        for name in where.split(", "):
            assert spec in find_container(name).candidates(parse_format(spec), (768, 768), "linear")
