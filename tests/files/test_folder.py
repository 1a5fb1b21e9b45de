"""Output folders appear complete or not at all."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

import pytest

from nybble.errors import OutputError
from nybble.files.folder import check_output
from nybble.files.job import job_folder, new_folder

MARKER = "config.json"


def make(path: Path, text: str, force: bool = False) -> None:
    with new_folder(path, force, MARKER) as work:
        (work / MARKER).write_text(text, encoding="utf-8")


def names(folder: Path) -> list[str]:
    return sorted(p.name for p in folder.iterdir())


def test_it_appears_when_the_block_ends(tmp_path: Path) -> None:
    path = tmp_path / "deep" / "out"
    with new_folder(path, False, MARKER) as work:
        (work / MARKER).write_text("{}", encoding="utf-8")
        assert not path.exists()
        assert work.parent == job_folder(path)
    assert names(path.parent) == ["out"]
    assert (path / MARKER).read_text(encoding="utf-8") == "{}"
    assert path.stat().st_mode & 0o777 == 0o755


@pytest.mark.parametrize("error", [RuntimeError("boom"), KeyboardInterrupt(), SystemExit(1)], ids=["error", "ctrl-c", "exit"])
@pytest.mark.parametrize("existing", [False, True])
def test_an_exception_leaves_what_was_there(tmp_path: Path, error: BaseException, existing: bool) -> None:
    path = tmp_path / "out"
    if existing:
        make(path, "old")
    with pytest.raises(type(error)), new_folder(path, existing, MARKER) as work:  # noqa: PT012  # the write is the point
        (work / MARKER).write_text("new", encoding="utf-8")
        raise error
    assert names(tmp_path) == (["out"] if existing else [])
    if existing:
        assert (path / MARKER).read_text(encoding="utf-8") == "old"


def test_an_existing_folder_needs_force(tmp_path: Path) -> None:
    path = tmp_path / "out"
    make(path, "old")
    with pytest.raises(OutputError, match="exists and is not empty; name another or add --force"):
        make(path, "new")
    make(path, "new", force=True)
    assert (path / MARKER).read_text(encoding="utf-8") == "new"
    assert names(tmp_path) == ["out"]


def test_an_empty_folder_may_be_filled(tmp_path: Path) -> None:
    (tmp_path / "out").mkdir()
    make(tmp_path / "out", "new")
    assert names(tmp_path / "out") == [MARKER]


def test_force_does_not_replace_what_nybble_did_not_make(tmp_path: Path) -> None:
    (tmp_path / "photos").mkdir()
    (tmp_path / "photos" / "one.jpg").write_bytes(b"1")
    with pytest.raises(OutputError, match=r"holds no config\.json, so nybble did not make it and will not replace it"):
        make(tmp_path / "photos", "new", force=True)
    assert names(tmp_path / "photos") == ["one.jpg"]


def test_files_in_the_way(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("x", encoding="utf-8")
    with pytest.raises(OutputError, match="is a file; name a folder"):
        check_output(tmp_path / "file", True, MARKER)
    with pytest.raises(OutputError, match=r"cannot be made: .*file is a file"):
        check_output(tmp_path / "file" / "out", False, MARKER)
    assert (tmp_path / "file").read_text(encoding="utf-8") == "x"


@pytest.mark.skipif(not hasattr(os, "geteuid") or os.geteuid() == 0, reason="root may write everywhere")
def test_a_read_only_parent(tmp_path: Path) -> None:
    tmp_path.chmod(0o500)
    try:
        with pytest.raises(OutputError, match=r"cannot write in .*; choose another folder"):
            check_output(tmp_path / "out", False, MARKER)
    finally:
        tmp_path.chmod(0o700)


def test_a_file_system_that_is_read_only(tmp_path: Path) -> None:
    if not Path("/proc/self").is_dir():
        pytest.skip("no /proc here, which nobody can write to")
    with pytest.raises(OutputError, match=r"cannot write in /proc.*; choose another folder with -o"):
        check_output(Path("/proc/nybble-test/out"), False, MARKER)


def test_a_check_leaves_nothing(tmp_path: Path) -> None:
    check_output(tmp_path / "a" / "b", False, MARKER)
    assert names(tmp_path) == []


def test_a_failing_rename_puts_the_old_folder_back(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "out"
    make(path, "old")
    rename, calls = os.rename, []

    def second_fails(source: Any, target: Any) -> None:
        calls.append(target)
        if len(calls) == 2:
            raise OSError(5, "Input/output error")
        rename(source, target)

    monkeypatch.setattr(os, "rename", second_fails)
    with pytest.raises(OutputError, match=r"cannot write .*out: Input/output error"):
        make(path, "new", force=True)
    assert names(tmp_path) == ["out"]
    assert (path / MARKER).read_text(encoding="utf-8") == "old"


def test_a_write_that_fails_inside_is_one_clear_error(tmp_path: Path) -> None:
    with pytest.raises(OutputError, match=r"cannot write .*out: No space left"), new_folder(tmp_path / "out", False, MARKER):
        raise OSError(28, "No space left on device")
    with pytest.raises(OutputError, match="as it was"), new_folder(tmp_path / "out", False, MARKER):
        raise OutputError("as it was")
    assert names(tmp_path) == []
