"""Stop strings over a text in pieces, against a plain definition over the whole text."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from nybble.engine.stopping import StopStrings
from nybble.errors import UsageError

letters = st.text("ab", max_size=30)
stop_strings = st.lists(st.text("ab", min_size=1, max_size=5), max_size=4)


def plain(text: str, stops: list[str]) -> tuple[str, str | None]:
    """(the text before the stop string, that string): character by character, the longest one at the first end."""
    for end in range(len(text) + 1):
        completed = [stop for stop in stops if text[:end].endswith(stop)]
        if completed:
            stop = max(completed, key=len)
            return text[: end - len(stop)], stop
    return text, None


def cut_up(text: str, lengths: list[int]) -> list[str]:
    pieces, at = [], 0
    for length in lengths:
        pieces.append(text[at : at + length])
        at += length
    return [*pieces, text[at:]]


@given(text=letters, stops=stop_strings, lengths=st.lists(st.integers(0, 4), max_size=12))
def test_the_text_ends_before_the_first_stop_string_whatever_the_pieces(text: str, stops: list[str], lengths: list[int]) -> None:
    stopping = StopStrings(stops)
    out = "".join(stopping.feed(piece) for piece in cut_up(text, lengths)) + stopping.finish()
    assert (out, stopping.stopped_by) == plain(text, stops)


@given(text=letters, stops=stop_strings)
def test_only_what_could_begin_a_stop_string_is_held_back(text: str, stops: list[str]) -> None:
    stopping = StopStrings(stops)
    out = ""
    for at, letter in enumerate(text, 1):
        out += stopping.feed(letter)
        if stopping.stopped_by is not None:
            break
        held = text[len(out) : at]
        assert not held or any(stop.startswith(held) and stop != held for stop in stops)
        assert not any(stop.startswith(text[start:at]) for stop in stops for start in range(len(out)))


def test_by_hand() -> None:
    stopping = StopStrings(["\n\n", "END"])
    assert [stopping.feed(piece) for piece in ("one\n", "two E", "N", "ough\n", "\nthree", "four")] == [
        "one", "\ntwo ", "", "ENough", "", "",
    ]  # fmt: skip
    assert stopping.stopped_by == "\n\n"
    assert stopping.finish() == ""


def test_what_is_held_back_comes_at_the_end() -> None:
    stopping = StopStrings(["STOP"])
    assert stopping.feed("a STO") == "a "
    assert stopping.finish() == "STO"
    assert stopping.finish() == ""
    assert stopping.stopped_by is None


def test_without_stop_strings_everything_passes() -> None:
    stopping = StopStrings([])
    assert [stopping.feed(piece) for piece in ("a", "", "b")] == ["a", "", "b"]
    assert stopping.finish() == ""


def test_an_empty_stop_string_is_refused() -> None:
    with pytest.raises(UsageError, match="stop string is empty"):
        StopStrings(["a", ""])
