"""The GGUF reader and writer: golden bytes, the gguf package where it is installed, and limits. Hostile files: tests/hostile."""

from __future__ import annotations

import os
import struct
import time
import tracemalloc
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from nybble.errors import FileFormatError, InputError, OutputError
from nybble.files import gguf_values
from nybble.files.gguf import ALIGNMENT_KEY, BY_NAME, TYPES, GgufFile, Tensor, write_gguf
from nybble.files.gguf_values import Value


def text(value: str | bytes) -> bytes:
    encoded = value if isinstance(value, bytes) else value.encode()
    return struct.pack("<Q", len(encoded)) + encoded


def assemble(
    keys: list[bytes], tensors: list[bytes], data: bytes = b"", version: int = 3, counts: tuple[int, int] | None = None
) -> bytes:
    """A file from its parts, with the padding before the data."""
    head = b"GGUF" + struct.pack("<IQQ", version, *(counts or (len(tensors), len(keys)))) + b"".join(keys + tensors)
    return head + bytes(-len(head) % 32) + data


def info(name: str = "a", shape: tuple[int, ...] = (4,), kind: int = 0, start: int = 0) -> bytes:
    return text(name) + struct.pack(f"<I{len(shape)}QIQ", len(shape), *shape, kind, start)


def key(name: str, kind: int, payload: bytes) -> bytes:
    return text(name) + struct.pack("<I", kind) + payload


def metadata() -> dict[str, Value]:
    return {
        "general.architecture": Value.text("llama"),
        "whole": Value("uint32", 7),
        "negative": Value("int64", -5),
        "float": Value("float32", 1e-5),
        "switch": Value("bool", 1),
        "texts": Value.texts(["a", "é", "", "日本"]),
        "numbers": Value.array("int16", [-1, 2, 3]),
        "switches": Value.array("bool", [0, 1]),
        "none": Value.array("float64", []),
    }


def tensors() -> list[Tensor]:
    rng = np.random.default_rng(0)
    blocks = rng.integers(0, 256, 4 * 36, dtype=np.uint8)
    return [
        Tensor("first", "F32", (3, 5), lambda: np.arange(15, dtype=np.float32)),
        Tensor("blocks", "Q4_0", (4, 64), lambda: blocks),
        Tensor("half", "F16", (2, 2, 3), lambda: np.arange(12, dtype=np.float16)),
    ]


def test_round_trip_and_views_are_read_only(tmp_path: Path) -> None:
    path = tmp_path / "a.gguf"
    assert write_gguf(path, metadata(), tensors()) == path.stat().st_size
    file = GgufFile(path)
    assert file.version == 3
    assert file.metadata == metadata()
    assert list(file.metadata) == list(metadata())
    assert list(file.tensors) == ["first", "blocks", "half"]
    assert file.elements("first").tolist() == np.arange(15).reshape(3, 5).tolist()
    assert file.elements("half").shape == (2, 2, 3)
    assert file.raw("blocks").shape == (4, 36)
    assert np.array_equal(file.raw("blocks").ravel(), tensors()[1].data())
    with pytest.raises(ValueError, match="read-only"):
        file.raw("blocks")[0, 0] = 1
    with pytest.raises(InputError, match="has no tensor 'b'; it has 3 others"):
        file.raw("b")
    with pytest.raises(InputError, match="tensor 'blocks' is Q4_0, which is made of blocks"):
        file.elements("blocks")


def test_golden_bytes(tmp_path: Path) -> None:
    path = tmp_path / "a.gguf"
    write_gguf(path, {"k": Value("uint8", 9)}, [Tensor("t", "F16", (1, 2), lambda: np.array([1.0, -1.5], np.float16))])
    head = b"GGUF\x03\0\0\0" + b"\1\0\0\0\0\0\0\0" * 2
    one = b"\1\0\0\0\0\0\0\0k\0\0\0\0\x09"
    two = b"\1\0\0\0\0\0\0\0t\2\0\0\0" + b"\2\0\0\0\0\0\0\0" + b"\1\0\0\0\0\0\0\0" + b"\1\0\0\0" + bytes(8)
    expected = head + one + two
    expected += bytes(-len(expected) % 32) + b"\x00\x3c\x00\xbe" + bytes(28)
    assert path.read_bytes() == expected


def test_the_same_input_gives_the_same_bytes(tmp_path: Path) -> None:
    for name in ("a", "b"):
        write_gguf(tmp_path / name, metadata(), tensors())
    assert (tmp_path / "a").read_bytes() == (tmp_path / "b").read_bytes()


@pytest.mark.parametrize("alignment", [1, 8, 64, 1 << 20])
def test_alignment(alignment: int, tmp_path: Path) -> None:
    path = tmp_path / "a.gguf"
    write_gguf(path, {ALIGNMENT_KEY: Value("uint32", 4096), **metadata()}, tensors(), alignment)
    file = GgufFile(path)
    assert file.alignment == alignment
    assert all(entry.start % alignment == 0 for entry in file.tensors.values())
    assert file.elements("first")[2, 4] == 14
    assert file.metadata[ALIGNMENT_KEY] == Value("uint32", alignment)


def test_a_file_of_version_2_and_one_without_its_last_padding(tmp_path: Path) -> None:
    path = tmp_path / "a.gguf"
    path.write_bytes(assemble([], [info()], bytes(16), version=2))
    assert GgufFile(path).version == 2
    assert GgufFile(path).elements("a").tolist() == [0, 0, 0, 0]


def test_nothing_is_left_behind_when_a_tensor_has_other_bytes(tmp_path: Path) -> None:
    path = tmp_path / "a.gguf"
    path.write_bytes(b"before")
    with pytest.raises(ValueError, match=r"tensor a has 4 bytes, F32 \(2, 2\) takes 16"):
        write_gguf(path, {}, [Tensor("a", "F32", (2, 2), lambda: np.zeros(1, np.float32))])
    with pytest.raises(OutputError, match=r"cannot write .*: tensor 'a' has rows of 33 columns, no multiple of 32"):
        write_gguf(path, {}, [Tensor("a", "Q8_0", (1, 33), lambda: np.zeros(34, np.uint8))])
    with pytest.raises(OutputError, match=r"the name of a tensor has 64 bytes, the limit is 63"):
        write_gguf(path, {}, [Tensor("a" * 64, "F32", (1,), lambda: np.zeros(1, np.float32))])
    with pytest.raises(OutputError, match=r"cannot write .*missing.*No such file"):
        write_gguf(tmp_path / "missing" / "a.gguf", {}, [])
    assert path.read_bytes() == b"before"
    assert os.listdir(tmp_path) == ["a.gguf"]


WRONG: dict[str, tuple[bytes, str]] = {
    "empty": (b"", "the word GGUF that it begins with takes 4 bytes, 0 are left"),
    "another file": (b"PK\3\4" + bytes(40), r"it begins with b'PK\\x03\\x04', not with GGUF"),
    "version 1": (assemble([], [], version=1), "its version is 1; nybble reads 2 and 3"),
    "big-endian": (b"GGUF" + struct.pack(">IQQ", 3, 0, 0), "its numbers are big-endian"),
    "many tensors": (assemble([], [], counts=(65_537, 0)), "it has 65537 tensors, the limit is 65536"),
    "many keys": (assemble([], [], counts=(0, 1 << 62)), "it has 4611686018427387904 keys, the limit is 65536"),
    "key twice": (assemble([key("k", 0, b"\1")] * 2, []), "key 'k' stands twice"),
    "key with NUL": (assemble([key("a\0b", 0, b"\1")], []), "holds no NUL"),
    "empty key": (assemble([key("", 0, b"\1")], []), "a name is not empty"),
    "key no UTF-8": (assemble([text(b"\xff") + bytes(5)], []), "a key is not UTF-8"),
    "unknown type": (assemble([key("k", 13, b"")], []), "the value of 'k' has type 13"),
    "bool of 2": (assemble([key("k", 7, b"\2")], []), "the value of 'k' is a bool of 2"),
    "bools of 2": (assemble([key("k", 9, struct.pack("<IQ", 7, 2) + b"\0\2")], []), "has bools other than 0 and 1"),
    "long text": (assemble([key("k", 8, struct.pack("<Q", (1 << 64) - 1))], []), "the limit is 67108864"),
    "text beyond the end": (assemble([key("k", 8, struct.pack("<Q", 1000))], []), "takes 1000 bytes, "),
    "array beyond the end": (
        assemble([key("k", 9, struct.pack("<IQ", 6, 1 << 61))], []),
        "the value of 'k' takes 9223372036854775808",
    ),
    "texts beyond the end": (assemble([key("k", 9, struct.pack("<IQ", 8, 100_000_000))], []), "has 100000000 texts, "),
    "array of arrays": (assemble([key("k", 9, struct.pack("<IQ", 9, 1))], []), "an array of arrays"),
    "array of unknown": (assemble([key("k", 9, struct.pack("<IQ", 99, 1))], []), "the elements of 'k' have type 99"),
    "texts no UTF-8": (assemble([key("k", 9, struct.pack("<IQ", 8, 1) + text(b"\xc3"))], []), "the value of 'k' is not UTF-8"),
    "character over two texts": (
        assemble([key("k", 9, struct.pack("<IQ", 8, 2) + text(b"\xc3") + text(b"\xa9"))], []),
        "the value of 'k' is not UTF-8",
    ),
    "alignment 48": (assemble([key(ALIGNMENT_KEY, 4, struct.pack("<I", 48))], []), "is 48 .uint32., not a power of two"),
    "alignment 0": (assemble([key(ALIGNMENT_KEY, 4, struct.pack("<I", 0))], []), "is 0 .uint32., not a power of two"),
    "alignment 2 MiB": (assemble([key(ALIGNMENT_KEY, 4, struct.pack("<I", 2 << 20))], []), "up to 1048576"),
    "alignment a text": (assemble([key(ALIGNMENT_KEY, 8, text("32"))], []), "is '32' .string., not a power of two"),
    "tensor twice": (assemble([], [info(), info(start=32)], bytes(64)), "tensor 'a' stands twice"),
    "long name": (assemble([], [info("a" * 64)], bytes(32)), "the name of a tensor has 64 bytes, the limit is 63"),
    "no dimensions": (assemble([], [info(shape=())], bytes(32)), "tensor 'a' has 0 dimensions, not 1 to 4"),
    "five dimensions": (assemble([], [info(shape=(1,) * 5)], bytes(32)), "tensor 'a' has 5 dimensions"),
    "dimension of 0": (assemble([], [info(shape=(4, 0))], bytes(32)), r"has shape \[0, 4\], with a dimension of 0"),
    "product wraps": (assemble([], [info(shape=(1 << 32, 1 << 32))], bytes(32)), "over 9223372036854775807 elements"),
    "larger than the file": (assemble([], [info(shape=(1 << 40,))], bytes(32)), "takes 4398046511104 bytes, the file has"),
    "unknown tensor type": (assemble([], [info(kind=4)], bytes(32)), "tensor 'a' has type 4, which is none of ggml's"),
    "half a block": (assemble([], [info(shape=(33,), kind=2)], bytes(32)), "has rows of 33 columns, no multiple of 32"),
    "overlap": (assemble([], [info(), info("b")], bytes(64)), "tensor 'b' begins at byte 0 of the data, expected 32"),
    "hole": (assemble([], [info(), info("b", start=64)], bytes(96)), "begins at byte 64 of the data, expected 32"),
    "not aligned": (assemble([], [info(), info("b", start=16)], bytes(64)), "begins at byte 16 of the data, expected 32"),
    "truncated": (assemble([], [info()], bytes(15)), "its tensors end at byte 80, the file has 79"),
    "something behind": (assemble([], [info()], bytes(33)), "1 bytes follow its last tensor"),
}


@pytest.mark.parametrize("name", WRONG)
def test_wrong_files_are_one_clear_line(name: str, tmp_path: Path) -> None:
    content, message = WRONG[name]
    path = tmp_path / "a.gguf"
    path.write_bytes(content)
    with pytest.raises(FileFormatError, match=message) as raised:
        GgufFile(path)
    assert str(raised.value).startswith(f"{path} is not a valid GGUF file: ")
    assert len(str(raised.value).splitlines()) == 1


def test_every_truncation_of_a_valid_file_is_refused(tmp_path: Path) -> None:
    whole, part = tmp_path / "a.gguf", tmp_path / "b.gguf"
    write_gguf(whole, metadata(), tensors())
    content = whole.read_bytes()
    last = GgufFile(whole).tensors["half"]
    for size in range(0, last.start + last.bytes, 3):
        part.write_bytes(content[:size])
        with pytest.raises(FileFormatError):
            GgufFile(part)


def test_a_file_that_changes_while_it_is_open(tmp_path: Path) -> None:
    path = tmp_path / "a.gguf"
    write_gguf(path, {}, tensors())
    file = GgufFile(path)
    path.write_bytes(path.read_bytes()[:-40])
    with pytest.raises(FileFormatError, match="it changed while it was being read"):
        file.raw("first")


def test_limits_of_texts(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "a.gguf"
    write_gguf(path, {"k": Value.texts(["ab", "cd"]), "l": Value.text("xyz")}, [])
    for limit, most, message in (
        ("MAX_STRING_BYTES", 8, "over 8 bytes"),
        ("MAX_STRINGS", 4, "over 4 texts"),
    ):
        with monkeypatch.context() as patch:
            patch.setattr(gguf_values, limit, most)
            with pytest.raises(FileFormatError, match=f"{message}, the limit"):
                GgufFile(path)
            patch.setattr(gguf_values, limit, most + 1)
            assert GgufFile(path).metadata["l"] == Value.text("xyz")


@pytest.mark.parametrize(
    "value",
    [
        Value.array("uint8", np.arange(1 << 23) % 251),
        Value.texts(["ab"] * (1 << 16)),
        Value.text("x" * (8 << 20) + "\U0001f600"),
        Value.texts(["x" * 4000 + "\U0001f600"] * 2000),
    ],
    ids=["8 MB of numbers", "65536 texts", "one long wide text", "long wide texts"],
)
def test_time_and_memory_of_large_values(value: Value, tmp_path: Path) -> None:
    path = tmp_path / "a.gguf"
    write_gguf(path, {"k": value}, [])
    tracemalloc.start()
    assert GgufFile(path).metadata["k"] == value
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert peak < 4 * path.stat().st_size + (64 << 20)
    started = time.perf_counter()
    GgufFile(path)
    assert time.perf_counter() - started < 1.0


def test_numbers_of_a_megabyte_take_milliseconds(tmp_path: Path) -> None:
    """gguf 0.19 takes 19 s for it."""
    path = tmp_path / "a.gguf"
    write_gguf(path, {"k": Value.array("uint8", np.zeros(1 << 20))}, [])
    times = []
    for _ in range(3):
        started = time.perf_counter()
        GgufFile(path)
        times.append(time.perf_counter() - started)
    assert min(times) < 0.05


def test_values_for_a_person() -> None:
    shown = {name: str(value) for name, value in metadata().items()}
    assert shown == {
        "general.architecture": "'llama'",
        "whole": "7",
        "negative": "-5",
        "float": "1e-05",
        "switch": "true",
        "texts": "4 x string",
        "numbers": "3 x int16",
        "switches": "2 x bool",
        "none": "0 x float64",
    }
    assert Value("uint32", 7) != Value("int32", 7)
    assert Value("uint32", 7) != 7


@pytest.fixture(scope="module")
def gguf() -> Any:
    return pytest.importorskip("gguf", reason="needs the gguf package (pip install gguf), whose reader and writer are the judge")


def test_types_are_those_of_the_gguf_package(gguf: Any) -> None:
    for kind, (weights, size) in gguf.GGML_QUANT_SIZES.items():
        if kind.name == "Q8_1":  # no file has it; ggml's own library says 36 bytes, as we do, this package 40
            continue
        found = TYPES[int(kind)]
        assert (found.name, found.weights, found.bytes) == (kind.name, weights, size)
    assert BY_NAME["Q4_K"].number == int(gguf.GGMLQuantizationType.Q4_K)


def test_the_gguf_package_reads_what_we_write(gguf: Any, tmp_path: Path) -> None:
    path = tmp_path / "a.gguf"
    write_gguf(path, metadata(), tensors())
    reader = gguf.GGUFReader(path)
    found = {tensor.name: tensor for tensor in reader.tensors}
    assert list(found) == ["first", "blocks", "half"]
    assert found["first"].data.tolist() == np.arange(15).reshape(3, 5).tolist()
    assert found["blocks"].tensor_type.name == "Q4_0"
    assert reader.get_field("texts").contents() == ["a", "é", "", "日本"]
    assert reader.get_field("numbers").contents() == [-1, 2, 3]


def test_what_the_gguf_package_writes_we_read(gguf: Any, tmp_path: Path) -> None:
    path = tmp_path / "a.gguf"
    writer = gguf.GGUFWriter(path, "llama")
    writer.add_custom_alignment(64)
    writer.add_uint32("whole", 7)
    writer.add_array("texts", ["a", "é"])
    writer.add_tensor("first", np.arange(15, dtype=np.float32).reshape(3, 5))
    writer.add_tensor("second", np.ones((2, 4), np.float16))
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    file = GgufFile(path)
    assert file.alignment == 64
    assert file.metadata["texts"] == Value.texts(["a", "é"])
    assert file.elements("first")[2, 4] == 14
    assert file.elements("second").tolist() == np.ones((2, 4)).tolist()
