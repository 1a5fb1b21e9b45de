"""Broken safetensors files."""

from __future__ import annotations

import json
import os
import struct
from collections.abc import Callable
from pathlib import Path

from catalogue import Build, Case, of_bytes, refused_for_a_link
from good import entry, safetensors

from nybble.errors import InputError

OK = entry()
ONE = json.dumps(OK).encode()


def case(build: Build, match: str, error: type[Exception] | None = None) -> Case:
    return Case("safetensors", build, match) if error is None else Case("safetensors", build, match, error)


def sparse(first: bytes, size: int) -> Build:
    """A file that is long and takes no space."""

    def build(folder: Path) -> None:
        (folder / "model.safetensors").write_bytes(first)
        os.truncate(folder / "model.safetensors", size)

    return build


def link(target: str) -> Build:
    """The file is a link, to a valid one in the folder above where that is what it names."""

    def build(folder: Path) -> None:
        (folder.parent / f"outside-{folder.name}.safetensors").write_bytes(safetensors({"a": OK}, b"1234"))
        (folder / "model.safetensors").symlink_to(target.format(name=folder.name, folder=folder))

    return build


def pipe(folder: Path) -> None:
    os.mkfifo(folder / "model.safetensors")


def many(count: int) -> bytes:
    """A header of this many tensors of no bytes."""
    one = '"%d":{"dtype":"U8","shape":[0],"data_offsets":[0,0]}'
    return safetensors(b"{" + ",".join(one % i for i in range(count)).encode() + b"}")


def nested(count: int) -> bytes:
    """A field of a header that would be 24 times its size in memory."""
    return safetensors(b'{"a":{"x":[' + b"{}," * count + b"{}]}}")


def wide() -> bytes:
    """A header of 9 MB with one character of 4 bytes: each character of the text takes 4 in memory."""
    return safetensors(json.dumps({"__metadata__": {"k": "\U0001f600" + "a" * 9_000_000}}, ensure_ascii=False).encode())


BYTES: dict[str, tuple[Callable[[], bytes], str]] = {
    "empty": (lambda: b"", "it has 0 bytes, a header length needs 8"),
    "seven bytes": (lambda: b"\0" * 7, "it has 7 bytes, a header length needs 8"),
    "no header": (lambda: struct.pack("<Q", 0), "does not begin with {"),
    "header of 2^63 bytes": (lambda: safetensors({"a": OK}, b"1234", 1 << 63), "claims 9223372036854775808 bytes"),
    "header of 2^64 - 1 bytes": (lambda: safetensors({"a": OK}, b"1234", (1 << 64) - 1), "claims 18446744073709551615 bytes"),
    "header one byte longer than the file": (
        lambda: safetensors({"a": OK}, b"", 1 + len(json.dumps({"a": OK}))),
        "bytes, [0-9]+ follow",
    ),
    "header longer than the file": (lambda: safetensors({"a": OK}, b"", 1000), "claims 1000 bytes"),
    "header is not JSON": (lambda: safetensors(b"{]", b"1234"), "header is not JSON"),
    "header is not UTF-8": (lambda: safetensors(b'{"\xff":1}'), "not JSON .*utf-8"),
    "header in UTF-16": (lambda: safetensors(json.dumps({"a": OK}).encode("utf-16-le"), b"1234"), "header is not JSON"),
    "header with a byte order mark": (lambda: safetensors(b"\xef\xbb\xbf{}"), "does not begin with {"),
    "header is a list": (lambda: safetensors([1]), "does not begin with {"),
    "header is a number": (lambda: safetensors(b"12"), "does not begin with {"),
    "header begins with a space": (lambda: safetensors(b' {"a":' + ONE + b"}", b"1234"), "does not begin with {"),
    "header has two values": (lambda: safetensors(b"{}{}"), "more text after its end"),
    "header ends early": (lambda: safetensors(b'{"a":'), "is not described by an object"),
    "header of one brace": (lambda: safetensors(b"{"), "header is not JSON"),
    "header with a comma too many": (lambda: safetensors(b'{"a":' + ONE + b",}", b"1234"), "header is not JSON"),
    "header in single quotes": (lambda: safetensors(b"{'a':" + ONE + b"}", b"1234"), "header is not JSON"),
    "header with a NUL behind it": (lambda: safetensors(b'{"a":' + ONE + b"}\0", b"1234"), "more text after its end"),
    "a tensor twice": (lambda: safetensors(b'{"a":%b,"a":%b}' % (ONE, ONE), b"1234"), "key 'a' stands twice"),
    "a tensor twice, once escaped": (lambda: safetensors(b'{"a":%b,"\\u0061":%b}' % (ONE, ONE), b"1234"), "key 'a' stands twice"),
    "metadata twice": (lambda: safetensors(b'{"__metadata__":{},"__metadata__":{}}'), "'__metadata__' stands twice"),
    "a key of the metadata twice": (lambda: safetensors(b'{"__metadata__":{"k":"v","k":"w"}}'), "key 'k' stands twice"),
    "a field twice": (
        lambda: safetensors(b'{"a":{"dtype":"U8","dtype":"U8","shape":[4],"data_offsets":[0,4]}}', b"1234"),
        "'dtype' stands twice",
    ),
    "overlap": (lambda: safetensors({"a": OK, "b": entry(offsets=[2, 6])}, b"123456"), "begins at byte 2, expected 4"),
    "the same bytes twice": (lambda: safetensors({"a": OK, "b": OK}, b"1234"), "begins at byte 0, expected 4"),
    "hole at the start": (lambda: safetensors({"a": entry(offsets=[2, 6])}, b"123456"), "begins at byte 2, expected 0"),
    "hole in the middle": (
        lambda: safetensors({"a": OK, "b": entry(offsets=[5, 9])}, b"123456789"),
        "begins at byte 5, expected 4",
    ),
    "bytes behind the end": (lambda: safetensors({"a": OK}, b"12345"), "take 4 bytes, the file holds 5"),
    "data missing": (lambda: safetensors({"a": OK}, b"123"), "take 4 bytes, the file holds 3"),
    "no tensors but data": (lambda: safetensors({}, b"1"), "take 0 bytes, the file holds 1"),
    "offsets reversed": (lambda: safetensors({"a": entry(offsets=[4, 0])}, b"1234"), "does not fill its -4 bytes"),
    "negative offset": (lambda: safetensors({"a": entry(offsets=[-4, 0])}, b"1234"), "not a non-negative integer"),
    "three offsets": (lambda: safetensors({"a": entry(offsets=[0, 4, 4])}, b"1234"), "not two numbers"),
    "offsets are text": (lambda: safetensors({"a": entry(offsets=["0", "4"])}, b"1234"), "not a non-negative integer"),
    "offsets are floats": (lambda: safetensors({"a": entry(offsets=[0.0, 4.0])}, b"1234"), "not a non-negative integer"),
    "offsets beyond 64 bits": (lambda: safetensors({"a": entry(shape=[2**70], offsets=[0, 2**70])}), "does not fit 64 bits"),
    "offset of 2^62": (lambda: safetensors({"a": entry(shape=[2**62], offsets=[0, 2**62])}), "is larger than"),
    "offsets missing": (lambda: safetensors({"a": {"dtype": "U8", "shape": [4]}}, b"1234"), "has not dtype, shape and"),
    "a field too many": (lambda: safetensors({"a": {**OK, "x": 1}}, b"1234"), "or more than these"),
    "negative shape": (lambda: safetensors({"a": entry(shape=[-2, -2])}, b"1234"), "not a non-negative integer"),
    "minus zero": (lambda: safetensors(b'{"a":{"dtype":"U8","shape":[-0],"data_offsets":[0,0]}}'), "-0 is not an integer"),
    "shape overflows": (lambda: safetensors({"a": entry(shape=[2**32, 2**32, 4])}, b"1234"), "is larger than"),
    "shape overflows to the right size": (lambda: safetensors({"a": entry(shape=[2**63, 2, 4])}), "is larger than"),
    "shape hides a size behind a zero": (
        lambda: safetensors({"a": entry(shape=[0, 2**62, 2**62], offsets=[0, 0])}),
        "is larger than",
    ),
    "shape of 40 dimensions": (lambda: safetensors({"a": entry(shape=[1] * 40, offsets=[0, 1])}, b"1"), "has 40 dimensions"),
    "shape of 100,000 dimensions": (
        lambda: safetensors({"a": entry(shape=[1] * 100_000, offsets=[0, 1])}, b"1"),
        "does not end within 4096 characters",
    ),
    "shape too small": (lambda: safetensors({"a": entry(shape=[3])}, b"1234"), "does not fill its 4 bytes"),
    "shape is a number": (lambda: safetensors({"a": entry(shape=4)}, b"1234"), "a shape that is no list"),
    "shape is text": (lambda: safetensors({"a": entry(shape="4")}, b"1234"), "a shape that is no list"),
    "shape holds true": (lambda: safetensors({"a": entry(shape=[4, True])}, b"1234"), "not a non-negative integer"),
    "shape holds null": (lambda: safetensors({"a": entry(shape=[None])}, b"1234"), "not a non-negative integer"),
    "shape holds NaN": (
        lambda: safetensors(b'{"a":{"dtype":"U8","shape":[NaN],"data_offsets":[0,4]}}', b"1234"),
        "NaN is not JSON",
    ),
    "ten thousand digits": (
        lambda: safetensors(b'{"a":{"dtype":"U8","shape":[%b],"data_offsets":[0,4]}}' % (b"9" * 10_000), b"1234"),
        "does not end within",
    ),
    "a thousand digits": (
        lambda: safetensors(b'{"a":{"dtype":"U8","shape":[%b],"data_offsets":[0,4]}}' % (b"9" * 1000), b"1234"),
        r"number 9{24}\.\.\. does not fit 64 bits",
    ),
    "a float beyond all floats": (
        lambda: safetensors(b'{"a":{"dtype":"U8","shape":[1e999],"data_offsets":[0,4]}}', b"1234"),
        "too large for a float",
    ),
    "unknown dtype": (lambda: safetensors({"a": entry(dtype="Q4")}, b"1234"), "unknown dtype 'Q4'"),
    "dtype in lower case": (lambda: safetensors({"a": entry(dtype="u8")}, b"1234"), "unknown dtype 'u8'"),
    "dtype is a list": (lambda: safetensors({"a": entry(dtype=["U8"])}, b"1234"), "unknown dtype"),
    "dtype is null": (lambda: safetensors({"a": entry(dtype=None)}, b"1234"), "unknown dtype None"),
    "wrong dtype for the bytes": (lambda: safetensors({"a": entry(dtype="F32")}, b"1234"), "does not fill its 4 bytes"),
    "a bool of 2": (lambda: safetensors({"a": entry(dtype="BOOL")}, b"\0\1\2\1"), "BOOL has bytes other than 0 and 1"),
    "a tensor is a list": (lambda: safetensors({"a": [1]}), "is not described by an object"),
    "a tensor is text": (lambda: safetensors({"a": "dtype"}), "is not described by an object"),
    "a tensor is null": (lambda: safetensors({"a": None}), "is not described by an object"),
    "a tensor is an object in an object": (lambda: safetensors({"a": {"dtype": OK}}, b"1234"), "header is not JSON"),
    "metadata holds a number": (lambda: safetensors({"__metadata__": {"k": 1}}), "metadata is not a map of strings"),
    "metadata holds an object": (lambda: safetensors({"__metadata__": {"k": {}}}), "metadata is not a map of strings"),
    "metadata is a list": (lambda: safetensors({"__metadata__": ["k"]}), "metadata is not a map of strings"),
    "metadata is a tensor": (lambda: safetensors({"__metadata__": OK}, b"1234"), "metadata is not a map of strings"),
    "metadata of 70,000 keys": (
        lambda: safetensors({"__metadata__": {str(i): "" for i in range(70_000)}}),
        "metadata has more than 65536 keys",
    ),
    "deep lists": (lambda: safetensors(b'{"a":' + b"[" * 100_000 + b"]" * 100_000 + b"}"), "is not described by an object"),
    "deep objects": (lambda: safetensors(b'{"a":' * 50_000 + b"1" + b"}" * 50_000), "does not end within|is not JSON"),
    "deep lists inside a tensor": (
        lambda: safetensors(b'{"a":{"shape":' + b"[" * 2000 + b"]" * 2000 + b"}}"),
        "header is not JSON|has not dtype",
    ),
    "lists in lists where a shape belongs": (lambda: safetensors({"a": entry(shape=[[[[4]]]])}, b"1234"), "not a non-negative"),
    "objects that take 24 times their text": (lambda: nested(3_000_000), "header is not JSON|does not end within"),
    "100,001 tensors": (lambda: many(100_001), "more than 100000 tensors"),
    "half a surrogate pair in a name": (
        lambda: safetensors(b'{"\\ud800":{"dtype":"U8","shape":[4],"data_offsets":[0,4]}}', b"1234"),
        "header is not JSON",
    ),
    "half a surrogate pair in the metadata": (lambda: safetensors(b'{"__metadata__":{"k":"\\uDFFF"}}'), "header is not JSON"),
    "a raw line break in a name": (
        lambda: safetensors(b'{"a\n":{"dtype":"U8","shape":[4],"data_offsets":[0,4]}}', b"1234"),
        "header is not JSON",
    ),
    "an escaped line break in a name": (lambda: safetensors({"a\nb": OK}, b"1234"), "cannot be printed"),
    "an escape sequence of terminals in a name": (lambda: safetensors({"\x1b[2J": OK}, b"1234"), "cannot be printed"),
    "a NUL in a name": (lambda: safetensors({"a\0b": OK}, b"1234"), "cannot be printed"),
    "a sign that turns the direction in a name": (lambda: safetensors({"a\u202eb": OK}, b"1234"), "cannot be printed"),
    "a name of 2,000 characters": (lambda: safetensors({"a" * 2000: OK}, b"1234"), "has 2000 characters"),
    "a name that leaves the folder": (lambda: safetensors({"../../etc/passwd": OK}, b"1234"), "a path that leaves its folder"),
    "a name that begins at the root": (lambda: safetensors({"/etc/passwd": OK}, b"1234"), "a path that leaves its folder"),
    "a name that leaves the folder backwards": (lambda: safetensors({"..\\..\\a": OK}, b"1234"), "a path that leaves its folder"),
    "9 MB that are not ASCII": (wide, "is not ASCII"),
}

CASES: dict[str, Case] = {name: case(of_bytes(make), match) for name, (make, match) in BYTES.items()} | {
    "header one byte over the limit": case(
        sparse(struct.pack("<Q", 100_000_001), 200_000_000), r"claims 100000001 bytes, 199999992 follow \(limit 100000000\)"
    ),
    "header of 100 MB of nothing": case(sparse(struct.pack("<Q", 100_000_000) + b"{", 100_000_008), "header is not JSON"),
    "a pipe": case(pipe, "is no regular file", InputError),
    "a folder": case(lambda folder: (folder / "model.safetensors").mkdir(), "Is a directory", InputError),
    "a link to a device": refused_for_a_link("safetensors", link("/dev/zero")),
    "a link to the folder above": refused_for_a_link("safetensors", link("../outside-{name}.safetensors")),
    "a link in a circle": case(link("{folder}/model.safetensors"), "cannot read", InputError),
    "a link to nothing": case(link("none.safetensors"), "cannot read .*No such file", InputError),
}
