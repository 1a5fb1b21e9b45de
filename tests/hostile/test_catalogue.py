"""Every file of the catalogue: refused with the error and the message it must have, in little time and little memory."""

from __future__ import annotations

import collections
import re
import time
import tracemalloc
from pathlib import Path

import pytest
from catalogue import KINDS, READERS, catalogue

from nybble.errors import FileFormatError, InputError, NumericError, UsageError

CASES = catalogue()
SECONDS = 2.0
TIMES, ROOM = 4, 64 << 20
"""Memory: so many times the file, and so much more."""
LONGEST_MESSAGE = 1000
AT_LEAST = {"gguf": 90, "safetensors": 50, "index": 25, "config": 25, "pickle": 20}


def size_of(path: Path) -> int:
    """Bytes on disk of a file, or of all files of a folder."""
    files = [path] if path.is_file() else [file for file in path.rglob("*") if file.is_file() and not file.is_symlink()]
    return sum(file.lstat().st_size for file in files)


@pytest.mark.parametrize("name", CASES)
def test_refused(name: str, tmp_path: Path) -> None:
    case = CASES[name]
    folder = tmp_path / "model"
    folder.mkdir()
    path = case.make(folder)
    seconds, peak = [], 0
    for watched in (False, True):  # to watch memory makes all of it slow
        started = time.process_time()
        if watched:
            tracemalloc.start()
        try:
            with pytest.raises((FileFormatError, InputError, NumericError, UsageError)) as caught:
                READERS[case.kind](path)
        finally:
            seconds.append(time.process_time() - started)
            peak = tracemalloc.get_traced_memory()[1]
            tracemalloc.stop()
    message = str(caught.value)
    assert type(caught.value) is case.error, message
    assert re.search(case.match, message), message
    assert message.isprintable(), ascii(message)
    assert len(message) < LONGEST_MESSAGE + len(str(path)), message
    assert seconds[0] < SECONDS
    assert peak <= TIMES * size_of(path) + ROOM


def test_the_catalogue_is_as_large_as_we_say() -> None:
    found = collections.Counter(case.kind for case in CASES.values())
    assert sum(found.values()) >= 200
    for kind in KINDS:
        assert found[kind] >= AT_LEAST[kind], found
