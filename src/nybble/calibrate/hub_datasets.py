"""Calibration documents from a dataset of the Hugging Face hub, or a folder laid out like one, through their `datasets`
library, which is only needed here."""

from __future__ import annotations

import itertools
from typing import Any

from nybble.errors import InputError, UsageError

HUB = "hub:"
"""How the name of a dataset begins where a file could be meant."""
CHARACTERS = 4_000_000
"""Read until there are so many: 128 windows of 2048 tokens and some more to draw from."""


def hub_documents(spec: str, characters: int = CHARACTERS) -> list[str]:
    """The first documents of a dataset `hub:NAME[:CONFIG[:SPLIT]]`, streamed, until there are so many characters: its column
    `text`, or else the only one of strings. CONFIG may be empty, SPLIT is `train` by default.

    Raises UsageError for a spec that is none, InputError where `datasets` is missing, and for a dataset that cannot be had
    or holds no text.
    """
    name, *rest = spec.removeprefix(HUB).split(":")
    if not name or len(rest) > 2:
        raise UsageError(f"dataset {spec!r} is not {HUB}NAME[:CONFIG[:SPLIT]]")
    config, split = (rest[0] if rest else "") or None, rest[1] if len(rest) > 1 else "train"
    try:
        import datasets
    except ImportError as error:
        raise InputError(
            f"{spec}: datasets of the hub need the package datasets; pip install datasets, or give a file"
        ) from error
    try:
        rows = iter(datasets.load_dataset(name, config, split=split, streaming=True))
        first = next(rows, None)
        column = _text_column(spec, first)
        found: list[str] = []
        room = characters
        for row in itertools.chain([first], rows):
            found.append(str(row[column]))
            room -= len(found[-1])
            if room <= 0:
                break
    except (InputError, KeyboardInterrupt):
        raise
    except Exception as error:  # the library raises what it likes
        message = " ".join(str(error).split())[:200] or type(error).__name__
        raise InputError(f"{spec}: the dataset cannot be had ({message})") from error
    if not any(text.strip() for text in found):
        raise InputError(f"{spec}: the documents of column {column!r} are empty")
    return found


def _text_column(spec: str, row: Any) -> str:
    if not row:
        raise InputError(f"{spec}: the dataset is empty")
    names = [name for name, value in row.items() if isinstance(value, str)]
    if "text" in names:
        return "text"
    if len(names) != 1:
        raise InputError(f"{spec}: no column 'text' among {', '.join(row)}; give a file")
    return str(names[0])
