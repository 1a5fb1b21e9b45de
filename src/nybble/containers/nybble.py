"""nybble's own folders: packed tensors under Hugging Face names, any format there is (files/native.py has the layout)."""

from __future__ import annotations

from collections.abc import Mapping
from functools import partial
from pathlib import Path
from typing import Any

from numpy.typing import NDArray

from nybble.containers.contents import Contents, read_extras, write_extras
from nybble.containers.streaming import Group, Stream, write_stream
from nybble.files.native import WEIGHTS, config_entry, file_metadata, is_native, open_native, stored_arrays, stored_entries
from nybble.files.safetensors import layout
from nybble.formats import Format, parse_format
from nybble.models.checkpoint import open_checkpoint

NAME = "nybble"
FOLDER = True
HOLDS = "every format"
OPTIONS: dict[str, tuple[tuple[str, ...], str]] = {}


def recognizes(path: Path) -> bool:
    """Whether a folder's config.json says that nybble wrote it."""
    return path.is_dir() and is_native(path)


def read(path: Path) -> Contents:
    """What a folder of ours holds."""
    checkpoint = open_checkpoint(path)
    native = open_native(path)
    parts = {f"{name}.{suffix}" for name, (spec, shape) in native.packed.items() for suffix in parse_format(spec).storage(shape)}
    parts |= {f"{name}.{suffix}" for name, scheme in native.schemes.items() for suffix in scheme.stored()}

    return Contents(
        container=NAME,
        path=path,
        config={key: value for key, value in checkpoint.config.items() if key != "quantization_config"},
        packed=native.packed,
        floats={name: (e.dtype, e.shape) for name, e in native.file.entries.items() if name not in parts},
        read_packed=native.read,
        read_float=native.file.read,
        read_stored=native.stored,
        schemes=native.schemes,
        extras=read_extras(path),
        provenance=native.provenance,
        files=checkpoint.files,
        bytes=checkpoint.bytes,
    )


def candidates(fmt: Format, shape: tuple[int, int], kind: str) -> tuple[str, ...]:
    """Every format as it is."""
    return (str(fmt),)


def stream(contents: Contents, options: Mapping[str, str]) -> Stream:
    """A folder of ours: packed weights in order, then the floats."""
    groups = []
    entries: dict[str, tuple[str, tuple[int, ...]]] = {}
    for name, (spec, shape) in contents.packed.items():
        entries.update(stored_entries(name, spec, shape, contents.schemes.get(name)))
        groups.append(Group(name, shape, partial(_packed, contents, name), name in contents.by_rows))
    for name, (tag, whole) in contents.floats.items():
        entries[name] = tag, whole
        groups.append(Group(name, whole, partial(_float, contents, name), name in contents.by_rows))
    quantization = config_entry(contents.packed, contents.schemes)

    def head(provenance: Mapping[str, Any]) -> bytes:
        return layout(entries, file_metadata(provenance))[0]

    def finish(folder: Path, provenance: Mapping[str, Any]) -> None:
        write_extras(folder, {**contents.config, "quantization_config": quantization}, contents.extras)

    _, places = layout(entries, file_metadata(contents.provenance))
    size = len(head(contents.provenance)) + sum(length for _, length in places.values())
    return Stream(WEIGHTS, groups, places, size, head, finish)


def write(path: Path, contents: Contents, options: Mapping[str, str]) -> None:
    """A folder of ours, all at once."""
    write_stream(path, stream(contents, options), contents.provenance)


def _packed(contents: Contents, name: str, rows: slice | None) -> dict[str, NDArray[Any]]:
    return stored_arrays(name, contents.part(name, rows))


def _float(contents: Contents, name: str, rows: slice | None) -> dict[str, NDArray[Any]]:
    return {name: contents.part(name, rows)}
