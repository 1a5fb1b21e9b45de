"""Whether an output folder can be written, before any work is done for it, and what is said where it turns out that it cannot."""

from __future__ import annotations

import os
import tempfile
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager, suppress
from pathlib import Path

from nybble.errors import NybbleError, OutputError


def check_output(path: Path, force: bool, marker: str) -> None:
    """Raise OutputError when `path` cannot become an output folder: it exists (unless `force`), its parent cannot be
    made or is not writable. Called before any work, so that hours of it are not lost at the end.

    `marker` is a file that every folder of this kind holds: even `force` does not replace a folder without it.
    """
    path = path.absolute()
    if path.exists() and not path.is_dir():
        raise OutputError(f"output {path} is a file; name a folder")
    if path.is_dir() and any(path.iterdir()) and not force:
        raise OutputError(f"output folder {path} exists and is not empty; name another or add --force to replace it")
    if path.is_dir() and any(path.iterdir()) and not (path / marker).is_file():
        raise OutputError(f"{path} holds no {marker}, so nybble did not make it and will not replace it; name another folder")
    parent = next(p for p in (path if path.is_dir() else path.parent, *path.parents) if p.exists())
    if not parent.is_dir():
        raise OutputError(f"output {path} cannot be made: {parent} is a file")
    try:  # asks the file system itself: access bits say nothing to root, on a full or a read-only disk
        with tempfile.TemporaryFile(dir=parent):  # one without a name, where the system can
            pass
    except OSError as error:
        raise OutputError(f"cannot write in {parent}: {error.strerror or error}; choose another folder with -o") from error


@contextmanager
def writing(where: Path) -> Iterator[None]:
    """Raise OutputError, with the path, for whatever the system refuses while the block writes below `where`."""
    try:
        yield
    except OSError as error:
        if isinstance(error, NybbleError):
            raise
        raise OutputError(f"cannot write {error.filename or where}: {error.strerror or error}") from error


def write_whole(files: Mapping[Path, bytes], stale: Iterable[Path] = ()) -> None:
    """Write all files, then give all of them their names and remove what is stale: none is ever seen half-written, and where one
    cannot be written the others stay what they were. Raises OSError."""
    pending: list[tuple[str, Path]] = []
    try:
        for path, content in files.items():
            path.parent.mkdir(parents=True, exist_ok=True)
            handle, temporary = tempfile.mkstemp(prefix=f".{path.name}.", suffix=".part", dir=path.parent)
            pending.append((temporary, path))
            with os.fdopen(handle, "wb") as stream:
                stream.write(content)
                stream.flush()
                os.fsync(stream.fileno())
            os.chmod(temporary, file_mode())
        while pending:
            os.replace(*pending[0])
            pending.pop(0)
        for path in stale:
            path.unlink(missing_ok=True)
    finally:
        for temporary, _ in pending:
            with suppress(FileNotFoundError):
                os.unlink(temporary)


def remove_empty(folders: list[Path]) -> None:
    """Take back the parents made for an output that did not come; one that somebody else uses by now stays."""
    with suppress(OSError):
        for folder in folders:
            folder.rmdir()


def file_mode() -> int:
    """Access bits of a new file, as the user's mask has it: temporary files are made with fewer."""
    mask = os.umask(0)
    os.umask(mask)
    return 0o666 & ~mask
