"""Legacy checkpoints of torch (`pytorch_model.bin`, `.pt`) to safetensors, without torch and without running what they say.

Such a file is a zip whose `data.pkl` is a pickle: a program. It is read by pickle_machine.py, which carries out none of it, in a
process of its own with little memory and time; members are stored uncompressed (zip_stored.py) and each as long as its
storage. Files of before torch 1.6 are no zip files and are not read; nor are whole modules and training states, only
dictionaries of tensors.
"""

from __future__ import annotations

import json
import math
import mmap
import os
import re
import subprocess
import sys
import zlib
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
from numpy.lib.stride_tricks import as_strided
from numpy.typing import NDArray

from nybble import errors
from nybble.errors import FileFormatError, InputError, NybbleError, OutputError, shown
from nybble.files.json_strict import read_object
from nybble.files.opening import open_file
from nybble.files.pickle_machine import Tensor, read_pickle
from nybble.files.safetensors import SafetensorsFile, write
from nybble.files.safetensors_header import DTYPES, ITEM_BYTES
from nybble.files.zip_stored import Member, members

SINGLE = "pytorch_model.bin"
INDEX = "pytorch_model.bin.index.json"
SHARD = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]{0,200}\.bin")
KNOWN = re.compile(r"(data\.pkl|version|byteorder|\.format_version|\.storage_alignment|\.data/serialization_id|data/[0-9]{1,9})")
"""Members of a checkpoint, behind their common first part."""

MOST_TIMES = 4
"""Tensors may share storages; written out they take at most so many times the file."""
ROOM_BYTES = 64 << 20
"""Memory for reading, beyond the process itself and MOST_TIMES the file."""
SECONDS = 20.0
"""Time for reading a small file."""
BYTES_PER_SECOND = 20e6
"""... and for each further byte: the slowest disk that we wait for."""


def pickled_to_safetensors(source: str | Path, target: str | Path) -> Path:
    """Write the tensors of a pickled checkpoint into an existing folder as safetensors; returns the file, or the index of shards.

    `source`: a .bin or .pt file, or a folder with pytorch_model.bin or its shards and index. Tensors come under their names,
    in their types (bfloat16 too), as contiguous arrays; tied ones are written once for each name. The index comes last.

    Raises InputError for a file that cannot be opened, FileFormatError for one that is anything but a dictionary of tensors,
    OutputError when `target` cannot be written.
    """
    source, target = Path(source), Path(target)
    if source.is_dir() and (source / INDEX).is_file():
        return _convert_shards(source, target)
    if source.is_dir():
        if not (source / SINGLE).is_file():
            raise InputError(f"{source} has no {SINGLE} and no {INDEX}")
        source = source / SINGLE
    return _convert(source, target / "model.safetensors")


def _convert_shards(folder: Path, target: Path) -> Path:
    index = folder / INDEX
    places = read_object(index).get("weight_map")
    if not isinstance(places, dict) or not places:
        raise FileFormatError(f"{index} names no shard")
    for name, shard in places.items():
        if not isinstance(shard, str) or not SHARD.fullmatch(shard):
            raise FileFormatError(
                f"{index} names {shown(shard)} for tensor {shown(name)}; a shard is a *.bin file of the same folder"
            )
    held: dict[str, str] = {}
    size = 0
    for shard in sorted(set(places.values())):
        written = _convert(
            folder / shard, target / f"{shard.removesuffix('.bin').replace('pytorch_model', 'model', 1)}.safetensors"
        )
        for name, entry in SafetensorsFile(written).entries.items():
            if places.get(name) != shard:
                raise FileFormatError(f"{folder / shard} holds tensor {shown(name)}, which {INDEX} does not say")
            held[name] = written.name
            size += entry.bytes
    if missing := next((name for name in places if name not in held), None):
        raise FileFormatError(f"{folder / places[missing]} lacks tensor {shown(missing)}, which {INDEX} says it holds")
    path = target / "model.safetensors.index.json"
    text = json.dumps({"metadata": {"total_size": size}, "weight_map": held}, indent=2, sort_keys=True)
    try:
        path.write_text(f"{text}\n", encoding="utf-8")
    except OSError as error:
        raise OutputError(f"cannot write {path}: {error.strerror or error}") from error
    return path


def _convert(source: Path, target: Path) -> Path:
    """One file, in a process of its own."""
    with open_file(source) as (_, status):
        size = status.st_size
    seconds = SECONDS + size / BYTES_PER_SECOND
    paths = [str(Path(__file__).parents[2]), *filter(None, [os.environ.get("PYTHONPATH")])]
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(paths), "PYTHONSAFEPATH": "1", "OPENBLAS_NUM_THREADS": "1"}
    command = [sys.executable, "-m", __name__, str(source.absolute()), str(target.absolute()), str(math.ceil(seconds))]
    try:
        done = subprocess.run(command, capture_output=True, env=environment, cwd=os.sep, timeout=seconds * 3, check=False)
        answer = json.loads(done.stdout or b"null")
    except subprocess.TimeoutExpired as error:
        raise FileFormatError(f"{source} could not be read within {seconds * 3:.0f} seconds") from error
    except (OSError, ValueError) as error:
        raise FileFormatError(f"{source} could not be read: the process for it gave no answer") from error
    if not isinstance(answer, dict):
        raise FileFormatError(
            f"{source} could not be read within {seconds:.0f} s of processor time and {_memory(size) >> 20} MiB"
        )
    if "error" in answer:
        kind = getattr(errors, answer["error"])
        raise kind(answer["message"])
    return target


def _memory(size: int) -> int:
    return MOST_TIMES * size + ROOM_BYTES


def read_tensors(source: Path) -> dict[str, tuple[str, NDArray[Any]]]:
    """Name -> (dtype tag, view of the mapped file). For the process that `pickled_to_safetensors` starts: it has the limits.

    Raises InputError and FileFormatError as that does.
    """
    with open_file(source) as (file, status):
        if not status.st_size:
            raise FileFormatError(f"{source} is empty")
        data = memoryview(mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ))
    parts = _parts(members(data, source), source)
    _check_plain(parts, data, source)
    try:
        tensors = read_pickle(bytes(_content(parts["data.pkl"], data, "data.pkl", source)))
    except ValueError as error:
        raise FileFormatError(f"{source} has a data.pkl that is not read: {error}") from error
    arrays = {name: (tensor.storage.dtype, _array(name, tensor, parts, data, source)) for name, tensor in tensors.items()}
    written = sum(array.nbytes for _, array in arrays.values())
    if written > MOST_TIMES * len(data):
        raise FileFormatError(f"{source} of {len(data)} bytes holds tensors of {written} bytes (limit {MOST_TIMES} times)")
    for key in {tensor.storage.key for tensor in tensors.values()}:
        _content(parts[f"data/{key}"], data, f"data/{key}", source)
    return arrays


def _parts(found: Mapping[str, Member], source: Path) -> dict[str, Member]:
    """Members by their name behind the first part, which all of them share."""
    first = {name.partition("/")[0] for name in found}
    if len(first) != 1:
        raise FileFormatError(f"{source} is no checkpoint of torch: its members have {len(first)} first names, not one")
    parts = {name.partition("/")[2]: member for name, member in found.items()}
    strange = next((name for name in parts if not KNOWN.fullmatch(name)), None)
    if strange is not None or "data.pkl" not in parts:
        raise FileFormatError(
            f"{source} is no checkpoint of torch: it {f'holds {shown(strange)}' if strange else 'has no data.pkl'}"
        )
    return parts


def _check_plain(parts: Mapping[str, Member], data: memoryview, source: Path) -> None:
    if "byteorder" in parts and bytes(_content(parts["byteorder"], data, "byteorder", source)) != b"little":
        raise FileFormatError(f"{source} is not little-endian; save it again on a machine that is")
    if "version" in parts and bytes(_content(parts["version"], data, "version", source)).strip() not in (b"2", b"3"):
        raise FileFormatError(f"{source} is of a version of torch's container other than 2 and 3")


def _content(member: Member, data: memoryview, name: str, source: Path) -> memoryview:
    """A member's bytes, which must have the checksum that is stated."""
    content = data[member.start : member.end]
    if zlib.crc32(content) != member.crc:
        raise FileFormatError(f"{source} is damaged: {name} has another checksum than it says; copy or download it again")
    return content


def _array(name: str, tensor: Tensor, parts: Mapping[str, Member], data: memoryview, source: Path) -> NDArray[Any]:
    """The tensor as a view of the file."""
    storage = tensor.storage
    member, item = parts.get(f"data/{storage.key}"), ITEM_BYTES[storage.dtype]
    if member is None or member.end - member.start != storage.elements * item:
        found = "none" if member is None else f"{member.end - member.start}"
        raise FileFormatError(
            f"{source}: tensor {shown(name)} needs {storage.elements * item} bytes of storage {storage.key}, the file has {found}"
        )
    dtype = np.dtype(DTYPES[storage.dtype]).newbyteorder("<")
    if not math.prod(tensor.shape):
        return np.empty(tensor.shape, dtype)
    flat = np.frombuffer(data, dtype, storage.elements, member.start)
    return as_strided(flat[tensor.offset :], tensor.shape, [stride * item for stride in tensor.strides], writeable=False)


def _limit(size: int, seconds: int) -> None:
    """Hold this process to its share of memory, time and disk, and to its own code."""
    import resource  # not on every system that the rest of this module runs on

    pages = int(Path("/proc/self/statm").read_text().split()[0]) if Path("/proc/self/statm").exists() else 0
    if pages:  # elsewhere there is no telling what the process itself takes
        most = pages * mmap.PAGESIZE + _memory(size)
        resource.setrlimit(resource.RLIMIT_AS, (most, most))
    resource.setrlimit(resource.RLIMIT_CPU, (seconds, seconds))
    resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
    resource.setrlimit(resource.RLIMIT_FSIZE, (_memory(size), _memory(size)))
    sys.addaudithook(_refuse)


def _refuse(event: str, _: Any) -> None:
    if event.startswith(
        ("os.exec", "os.fork", "os.posix_spawn", "os.spawn", "os.system", "subprocess.", "socket.", "pickle.", "ctypes.")
    ):
        raise FileFormatError(f"reading it tried {event}, which reading never does")


def _main(source: str, target: str, seconds: str) -> None:
    answer: dict[str, str] = {}
    size = 0
    try:
        with open_file(source) as (_, status):
            size = status.st_size
        _limit(size, int(seconds))
        tensors = read_tensors(Path(source))
        arrays = {name: array for name, (_, array) in tensors.items()}
        write(target, arrays, {"format": "pt"}, {name: tag for name, (tag, _) in tensors.items()})
    except NybbleError as error:
        answer = {"error": type(error).__name__, "message": str(error)}
    except MemoryError:
        pass  # its traceback holds the memory: nothing can be said before that is gone
    else:
        answer = {"done": source}
    if not answer:
        message = f"{source} needs more than {_memory(size) >> 20} MiB of memory to be read"
        answer = {"error": "FileFormatError", "message": message}
    print(json.dumps(answer))


if __name__ == "__main__":
    _main(*sys.argv[1:])
