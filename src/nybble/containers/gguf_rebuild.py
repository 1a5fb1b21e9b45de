"""From the keys `tokenizer.*` of a GGUF file back to the tokenizer files of a model folder.

A tokenizer.json is built that gives the same tokens as llama.cpp: byte-level BPE as it is, SentencePiece with merges in the order
of their scores. What a folder's own files say beyond that has no place among llama.cpp's keys, so `stored_files` keeps those
files whose rebuilt form says something else: tokenizer.json under `tokenizer.huggingface.json`, as the format provides, the
others under keys of ours, `nybble.file.NAME`.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator, Mapping
from typing import Any

import numpy as np

from nybble.containers.gguf_config import Keys
from nybble.containers.gguf_splits import Split, plain, split_named
from nybble.containers.gguf_tokenizer import (
    BYTE,
    CONTROL,
    KEYS,
    NORMAL,
    PREFIX,
    SPACE,
    SQUEEZES,
    TEMPLATE,
    UNKNOWN,
    UNUSED,
    USER_DEFINED,
    added_ends,
    pairs,
)
from nybble.errors import FileFormatError, NybbleError, shown
from nybble.files.gguf_values import Value
from nybble.files.json_strict import parse_object

HUGGING_FACE = "tokenizer.huggingface.json"
STORED = "nybble.file."
KEPT = ("tokenizer.json", "tokenizer_config.json", "generation_config.json", "special_tokens_map.json", "added_tokens.json")
"""Files that are kept where they say more than the keys."""
LONGEST_PIECE = 256
MOST_CHARACTERS = 4 << 20
"""Of all pieces of a SentencePiece vocabulary: its merges are found by trying every cut of every piece."""


class Files(Mapping[str, bytes]):
    """Files by name that are made when they are first asked for."""

    def __init__(self, makers: Mapping[str, Callable[[], bytes]]) -> None:
        self._makers = makers
        self._made: dict[str, bytes] = {}

    def __getitem__(self, name: str) -> bytes:
        if name not in self._made:
            self._made[name] = self._makers[name]()
        return self._made[name]

    def __contains__(self, name: object) -> bool:  # Mapping's own would make the file
        return name in self._makers

    def __iter__(self) -> Iterator[str]:
        return iter(self._makers)

    def __len__(self) -> int:
        return len(self._makers)


def files_of(keys: Keys) -> Files:
    """A model's tokenizer and generation files: those that are kept in the file, else rebuilt ones.

    Nothing is built here. Asking for one raises FileFormatError where the keys do not make a tokenizer.
    """
    makers = dict(rebuilt(keys))
    for name in KEPT:
        key = HUGGING_FACE if name == "tokenizer.json" else f"{STORED}{name}"
        if key in keys.metadata:
            makers[name] = lambda key=key: keys.text(key).encode()  # type: ignore[misc]  # bound now
    return Files(makers)


def rebuilt(keys: Keys) -> dict[str, Callable[[], bytes]]:
    """What the keys of llama.cpp alone give, by name of the file."""
    makers: dict[str, Callable[[], bytes]] = {}
    model = keys.text(f"{PREFIX}model", "none")
    split = split_named(keys.text(f"{PREFIX}pre", "gpt-2")) if model == "gpt2" else None
    if model == "llama" or split is not None:
        makers["tokenizer.json"] = lambda: _bytes(_sentencepiece(keys) if split is None else _byte_level(keys, split))
        makers["tokenizer_config.json"] = lambda: _bytes(_settings(keys))
    ends = {name: keys.metadata.get(f"{PREFIX}{KEYS[name]}") for name in ("bos", "eos", "pad")}
    found = {f"{name}_token_id": keys.whole(f"{PREFIX}{KEYS[name]}") for name, value in ends.items() if value is not None}
    if found:
        makers["generation_config.json"] = lambda: _bytes(found)
    if TEMPLATE in keys.metadata:
        makers["chat_template.jinja"] = lambda: keys.text(TEMPLATE).encode()
    return makers


def stored_files(extras: Mapping[str, bytes], keys: Keys) -> dict[str, Value]:
    """The keys that keep those of a model's files which cannot be rebuilt from its other keys."""
    again = Files(rebuilt(keys))
    found = {}
    for name in KEPT:
        if name not in extras:
            continue
        same = _same_tokenizer if name == "tokenizer.json" else _same
        if name not in again or not same(extras[name], again, name, keys):
            found[HUGGING_FACE if name == "tokenizer.json" else f"{STORED}{name}"] = Value("string", extras[name])
    return found


def _same(given: bytes, again: Mapping[str, bytes], name: str, keys: Keys) -> bool:
    return parse_object(given, f"{keys.where}: {name}") == json.loads(again[name])


def _same_tokenizer(given: bytes, again: Mapping[str, bytes], name: str, keys: Keys) -> bool:
    """Whether two tokenizer.json give the same tokens for every text, for all that their settings tell."""
    try:
        return _essence(parse_object(given, f"{keys.where}: {name}"), keys) == _essence(json.loads(again[name]), keys)
    except NybbleError:  # something in it that has no form here
        return False


def _essence(tokenizer: dict[str, Any], keys: Keys) -> dict[str, Any]:
    decoder = plain(tokenizer.get("decoder"))
    if isinstance(decoder, dict) and decoder.get("type") == "ByteLevel":
        decoder = {"type": "ByteLevel"}
    model = dict(tokenizer.get("model") or {})
    merges = pairs(model, keys.where)
    vocabulary = model.pop("vocab", None)
    model.pop("merges", None)
    added = sorted(((token.get("id"), plain(token)) for token in tokenizer.get("added_tokens") or []), key=lambda pair: pair[0])
    return {
        "normalizer": plain(tokenizer.get("normalizer")),
        "pre_tokenizer": plain(tokenizer.get("pre_tokenizer")),
        "ends": added_ends(tokenizer, keys.where),
        "decoder": decoder,
        "model": plain(model),
        "vocab": vocabulary,
        "merges": merges,
        "added": added,
    }


def _bytes(value: Mapping[str, Any]) -> bytes:
    return (json.dumps(value, indent=1, ensure_ascii=False) + "\n").encode()


def _tokens(keys: Keys) -> tuple[tuple[str, ...], list[int]]:
    tokens = keys.texts(f"{PREFIX}tokens")
    types = keys.numbers(f"{PREFIX}token_type", len(tokens))
    if types is not None and types.dtype.kind not in "iu":
        raise FileFormatError(f"{keys.where}: key {PREFIX}token_type is an array of {types.dtype}, not of whole numbers")
    if len(set(tokens)) != len(tokens):
        raise FileFormatError(f"{keys.where}: a token stands twice in {PREFIX}tokens")
    return tokens, [NORMAL] * len(tokens) if types is None else [int(kind) for kind in types]


def _added(tokens: tuple[str, ...], types: list[int]) -> list[dict[str, Any]]:
    """Entries of tokenizer.json for tokens that are found in a text before it is cut."""
    flags = dict.fromkeys(("single_word", "lstrip", "rstrip", "normalized"), False)
    return [
        {"id": i, "content": token, **flags, "special": kind != USER_DEFINED}
        for i, (token, kind) in enumerate(zip(tokens, types, strict=True))
        if kind in (CONTROL, USER_DEFINED, UNKNOWN)
    ]


def _frame(keys: Keys, tokens: tuple[str, ...], types: list[int], begins: bool) -> dict[str, Any]:
    """A tokenizer.json without its steps and model; it puts bos and eos around a text where the file says so."""
    ends = []
    for end, default in (("bos", begins), ("eos", False)):
        key = f"{PREFIX}{KEYS[end]}"
        wanted = keys.switch(f"{PREFIX}add_{end}_token", default) and key in keys.metadata
        place = keys.whole(key) if wanted else 0
        if place >= len(tokens):
            raise FileFormatError(f"{keys.where}: key {key} is {place}, there are {len(tokens)} tokens")
        ends.append((tokens[place], place) if wanted else None)
    first, last = ([{"SpecialToken": {"id": end[0], "type_id": 0}}] if end else [] for end in ends)
    single = [*first, {"Sequence": {"id": "A", "type_id": 0}}, *last]
    pair = [*single, *first, {"Sequence": {"id": "B", "type_id": 0}}, *last]
    used = {end[0]: {"id": end[0], "ids": [end[1]], "tokens": [end[0]]} for end in ends if end}
    template = {"type": "TemplateProcessing", "single": single, "pair": pair, "special_tokens": used}
    return {
        "version": "1.0",
        "truncation": None,
        "padding": None,
        "added_tokens": _added(tokens, types),
        "post_processor": template if used else None,
    }


def _byte_level(keys: Keys, split: Split) -> dict[str, Any]:
    tokens, types = _tokens(keys)
    merges = []
    for merge in keys.texts(f"{PREFIX}merges"):
        cut = merge.find(" ", 1)
        if cut < 0:
            raise FileFormatError(f"{keys.where}: merge {shown(merge)} is no pair of tokens")
        merges.append([merge[:cut], merge[cut + 1 :]])
    inside = len(tokens)
    while split.specials_apart and inside and types[inside - 1] in (CONTROL, USER_DEFINED, UNUSED):
        inside -= 1
    vocabulary = {token: i for i, token in enumerate(tokens[:inside]) if types[i] != UNUSED}
    return {
        **_frame(keys, tokens, types, split.begins),
        "normalizer": split.normalizer(),
        "pre_tokenizer": split.pre_tokenizer(),
        "decoder": {"type": "ByteLevel", "add_prefix_space": True, "trim_offsets": True, "use_regex": True},
        "model": {
            "type": "BPE",
            "dropout": None,
            "unk_token": None,
            "continuing_subword_prefix": "",
            "end_of_word_suffix": "",
            "fuse_unk": False,
            "byte_fallback": False,
            "ignore_merges": split.whole_words,
            "vocab": vocabulary,
            "merges": merges,
        },
    }


def _sentencepiece(keys: Keys) -> dict[str, Any]:
    tokens, types = _tokens(keys)
    scores = keys.numbers(f"{PREFIX}scores", len(tokens))
    if scores is None or scores.dtype.kind != "f" or not np.isfinite(scores).all():
        raise FileFormatError(f"{keys.where}: key {PREFIX}scores is missing or holds what are no numbers")
    prefix = keys.switch(f"{PREFIX}add_space_prefix", True)
    normalizers: list[dict[str, Any]] = []
    if keys.switch(f"{PREFIX}remove_extra_whitespaces", False):
        normalizers += [{"type": "Replace", "pattern": {"Regex": regex}, "content": text} for regex, text in SQUEEZES]
    if prefix:
        normalizers.append({"type": "Prepend", "prepend": SPACE})
    normalizers.append({"type": "Replace", "pattern": {"String": " "}, "content": SPACE})
    decoders: list[dict[str, Any]] = [
        {"type": "Replace", "pattern": {"String": SPACE}, "content": " "},
        {"type": "ByteFallback"},
        {"type": "Fuse"},
    ]
    if prefix:
        decoders.append({"type": "Strip", "content": " ", "start": 1, "stop": 0})
    unknown = next((token for token, kind in zip(tokens, types, strict=True) if kind == UNKNOWN), None)
    return {
        **_frame(keys, tokens, types, True),
        "normalizer": {"type": "Sequence", "normalizers": normalizers},
        "pre_tokenizer": None,
        "decoder": {"type": "Sequence", "decoders": decoders},
        "model": {
            "type": "BPE",
            "dropout": None,
            "unk_token": unknown,
            "continuing_subword_prefix": None,
            "end_of_word_suffix": None,
            "fuse_unk": True,
            "byte_fallback": BYTE in types,
            "ignore_merges": False,
            "vocab": {token: i for i, token in enumerate(tokens) if types[i] != UNUSED},
            "merges": _merges(keys, tokens, types, scores.tolist()),
        },
    }


def _merges(keys: Keys, tokens: tuple[str, ...], types: list[int], scores: list[float]) -> list[list[str]]:
    """Every way in which a piece is two pieces, the pieces of highest score first, the ways by ids of left and right."""
    pieces = {token: i for i, token in enumerate(tokens) if types[i] == NORMAL}
    characters = sum(map(len, pieces))
    longest = max(map(len, pieces), default=0)
    if characters > MOST_CHARACTERS or longest > LONGEST_PIECE:
        raise FileFormatError(
            f"{keys.where}: its pieces have {characters} characters, the longest {longest}; "
            f"the limits are {MOST_CHARACTERS} and {LONGEST_PIECE}"
        )
    found = []
    for piece, i in pieces.items():
        for cut in range(1, len(piece)):
            left, right = pieces.get(piece[:cut]), pieces.get(piece[cut:])
            if left is not None and right is not None:
                found.append((-scores[i], left, right))
    found.sort()
    return [[tokens[left], tokens[right]] for _, left, right in found]


def _settings(keys: Keys) -> dict[str, Any]:
    """tokenizer_config.json."""
    tokens = keys.texts(f"{PREFIX}tokens")
    settings: dict[str, Any] = {"tokenizer_class": "PreTrainedTokenizerFast", "clean_up_tokenization_spaces": False}
    for end, key in KEYS.items():
        if f"{PREFIX}{key}" in keys.metadata and keys.whole(f"{PREFIX}{key}") < len(tokens):
            settings[f"{end}_token"] = tokens[keys.whole(f"{PREFIX}{key}")]
    return settings
