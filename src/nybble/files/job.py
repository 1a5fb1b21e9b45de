"""A long job beside its output: a folder `OUTPUT.part` with what is finished so far, under a lock, put in place at the end.

    OUTPUT.part/lock       held by the process that works (flock: a dead process holds nothing); says which one it is
    OUTPUT.part/journal    what is finished (journal.py)
    OUTPUT.part/NAME       the output itself while it is made: a folder or a file

The same command takes up what an earlier one left. What is wrong with the input or the command leaves nothing behind that was not
there before; what may go another way next time (a full disk, an interruption) leaves the folder once a piece in it is finished.
"""

from __future__ import annotations

import errno
import os
import shutil
import socket
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

from nybble.errors import MeasureError, NybbleError, OutputError
from nybble.files.folder import check_output, remove_empty
from nybble.files.journal import Journal, read_journal, sync_folder, sync_tree

try:
    import fcntl
except ImportError:  # a system without it has no such locks
    fcntl = None  # type: ignore[assignment]

LOCK, JOURNAL, REPLACED, BLOCKS = "lock", "journal", "replaced", "blocks"
IN_USE = "is in use by"
AT_ONCE = {"way of writing": "at once"}
READY = "ready"
"""Key of the journal's last line: the output is whole, and only has to get its name."""
NO_LOCKS = (errno.ENOLCK, errno.ENOTSUP, errno.EOPNOTSUPP, errno.ENOSYS)
"""Of a file system that has no locks: there one works without."""


class Job:
    """A job under way. `place` is where its output is made."""

    def __init__(self, target: Path, folder: Path, journal: Journal) -> None:
        self.target, self.folder, self.journal = target, folder, journal
        self.place = folder / target.name

    @property
    def begun(self) -> bool:
        """Whether there is something to go on from."""
        return bool(self.journal.records)

    @property
    def published(self) -> bool:
        """Whether the output has its name already: the process that gave it ended before it could take the folder away."""
        return any(READY in record for record in self.journal.records) and not self.place.exists() and self.target.exists()

    def publish(self) -> None:
        """Have all of the output on disk, then give it its name, in place of what has it."""
        sync_tree(self.place)
        self.journal.append({READY: True})
        sync_folder(self.folder)
        old = self.folder / REPLACED
        replaces = self.target.is_dir()
        if replaces:
            remove(old)
            os.rename(self.target, old)
        try:
            os.rename(self.place, self.target)  # a file takes another's place in one step
        except OSError as error:
            if replaces:
                os.rename(old, self.target)
            raise OutputError(f"cannot write {self.target}: {error.strerror or error}") from error
        sync_folder(self.target.parent)


@contextmanager
def open_job(target: str | Path, facts: Mapping[str, Any], restart: bool = False) -> Iterator[Job]:
    """The job that makes `target`, locked for as long as the block runs; left without an error, it is done and its folder goes.

    `facts` is what the result depends on: a job with others is refused, unless `restart` forgets it. Raises OutputError where
    another process works on it, naming that, or where nothing can be written; UsageError and InputError as `Journal`.
    """
    target = Path(target).absolute()
    folder = job_folder(target)
    made = [parent for parent in target.parents if not parent.exists()]  # innermost first
    _check_ours(folder, target.name)
    lock = _lock(folder)
    journal = None
    try:
        if restart:
            for path in folder.iterdir():
                if path.name not in (LOCK, REPLACED):
                    remove(path)
        _restore(folder, target)
        journal = Journal(folder / JOURNAL, facts)
        job = Job(target, folder, journal)
        yield job
        journal.close()
        _clear(folder)
    except BaseException as error:
        if journal is not None:
            journal.close()
            passing = not isinstance(error, NybbleError) or isinstance(error, OutputError | MeasureError)
            if facts == AT_ONCE or not (journal.records or (passing and journal.appended)):
                _clear(folder)
        elif not (folder / JOURNAL).exists():
            _clear(folder)
        if isinstance(error, OSError) and not isinstance(error, OutputError):
            raise OutputError(f"cannot write {error.filename or target}: {error.strerror or error}") from error
        raise
    finally:
        if lock is not None:
            os.close(lock)
        if not target.exists() and not folder.exists():
            remove_empty(made)


@contextmanager
def new_output(target: str | Path, restart: bool = False) -> Iterator[Path]:
    """A place beside `target` that gets its name when the block ends, and is removed when it fails: what is written at once, with
    nothing to go on from. What a killed process left is removed first. Raises as `open_job`."""
    with open_job(target, AT_ONCE, restart) as job:
        remove(job.place)
        yield job.place
        job.publish()


@contextmanager
def new_folder(path: str | Path, force: bool, marker: str) -> Iterator[Path]:
    """An empty folder beside `path` that becomes `path` when the block ends, and is removed when it fails.

    With `force` an existing folder is replaced, at that moment and not before. Raises OutputError as `check_output`, and as
    `open_job`.
    """
    check_output(Path(path), force, marker)
    with new_output(path) as place:
        place.mkdir()
        yield place


def job_folder(target: Path) -> Path:
    """Where the job that makes `target` works."""
    return target.absolute().with_name(f"{target.name}.part")


def has_begun(target: Path) -> bool:
    """Whether a job left something to go on from."""
    return bool(read_journal(job_folder(target) / JOURNAL)[1])


def how_to_go_on(target: Path, error: BaseException) -> str | None:
    """What to say when a job was stopped by an error and left something to go on from."""
    wrong = isinstance(error, NybbleError) and not isinstance(error, OutputError | MeasureError)  # it would be wrong again
    if wrong or not has_begun(target) or IN_USE in str(error):
        return None
    return f"stopped; the same command goes on from {job_folder(target)}"


def is_published(target: Path) -> bool:
    """Whether a job that goes on gave its output its name and was killed before it could take its folder away."""
    folder = job_folder(target)
    if not (target.exists() and (folder / JOURNAL).is_file()) or (folder / target.name).exists():
        return False
    facts, records = read_journal(folder / JOURNAL)
    return facts != AT_ONCE and any(READY in record for record in records)


def sweep(target: Path) -> None:
    """Take away the folder of a job that was killed while it took it away itself; any other stays."""
    folder = job_folder(target)
    names = {path.name for path in folder.iterdir()} if folder.is_dir() else {LOCK, JOURNAL, target.name}
    over = names <= {LOCK, JOURNAL} and read_journal(folder / JOURNAL)[0] == AT_ONCE
    if over or names <= {LOCK}:
        with suppress(OutputError):
            lock = _lock(folder)
            _clear(folder)
            if lock is not None:
                os.close(lock)


def _check_ours(folder: Path, name: str) -> None:
    """Raise OutputError for a folder that is somebody else's: it would be taken away in the end."""
    if folder.is_dir():
        names = {path.name for path in folder.iterdir()}
        known = {LOCK, JOURNAL, f".{JOURNAL}.part", REPLACED, BLOCKS, name, f"{name}.part"}
        if names and (LOCK not in names or names - known):
            raise OutputError(f"{folder} is there, and nybble did not make it; name another output, or move it away")
    elif folder.exists():
        raise OutputError(f"{folder} is a file, where the work is to be kept; name another output, or move it away")


def _restore(folder: Path, target: Path) -> None:
    """Undo half of a `publish` that was killed between its two renames."""
    old = folder / REPLACED
    if old.exists() and not target.exists():
        os.rename(old, target)
        sync_folder(target.parent)


def _lock(folder: Path) -> int | None:
    """A locked descriptor of the folder's lock file; the folder is made. None where there are no locks."""
    for _ in range(100):
        try:
            folder.mkdir(parents=True, exist_ok=True)
            descriptor = os.open(folder / LOCK, os.O_RDWR | os.O_CREAT | getattr(os, "O_CLOEXEC", 0), 0o644)
        except FileNotFoundError:  # another process finished and took the folder away
            continue
        except OSError as error:
            raise OutputError(f"cannot write in {folder.parent}: {error.strerror or error}; choose another folder") from error
        if fcntl is None:
            return descriptor
        try:
            fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            holder = os.read(descriptor, 200).decode(errors="replace").strip()
            os.close(descriptor)
            raise OutputError(f"{folder} {IN_USE} {holder or 'another process'}; wait for it, or stop it") from None
        except OSError as error:
            if error.errno in NO_LOCKS:
                return descriptor
            os.close(descriptor)
            raise OutputError(f"cannot lock {folder}: {error.strerror or error}") from error
        try:
            ours = os.fstat(descriptor).st_ino == os.stat(folder / LOCK).st_ino
        except FileNotFoundError:
            ours = False
        if ours:
            with suppress(OSError):  # on a full disk nobody learns who holds it
                os.ftruncate(descriptor, 0)
                os.pwrite(descriptor, f"process {os.getpid()} on {socket.gethostname()}\n".encode(), 0)
            return descriptor
        os.close(descriptor)  # it was taken away between opening and locking
    raise OutputError(f"cannot lock {folder}: it comes and goes; name another output")


def _clear(folder: Path) -> None:
    """Take a job's folder away, its lock last, before that its journal: a job that is killed here is known as over."""
    with suppress(OSError):
        for path in sorted(folder.iterdir(), key=lambda path: (path.name == LOCK, path.name == JOURNAL)):
            remove(path)
        folder.rmdir()


def remove(path: Path) -> None:
    """Take a file or a folder away, if it is there."""
    if path.is_dir() and not path.is_symlink():
        shutil.rmtree(path, ignore_errors=True)
    else:
        path.unlink(missing_ok=True)
