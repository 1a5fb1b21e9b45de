"""Reads a plain command line without typer's own machinery, which needs pydantic: 80 ms, a third of what `inspect` takes.

`read` gives a verb's arguments where there is nothing to decide: options by their full names, values of simple types, all
there. Everything else is left to typer (help, mistakes, unusual spellings), whose answers it must not change: a test
compares the two.
"""

from __future__ import annotations

import inspect
import re
import types
import typing
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import typer
from typer.models import ArgumentInfo, OptionInfo

WHOLE = re.compile(r"-?[0-9]{1,15}")
DECIMAL = re.compile(r"-?[0-9]{1,15}(\.[0-9]{1,15})?")
PLAIN = {OptionInfo: vars(typer.Option()), ArgumentInfo: vars(typer.Argument())}
FREE = {"default", "param_decls", "help"}
"""What may differ in an option that is read here; any other setting is typer's to carry out."""


class _NotPlain(Exception):
    pass


def read(run: Callable[..., None], words: Sequence[str]) -> dict[str, Any] | None:
    """Keyword arguments of a verb's `run` for the words after its name; None where typer must read them."""
    try:
        return _read(run, list(words))
    except _NotPlain:
        return None


def _read(run: Callable[..., None], words: list[str]) -> dict[str, Any]:
    options: dict[str, tuple[str, Any]] = {}
    positional: list[tuple[str, Any]] = []
    found: dict[str, Any] = {}
    hints = typing.get_type_hints(run, include_extras=True)
    for name, parameter in inspect.signature(run).parameters.items():
        kind, info = _declared(hints[name])
        if isinstance(info, ArgumentInfo):
            positional.append((name, kind))
        else:
            options.update((spelling, (name, kind)) for spelling in _spellings(name, kind, info))
        if parameter.default is not inspect.Parameter.empty:
            found[name] = parameter.default
    given: dict[str, Any] = {}
    while words:
        word = words.pop(0)
        if not word.startswith("-") or word == "-":
            if not positional:
                raise _NotPlain
            name, kind = positional[0]
            if typing.get_origin(kind) is list:  # takes all the words there are
                given.setdefault(name, []).append(_value(typing.get_args(kind)[0], word))
                continue
            positional.pop(0)
            given[name] = _value(kind, word)
            continue
        spelling, equals, value = word.partition("=") if word.startswith("--") else (word, "", "")
        if spelling not in options:
            raise _NotPlain
        name, kind = options[spelling]
        if kind is bool:
            if equals:
                raise _NotPlain
            given[name] = True
            continue
        if not equals:
            if not words or (words[0].startswith("-") and words[0] != "-" and not DECIMAL.fullmatch(words[0])):
                raise _NotPlain
            value = words.pop(0)
        if typing.get_origin(kind) is list:
            given.setdefault(name, []).append(_value(typing.get_args(kind)[0], value))
        else:
            given[name] = _value(kind, value)
    found.update(given)
    if len(found) < len(hints) - ("return" in hints):  # one that is required is missing
        raise _NotPlain
    return found


def _declared(hint: Any) -> tuple[Any, ArgumentInfo | OptionInfo]:
    """(type, typer's description) of an annotated parameter, its type without None."""
    kind, *described = typing.get_args(hint) if typing.get_origin(hint) is typing.Annotated else (hint,)
    if typing.get_origin(kind) in (typing.Union, types.UnionType):
        kind, *others = (each for each in typing.get_args(kind) if each is not type(None))
        if others:
            raise _NotPlain
    if len(described) != 1 or type(described[0]) not in PLAIN:
        raise _NotPlain
    info = described[0]
    usual = PLAIN[type(info)]
    if any(value != usual.get(key) for key, value in vars(info).items() if key not in FREE):
        raise _NotPlain
    return kind, info


def _spellings(name: str, kind: Any, info: OptionInfo) -> list[str]:
    """How an option is written. typer holds the first spelling of an annotated one where its default would be."""
    stated = [word for word in (info.default, *(info.param_decls or ())) if isinstance(word, str)]
    if any("/" in word or not word.startswith("-") for word in stated) or (kind is bool and not stated):
        raise _NotPlain  # a switch with an opposite
    return stated or [f"--{name.replace('_', '-')}"]


def _value(kind: Any, word: str) -> Any:
    if kind is str:
        return word
    if kind is Path:
        return Path(word)
    if kind is int and WHOLE.fullmatch(word):
        return int(word)
    if kind is float and DECIMAL.fullmatch(word):
        return float(word)
    raise _NotPlain
