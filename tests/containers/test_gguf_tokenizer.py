"""Tokenizers to the keys of a GGUF file and back: the same ids for every text, and what has no form there."""

from __future__ import annotations

import copy
import json
from collections.abc import Mapping
from pathlib import Path
from random import Random
from typing import Any

import numpy as np
import pytest
from tokenizers import Tokenizer

from nybble.containers import gguf_rebuild
from nybble.containers.gguf_config import Keys
from nybble.containers.gguf_rebuild import HUGGING_FACE, STORED, files_of, rebuilt, stored_files
from nybble.containers.gguf_splits import ALIASES, SPLITS, name_of, split_named
from nybble.containers.gguf_tokenizer import (
    BYTE,
    CONTROL,
    NORMAL,
    PREFIX,
    SPACE,
    UNKNOWN,
    UNUSED,
    USER_DEFINED,
    tokenizer_keys,
)
from nybble.demo import model_folder, text
from nybble.errors import FileFormatError, InputError
from nybble.files.gguf_values import Value

WHERE = Path("model")
ODD = (
    "",
    " ",
    "  two  spaces ",
    "\ttab\r\nline\n\n\nend",
    "it's I'LL we'VE",
    "1234567 1 12 ½",
    "naïve café 日本語 😀👍🏽",
    "e\u0301 composed and decomposed",
    "<|endoftext|>a<|endoftext|> b",
    "x=y+z; if (a&&b) {}",
    "A" * 60 + " " * 40,
)


def texts() -> list[str]:
    random = Random(0)
    noise = ["".join(random.choice("aA1 \n\t'.,é日😀_-s") for _ in range(80)) for _ in range(20)]
    return [text.held_out_documents()[0][:3000], *ODD, *noise]


@pytest.fixture(scope="module")
def demo() -> dict[str, Any]:
    """The tokenizer.json of the model that ships: byte-level BPE of 4,096."""
    return json.loads((model_folder() / "tokenizer.json").read_bytes())


def sentencepiece() -> dict[str, Any]:
    """A small BPE with bytes to fall back on, as transformers makes of SentencePiece's models."""
    special = ["<unk>", "<s>", "</s>"]
    pieces = [f"{SPACE}t", "he", f"{SPACE}the", f"{SPACE}a", "in", "ing", f"{SPACE}{SPACE}", f"{SPACE}th"]
    characters = [SPACE, *"abcdefghijklmnopqrstuvwxyz"]
    tokens = [*special, *(f"<0x{byte:02X}>" for byte in range(256)), *pieces, *characters]
    ids = {token: i for i, token in enumerate(tokens)}
    merges = [
        [left, right]
        for piece in pieces
        for _, left, right in sorted(
            (ids[piece[:i]], piece[:i], piece[i:]) for i in range(1, len(piece)) if piece[:i] in ids and piece[i:] in ids
        )
    ]
    added = [
        {"id": i, "content": token, "single_word": False, "lstrip": False, "rstrip": False, "normalized": False, "special": True}
        for i, token in enumerate(special)
    ]
    template = {
        "type": "TemplateProcessing",
        "single": [{"SpecialToken": {"id": "<s>", "type_id": 0}}, {"Sequence": {"id": "A", "type_id": 0}}],
        "pair": [{"Sequence": {"id": "A", "type_id": 0}}, {"Sequence": {"id": "B", "type_id": 1}}],
        "special_tokens": {"<s>": {"id": "<s>", "ids": [1], "tokens": ["<s>"]}},
    }
    return {
        "version": "1.0",
        "truncation": None,
        "padding": None,
        "added_tokens": added,
        "normalizer": {
            "type": "Sequence",
            "normalizers": [
                {"type": "Prepend", "prepend": SPACE},
                {"type": "Replace", "pattern": {"String": " "}, "content": SPACE},
            ],
        },
        "pre_tokenizer": None,
        "post_processor": template,
        "decoder": {
            "type": "Sequence",
            "decoders": [
                {"type": "Replace", "pattern": {"String": SPACE}, "content": " "},
                {"type": "ByteFallback"},
                {"type": "Fuse"},
                {"type": "Strip", "content": " ", "start": 1, "stop": 0},
            ],
        },
        "model": {
            "type": "BPE",
            "dropout": None,
            "unk_token": "<unk>",
            "continuing_subword_prefix": None,
            "end_of_word_suffix": None,
            "fuse_unk": True,
            "byte_fallback": True,
            "ignore_merges": False,
            "vocab": ids,
            "merges": merges,
        },
    }


def encoded(tokenizer: Mapping[str, Any], settings: Mapping[str, Any] | None = None) -> dict[str, bytes]:
    extras = {"tokenizer.json": json.dumps(tokenizer).encode()}
    return extras | ({"tokenizer_config.json": json.dumps(settings).encode()} if settings is not None else {})


def keys_of(tokenizer: Mapping[str, Any], settings: Mapping[str, Any] | None = None, rows: int = 4096, **config: Any) -> Keys:
    return Keys(tokenizer_keys(encoded(tokenizer, settings), config, rows, WHERE), WHERE)


def again(keys: Keys) -> Tokenizer:
    return Tokenizer.from_str(rebuilt(keys)["tokenizer.json"]().decode())


def test_the_model_that_ships_needs_no_copy_of_its_tokenizer(demo: dict[str, Any]) -> None:
    settings = {"bos_token": "<|endoftext|>", "eos_token": {"content": "<|endoftext|>"}, "chat_template": "{{ x }}"}
    keys = keys_of(demo, settings)
    assert keys.text(f"{PREFIX}model") == "gpt2"
    assert keys.text(f"{PREFIX}pre") == "gpt-2"
    assert len(keys.texts(f"{PREFIX}tokens")) == 4096
    assert keys.metadata[f"{PREFIX}token_type"] == Value.array("int32", [CONTROL] + [NORMAL] * 4095)
    assert keys.metadata[f"{PREFIX}bos_token_id"] == keys.metadata[f"{PREFIX}eos_token_id"] == Value("uint32", 0)
    assert keys.metadata[f"{PREFIX}add_bos_token"] == Value("bool", 0)
    assert keys.text("tokenizer.chat_template") == "{{ x }}"
    stored = stored_files(encoded(demo, settings), keys)
    assert list(stored) == [f"{STORED}tokenizer_config.json"]  # which says more than the keys
    files = files_of(Keys({**keys.metadata, **stored}, WHERE))
    assert json.loads(files["tokenizer_config.json"]) == settings
    assert files["chat_template.jinja"] == b"{{ x }}"
    assert json.loads(files["generation_config.json"]) == {"bos_token_id": 0, "eos_token_id": 0}


@pytest.mark.parametrize("name", SPLITS)
def test_byte_level_tokenizers_come_back_with_the_same_ids(name: str, demo: dict[str, Any]) -> None:
    split = SPLITS[name]
    tokenizer = copy.deepcopy(demo)
    tokenizer.update(normalizer=split.normalizer(), pre_tokenizer=split.pre_tokenizer())
    tokenizer["model"]["ignore_merges"] = split.whole_words
    keys = keys_of(tokenizer, rows=4100)
    assert keys.text(f"{PREFIX}pre") == name
    assert keys.texts(f"{PREFIX}tokens")[-1] == "[PAD4099]"
    ours, theirs = Tokenizer.from_str(json.dumps(tokenizer)), again(keys)
    for sample in texts():
        assert theirs.encode(sample).ids == ours.encode(sample).ids
        assert theirs.decode(theirs.encode(sample).ids) == ours.decode(ours.encode(sample).ids)


def test_splits_are_told_apart(demo: dict[str, Any]) -> None:
    """Each gives other words for some text, and aliases lead to one that is there."""
    words = {}
    for name, split in SPLITS.items():
        tokenizer = copy.deepcopy(demo)
        tokenizer.update(normalizer=split.normalizer(), pre_tokenizer=split.pre_tokenizer())
        made = Tokenizer.from_str(json.dumps(tokenizer))
        words[name] = str([made.pre_tokenizer.pre_tokenize_str(sample) for sample in ODD])
    assert len(set(words.values())) == len(SPLITS)
    assert all(split_named(alias) is SPLITS[name] for alias, name in ALIASES.items())
    assert split_named("other") is None


def test_settings_that_change_no_ids_are_passed_over(demo: dict[str, Any]) -> None:
    other = copy.deepcopy(demo)
    other["pre_tokenizer"]["trim_offsets"] = False
    other["post_processor"] = None
    other["decoder"] = {"type": "ByteLevel"}
    other["model"]["merges"] = [" ".join(pair) if isinstance(pair, list) else pair for pair in demo["model"]["merges"]]
    other["model"]["continuing_subword_prefix"] = None
    keys = keys_of(other)
    assert stored_files(encoded(other), keys) == {}
    other["model"]["merges"] = other["model"]["merges"][:-1]
    assert list(stored_files(encoded(other), keys)) == [HUGGING_FACE]


def test_special_tokens_behind_the_vocabulary(demo: dict[str, Any]) -> None:
    """As Qwen has them: in added_tokens alone, some of them no special ones."""
    tokenizer = copy.deepcopy(demo)
    split = SPLITS["qwen2"]
    tokenizer.update(normalizer=split.normalizer(), pre_tokenizer=split.pre_tokenizer())
    flags = dict.fromkeys(("single_word", "lstrip", "rstrip", "normalized"), False)
    tokenizer["added_tokens"] += [
        {"id": 4096, "content": "<|im_start|>", **flags, "special": True},
        {"id": 4097, "content": "<tool>", **flags, "special": False},
    ]
    keys = keys_of(tokenizer, rows=4100)
    types = keys.numbers(f"{PREFIX}token_type", 4100)
    assert types is not None
    assert types[-4:].tolist() == [CONTROL, USER_DEFINED, UNUSED, UNUSED]
    assert stored_files(encoded(tokenizer), keys) == {}
    ours, theirs = Tokenizer.from_str(json.dumps(tokenizer)), again(keys)
    sample = "a<|im_start|>user <tool> b"
    assert theirs.encode(sample).ids == ours.encode(sample).ids
    assert 4096 in ours.encode(sample).ids
    assert theirs.decode([4096, 4097, 5]) == ours.decode([4096, 4097, 5])


@pytest.mark.parametrize("squeezed", [False, True])
@pytest.mark.parametrize("prefix", [False, True])
def test_sentencepiece_comes_back_with_the_same_ids(prefix: bool, squeezed: bool) -> None:
    tokenizer = sentencepiece()
    if not prefix:
        tokenizer["normalizer"] = tokenizer["normalizer"]["normalizers"][1]
        del tokenizer["decoder"]["decoders"][-1]
    if squeezed:
        steps = tokenizer["normalizer"].get("normalizers") or [tokenizer["normalizer"]]
        strip = [
            {"type": "Replace", "pattern": {"Regex": r"\A +| +\z"}, "content": ""},
            {"type": "Replace", "pattern": {"Regex": " {2,}"}, "content": " "},
        ]
        tokenizer["normalizer"] = {"type": "Sequence", "normalizers": [*strip, *steps]}
    rows = len(tokenizer["model"]["vocab"])
    keys = keys_of(tokenizer, rows=rows)
    assert keys.text(f"{PREFIX}model") == "llama"
    assert keys.switch(f"{PREFIX}add_space_prefix", not prefix) is prefix
    assert keys.switch(f"{PREFIX}remove_extra_whitespaces", not squeezed) is squeezed
    assert keys.switch(f"{PREFIX}add_bos_token", False) is True
    assert keys.whole(f"{PREFIX}bos_token_id") == 1
    types = keys.numbers(f"{PREFIX}token_type", rows)
    assert types is not None
    assert types[:4].tolist() == [UNKNOWN, CONTROL, CONTROL, BYTE]
    assert (types[259:] == NORMAL).all()
    assert stored_files(encoded(tokenizer), keys) == {}
    ours, theirs = Tokenizer.from_str(json.dumps(tokenizer)), again(keys)
    for sample in (*texts(), "the thing in the", "in  the   ing</s> the"):
        assert theirs.encode(sample).ids == ours.encode(sample).ids
        assert theirs.decode(theirs.encode(sample).ids) == ours.decode(ours.encode(sample).ids)


def test_scores_follow_the_merges() -> None:
    """llama.cpp merges the pair whose piece scores highest; so the first merge's piece scores highest, characters lowest."""
    tokenizer = sentencepiece()
    tokenizer["model"]["merges"].sort(key=lambda pair: -len(pair[0] + pair[1]))
    ids, rows = tokenizer["model"]["vocab"], len(tokenizer["model"]["vocab"])
    scores = keys_of(tokenizer, rows=rows).numbers(f"{PREFIX}scores", rows)
    assert scores is not None
    pieces = list(dict.fromkeys(left + right for left, right in tokenizer["model"]["merges"]))
    found = [float(scores[ids[piece]]) for piece in pieces]
    assert found == sorted(found, reverse=True)
    assert len(set(found)) == len(found)
    assert min(found) > max(float(scores[ids[character]]) for character in "abc")
    assert not scores[:259].any()


def test_a_metaspace_step_is_the_same_as_normalizers() -> None:
    tokenizer = sentencepiece()
    tokenizer["normalizer"] = None
    tokenizer["pre_tokenizer"] = {"type": "Metaspace", "replacement": SPACE, "prepend_scheme": "first", "split": False}
    keys = keys_of(tokenizer, rows=400)
    assert keys.switch(f"{PREFIX}add_space_prefix", False) is True
    ours, theirs = Tokenizer.from_str(json.dumps(tokenizer)), again(keys)
    assert theirs.encode("the thing in a").ids == ours.encode("the thing in a").ids
    assert list(stored_files(encoded(tokenizer), keys)) == [HUGGING_FACE]  # they differ behind a special token


def test_gpt2s_vocabulary_files_alone(demo: dict[str, Any]) -> None:
    merges = "\n".join(" ".join(pair) if isinstance(pair, list) else pair for pair in demo["model"]["merges"])
    extras = {"vocab.json": json.dumps(demo["model"]["vocab"]).encode(), "merges.txt": f"#version: 0.2\n{merges}\n".encode()}
    keys = Keys(tokenizer_keys(extras, {}, 4096, WHERE), WHERE)
    ours, theirs = Tokenizer.from_str(json.dumps(demo)), again(keys)
    assert all(theirs.encode(sample).ids == ours.encode(sample).ids for sample in texts())


def test_a_model_without_a_tokenizer() -> None:
    assert tokenizer_keys({}, {"bos_token_id": 1}, 100, WHERE) == {f"{PREFIX}model": Value.text("none")}
    assert dict(files_of(Keys({f"{PREFIX}model": Value.text("none")}, WHERE))) == {}


def test_ids_of_config_json_where_the_tokenizer_names_none(demo: dict[str, Any]) -> None:
    keys = keys_of(demo, {}, bos_token_id=7, eos_token_id=[8, 9], pad_token_id=None)
    found = {key.removeprefix(PREFIX): value.data for key, value in keys.metadata.items() if key.endswith("token_id")}
    assert found == {"bos_token_id": 7, "eos_token_id": 8}


def _changed(tokenizer: dict[str, Any], change: str) -> dict[str, Any]:
    wordpiece = {"type": "WordPiece", "vocab": {"a": 0}}
    changes: dict[str, dict[str, Any]] = {
        "another model": {"model": wordpiece},
        "a list of pieces": {"model": {"type": "Unigram", "vocab": [["a", 0.0]]}},
        "a space before words": {"pre_tokenizer": {**tokenizer["pre_tokenizer"], "add_prefix_space": True}},
        "lower case": {"normalizer": {"type": "Lowercase"}},
        "three ends": {
            "post_processor": {
                "type": "TemplateProcessing",
                "single": [{"SpecialToken": {"id": "x"}}, {"SpecialToken": {"id": "y"}}, {"Sequence": {"id": "A"}}],
            }
        },
        "another end": {"post_processor": {"type": "BertProcessing"}},
    }
    return {**tokenizer, **changes[change]}


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ("another model", "a 'WordPiece' model that cuts words in this way"),
        ("a list of pieces", "a model of type 'Unigram'"),
        ("a space before words", "a 'BPE' model that cuts words in this way"),
        ("lower case", "a 'BPE' model that cuts words in this way"),
        ("three ends", "two tokens on one side of a text"),
        ("another end", "a step {'type': 'BertProcessing'} behind its tokens"),
    ],
)
def test_tokenizers_without_a_form(change: str, message: str, demo: dict[str, Any]) -> None:
    with pytest.raises(InputError) as raised:
        keys_of(_changed(demo, change))
    assert str(raised.value).startswith(f"model: llama.cpp has no form of a tokenizer with {message}")
    assert str(raised.value).endswith("write the file without one: option tokenizer=none")


def test_tokens_and_merges_that_cannot_be_meant(demo: dict[str, Any]) -> None:
    with pytest.raises(InputError, match=r"token '.*' has id 40[0-9]+, the model has 4000 rows of tokens"):
        keys_of(demo, rows=4000)
    for merges, message in (
        ([["a"]], "has a merge"),
        (["a b c"], "has a merge 'a b c', which is no pair"),
        ([1], "has a merge 1"),
    ):
        broken = copy.deepcopy(demo)
        broken["model"]["merges"] = merges
        with pytest.raises(FileFormatError, match=message):
            keys_of(broken)
    with pytest.raises(FileFormatError, match=r"model: tokenizer.json is not JSON"):
        tokenizer_keys({"tokenizer.json": b"{"}, {}, 10, WHERE)


def _foreign(**changes: Value) -> Keys:
    rows = len(sentencepiece()["model"]["vocab"])
    return Keys(
        {**keys_of(sentencepiece(), rows=rows).metadata, **{f"{PREFIX}{key}": value for key, value in changes.items()}}, WHERE
    )


def test_keys_that_make_no_tokenizer(demo: dict[str, Any], monkeypatch: pytest.MonkeyPatch) -> None:
    def refused(keys: Keys, message: str) -> None:
        with pytest.raises(FileFormatError, match=message):
            files_of(keys)["tokenizer.json"]

    refused(_foreign(scores=Value.array("uint8", np.zeros(294))), "scores is missing or holds what are no numbers")
    refused(_foreign(scores=Value.array("float32", [0.0])), "it should be an array of 294 numbers")
    refused(_foreign(scores=Value.array("float32", np.full(294, np.nan))), "scores is missing or holds what are no numbers")
    refused(_foreign(tokens=Value.texts(["a"] * 294)), "a token stands twice in tokenizer.ggml.tokens")
    refused(_foreign(bos_token_id=Value("uint32", 294)), "bos_token_id is 294, there are 294 tokens")
    with monkeypatch.context() as patch:
        patch.setattr(gguf_rebuild, "LONGEST_PIECE", 3)
        refused(_foreign(), "the longest 4; the limits are 4194304 and 3")
    keys = Keys({**keys_of(demo).metadata, f"{PREFIX}merges": Value.texts(["ab"])}, WHERE)
    refused(keys, "merge 'ab' is no pair of tokens")
    unknown = Keys({**keys_of(demo).metadata, f"{PREFIX}pre": Value.text("somebody's")}, WHERE)
    assert "tokenizer.json" not in files_of(unknown)


def test_nothing_is_built_before_it_is_asked_for(demo: dict[str, Any], monkeypatch: pytest.MonkeyPatch) -> None:
    built = []
    monkeypatch.setattr(gguf_rebuild, "_byte_level", lambda keys, split: built.append(1) or {})
    files = files_of(keys_of(demo))
    assert "tokenizer.json" in files
    assert len(files) == 2
    assert built == []
    assert files["tokenizer.json"] == files["tokenizer.json"] == b"{}\n"
    assert built == [1]


def test_name_of_a_sequence_of_one_step(demo: dict[str, Any]) -> None:
    wrapped = {**demo, "pre_tokenizer": {"type": "Sequence", "pretokenizers": [demo["pre_tokenizer"]]}}
    assert name_of(wrapped) == "gpt-2"
