"""From the tokenizer files of a model folder to the keys `tokenizer.*` of a GGUF file.

Two kinds have a place there, as llama.cpp calls them:

    gpt2     byte-level BPE: tokens, merges, and the name of how a text is cut into words (gguf_splits.py)
    llama    SentencePiece's BPE with bytes to fall back on: tokens and scores; the merge of highest score comes first

A tokenizer.json of the second kind has merges, no scores; scores are given by their order. gguf_rebuild.py goes back.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from nybble.containers.gguf_splits import name_of
from nybble.errors import FileFormatError, InputError, shown
from nybble.files.gguf_values import Value
from nybble.files.json_strict import parse_object

NORMAL, UNKNOWN, CONTROL, USER_DEFINED, UNUSED, BYTE = range(1, 7)
"""`tokenizer.ggml.token_type`."""
BYTE_TOKEN = re.compile(r"<0x[0-9A-F]{2}>")
SPACE = "\u2581"
"""What SentencePiece writes for a space."""
SQUEEZES = ((r"\A +| +\z", ""), (" {2,}", " "))
"""Patterns and what they become, of tokenizers that take away spaces which separate nothing."""
KEYS = {"bos": "bos_token_id", "eos": "eos_token_id", "unk": "unknown_token_id", "pad": "padding_token_id"}
PREFIX = "tokenizer.ggml."
TEMPLATE = "tokenizer.chat_template"


@dataclass
class Files:
    """The tokenizer of a model folder, parsed."""

    tokenizer: dict[str, Any]
    """tokenizer.json."""
    settings: dict[str, Any]
    """tokenizer_config.json."""
    template: str | None
    """Of a chat."""


def tokenizer_keys(extras: Mapping[str, bytes], config: Mapping[str, Any], vocabulary: int, where: Path) -> dict[str, Value]:
    """The keys of a tokenizer whose model has `vocabulary` rows of tokens; no tokenizer at all is one of model `none`.

    Raises InputError for a tokenizer that llama.cpp has no form of, FileFormatError for files that cannot be meant.
    """
    files = read_files(extras, where)
    if files is None:
        return no_tokenizer()
    model = files.tokenizer.get("model")
    if not isinstance(model, dict) or not isinstance(model.get("vocab"), dict):
        raise _no_form(where, f"a model of type {shown((model or {}).get('type') if isinstance(model, dict) else model)}")
    make = _sentencepiece if model.get("byte_fallback") else _byte_level
    found, ids = make(files, vocabulary, where)
    found.update(_ends(files, ids, config, where))
    if files.template is not None:
        found[TEMPLATE] = Value.text(files.template)
    return found


def no_tokenizer() -> dict[str, Value]:
    """The keys of a file without one: token ids in, token ids out."""
    return {f"{PREFIX}model": Value.text("none")}


def read_files(extras: Mapping[str, bytes], where: Path) -> Files | None:
    """The tokenizer among a model's files: its tokenizer.json, or GPT-2's from vocab.json and merges.txt; None where is none."""
    name = "tokenizer_config.json"
    settings = parse_object(extras[name], f"{where}: {name}") if name in extras else {}
    if "tokenizer.json" in extras:
        tokenizer = parse_object(extras["tokenizer.json"], f"{where}: tokenizer.json")
    elif "vocab.json" in extras and "merges.txt" in extras:
        tokenizer = _from_vocabulary(extras, where)
    else:
        return None
    template = settings.get("chat_template")
    if isinstance(template, list):  # several by name
        named = {part.get("name"): part.get("template") for part in template if isinstance(part, dict)}
        template = named.get("default")
    if "chat_template.jinja" in extras:
        template = extras["chat_template.jinja"].decode(errors="replace")
    return Files(tokenizer, settings, template if isinstance(template, str) else None)


def _from_vocabulary(extras: Mapping[str, bytes], where: Path) -> dict[str, Any]:
    vocabulary = parse_object(extras["vocab.json"], f"{where}: vocab.json")
    lines = extras["merges.txt"].decode(errors="replace").split("\n")
    merges = [line.split(" ") for line in lines if line and not line.startswith("#version")]
    token = "<|endoftext|>"
    added = [{"id": vocabulary[token], "content": token, "special": True}] if token in vocabulary else []
    return {
        "added_tokens": added,
        "pre_tokenizer": {"type": "ByteLevel", "add_prefix_space": False, "use_regex": True},
        "model": {"type": "BPE", "vocab": vocabulary, "merges": merges},
    }


def _no_form(where: Path, what: str) -> InputError:
    return InputError(
        f"{where}: llama.cpp has no form of a tokenizer with {what}; write the file without one: option tokenizer=none"
    )


def _vocabulary(files: Files, rows: int, where: Path) -> tuple[list[str], list[int], dict[str, int]]:
    """(tokens by id, their types, token -> id); ids without a token are filled up, since llama.cpp wants as many as rows."""
    ids: dict[str, int] = dict(files.tokenizer["model"]["vocab"])
    types: dict[int, int] = {}
    for token in files.tokenizer.get("added_tokens") or []:
        if not isinstance(token, dict) or not isinstance(token.get("content"), str):
            raise FileFormatError(f"{where}: tokenizer.json has an added token {shown(token)}")
        ids[token["content"]] = token.get("id")  # type: ignore[assignment]  # checked below
        types[token.get("id", -1)] = CONTROL if token.get("special") else USER_DEFINED
    tokens: list[str | None] = [None] * rows
    for content, place in ids.items():
        if type(place) is not int or not 0 <= place < rows:
            raise InputError(f"{where}: token {shown(content)} has id {shown(place)}, the model has {rows} rows of tokens")
        tokens[place] = content
    kinds = [types.get(i, UNUSED if token is None else NORMAL) for i, token in enumerate(tokens)]
    return [f"[PAD{i}]" if token is None else token for i, token in enumerate(tokens)], kinds, ids


def pairs(model: Mapping[str, Any], where: Path) -> list[tuple[str, str]]:
    """The merges of a tokenizer.json, which has them as texts "a b" or as pairs."""
    found = []
    for merge in model.get("merges") or []:
        pair = merge.split(" ") if isinstance(merge, str) else merge
        if not isinstance(pair, list) or len(pair) != 2 or not all(isinstance(part, str) and part for part in pair):
            raise FileFormatError(f"{where}: tokenizer.json has a merge {shown(merge)}, which is no pair of tokens")
        found.append((pair[0], pair[1]))
    return found


def _byte_level(files: Files, rows: int, where: Path) -> tuple[dict[str, Value], dict[str, int]]:
    name = name_of(files.tokenizer)
    model = files.tokenizer["model"]
    if model.get("type") != "BPE" or name is None:
        raise _no_form(where, f"a {shown(model.get('type'))} model that cuts words in this way")
    tokens, types, ids = _vocabulary(files, rows, where)
    merges = pairs(model, where)
    if any(" " in part for pair in merges for part in pair):
        raise _no_form(where, "merges of tokens with a space in them")
    return {
        f"{PREFIX}model": Value.text("gpt2"),
        f"{PREFIX}pre": Value.text(name),
        f"{PREFIX}tokens": Value.texts(tokens),
        f"{PREFIX}token_type": Value.array("int32", types),
        f"{PREFIX}merges": Value.texts([f"{left} {right}" for left, right in merges]),
    }, ids


def _sentencepiece(files: Files, rows: int, where: Path) -> tuple[dict[str, Value], dict[str, int]]:
    prefix, squeezed = _spaces(files.tokenizer, where)
    model = files.tokenizer["model"]
    tokens, types, ids = _vocabulary(files, rows, where)
    unknown = ids.get(model.get("unk_token") or "")
    for i, token in enumerate(tokens):
        if i == unknown:
            types[i] = UNKNOWN
        elif BYTE_TOKEN.fullmatch(token):
            types[i] = BYTE
    rank: dict[str, int] = {}
    for left, right in pairs(model, where):
        rank.setdefault(left + right, len(rank))
    later = len(rank)
    scores = np.zeros(rows, np.float32)
    for i, token in enumerate(tokens):
        if types[i] == NORMAL:
            if token not in rank:
                later += 1
            scores[i] = -float(rank.get(token, later - 1))
    return {
        f"{PREFIX}model": Value.text("llama"),
        f"{PREFIX}pre": Value.text("default"),
        f"{PREFIX}tokens": Value.texts(tokens),
        f"{PREFIX}scores": Value.array("float32", scores),
        f"{PREFIX}token_type": Value.array("int32", types),
        f"{PREFIX}add_space_prefix": Value("bool", int(prefix)),
        f"{PREFIX}remove_extra_whitespaces": Value("bool", int(squeezed)),
    }, ids


def _spaces(tokenizer: Mapping[str, Any], where: Path) -> tuple[bool, bool]:
    """(whether a space is put before a text, whether spaces at its ends and more than one in a row go away)."""
    normalizer = tokenizer.get("normalizer") or {}
    prefix = squeezed = replaced = False
    for step in normalizer.get("normalizers") or ([normalizer] if normalizer else []):
        pattern = (step.get("pattern") or {}) if step.get("type") == "Replace" else {}
        if step.get("type") == "Prepend" and step.get("prepend") == SPACE:
            prefix = True
        elif pattern.get("String") == " " and step.get("content") == SPACE:
            replaced = True
        elif (pattern.get("Regex"), step.get("content")) in SQUEEZES:
            squeezed = True
        else:
            raise _no_form(where, f"a step {shown(step)} that changes the text")
    cut = tokenizer.get("pre_tokenizer")
    if cut:
        if cut.get("type") != "Metaspace" or cut.get("replacement", SPACE) != SPACE or cut.get("split"):
            raise _no_form(where, f"a step {shown(cut)} that cuts words")
        scheme = cut.get("prepend_scheme", "always" if cut.get("add_prefix_space", True) else "never")
        prefix, replaced = prefix or scheme != "never", True
    if not replaced:
        raise _no_form(where, "spaces that stay spaces")
    return prefix, squeezed


def _ends(files: Files, ids: Mapping[str, int], config: Mapping[str, Any], where: Path) -> dict[str, Value]:
    """Ids of the tokens that begin, end and fill up a text, and whether they are added to one."""
    found: dict[str, int] = {}
    for end in KEYS:
        token = files.settings.get(f"{end}_token")
        content = token.get("content") if isinstance(token, dict) else token
        stated = config.get(f"{end}_token_id")
        first = stated[0] if isinstance(stated, list) and stated else stated
        if isinstance(content, str) and content in ids:
            found[end] = ids[content]
        elif type(first) is int and first >= 0:
            found[end] = first
        elif end == "unk" and (files.tokenizer["model"].get("unk_token") or "") in ids:
            found[end] = ids[files.tokenizer["model"]["unk_token"]]
    before, behind = added_ends(files.tokenizer, where)
    for end, content in (("bos", before), ("eos", behind)):
        if content is not None:
            if content not in ids:
                raise FileFormatError(f"{where}: tokenizer.json adds token {shown(content)}, which it does not have")
            found[end] = ids[content]
    values = {f"{PREFIX}{KEYS[end]}": Value("uint32", place) for end, place in found.items()}
    values[f"{PREFIX}add_bos_token"] = Value("bool", int(before is not None))
    values[f"{PREFIX}add_eos_token"] = Value("bool", int(behind is not None))
    return values


def added_ends(tokenizer: Mapping[str, Any], where: Path) -> tuple[str | None, str | None]:
    """The tokens that a tokenizer.json puts before and behind a text."""
    step = tokenizer.get("post_processor") or {}
    steps = step.get("processors") or [] if step.get("type") == "Sequence" else [step]
    for step in steps:
        if step.get("type") == "TemplateProcessing":
            parts = [(part.get("SpecialToken") or {}).get("id") for part in step.get("single") or []]
            if len(parts) > 3 or parts.count(None) != 1:
                raise _no_form(where, f"{len(parts) - 1} tokens around a text")
            middle = parts.index(None)
            before, behind = parts[:middle], parts[middle + 1 :]
            if len(before) > 1 or len(behind) > 1:
                raise _no_form(where, "two tokens on one side of a text")
            return (before or [None])[0], (behind or [None])[0]
        if step and step.get("type") != "ByteLevel":
            raise _no_form(where, f"a step {shown(step)} behind its tokens")
    return None, None
