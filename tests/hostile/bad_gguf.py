"""GGUF files that break the format itself."""

from __future__ import annotations

import os
import struct
from collections.abc import Callable
from pathlib import Path

from catalogue import Build, Case, of_bytes, refused_for_a_link
from good import ARRAY, BOOL, F32, STRING, U8, U32, U64, Lie, Tensor, array, gguf, gguf_model, key, text

from nybble.errors import FileFormatError, InputError

GOOD = key("general.name", STRING, "x")
W = Tensor()
HUGE = 10**18


def tensors(*found: Tensor) -> bytes:
    return gguf([GOOD], found)


def aligned(kind: int, value: object) -> bytes:
    """A file that states its alignment."""
    return gguf([key("general.alignment", kind, value)], [W])


def with_value(kind: int, payload: bytes) -> bytes:
    """A file of one key whose value is these bytes."""
    return gguf([key("k", kind, payload)])


def cut(part: float) -> Callable[[], bytes]:
    """A whole model of which only a part is left."""
    return lambda: (data := gguf_model())[: int(len(data) * part)]


def cut_at(sign: bytes, behind: int) -> Callable[[], bytes]:
    """A whole model that ends so many bytes behind a text in it."""
    return lambda: (data := gguf_model())[: data.index(sign) + len(sign) + behind]


def big_endian() -> bytes:
    name, value = b"general.name", b"x"
    head = struct.pack(">IQQ", 3, 0, 1) + struct.pack(">Q", len(name)) + name + struct.pack(">IQ", STRING, len(value)) + value
    return b"GGUF" + head + bytes(64)


def many_keys(count: int) -> bytes:
    return gguf([key(str(i), U8, 0) for i in range(count)])


def many_tensors(count: int) -> bytes:
    one = [Tensor(name=str(i), dims=(1,), type=24, data=b"") for i in range(count)]
    return gguf([], [Tensor(**{**vars(t), "offset": 32 * i}) for i, t in enumerate(one)], after=bytes(32 * count))


def many_texts(count: int) -> bytes:
    return gguf([key("k", ARRAY, array(STRING, bytes(8 * count), count))])


def link(target: str) -> Build:
    def build(folder: Path) -> None:
        (folder.parent / f"outside-{folder.name}.gguf").write_bytes(gguf_model())
        (folder / "model.gguf").symlink_to(target.format(name=folder.name))

    return build


def sparse(first: Callable[[], bytes], size: int) -> Build:
    """A file that is long and takes no space."""

    def build(folder: Path) -> None:
        (folder / "model.gguf").write_bytes(first())
        os.truncate(folder / "model.gguf", size)

    return build


BYTES: dict[str, tuple[Callable[[], bytes], str]] = {
    "empty": (lambda: b"", "takes 4 bytes, 0 are left"),
    "three bytes": (lambda: b"GGU", "takes 4 bytes, 3 are left"),
    "another magic": (lambda: gguf([GOOD], [W], magic=b"GGML"), "begins with b'GGML'"),
    "magic in lower case": (lambda: gguf([GOOD], [W], magic=b"gguf"), "begins with b'gguf'"),
    "magic of nothing": (lambda: bytes(1000), "begins with b'.*x00"),
    "a safetensors file": (lambda: struct.pack("<Q", 2) + b"{}", "begins with"),
    "only its magic": (lambda: b"GGUF", "its version takes 4 bytes, 0 are left"),
    "version 0": (lambda: gguf([GOOD], [W], version=0), "its version is 0"),
    "version 1": (lambda: gguf([GOOD], [W], version=1), "its version is 1"),
    "version 4": (lambda: gguf([GOOD], [W], version=4), "its version is 4"),
    "version of 32 bits": (lambda: gguf([GOOD], [W], version=0xFFFFFFFF), "its version is 4294967295"),
    "big-endian": (big_endian, "big-endian"),
    "2^64 - 1 tensors": (lambda: gguf([GOOD], counts=((1 << 64) - 1, None)), "has 18446744073709551615 tensors, the limit"),
    "2^64 - 1 keys": (lambda: gguf([GOOD], counts=(None, (1 << 64) - 1)), "has 18446744073709551615 keys, the limit"),
    "2^31 tensors": (lambda: gguf([GOOD], counts=(1 << 31, None)), "has 2147483648 tensors, the limit"),
    "65,537 keys": (lambda: many_keys(65_537), "has 65537 keys, the limit is 65536"),
    "65,537 tensors": (lambda: gguf([], [], counts=(65_537, None)), "has 65537 tensors, the limit is 65536"),
    "one tensor more than there is": (lambda: gguf([GOOD], [W], counts=(2, None)), "the (name|shape|dimensions) of|takes"),
    "one key more than there is": (lambda: gguf([GOOD], [W], counts=(None, 2)), "a name is not empty"),
    "one key less than there is": (lambda: gguf([GOOD, GOOD], [W], counts=(None, 1)), "dimensions"),
    "a tensor less than there is": (lambda: gguf([GOOD], [W, Tensor("v")], counts=(1, None)), "bytes follow its last tensor"),
    "a key twice": (lambda: gguf([GOOD, GOOD], [W]), "key 'general.name' stands twice"),
    "a key without a name": (lambda: gguf([key("", U8, 0)]), "a name is not empty"),
    "a key with a NUL": (lambda: gguf([key("a\0b", U8, 0)]), "holds no NUL"),
    "a key that is not UTF-8": (lambda: gguf([key(b"\xff\xfe", U8, 0)]), "a key is not UTF-8"),
    "a key of 65,536 bytes": (lambda: gguf([key("k" * 65_536, U8, 0)]), "a key has 65536 bytes, the limit is 65535"),
    "a key of 2^64 - 1 bytes": (lambda: gguf([text("k", (1 << 64) - 1) + struct.pack("<IB", U8, 0)]), "the limit is 65535"),
    "a key longer than the file": (lambda: gguf([text("k", 60_000)]), "takes 60000 bytes"),
    "a value of type 13": (lambda: with_value(13, b"\0" * 8), "has type 13, types go from 0 to 12"),
    "a value of type 2^32 - 1": (lambda: with_value(0xFFFFFFFF, b"\0" * 8), "has type 4294967295"),
    "a value longer than the file": (lambda: gguf([key("k", U64, b"")], alignment=1), "takes 8 bytes, 0 are left"),
    "a text of 2^64 - 1 bytes": (lambda: with_value(STRING, text("x", (1 << 64) - 1)), "the limit is 67108864"),
    "a text of 2^63 bytes": (lambda: with_value(STRING, text("x", 1 << 63)), "the limit is 67108864"),
    "a text longer than the file": (lambda: with_value(STRING, text("x", 1000)), "takes 1000 bytes"),
    "a text that is not UTF-8": (lambda: with_value(STRING, text(b"\xc3\x28")), "is not UTF-8"),
    "a text with half a surrogate pair": (lambda: with_value(STRING, text(b"\xed\xa0\x80")), "is not UTF-8"),
    "a text that is UTF-8 written too long": (lambda: with_value(STRING, text(b"\xc0\xaf")), "is not UTF-8"),
    "a bool of 2": (lambda: with_value(BOOL, b"\2"), "a bool of 2, which is 0 or 1"),
    "a bool of 255": (lambda: with_value(BOOL, b"\xff"), "a bool of 255"),
    "an array of bools, one of them 7": (lambda: with_value(ARRAY, array(BOOL, [0, 1, 7])), "bools other than 0 and 1"),
    "an array of 10^18 bytes": (lambda: with_value(ARRAY, array(U8, b"", HUGE)), "takes 1000000000000000000 bytes"),
    "an array of 10^18 texts": (lambda: with_value(ARRAY, array(STRING, b"", HUGE)), "has 1000000000000000000 texts"),
    "an array of 10^18 floats": (lambda: with_value(ARRAY, array(F32, b"", HUGE)), "takes 4000000000000000000 bytes"),
    "an array of 2^62 numbers of 8 bytes": (lambda: with_value(ARRAY, array(U64, b"", 1 << 62)), "takes 36893488147419103232"),
    "an array of 2^64 - 1 texts": (lambda: with_value(ARRAY, array(STRING, b"", (1 << 64) - 1)), "texts, .* are left"),
    "an array of 100,000,000 bytes in 113": (lambda: with_value(ARRAY, array(U8, bytes(50), 100_000_000)), "takes 100000000"),
    "an array one longer than the file": (
        lambda: gguf([key("k", ARRAY, array(U8, bytes(9), 10))], alignment=1),
        "takes 10 bytes",
    ),
    "an array of texts that ends early": (lambda: gguf([key("k", ARRAY, array(STRING, ["a"], 2))], alignment=1), "texts|takes"),
    "an array of texts, one of 2^63 bytes": (
        lambda: with_value(ARRAY, array(STRING, text("a") + text("b", 1 << 63) + bytes(50), 3)),
        "bytes, the limit|takes",
    ),
    "an array of texts, one not UTF-8": (lambda: with_value(ARRAY, array(STRING, ["a", b"\xff", "b"])), "is not UTF-8"),
    "an array of texts, a character over two of them": (
        lambda: with_value(ARRAY, array(STRING, [b"\xc3", b"\xa4"])),
        "is not UTF-8",
    ),
    "over a million texts": (lambda: many_texts((1 << 20) + 1), "over 1048576 texts"),
    "an array of arrays": (lambda: with_value(ARRAY, array(ARRAY, array(U8, [1, 2]), 1)), "an array of arrays"),
    "arrays of arrays of arrays, 10,000 deep": (
        lambda: with_value(ARRAY, struct.pack("<IQ", ARRAY, 1) * 10_000 + bytes(16)),
        "an array of arrays",
    ),
    "an array of elements of type 99": (lambda: with_value(ARRAY, array(99, b"\0" * 8, 1)), "have type 99"),
    "alignment 0": (lambda: aligned(U32, 0), "not a power of two"),
    "alignment 33": (lambda: aligned(U32, 33), "not a power of two"),
    "alignment 2^31": (lambda: aligned(U32, 1 << 31), "not a power of two up to 1048576"),
    "alignment of 2^64 - 1": (lambda: aligned(U64, (1 << 64) - 1), "not a power of two"),
    "alignment that is a text": (lambda: aligned(STRING, "32"), "not a power of two"),
    "alignment that is a float": (lambda: aligned(F32, 32.0), "not a power of two"),
    "alignment that is an array": (lambda: aligned(ARRAY, array(U32, [32])), "not a power of two"),
    "alignment of 8 bytes": (lambda: aligned(U64, 32), r"general.alignment is 32 \(uint64\)"),
    "a tensor without a name": (lambda: tensors(Tensor("")), "a name is not empty"),
    "a tensor's name with a NUL": (lambda: tensors(Tensor("../../x\0y")), "holds no NUL"),
    "a tensor's name of 64 bytes": (lambda: tensors(Tensor("w" * 64)), "has 64 bytes, the limit is 63"),
    "a tensor's name that is not UTF-8": (lambda: tensors(Tensor(b"\x80")), "is not UTF-8"),
    "a tensor's name of 2^63 bytes": (lambda: gguf([GOOD], [Tensor(Lie(b"w", 1 << 63))]), "the limit is 63"),
    "a tensor twice": (lambda: tensors(W, W), "tensor 'w' stands twice"),
    "no dimensions": (lambda: tensors(Tensor(dims=(), n_dims=0)), "has 0 dimensions, not 1 to 4"),
    "5 dimensions": (lambda: tensors(Tensor(dims=(1, 1, 1, 1, 4))), "has 5 dimensions"),
    "2^32 - 1 dimensions": (lambda: tensors(Tensor(n_dims=0xFFFFFFFF)), "has 4294967295 dimensions"),
    "a dimension of 0": (lambda: tensors(Tensor(dims=(0,), data=b"")), "a dimension of 0"),
    "an outer dimension of 0": (lambda: tensors(Tensor(dims=(4, 0), data=b"")), "a dimension of 0"),
    "a dimension of -1": (lambda: tensors(Tensor(dims=(-1,))), "over 9223372036854775807 elements|takes"),
    "dimensions that wrap to a negative count": (lambda: tensors(Tensor(dims=((1 << 63) - 1, 2))), "over 9223372036854775807"),
    "dimensions that wrap to 4": (lambda: tensors(Tensor(dims=(1 << 62, 4, 1, 1))), "over 9223372036854775807"),
    "dimensions that wrap to 0": (lambda: tensors(Tensor(dims=(1 << 32, 1 << 32))), "over 9223372036854775807"),
    "bytes that wrap to 0": (lambda: tensors(Tensor(dims=(1 << 62,))), "takes 18446744073709551616 bytes"),
    "a dimension of 2^42 + 1": (lambda: tensors(Tensor(dims=((1 << 42) + 1,), type=0)), "takes 17592186044420 bytes"),
    "a row of 33 in blocks of 32": (lambda: tensors(Tensor(dims=(33,), type=2)), "no multiple of 32, a block of Q4_0"),
    "a row of 128 in blocks of 256": (lambda: tensors(Tensor(dims=(128, 2), type=12)), "no multiple of 256, a block of Q4_K"),
    "a type that is no more": (lambda: tensors(Tensor(type=4)), "has type 4, which is none of ggml's that are in use"),
    "type 43": (lambda: tensors(Tensor(type=43)), "has type 43"),
    "type 2^32 - 1": (lambda: tensors(Tensor(type=0xFFFFFFFF)), "has type 4294967295"),
    "an offset that is not aligned": (lambda: tensors(W, Tensor("v", offset=16)), "begins at byte 16 of the data, expected 32"),
    "an offset of 1": (lambda: tensors(Tensor(offset=1)), "begins at byte 1 of the data, expected 0"),
    "an offset behind the file": (lambda: tensors(Tensor(offset=1 << 40)), "begins at byte 1099511627776"),
    "an offset of 2^64 - 32": (lambda: tensors(Tensor(offset=(1 << 64) - 32)), "begins at byte 18446744073709551584"),
    "two tensors in one place": (lambda: tensors(W, Tensor("v", offset=0)), "begins at byte 0 of the data, expected 32"),
    "tensors over each other": (lambda: tensors(Tensor(dims=(16,), data=bytes(64)), Tensor("v", offset=32)), "expected 64"),
    "tensors in the other order": (lambda: tensors(Tensor(offset=32), Tensor("v", offset=0)), "begins at byte 32"),
    "a hole between two tensors": (lambda: tensors(W, Tensor("v", offset=64)), "begins at byte 64 of the data, expected 32"),
    "a tensor longer than the file": (lambda: tensors(Tensor(dims=(1000,))), "takes 4000 bytes"),
    "a tensor that ends behind the file": (lambda: tensors(Tensor(dims=(16,), data=bytes(32))), r"\(truncated\)"),
    "the last byte missing": (lambda: tensors(Tensor(dims=(8,), data=bytes(32)))[:-1], r"\(truncated\)"),
    "bytes behind the last tensor": (lambda: gguf([GOOD], [W], after=bytes(32)), "32 bytes follow its last tensor"),
    "another file behind it": (lambda: gguf([GOOD], [W]) + gguf([GOOD], [W]), "bytes follow its last tensor"),
    "no tensors but data": (lambda: gguf([GOOD], after=bytes(1000)), "bytes follow its last tensor"),
    "cut within its counts": (lambda: gguf_model()[:20], "the number of keys takes 8 bytes"),
    "cut within the name of a key": (cut_at(b"llama.context", 0), "a key takes"),
    "cut within a number": (cut_at(b"llama.context_length", 6), "the value of 'llama.context_length' takes 4 bytes"),
    "cut within a text": (cut_at(b"general.name", 14), "the value of 'general.name' takes"),
    "cut within an array of texts": (cut_at(b"tokenizer.ggml.tokens", 100), "texts, .* are left|takes"),
    "cut within an array of floats": (cut_at(b"tokenizer.ggml.scores", 100), "the value of 'tokenizer.ggml.scores' takes 192"),
    "cut within the name of a tensor": (cut_at(b"token_embd", 0), "the name of a tensor takes"),
    "cut within the shape of a tensor": (cut_at(b"token_embd.weight", 10), "the shape of tensor 'token_embd.weight' takes"),
    "cut within the offset of a tensor": (cut_at(b"token_embd.weight", 26), "the offset of tensor 'token_embd.weight' takes"),
    "cut before its data": (cut_at(b"output.weight", 32), "takes|truncated"),
    "cut in the middle of its data": (cut(0.7), "takes|truncated"),
    "cut in the last of its data": (cut(0.995), "takes|truncated"),
}

CASES: dict[str, Case] = {name: Case("gguf", of_bytes(make), match, FileFormatError) for name, (make, match) in BYTES.items()} | {
    "a terabyte of nothing behind its magic": Case(
        "gguf", sparse(lambda: b"GGUF" + struct.pack("<IQQ", 3, 0, 0), 1 << 40), "bytes follow its last tensor"
    ),
    "a text of 65 MB": Case(
        "gguf", sparse(lambda: b"GGUF" + struct.pack("<IQQ", 3, 0, 1) + key("k", STRING, text("", 68_000_000)), 1 << 27), "limit"
    ),
    "a pipe": Case("gguf", lambda folder: os.mkfifo(folder / "model.gguf"), "is no regular file", InputError),
    "a folder": Case("gguf", lambda folder: (folder / "model.gguf").mkdir(), "Is a directory", InputError),
    "a link to a device": refused_for_a_link("gguf", link("/dev/zero")),
    "a link to the folder above": refused_for_a_link("gguf", link("../outside-{name}.gguf")),
}
