"""Text to ids as transformers' tokenizer of the same folder does it; and back, whole or id by id."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from functools import cache
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from nybble import demo
from nybble.engine.text import Detokenizer, TextCodec
from nybble.errors import FileFormatError, InputError

MODELS = Path(__file__).parents[3] / "shared" / "data" / "models"
FOLDERS = {
    "demo": demo.model_folder(),
    "stdlib-gpt2-6m": MODELS / "stdlib-gpt2-6m",
    "stories260k-llama": MODELS / "stories260k-llama",
    "gpt2-bpe-tokenizer": MODELS / "gpt2-bpe-tokenizer",
}
TEXTS = (
    "",
    " ",
    "\n",
    "Once upon a time",
    " leading and trailing ",
    "two  spaces,   three\n\n\ttabs\r\n",
    "def main(argv: list[str]) -> None:\n    return 0x1F",
    "größer als 5 €, naïve café — “quoted” …",
    "日本語とにほんご 한국어 العربية",
    "👩‍🚀 🏳️‍🌈 e\u0301 \u200b\ufeff x",
    "before <|endoftext|> between <s>after</s> <unk>",
    "I'll we've don't 12345 3.14159 C++20",
    "\ufffd\x00\x7f",
)


def folder_of(name: str) -> Path:
    if not FOLDERS[name].is_dir():
        pytest.skip(f"{FOLDERS[name]} is not here")
    return FOLDERS[name]


@cache
def codec_of(name: str) -> TextCodec:
    return TextCodec.load(folder_of(name))


def transformers_tokenizer(folder: Path) -> Any:
    from transformers import AutoTokenizer

    return AutoTokenizer.from_pretrained(str(folder), local_files_only=True)


def check_equal(folder: Path) -> None:
    """Ids and decoded text are those of transformers, over all TEXTS, with special tokens and without."""
    ours, theirs = TextCodec.load(folder), transformers_tokenizer(folder)
    for text in TEXTS:
        ids = theirs(text)["input_ids"]
        assert ours.encode(text) == ids, text
        assert ours.encode(text, special_tokens=False) == theirs(text, add_special_tokens=False)["input_ids"], text
        assert ours.decode(ids) == theirs.decode(ids, skip_special_tokens=True), text
        assert ours.decode(ids, special_tokens=True) == theirs.decode(ids), text
    assert ours.vocabulary == len(theirs)


@pytest.mark.parametrize("name", FOLDERS)
def test_the_same_ids_as_transformers(name: str) -> None:
    check_equal(folder_of(name))


@pytest.mark.parametrize("name", FOLDERS)
def test_text_comes_back(name: str) -> None:
    codec = codec_of(name)
    assert codec.decode(codec.encode("Once upon a time, 5 €")) == "Once upon a time, 5 €"


def test_bos_begins_a_text_where_the_tokenizer_has_it() -> None:
    codec = codec_of("stories260k-llama")
    assert codec.encode("Once") == [1, *codec.encode("Once", special_tokens=False)]
    assert codec_of("demo").encode("Once") == codec_of("demo").encode("Once", special_tokens=False)


# GPT-2's vocabulary without tokenizer.json, and what other files add to it


@pytest.fixture
def gpt2_files(tmp_path: Path) -> Path:
    """A small GPT-2 vocabulary: bytes, some merges, and one special token."""
    from tokenizers import pre_tokenizers

    pairs = ["Ġ t", "h e", "Ġt he", "o n", "c e", "i n", "e r", "Ġ a"]
    tokens = [*sorted(pre_tokenizers.ByteLevel.alphabet()), *(pair.replace(" ", "") for pair in pairs), "<|endoftext|>"]
    (tmp_path / "vocab.json").write_text(json.dumps({token: i for i, token in enumerate(tokens)}))
    (tmp_path / "merges.txt").write_text("#version: 0.2\n" + "\n".join(pairs) + "\n", encoding="utf-8")
    write(tmp_path, "config.json", {"model_type": "gpt2"})
    return tmp_path


def write(folder: Path, name: str, value: Any) -> None:
    (folder / name).write_text(json.dumps(value))


ADDED = {"content": "<pad>", "lstrip": True, "normalized": False, "rstrip": True, "single_word": False, "special": True}
SETTINGS: dict[str, dict[str, dict[str, Any]]] = {
    "alone": {},
    "class named": {"tokenizer_config.json": {"tokenizer_class": "GPT2Tokenizer"}},
    "fast class named": {"tokenizer_config.json": {"tokenizer_class": "GPT2TokenizerFast", "model_max_length": 8}},
    "space before": {"tokenizer_config.json": {"tokenizer_class": "GPT2Tokenizer", "add_prefix_space": True}},
    "bos before": {"tokenizer_config.json": {"tokenizer_class": "GPT2Tokenizer", "add_bos_token": True}},
    "bos and eos around": {
        "tokenizer_config.json": {
            "tokenizer_class": "GPT2Tokenizer", "add_bos_token": True, "add_eos_token": True, "bos_token": "<s>",
        },
    },
    "other special tokens": {"tokenizer_config.json": {"tokenizer_class": "GPT2Tokenizer", "pad_token": "<unk>"}},
    "map": {"special_tokens_map.json": {"bos_token": {"content": "<s>", "lstrip": True, "rstrip": False}, "eos_token": "</s>"}},
    "bos of the map before": {
        "tokenizer_config.json": {"tokenizer_class": "GPT2Tokenizer", "add_bos_token": True},
        "special_tokens_map.json": {"bos_token": "<s>"},
    },
    "listed": {
        "tokenizer_config.json": {"tokenizer_class": "GPT2Tokenizer", "additional_special_tokens": ["<s>", "</s>"]},
    },
    "no unknown token": {"tokenizer_config.json": {"tokenizer_class": "GPT2Tokenizer", "unk_token": None}},
    "added tokens": {"added_tokens.json": {"<s>": 265, "</s>": 266}, "special_tokens_map.json": {"bos_token": "<s>"}},
    "decoder": {
        "tokenizer_config.json": {
            "tokenizer_class": "GPT2Tokenizer", "added_tokens_decoder": {"265": ADDED}, "pad_token": "<pad>",
        },
        "special_tokens_map.json": {"pad_token": "<unk>"},
    },
}  # fmt: skip
"""Files beside vocab.json and merges.txt."""


@pytest.mark.parametrize("case", SETTINGS)
def test_vocabulary_and_merges(case: str, gpt2_files: Path) -> None:
    for name, value in SETTINGS[case].items():
        write(gpt2_files, name, value)
    check_equal(gpt2_files)
    text = "then <pad> the <s>once"
    assert TextCodec.load(gpt2_files).encode(text) == transformers_tokenizer(gpt2_files)(text)["input_ids"]


def test_the_vocabulary_of_gpt2_needs_no_tokenizer_json(tmp_path: Path) -> None:
    source = folder_of("gpt2-bpe-tokenizer")
    for name in ("vocab.json", "merges.txt", "tokenizer_config.json"):
        shutil.copyfile(source / name, tmp_path / name)
    ours, whole = TextCodec.load(tmp_path), codec_of("gpt2-bpe-tokenizer")
    assert [ours.encode(text) for text in TEXTS] == [whole.encode(text) for text in TEXTS]


@pytest.mark.parametrize("case", SETTINGS)
def test_special_tokens_beside_a_tokenizer_json(case: str, gpt2_files: Path) -> None:
    """transformers takes bos and eos around a text from tokenizer.json then, and a space before it by its class."""
    TextCodec.load(gpt2_files)._tokenizer.save(str(gpt2_files / "tokenizer.json"))
    (gpt2_files / "vocab.json").unlink()
    for name, value in SETTINGS[case].items():
        write(gpt2_files, name, value)
    check_equal(gpt2_files)


def test_truncation_in_tokenizer_json_cuts_no_prompt(tmp_path: Path) -> None:
    shutil.copytree(demo.model_folder(), tmp_path / "m")
    path = tmp_path / "m" / "tokenizer.json"
    value = json.loads(path.read_text(encoding="utf-8"))
    value["truncation"] = {"direction": "Right", "max_length": 3, "strategy": "LongestFirst", "stride": 0}
    value["padding"] = {
        "strategy": {"Fixed": 64}, "direction": "Right", "pad_to_multiple_of": None, "pad_id": 0, "pad_type_id": 0,
        "pad_token": "<|endoftext|>",
    }  # fmt: skip
    path.write_text(json.dumps(value), encoding="utf-8")
    assert TextCodec.load(tmp_path / "m").encode(TEXTS[6]) == codec_of("demo").encode(TEXTS[6])


# Wrong folders and texts


def make(files: dict[str, str]) -> Callable[[Path], None]:
    def fill(folder: Path) -> None:
        for name, content in files.items():
            (folder / name).write_text(content)

    return fill


MISSING: dict[str, tuple[dict[str, str], tuple[str, ...]]] = {
    "nothing": ({}, ("has no tokenizer.json", "no vocab.json with merges.txt")),
    "no merges": ({"vocab.json": "{}"}, ("lacks merges.txt",)),
    "no vocabulary": ({"merges.txt": ""}, ("lacks vocab.json",)),
    "sentencepiece": ({"tokenizer.model": ""}, ("no tokenizer.json", "only tokenizer.model")),
    "of qwen": (
        {"vocab.json": "{}", "merges.txt": "", "tokenizer_config.json": '{"tokenizer_class": "Qwen2Tokenizer"}'},
        ("Qwen2Tokenizer", "GPT-2", "copy tokenizer.json"),
    ),
    "of an unnamed class": (
        {"vocab.json": "{}", "merges.txt": "", "config.json": '{"model_type": "qwen2"}'}, ("only GPT-2's way",),
    ),
}  # fmt: skip


@pytest.mark.parametrize("case", MISSING)
def test_what_is_missing_is_named(case: str, tmp_path: Path) -> None:
    files, parts = MISSING[case]
    make(files)(tmp_path)
    with pytest.raises(InputError) as caught:
        TextCodec.load(tmp_path)
    message = str(caught.value)
    assert all(part in message for part in (str(tmp_path), *parts)), message
    assert len(message.splitlines()) == 1


BROKEN = {
    "no JSON": {"tokenizer.json": "{"},
    "another JSON": {"tokenizer.json": "[1, 2]"},
    "unknown model": {"tokenizer.json": '{"model": {"type": "XYZ"}}'},
    "vocabulary no JSON": {"vocab.json": "{", "merges.txt": ""},
    "merge of nothing": {"vocab.json": '{"a": 0}', "merges.txt": "#version: 0.2\na b\n"},
    "config a list": {"vocab.json": "{}", "merges.txt": "", "tokenizer_config.json": "[]"},
    "config cut short": {"vocab.json": "{}", "merges.txt": "", "tokenizer_config.json": '{"add_'},
    "added token out of place": {"vocab.json": '{"a": 0}', "merges.txt": "", "added_tokens.json": '{"<x>": 7}'},
    "token without a name": {"vocab.json": "{}", "merges.txt": "", "tokenizer_config.json": '{"bos_token": {"lstrip": true}}'},
    "id no number": {
        "vocab.json": '{"a": 0}', "merges.txt": "", "tokenizer_config.json": '{"added_tokens_decoder": {"x": {"content": "y"}}}',
    },
}  # fmt: skip


@pytest.mark.parametrize("case", BROKEN)
def test_broken_files_are_one_line(case: str, tmp_path: Path) -> None:
    make(BROKEN[case])(tmp_path)
    with pytest.raises(FileFormatError) as caught:
        TextCodec.load(tmp_path)
    assert str(tmp_path) in str(caught.value)
    assert len(str(caught.value).splitlines()) == 1


def test_a_text_that_is_no_unicode() -> None:
    with pytest.raises(InputError, match="character 18 of the text is no Unicode"):
        codec_of("demo").encode("a lone surrogate: \ud800")


def test_a_text_that_the_tokenizer_cannot_take(tmp_path: Path) -> None:
    """A vocabulary of words whose unknown token is missing."""
    from tokenizers import Tokenizer, models, pre_tokenizers

    tokenizer = Tokenizer(models.WordLevel({"one": 0}, unk_token="none"))
    tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
    tokenizer.save(str(tmp_path / "tokenizer.json"))
    codec = TextCodec.load(tmp_path)
    assert codec.encode("one one") == [0, 0]
    with pytest.raises(InputError, match="the tokenizer failed on the text"):
        codec.encode("one two")


# Id by id


def stream(codec: TextCodec, ids: list[int], prompt: list[int]) -> list[str]:
    detokenizer = Detokenizer(codec, prompt)
    return [*(detokenizer.feed(token) for token in ids), detokenizer.finish()]


@pytest.mark.parametrize("name", ["demo", "stories260k-llama", "gpt2-bpe-tokenizer"])
@given(data=st.data())
@settings(deadline=None, max_examples=200)
def test_pieces_are_together_the_text(name: str, data: st.DataObject) -> None:
    """Any ids, special ones and ones beyond the vocabulary too: most are bytes that are no UTF-8."""
    codec = codec_of(name)
    low = st.integers(0, min(codec.vocabulary, 270))  # where the bytes are
    ids = data.draw(st.lists(low | st.integers(0, codec.vocabulary + 1), max_size=24))
    prompt = codec.encode(data.draw(st.sampled_from(["", "a", " ", "5 €", "Hi ♞", "the end "])))
    assert "".join(stream(codec, ids, prompt)) == codec.decode(prompt + ids)[len(codec.decode(prompt)) :]


@pytest.mark.parametrize("name", ["demo", "stories260k-llama", "gpt2-bpe-tokenizer"])
@given(text=st.text(st.characters(codec="utf-8", exclude_characters="\ufffd"), max_size=30))
@settings(deadline=None, max_examples=200)
def test_no_piece_ends_inside_a_character(name: str, text: str) -> None:
    codec = codec_of(name)
    ids = codec.encode(text)
    pieces = stream(codec, ids, [])
    assert all("\ufffd" not in piece for piece in pieces)
    assert "".join(pieces) == codec.decode(ids)


@pytest.mark.parametrize("name", ["demo", "stories260k-llama", "gpt2-bpe-tokenizer"])
def test_words_keep_the_space_before_them_and_come_at_once(name: str) -> None:
    codec = codec_of(name)
    prompt, whole = codec.encode("Once upon"), codec.encode("Once upon a time")
    assert whole[: len(prompt)] == prompt
    pieces = stream(codec, whole[len(prompt) :], prompt)
    assert "".join(pieces) == " a time"
    assert pieces[0].startswith(" ")
    assert pieces[-1] == ""


@pytest.mark.parametrize("name", ["demo", "stories260k-llama"])
def test_an_incomplete_character_waits_until_the_end(name: str) -> None:
    codec = codec_of(name)
    ids = codec.encode("a😀", special_tokens=False)
    pieces = stream(codec, ids[:-1], [])
    assert pieces[:2] == ["a", ""]
    assert pieces[-1].startswith("\ufffd")
    assert "".join(stream(codec, ids, [])) == "a😀"


@pytest.mark.parametrize("name", ["demo", "stories260k-llama", "gpt2-bpe-tokenizer"])
def test_special_tokens_are_not_shown(name: str) -> None:
    codec = codec_of(name)
    end = {"demo": 0, "stories260k-llama": 2, "gpt2-bpe-tokenizer": 50256}[name]
    ids = [*codec.encode("the end", special_tokens=False), end, codec.vocabulary + 5]
    assert codec.decode(ids) == "".join(stream(codec, ids, [])) == "the end"


def test_a_run_of_bytes_that_turns_bad_is_shown_as_decoding_shows_it() -> None:
    """SentencePiece's decoder takes back what were good characters when the bytes after them are no UTF-8."""
    codec = codec_of("stories260k-llama")
    token = {name: codec._tokenizer.token_to_id(name) for name in ("<0xE2>", "<0x99>", "<0x9E>", "<0xFF>")}
    good, run = [token["<0xE2>"], token["<0x99>"], token["<0x9E>"]], codec.encode("x", special_tokens=False)
    assert "".join(stream(codec, [*good, *run], codec.encode("a"))) == "♞ x"
    bad = [*good, token["<0xFF>"], *run]
    assert "".join(stream(codec, bad, codec.encode("a"))) == "\ufffd" * 4 + " x"


def test_tokenizers_is_imported_only_when_used(python_script: Callable[..., str]) -> None:
    program = """
import sys
from nybble.engine.text import TextCodec
assert not {"tokenizers", "torch", "transformers"} & set(sys.modules)
ids = TextCodec.load(sys.argv[1]).encode("Once upon a time")
assert not {"torch", "transformers", "huggingface_hub"} & set(sys.modules)
print(len(ids))
"""
    assert int(python_script(program, demo.model_folder())) > 2
