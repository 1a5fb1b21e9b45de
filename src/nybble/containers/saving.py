"""A container under its final name: only when it is whole, on disk, and reads back as what was to be written."""

from __future__ import annotations

import shutil
from collections.abc import Callable, Mapping
from hashlib import sha256
from pathlib import Path
from typing import Any

import numpy as np

from nybble.containers import find_container
from nybble.containers.contents import Contents
from nybble.containers.float import float_tensor
from nybble.errors import OutputError, UsageError, unknown_name
from nybble.files.folder import check_output
from nybble.files.job import is_published, new_folder, new_output, sweep
from nybble.files.safetensors import forget_pages, widen
from nybble.formats import QTensor

MARKER = "config.json"
ROOM = 1 << 20
"""Bytes beside the tensors that an output may take: headers, a tokenizer."""


def container_of(target: Path, container: str | None) -> str:
    """The container's name where it is given, else what the target's name says: gguf for `.gguf`, nybble for a folder."""
    return str(find_container(container or ("gguf" if target.suffix == ".gguf" else "nybble")).NAME)


def check_target(container: str, target: Path, force: bool, options: Mapping[str, str]) -> dict[str, str]:
    """The container's options with their defaults. Raises OutputError, before any work, where the target cannot become what the
    container makes, and UsageError for an option that it has not."""
    module = find_container(container)
    known: dict[str, tuple[tuple[str, ...], str]] = module.OPTIONS
    for name, value in options.items():
        if name not in known:
            raise unknown_name(f"option of {module.NAME}", name, known)
        if value not in known[name][0]:
            raise UsageError(f"option {name} of {module.NAME} is {value!r}; it may be {', '.join(known[name][0])}")
    force = force or is_published(target)
    if target.exists():
        sweep(target)
    if module.FOLDER:
        check_output(target, force, marker=MARKER)
    elif target.is_dir():
        raise OutputError(f"output {target} is a folder; {module.NAME} is one file: name it, for example {target / 'model.gguf'}")
    elif target.exists() and not force:
        raise OutputError(f"output {target} exists; name another or add --force to replace it")
    return {name: options.get(name, values[0]) for name, (values, _) in known.items()}


def check_room(target: Path, size: int) -> None:
    """Raise OutputError where the disk has no room for an output of about so many bytes."""
    parent = next(path for path in target.absolute().parents if path.exists())
    free = shutil.disk_usage(parent).free
    if free < size + ROOM:
        raise OutputError(f"{target} takes about {(size + ROOM) / 1e6:,.0f} MB, {parent} has {free / 1e6:,.0f} MB free")


def save(
    contents: Contents, target: Path, container: str, options: Mapping[str, str], force: bool, digests: Callable[[str], str]
) -> int:
    """Write, read again, compare, rename; returns the bytes on disk. `digests` gives `digest_of` of a packed tensor once it has
    been written. Raises OutputError with nothing left behind, and whatever the container raises."""
    module = find_container(container)
    if module.FOLDER:
        with new_folder(target, force, marker=MARKER) as folder:
            write_checked(module, folder, contents, options, digests)
            return sum(file.stat().st_size for file in folder.iterdir())
    with new_output(target) as part:
        write_checked(module, part, contents, options, digests)
        return part.stat().st_size


def digest_of(tensor: QTensor) -> str:
    """SHA-256 of a tensor's format, codes and params."""
    digest = sha256(f"{tensor.format} {tensor.shape} {tensor.activations}".encode())
    for suffix, array in sorted(tensor.stored().items()):
        digest.update(suffix.encode())
        digest.update(np.ascontiguousarray(array).data)
    return digest.hexdigest()


def write_checked(module: Any, path: Path, contents: Contents, options: Mapping[str, str], digests: Callable[[str], str]) -> None:
    """Have a container's module write, read that again, and compare; as `save`, in a place that has no name yet."""
    module.write(path, contents, options)
    again: Contents = module.read(path)
    for name, (spec, _) in contents.packed.items():
        if name in again.packed:
            same = digest_of(again.read_packed(name)) == digests(name)
        else:  # as plain floats
            same = name in again.floats and digest_of(float_tensor(again, name, spec)) == digests(name)
        if not same:
            raise _differs(path, name)
        forget_pages()
    for name, (tag, _) in contents.floats.items():
        if name not in again.floats:
            raise _differs(path, name)
        before, after = contents.read_float(name), again.read_float(name)
        if tag == again.floats[name][0]:
            same = np.array_equal(before.reshape(-1).view(np.uint8), after.reshape(-1).view(np.uint8))
        else:  # a container may widen: GGUF has vectors in F32 alone
            same = np.array_equal(widen(tag, before, name), again.float32(name))
        if not same:
            raise _differs(path, name)
        forget_pages()


def _differs(path: Path, name: str) -> OutputError:
    return OutputError(
        f"{path}: tensor {name} does not read back as it was written, so that the output did not get its name; run the command "
        "again, and report it if that does not help"
    )
