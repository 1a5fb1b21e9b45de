"""The strict JSON reader: takes what writers write, refuses what two readers could read as two things, in little memory."""

from __future__ import annotations

import json
import tracemalloc
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from nybble.errors import FileFormatError, InputError
from nybble.files.json_strict import MAX_BYTES, MAX_DEPTH, MAX_WIDE, ROOM, VALUE_BYTES, parse, parse_object, read_object

NUMBERS = st.integers(-(1 << 63), (1 << 64) - 1) | st.floats(allow_nan=False, allow_infinity=False)
TREES = st.recursive(
    st.none() | st.booleans() | NUMBERS | st.text(st.characters(codec="utf-8")),
    lambda inner: st.lists(inner, max_size=4) | st.dictionaries(st.text(st.characters(codec="utf-8")), inner, max_size=4),
    max_leaves=20,
)


@given(TREES)
def test_reads_what_json_writes(value: object) -> None:
    for ascii_only in (True, False):
        encoded = json.dumps(value, ensure_ascii=ascii_only).encode()
        assert parse(encoded, "x") == json.loads(encoded)


@pytest.mark.parametrize("text", ['{"a": 1, "a": 1}', '{"a": {"b": [{"c": 1, "c": 2}]}}', '{"": 1, "": 2}'])
def test_a_key_twice(text: str) -> None:
    with pytest.raises(FileFormatError, match=r"^x is JSON that is not safe to read: key '.?' stands twice in one object$"):
        parse(text.encode(), "x")


def test_the_depth_that_is_read() -> None:
    for depth, fine in ((MAX_DEPTH, True), (MAX_DEPTH + 1, False)):
        text = b'{"a":' + b"[" * depth + b"]" * depth + b"}"
        if fine:
            assert parse_object(text, "x")
        else:
            with pytest.raises(FileFormatError, match=f"nests deeper than {MAX_DEPTH}"):
                parse_object(text, "x")


@pytest.mark.parametrize("number", ["-0", "18446744073709551616", "-9223372036854775809", "1e309", "1" * 401 + ".0", "NaN"])
def test_numbers_that_are_refused(number: str) -> None:
    with pytest.raises(FileFormatError, match=r"-0|64 bits|too large|characters|NaN"):
        parse(f'{{"a": {number}}}'.encode(), "x")


@pytest.mark.parametrize(
    "number", ["0", "-1", "18446744073709551615", "-9223372036854775808", "1e308", "-0.0", "5e-324", "1e-400"]
)
def test_numbers_that_are_read(number: str) -> None:
    assert parse(f'{{"a": {number}}}'.encode(), "x") == {"a": json.loads(number)}


@pytest.mark.parametrize("escape", [r"\ud800", r"\uDFFF", r"a\ud83d", r"\ude00\ud83d"])
def test_half_a_surrogate_pair(escape: str) -> None:
    for text in (f'{{"{escape}": 1}}', f'{{"a": ["{escape}"]}}'):
        with pytest.raises(FileFormatError):
            parse(text.encode(), "x")


def test_whole_surrogate_pairs_are_characters() -> None:
    assert parse(rb'{"a": "\ud83d\ude00 \\ud800"}', "x") == {"a": "\U0001f600 \\ud800"}


def test_only_objects() -> None:
    for text, kind in ((b"[]", "list"), (b"3", "int"), (b'"a"', "str"), (b"null", "NoneType")):
        with pytest.raises(FileFormatError, match=f"^x holds a {kind}, not an object$"):
            parse_object(text, "x")


def test_the_size_that_is_read(tmp_path: Path) -> None:
    (tmp_path / "a.json").write_bytes(b'{"a":"' + b"b" * 1000 + b'"}')
    assert read_object(tmp_path / "a.json", 1008) == {"a": "b" * 1000}
    with pytest.raises(FileFormatError, match=r"has 1008 bytes, the limit is 1007"):
        read_object(tmp_path / "a.json", 1007)
    with pytest.raises(InputError, match="No such file"):
        read_object(tmp_path / "none.json")
    assert MAX_BYTES == 64 << 20


WORST = {
    "objects": lambda n: b"[" + b"{}," * n + b"{}]",
    "keys": lambda n: b"{" + b",".join(b'"%07d":{}' % i for i in range(n)) + b"}",
    "objects with a key": lambda n: b"[" + b'{"a":{}},' * n + b"1]",
    "one wide text": lambda n: b'"' + "\U0001f600".encode() + b"a" * n + b'"',
}


def longest(name: str) -> int:
    """How many of them are read."""
    if name == "one wide text":
        return MAX_WIDE - 6
    sample = WORST[name](1000)
    values = sum(sample.count(sign) for sign in (b",", b":", b"[", b"{"))
    return int(ROOM * 1000 / (values * VALUE_BYTES - len(sample)))


@pytest.mark.parametrize("name", WORST)
def test_memory_in_proportion(name: str) -> None:
    """Texts of each kind that are as long as they may be, and longer ones."""
    text = WORST[name](int(longest(name) * 0.99))
    tracemalloc.start()
    parse(text, "x")
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert peak + len(text) <= 4 * len(text) + (64 << 20)
    with pytest.raises(FileFormatError, match=r"too many to read safely|is not ASCII"):
        parse(WORST[name](int(longest(name) * 1.01)), "x")


def test_what_models_have_is_far_from_the_limits() -> None:
    """An index of 90,000 tensors (the largest model of 2025 has as many), and a config that names each of 20,000 weights."""
    index = {
        f"model.layers.{i % 61}.mlp.experts.{i}.down_proj.weight": f"model-{i % 163:05d}-of-00163.safetensors"
        for i in range(90_000)
    }
    assert len(parse_object(json.dumps({"weight_map": index}).encode(), "x")["weight_map"]) == 90_000
    tensors = {f"model.layers.{i}.weight": {"format": "int4:g64", "shape": [4096, 4096]} for i in range(20_000)}
    assert len(parse_object(json.dumps({"quantization_config": {"tensors": tensors}}, indent=2).encode(), "x")) == 1
    assert MAX_WIDE == 8 << 20


def test_the_number_that_tokenizers_have_for_no_limit() -> None:
    number = 1000000000000000019884624838656  # int(1e30), in tokenizer_config.json of most models on the hub
    assert parse(f'{{"model_max_length": {number}}}'.encode(), "file") == {"model_max_length": number}
    for other in (number + 1, number * 10, -number):
        with pytest.raises(FileFormatError, match="does not fit 64 bits"):
            parse(f'{{"model_max_length": {other}}}'.encode(), "file")
