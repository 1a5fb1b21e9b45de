"""The largest files that the limits let through, broken at their very end: still in time, still in proportion. And the smallest
files of large matrices: reading one takes at most four times what it has in the file."""

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

from nybble.containers import open_contents
from nybble.convert import convert
from nybble.errors import FileFormatError
from nybble.files.gguf import GgufFile
from nybble.files.json_strict import read_object
from nybble.files.pickle_machine import MOST_BYTES, read_pickle
from nybble.files.safetensors import SafetensorsFile
from nybble.formats import parse_format

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


@pytest.mark.parametrize("instructions", [b"N\x85", b"(t", b"]Na", b"h\x01)R", b"}"])
def test_the_slowest_pickles(instructions: bytes) -> None:
    head = b"\x80\x02ccollections\nOrderedDict\nq\x01"
    program = head + instructions * ((MOST_BYTES - len(head) - 1) // len(instructions)) + b"."
    started = time.process_time()
    with pytest.raises(ValueError, match=r"it leaves \d+ values, not one"):
        read_pickle(program)
    assert time.process_time() - started < SECONDS


NARROW = (
    ("nybble", "int2:channel"), ("nybble", "int2:g64,asym"), ("nybble", "nf4:g64,dq"), ("gguf", "q2_k"), ("gguf", "mxfp4"),
    ("gptq", "int2:g64,asym"), ("gptq", "int3:g64"), ("awq", "int4:g32,asym"), ("compressed-tensors", "int2:g64,asym"),
    ("bitsandbytes", "nf4:g64,dq"), ("nybble-sparse", "int2:channel"), ("nybble-sparse", "int3:channel"),
)  # fmt: skip
"""A container and the format that has the fewest bits in it."""
SPARSE = "nybble-sparse"
SLABS = 8 << 20
"""Bytes of what is worked on at a time, whatever the size of the matrix."""


@pytest.fixture(scope="module")
def wide(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A model of three matrices of 16 M weights, and little else."""
    import torch
    import transformers

    sizes = {"vocab_size": 64, "hidden_size": 512, "intermediate_size": 1 << 15, "num_hidden_layers": 1, "num_attention_heads": 8}
    with torch.random.fork_rng():
        torch.manual_seed(0)
        model = transformers.LlamaForCausalLM(transformers.LlamaConfig(tie_word_embeddings=True, **sizes))
    folder = tmp_path_factory.mktemp("wide") / "model"
    model.save_pretrained(folder)
    return folder


@pytest.mark.parametrize(("container", "spec"), NARROW)
def test_a_matrix_takes_at_most_four_times_its_bytes(container: str, spec: str, wide: Path, tmp_path: Path) -> None:
    path = tmp_path / ("model.gguf" if container == "gguf" else "model")
    convert(wide, path, container, to=spec, options={"tokenizer": "none"} if container == "gguf" else {})
    contents = open_contents(path)
    large = [name for name, (_, shape) in contents.packed.items() if max(shape) == 1 << 15]
    assert len(large) == 3
    for name in large:
        tracemalloc.start()
        tensor = contents.read_packed(name)
        peak = tracemalloc.get_traced_memory()[1]
        tracemalloc.stop()
        assert tensor.codes.size == 1 << 24
        full = parse_format(spec).stored_bits(tensor.shape) / 8  # where zeros take a bit: what it takes with all of them
        assert container != SPARSE or contents.sizes[name] < full
        assert peak <= TIMES * (full if container == SPARSE else contents.bytes / 3) + SLABS, name
