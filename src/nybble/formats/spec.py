"""Spec strings: `NAME[:tensor|channel|gN][,option...]`, e.g. `int4:g64,asym`, `nf4:g64,dq`, `fp16`.

A family of formats is a module of this folder with `NAMES: dict[name, build]`, where `build(name, granularity, options)`
returns the format or raises UsageError. Nothing else has to be edited to add one.
"""

from __future__ import annotations

import importlib
import pkgutil
from collections.abc import Callable
from functools import cache

import nybble.formats
from nybble.errors import UsageError, unknown_name
from nybble.formats.base import Format, Granularity

GROUPS = (32, 64, 128, 256)
BLOCKS: dict[str, Granularity] = {"tensor": "tensor", "channel": "channel", **{f"g{columns}": columns for columns in GROUPS}}

Build = Callable[[str, "Granularity | None", frozenset[str]], Format]


@cache
def _families() -> dict[str, Build]:
    names: dict[str, Build] = {}
    for module in pkgutil.iter_modules(nybble.formats.__path__):
        for name, build in getattr(importlib.import_module(f"nybble.formats.{module.name}"), "NAMES", {}).items():
            assert name not in names, f"two formats are called {name}"
            names[name] = build
    return names


def format_names() -> list[str]:
    """All names that a spec may begin with."""
    return sorted(_families())


def parse_format(spec: str | Format) -> Format:
    """The format of a spec string. Raises UsageError that says which part is wrong and what it may be."""
    if isinstance(spec, Format):
        return spec
    head, *options = [part.strip() for part in spec.strip().split(",")]
    name, colon, block = head.partition(":")
    build = _families().get(name)
    if build is None:
        raise unknown_name("format", name, _families())
    granularity: Granularity | None = None
    if colon:
        granularity = BLOCKS.get(block)
        if granularity is None:
            raise UsageError(f"format {spec!r}: {block!r} is not a block; use {', '.join(BLOCKS)}")
    if len(set(options)) != len(options):
        raise UsageError(f"format {spec!r}: an option is given twice")
    return build(name, granularity, frozenset(options))


def check_options(name: str, options: frozenset[str], known: set[str]) -> None:
    """Raise UsageError for the first option that is not known."""
    for option in sorted(options - known):
        allowed = f"it has {', '.join(sorted(known))}" if known else "it has none"
        raise UsageError(f"format {name}: unknown option {option!r}; {allowed}")


def check_wide(name: str, granularity: Granularity | None, options: frozenset[str]) -> None:
    """Raise UsageError for option f32 where scales are float32 as it is."""
    if "f32" in options and not isinstance(granularity, int):
        raise UsageError(f"format {name}: f32 widens the scales of groups; those of rows are float32 already")
