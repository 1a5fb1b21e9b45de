"""docs/security.md says the limits that the code has, and figures of this catalogue."""

from __future__ import annotations

import importlib
import re
from pathlib import Path

import pytest
from catalogue import catalogue

PAGE = (Path(__file__).parents[2] / "docs" / "security.md").read_text(encoding="utf-8")


def between(name: str) -> str:
    found = re.search(f"<!-- {name} -->\n(.*)<!-- /{name} -->", PAGE, re.DOTALL)
    assert found is not None, name
    return found.group(1)


LIMITS = re.findall(r"\| ([0-9][0-9,]*(?: MiB)?) \| `([A-Za-z_.]+)` \|", between("limits"))


def test_the_table_of_limits_is_found() -> None:
    assert len(LIMITS) == len(between("limits").splitlines()) - 2 >= 20


@pytest.mark.parametrize(("stated", "name"), LIMITS, ids=[name for _, name in LIMITS])
def test_limits(stated: str, name: str) -> None:
    module, _, constant = name.rpartition(".")
    number = int(stated.removesuffix(" MiB").replace(",", "")) * (1 << 20 if stated.endswith("MiB") else 1)
    assert getattr(importlib.import_module(module), constant) == number


def test_the_table_of_readers_is_of_this_catalogue() -> None:
    """Made by hand (peers.py), so it may be a few files behind; nybble refuses all of them."""
    rows = [[cell.strip() for cell in line.strip("|\n").split("|")] for line in between("peers").splitlines()[2:]]
    ours = [list(map(int, row[2:])) for row in rows if row[0].startswith("nybble ")]
    files = sum(row[0] for row in ours)
    assert len(catalogue()) * 0.9 <= files <= len(catalogue())
    assert all(row == [row[0], row[0], 0, 0, 0, 0, 0] for row in ours)
    assert {row[0].split(" ")[0] for row in rows} >= {
        "nybble",
        "gguf-py",
        "llama.cpp",
        "safetensors",
        "transformers",
        "torch.load,",
    }
