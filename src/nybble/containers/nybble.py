"""nybble's own folders: packed tensors under Hugging Face names, any format there is (files/native.py has the layout)."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

from nybble.containers.contents import Contents, read_extras, write_extras
from nybble.files.native import config_entry, is_native, open_native, write_native
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
        bytes=checkpoint.bytes,
    )


def candidates(fmt: Format, shape: tuple[int, int], kind: str) -> tuple[str, ...]:
    """Every format as it is."""
    return (str(fmt),)


def write(path: Path, contents: Contents, options: Mapping[str, str]) -> None:
    """A folder of ours."""
    tensors = {name: contents.read_packed(name) for name in contents.packed}
    config = {**contents.config, "quantization_config": config_entry(tensors)}
    floats = [(name, (tag, contents.read_float(name))) for name, (tag, _) in contents.floats.items()]
    write_native(path, tensors, floats, contents.provenance)
    write_extras(path, config, contents.extras)
