"""A file without a name: it goes when nobody has it any more, however that comes."""

from __future__ import annotations

import os
import tempfile
import weakref
from pathlib import Path

from nybble.errors import OutputError


class UnnamedFile:
    """Bytes on disk in place of memory. Threads may read and write different ones."""

    def __init__(self, folder: Path, what: str, size: int = 0, advice: str = "make room") -> None:
        """A file in a folder, with room for `size` bytes. Errors say `what` is in it and what to do. Raises OutputError where
        there is no room."""
        self.folder, self.what, self.advice, self._size = folder, what, advice, size
        try:
            self._file, name = tempfile.mkstemp(dir=folder)
            weakref.finalize(self, os.close, self._file)
            os.unlink(name)
            if size and hasattr(os, "posix_fallocate"):
                os.posix_fallocate(self._file, 0, size)
        except OSError as error:
            raise self._failed(error) from error

    def write(self, data: memoryview, at: int) -> None:
        """Write bytes at a place. Raises OutputError."""
        done, self._size = 0, max(self._size, at + data.nbytes)
        while done < data.nbytes:
            try:
                done += os.pwrite(self._file, data[done:], at + done)
            except OSError as error:
                raise self._failed(error) from error

    def read(self, into: memoryview, at: int) -> None:
        """Fill a buffer from a place. Raises OutputError where the file ends before."""
        done = 0
        while done < into.nbytes:
            count = os.preadv(self._file, [into[done:]], at + done)
            if not count:
                raise OutputError(f"{self.what} in {self.folder} end at byte {at + done}, {into.nbytes - done} are missing")
            done += count

    def _failed(self, error: OSError) -> OutputError:
        why = error.strerror or error
        return OutputError(f"cannot write {self.what} ({self._size:,} bytes) in {self.folder}: {why}; {self.advice}")
