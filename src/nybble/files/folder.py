"""Output folders that appear complete or not at all."""

from __future__ import annotations

import os
import shutil
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

from nybble.errors import OutputError


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
def new_folder(path: str | Path, force: bool, marker: str) -> Iterator[Path]:
    """A temporary folder beside `path` that becomes `path` when the block ends, and is removed when it fails.

    With `force` an existing folder is replaced, at that moment and not before. Raises OutputError as `check_output`.
    """
    path = Path(path).absolute()
    check_output(path, force, marker)
    made = [p for p in path.parents if not p.exists()]  # innermost first
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        work = Path(tempfile.mkdtemp(dir=path.parent, prefix=f".{path.name}.", suffix=".part"))
    except OSError as error:
        raise OutputError(f"cannot make a folder beside {path}: {error.strerror or error}") from error
    try:
        yield work
        os.chmod(work, 0o755)
        _put_in_place(work, path)
    except OSError as error:
        if isinstance(error, OutputError):
            raise
        raise OutputError(f"cannot write {path}: {error.strerror or error}") from error
    finally:
        shutil.rmtree(work, ignore_errors=True)
        if not path.exists():
            remove_empty(made)


def remove_empty(folders: list[Path]) -> None:
    """Take back the parents made for an output that did not come; one that somebody else uses by now stays."""
    with suppress(OSError):
        for folder in folders:
            folder.rmdir()


def _put_in_place(work: Path, path: Path) -> None:
    old = None
    if path.exists():
        old = Path(tempfile.mkdtemp(dir=path.parent, prefix=f".{path.name}.", suffix=".old"))
        os.rename(path, old / "replaced")
    try:
        os.rename(work, path)
    except OSError:
        if old is not None:
            os.rename(old / "replaced", path)
        raise
    finally:
        if old is not None:
            shutil.rmtree(old, ignore_errors=True)
    descriptor = os.open(path.parent, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
