"""The largest files that the limits let through, broken at their very end: still in time, still in proportion."""

from __future__ import annotations

import struct
import time
import tracemalloc
from collections.abc import Callable
from pathlib import Path
from typing import Any

import good
import pytest
from test_catalogue import ROOM, SECONDS, TIMES

from nybble.errors import FileFormatError
from nybble.files.gguf import GgufFile
from nybble.files.json_strict import read_object
from nybble.files.safetensors import SafetensorsFile

pytestmark = pytest.mark.slow
EMPTY = '"%s":{"dtype":"U8","shape":[%s],"data_offsets":[0,0]%s}'


def header(members: list[str]) -> bytes:
    return good.safetensors(("{" + ",".join(members) + ',"z":{"dtype":"Q"}}').encode())


def gguf(texts: int) -> bytes:
    keys = [good.key(str(i), good.ARRAY, good.array(good.U8, [1])) for i in range(65_000)]
    array = good.array(good.STRING, b"".join(good.text(f"{i:07}") for i in range(texts)), texts)
    tensors = [good.Tensor(f"t{i:06}", (1,), 24).encode(32 * i) for i in range(65_000)]
    tensors.append(good.Tensor("bad", (3,), 99).encode(0))
    head = b"GGUF" + struct.pack("<IQQ", 3, len(tensors), len(keys) + 1)
    return head + b"".join(keys) + good.key("texts", good.ARRAY, array) + b"".join(tensors)


CASES: dict[str, tuple[Callable[[Path], Any], Callable[[], bytes], str]] = {
    "names of 930 letters": (SafetensorsFile, lambda: header([EMPTY % (f"{i}{'a' * 930}", 0, "") for i in range(99_999)]), "'z'"),
    "entries of 700 spaces": (
        SafetensorsFile,
        lambda: header([EMPTY % (i, ",".join("0" * 32), " " * 700) for i in range(99_999)]),
        "'z'",
    ),
    "long keys, one twice": (
        read_object,
        lambda: ("{" + "".join(f'"{i:07}{"x" * 90}":1,' for i in range(600_000)) + f'"0000000{"x" * 90}":1}}').encode(),
        "stands twice",
    ),
    "keys, tensors and texts": (GgufFile, lambda: gguf(900_000), "has type 99"),
}


@pytest.mark.parametrize("name", CASES)
def test_worst(name: str, tmp_path: Path) -> None:
    read, make, match = CASES[name]
    path = tmp_path / "file"
    path.write_bytes(make())
    started = time.process_time()
    with pytest.raises(FileFormatError, match=match):
        read(path)
    assert time.process_time() - started < SECONDS
    tracemalloc.start()
    with pytest.raises(FileFormatError, match=match):
        read(path)
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert peak <= TIMES * path.stat().st_size + ROOM
