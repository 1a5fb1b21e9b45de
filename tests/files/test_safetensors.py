"""The safetensors reader and writer: against the official library and golden bytes. Hostile files: tests/hostile."""

from __future__ import annotations

import hashlib
import json
import os
import random
import resource
import struct
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import safetensors
import safetensors.numpy

from nybble.errors import FileFormatError, InputError, OutputError
from nybble.files.safetensors import SafetensorsFile, write


def assemble(header: Any, data: bytes = b"", length: int | None = None) -> bytes:
    encoded = header if isinstance(header, bytes) else json.dumps(header).encode()
    return struct.pack("<Q", len(encoded) if length is None else length) + encoded + data


def entry(dtype: Any = "U8", shape: Any = (4,), offsets: Any = (0, 4)) -> dict[str, Any]:
    return {"dtype": dtype, "shape": shape, "data_offsets": offsets}


def arrays() -> dict[str, np.ndarray]:
    rng = np.random.default_rng(0)
    names = ("float64", "float32", "float16", "int64", "int32", "int16", "int8", "uint64", "uint32", "uint16", "uint8")
    found = {name: (rng.standard_normal((3, 5)) * 50).astype(name) for name in names if name[0] != "u"}
    found |= {name: rng.integers(0, 200, (3, 5)).astype(name) for name in names if name[0] == "u"}
    found |= {"flag": np.array([True, False, True]), "scalar": np.array(1.5, dtype=np.float32)}
    found |= {"empty": np.empty((0, 4), dtype=np.float16), 'name ü "quoted" \\': np.arange(7, dtype=np.uint8)}
    found["strided"] = np.arange(24, dtype=np.float32).reshape(4, 6)[:, ::2].T
    return found


def same(found: np.ndarray, expected: np.ndarray) -> bool:
    return found.dtype == expected.dtype and found.shape == expected.shape and found.tobytes() == expected.tobytes()


def test_what_we_write_the_official_library_reads(tmp_path: Path) -> None:
    path = tmp_path / "a.safetensors"
    size = write(path, arrays(), {"format": "pt", "note": "ü"})
    assert size == path.stat().st_size
    theirs = safetensors.numpy.load_file(path)
    assert theirs.keys() == arrays().keys()
    assert all(same(theirs[name], array) for name, array in arrays().items())
    with safetensors.safe_open(path, framework="numpy") as file:
        assert file.metadata() == {"format": "pt", "note": "ü"}


def test_what_the_official_library_writes_we_read(tmp_path: Path) -> None:
    path = tmp_path / "a.safetensors"
    expected = {name: np.ascontiguousarray(array) for name, array in arrays().items() if name != "scalar"}
    safetensors.numpy.save_file(expected, path, {"k": "v"})
    ours = SafetensorsFile(path)
    assert ours.metadata == {"k": "v"}
    assert ours.entries.keys() == expected.keys()
    assert all(same(ours.read(name), array) for name, array in expected.items())


def test_our_own_round_trip_and_views_are_read_only(tmp_path: Path) -> None:
    path = tmp_path / "a.safetensors"
    write(path, arrays().items(), {})
    file = SafetensorsFile(path)
    assert list(file.entries) == list(arrays())
    assert all(same(file.read(name), array) for name, array in arrays().items())
    with pytest.raises(ValueError, match="read-only"):
        file.read("uint8")[0, 0] = 1
    with pytest.raises(InputError, match="has no tensor 'b'; it has"):
        file.read("b")


def test_bfloat16_is_tagged(tmp_path: Path) -> None:
    torch = pytest.importorskip("torch")
    load_file = pytest.importorskip("safetensors.torch").load_file
    values = torch.tensor([[1.0, -2.5, 3e38]], dtype=torch.bfloat16)
    path = tmp_path / "a.safetensors"
    write(path, {"w": values.view(torch.uint16).numpy(), "plain": np.array([7], dtype=np.uint16)}, {}, {"w": "BF16"})
    theirs = load_file(path)
    assert theirs["w"].dtype == torch.bfloat16
    assert torch.equal(theirs["w"], values)
    assert theirs["plain"].dtype == torch.uint16
    assert SafetensorsFile(path).entries["w"].dtype == "BF16"
    assert SafetensorsFile(path).read("w").dtype == np.uint16


def test_golden_bytes(tmp_path: Path) -> None:
    path = tmp_path / "a.safetensors"
    write(path, {"a": np.array([1, 2], dtype=np.uint8), "b": np.array([[-1.5]], dtype=np.float16)}, {"k": "v"})
    header = (
        b'{"__metadata__":{"k":"v"},"a":{"dtype":"U8","shape":[2],"data_offsets":[0,2]},'
        b'"b":{"dtype":"F16","shape":[1,1],"data_offsets":[2,4]}}   '
    )
    assert path.read_bytes() == b"\x88\x00\x00\x00\x00\x00\x00\x00" + header + b"\x01\x02\x00\xbe"
    assert SafetensorsFile(path).sha256() == hashlib.sha256(path.read_bytes()).hexdigest()


def test_white_space_order_and_escapes_change_nothing(tmp_path: Path) -> None:
    """Headers as writers leave them take a short way; the same JSON written in other ways takes the long one."""
    plain = b'{"a b":{"dtype":"U8","shape":[2,2],"data_offsets":[0,4]},"c":{"dtype":"F16","shape":[],"data_offsets":[4,6]}}'
    other = (
        b'{ "c" :\n{"data_offsets":[ 4 ,6],"shape" : [],"dtype":"\\u00461\\u0036"} ,'
        b'"\\u0061 b":{"shape":[2,\t2],"dtype":"U8","data_offsets":[0,4]}} \n'
    )
    files = []
    for i, header in enumerate((plain, other)):
        (tmp_path / f"{i}.safetensors").write_bytes(assemble(header, b"123456"))
        files.append(SafetensorsFile(tmp_path / f"{i}.safetensors"))
        with safetensors.safe_open(tmp_path / f"{i}.safetensors", framework="numpy") as official:
            assert sorted(official.keys()) == ["a b", "c"]
    assert files[0].entries == files[1].entries
    assert all(np.array_equal(files[0].read(name), files[1].read(name)) for name in ("a b", "c"))


def test_a_file_cut_at_any_byte_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "a.safetensors"
    write(path, {"a": np.arange(6, dtype=np.uint8), "b": np.arange(3, dtype=np.float16)}, {"k": "v"})
    whole = path.read_bytes()
    for length in range(len(whole)):
        path.write_bytes(whole[:length])
        with pytest.raises(FileFormatError):
            SafetensorsFile(path)


def official_refuses(path: Path) -> bool:
    try:
        with safetensors.safe_open(path, framework="numpy") as file:
            file.keys()
    except (safetensors.SafetensorError, OSError, UnicodeDecodeError):
        return True
    return False


def test_what_the_official_library_refuses_we_refuse(tmp_path: Path) -> None:
    """Random damage to the header of a good file: never more lenient, never another exception."""
    rng, path = random.Random(3), tmp_path / "a.safetensors"
    header = json.dumps({"__metadata__": {"k": "v"}, "a": entry(), "b": entry("F32", [1, 1], [4, 8])}).encode()
    refused = accepted = 0
    for _ in range(3000):
        changed = bytearray(header)
        for _ in range(rng.randint(1, 3)):
            at = rng.randrange(len(changed))
            changed[at : at + rng.randint(0, 2)] = rng.choice(
                [b"", b"0", b"-", b'"', b",", b"9", b"[", b"}", b" ", b"\xc3", b"\\", b"e"]
            )
        path.write_bytes(assemble(bytes(changed), b"12345678"))
        try:
            SafetensorsFile(path)
            accepted += 1
            assert not official_refuses(path), bytes(changed)
        except FileFormatError:
            refused += 1
    assert refused > 1000
    assert accepted > 50


def test_missing_and_unreadable_files(tmp_path: Path) -> None:
    with pytest.raises(InputError, match=r"cannot read .*: No such file"):
        SafetensorsFile(tmp_path / "none.safetensors")
    with pytest.raises(InputError, match=r"cannot read .*: Is a directory"):
        SafetensorsFile(tmp_path)


def test_a_file_cut_after_it_was_opened_is_an_error_not_a_crash(tmp_path: Path) -> None:
    path = tmp_path / "a.safetensors"
    write(path, {"a": np.zeros(1 << 16, dtype=np.uint8)}, {})
    file = SafetensorsFile(path)
    os.truncate(path, 100)
    with pytest.raises(FileFormatError, match="changed while it was being read"):
        file.read("a")


@pytest.mark.parametrize("fail_at", ["fsync", "replace"])
def test_a_failed_write_leaves_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, fail_at: str) -> None:
    def full(*_: Any) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(os, fail_at, full)
    with pytest.raises(OutputError, match=r"cannot write .*a\.safetensors \(\d+ bytes\): No space left on device"):
        write(tmp_path / "a.safetensors", arrays(), {})
    assert list(tmp_path.iterdir()) == []


def test_a_failed_write_keeps_the_older_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "a.safetensors"
    write(path, {"a": np.zeros(3, dtype=np.uint8)}, {})
    before = path.read_bytes()

    def interrupt(*_: Any) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(os, "fsync", interrupt)
    with pytest.raises(KeyboardInterrupt):
        write(path, arrays(), {})
    assert [p.name for p in tmp_path.iterdir()] == ["a.safetensors"]
    assert path.read_bytes() == before


def test_a_file_too_large_for_the_disk_leaves_nothing(tmp_path: Path) -> None:
    """A file size limit stands in for a full disk; in a process of its own, since the limit stays."""
    script = (
        "import resource, sys, numpy as np\n"
        "from nybble.errors import OutputError\n"
        "from nybble.files.safetensors import write\n"
        "resource.setrlimit(resource.RLIMIT_FSIZE, (65536, 65536))\n"
        "try:\n"
        "    write(sys.argv[1] + '/a.safetensors', {'a': np.zeros(1 << 20, dtype=np.uint8)}, {})\n"
        "except OutputError as error:\n"
        "    print(error)\n"
    )
    assert resource.getrlimit(resource.RLIMIT_FSIZE)[0] != 65536
    done = subprocess.run([sys.executable, "-c", script, str(tmp_path)], capture_output=True, text=True, check=True)
    assert "cannot write" in done.stdout
    assert "File too large" in done.stdout
    assert list(tmp_path.iterdir()) == []


def test_a_folder_that_is_not_there(tmp_path: Path) -> None:
    with pytest.raises(OutputError, match="No such file"):
        write(tmp_path / "none" / "a.safetensors", arrays(), {})


@pytest.mark.parametrize("make", [lambda a: [("a", a), ("a", a)], lambda a: [("__metadata__", a)]], ids=["twice", "reserved"])
def test_names_that_cannot_be_written(tmp_path: Path, make: Callable[[Any], Any]) -> None:
    with pytest.raises(ValueError, match="given twice"):
        write(tmp_path / "a.safetensors", make(np.zeros(3, dtype=np.uint8)), {"k": "v"})
    assert list(tmp_path.iterdir()) == []


def test_the_file_has_the_permissions_of_the_umask(tmp_path: Path) -> None:
    before = os.umask(0o027)
    try:
        write(tmp_path / "a.safetensors", {"a": np.zeros(1, dtype=np.uint8)}, {})
    finally:
        os.umask(before)
    assert (tmp_path / "a.safetensors").stat().st_mode & 0o777 == 0o640
