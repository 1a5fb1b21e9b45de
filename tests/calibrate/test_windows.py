"""Text files, tokens and windows: every protocol against its definition, every wrong input in one line."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest

from nybble.calibrate.windows import PROTOCOLS, encode, read_text, token_windows
from nybble.errors import InputError, UsageError

TEXT = np.arange(100, 200)


class Tokenizer:
    """One token per character; begins a text with id 1 when `bos`."""

    bos_token_id = 1

    def __init__(self, bos: bool, fails: BaseException | None = None) -> None:
        self.bos, self.fails = bos, fails

    def __call__(self, text: str, add_special_tokens: bool = True, verbose: bool = True) -> dict[str, Any]:
        if self.fails:
            raise self.fails
        return {"input_ids": [1] * (self.bos and add_special_tokens) + [ord(c) for c in text]}


def scored_ids(windows: Any) -> list[int]:
    return [int(i) for i in windows.ids[windows.scored]]


def test_paper_windows_lie_side_by_side_and_score_all_but_their_first() -> None:
    windows = token_windows(TEXT, 32)
    assert windows.ids.tolist() == [list(range(100, 132)), list(range(132, 164)), list(range(164, 196))]
    assert windows.scored.sum(axis=1).tolist() == [31, 31, 31]
    assert not windows.scored[:, 0].any()
    assert windows.scored_tokens == 93
    assert windows.stride == 32


def test_paper_with_bos_scores_every_text_token() -> None:
    windows = token_windows(TEXT, 34, bos=1)
    assert windows.ids.shape == (3, 34)
    assert windows.ids[:, 0].tolist() == [1, 1, 1]
    assert scored_ids(windows) == list(range(100, 199))
    assert windows.stride == 33


@pytest.mark.parametrize(("length", "first_scored"), [(8, 5), (9, 5), (512, 257)])
def test_llama_cpp_scores_the_second_half(length: int, first_scored: int) -> None:
    windows = token_windows(np.arange(2 * length), length, protocol="llama.cpp")
    assert np.flatnonzero(windows.scored[0]).tolist() == list(range(first_scored, length))
    # its tool counts n_ctx - n_ctx / 2 - 1 tokens per chunk
    assert windows.scored.sum(axis=1).tolist() == [length - length // 2 - 1] * 2


def test_llama_cpp_bos_takes_the_place_of_the_first_token() -> None:
    windows = token_windows(TEXT, 10, bos=1, protocol="llama.cpp")
    assert windows.ids[0].tolist() == [1, *range(100, 109)]
    assert windows.ids[1].tolist() == [1, *range(110, 119)]  # token 109 gave way to bos
    assert len(windows) == 10


@pytest.mark.parametrize("bos", [None, 1])
@pytest.mark.parametrize("stride", [1, 3, 8, 15, None])
def test_stride_scores_every_token_once_with_the_longest_context(bos: int | None, stride: int | None) -> None:
    windows = token_windows(TEXT, 16, bos=bos, protocol="stride", stride=stride)
    assert scored_ids(windows) == list(range(100 if bos else 101, 200))
    assert windows.ids[0, -1] == (114 if bos else 115)
    assert windows.ids[-1, -1] == 199
    for row in range(1, len(windows)):
        first = int(np.flatnonzero(windows.scored[row])[0])
        assert first >= 16 - windows.stride, "a token was scored with less context than the window before left it"


def test_stride_of_the_window_that_ends_the_text() -> None:
    windows = token_windows(np.arange(10), 6, protocol="stride", stride=3)
    assert windows.ids.tolist() == [[0, 1, 2, 3, 4, 5], [3, 4, 5, 6, 7, 8], [4, 5, 6, 7, 8, 9]]
    assert windows.scored.sum(axis=1).tolist() == [5, 3, 1]


@pytest.mark.parametrize("protocol", PROTOCOLS)
def test_count_keeps_the_first_windows(protocol: str) -> None:
    windows = token_windows(TEXT, 10, count=2, protocol=protocol)
    everything = token_windows(TEXT, 10, protocol=protocol)
    assert len(windows) == 2
    assert np.array_equal(windows.ids, everything.ids[:2])
    assert len(token_windows(TEXT, 10, count=1000, protocol=protocol)) == len(everything)


@pytest.mark.parametrize("protocol", PROTOCOLS)
def test_one_window_exactly_and_one_token_less(protocol: str) -> None:
    assert len(token_windows(np.arange(16), 16, protocol=protocol)) == 1
    with pytest.raises(InputError, match=r"^the text has 15 tokens, less than one window of 16; .*--window smaller$"):
        token_windows(np.arange(15), 16, protocol=protocol)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"length": 1}, "at least 2"),
        ({"length": 8, "count": 0}, "0 windows"),
        ({"length": 8, "protocol": "papers"}, "did you mean paper"),
        ({"length": 8, "stride": 4}, "only protocol stride"),
        ({"length": 8, "stride": 8, "protocol": "stride"}, "between 1 and 7"),
        ({"length": 2, "protocol": "llama.cpp"}, "empty here"),
    ],
)
def test_wrong_arguments(arguments: dict[str, Any], message: str) -> None:
    with pytest.raises(UsageError, match=message):
        token_windows(TEXT, **arguments)


def test_hash_tells_protocols_apart() -> None:
    hashes = {token_windows(np.arange(20), 20, protocol=protocol).sha256 for protocol in ("paper", "llama.cpp")}
    assert len(hashes) == 2
    assert token_windows(np.arange(20), 20).sha256 in hashes


def test_read_text_json_and_jsonl(tmp_path: Path) -> None:
    plain, lines, listed = tmp_path / "a.txt", tmp_path / "a.jsonl", tmp_path / "a.json"
    plain.write_bytes("\ufeffé\r\nb".encode())
    lines.write_text('{"text": "one\u2028"}\n\n{"text": "two", "id": 3}\n', encoding="utf-8")
    listed.write_text('["one", "two"]', encoding="utf-8")
    assert read_text(plain) == "é\r\nb"
    assert read_text(lines) == "one\u2028\n\ntwo"
    assert read_text(listed) == "one\n\ntwo"


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("none.txt", None, "does not exist"),
        ("empty.txt", b"", "is empty"),
        ("blank.txt", b" \n\t", "is empty"),
        ("latin.txt", b"abc\xe9", r"not UTF-8 \(byte 3\)"),
        ("bad.jsonl", b'{"text": "a"}\n{"text": 3}', "line 2: expected an object"),
        ("cut.jsonl", b'{"text": "a"}\n{"te', "line 2 is not JSON"),
        ("bad.json", b'{"text": "a"}', "JSON list of strings"),
        ("deep.json", b"[" * 100_000, "is not JSON"),
    ],
)
def test_read_text_errors_are_one_line(tmp_path: Path, name: str, content: bytes | None, message: str) -> None:
    if content is not None:
        (tmp_path / name).write_bytes(content)
    with pytest.raises(InputError, match=message) as error:
        read_text(tmp_path / name)
    assert "\n" not in str(error.value)


def test_read_text_of_a_folder_and_of_an_impossible_name(tmp_path: Path) -> None:
    with pytest.raises(InputError, match="is a folder"):
        read_text(tmp_path)
    with pytest.raises(InputError, match=r"cannot read text a.b: "):
        read_text("a\0b")


def test_encode_decides_bos_by_what_the_tokenizer_does() -> None:
    ids, bos = encode(Tokenizer(bos=True), "ab")
    assert (ids.tolist(), ids.dtype, bos) == ([97, 98], np.int64, 1)
    assert encode(Tokenizer(bos=False), "ab")[1] is None


class PanicException(BaseException):
    """What a panic in Rust looks like from Python."""


def test_encode_turns_a_failing_tokenizer_into_one_line() -> None:
    with pytest.raises(InputError, match=r"PanicException: index out of range$|PanicException: index out of range\)$"):
        encode(Tokenizer(False, PanicException("index out\nof range")), "ab")
    with pytest.raises(InputError, match="no token"):
        encode(Tokenizer(False), "")
    with pytest.raises(KeyboardInterrupt):
        encode(Tokenizer(False, KeyboardInterrupt()), "ab")
