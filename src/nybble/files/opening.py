"""Opening files that others made: regular files only, and no link that leaves the model's folder.

A model folder is data from somewhere else. Where it may hold links, `model.safetensors` can point at anything the reader's user
may read, a pipe blocks whoever opens it, and a device never ends. The rule, for every file of a model:

    - it is opened without following a link in its last part, relative to the folder's own descriptor
    - a link is followed only if all of it, resolved, lies in the same folder, or in `blobs` of the same repository where the
      folder is a snapshot of the hub's cache (`REPOSITORY/snapshots/REVISION`), which is made of such links
    - what was opened is a regular file

Who can change the folder while it is read can still exchange one good file for another; what is read then is checked as any file.
"""

from __future__ import annotations

import errno
import os
import stat
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import BinaryIO

from nybble.errors import FileFormatError, InputError

_FLAGS = os.O_RDONLY | getattr(os, "O_CLOEXEC", 0) | getattr(os, "O_NONBLOCK", 0) | getattr(os, "O_NOCTTY", 0)
_NO_LINK = getattr(os, "O_NOFOLLOW", 0)


@contextmanager
def open_file(path: str | Path) -> Iterator[tuple[BinaryIO, os.stat_result]]:
    """An unbuffered binary file, open for reading, and what the system says of it, from the same descriptor.

    Raises InputError, naming the path, when it cannot be opened, is no regular file, or is a link that leaves its folder.
    """
    path = Path(path)
    try:
        descriptor = _open(path)
        with open(descriptor, "rb", buffering=0) as file:
            status = os.fstat(descriptor)
            if stat.S_ISDIR(status.st_mode):
                raise OSError(errno.EISDIR, os.strerror(errno.EISDIR))
            if not stat.S_ISREG(status.st_mode):
                raise InputError(f"cannot read {path}: it is no regular file (a pipe, a socket or a device)")
            yield file, status
    except OSError as error:
        raise InputError(f"cannot read {path}: {error.strerror or error}") from error


def _open(path: Path) -> int:
    """A descriptor of the file or of where its link leads."""
    target = _target(path)
    if os.open not in os.supports_dir_fd or not hasattr(os, "O_DIRECTORY"):
        return os.open(target, _FLAGS | _NO_LINK)
    folder = os.open(target.parent, os.O_RDONLY | os.O_DIRECTORY)
    try:
        return os.open(target.name, _FLAGS | _NO_LINK, dir_fd=folder)
    finally:
        os.close(folder)


def _target(path: Path) -> Path:
    """The path itself, or where it leads if it is a link that may be followed. Raises InputError for one that may not."""
    if not path.is_symlink():
        return path
    folder = path.parent.resolve()
    try:
        target = path.resolve(strict=True)
    except RuntimeError as error:  # a ring of links, before Python 3.13
        raise InputError(f"cannot read {path}: its links lead in a circle") from error
    homes = [folder]
    if folder.parent.name == "snapshots":
        homes.append(folder.parent.parent / "blobs")
    if not any(target.is_relative_to(home) for home in homes):
        raise InputError(f"cannot read {path}: it is a link that leaves its folder; put the file itself there")
    return target


def read_bytes(path: str | Path, limit: int) -> bytes:
    """All bytes of a file. Raises InputError as `open_file`, FileFormatError when there are more than `limit`."""
    with open_file(path) as (file, status):
        if status.st_size > limit:
            raise FileFormatError(f"{path} has {status.st_size} bytes, the limit is {limit}")
        pieces, left = [], limit + 1
        while left and (piece := file.read(min(left, status.st_size + 1))):  # in pieces, since it may grow while it is read
            pieces.append(piece)
            left -= len(piece)
    if not left:
        raise FileFormatError(f"{path} has more than {limit} bytes")
    return pieces[0] if len(pieces) == 1 else b"".join(pieces)
