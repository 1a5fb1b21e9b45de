"""Files of a model folder: regular ones only, and links only where they stay with the model."""

from __future__ import annotations

import os
import socket
from pathlib import Path

import pytest

from nybble.errors import FileFormatError, InputError
from nybble.files.opening import open_file, read_bytes


def read(path: Path) -> bytes:
    return read_bytes(path, 1000)


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    (tmp_path / "secret").write_bytes(b"secret")
    (tmp_path / "model").mkdir()
    (tmp_path / "model" / "a").write_bytes(b"mine")
    return tmp_path / "model"


def test_a_file(folder: Path) -> None:
    assert read(folder / "a") == b"mine"
    with open_file(folder / "a") as (file, status):
        assert file.read() == b"mine"
        assert status.st_size == 4
    assert file.closed


@pytest.mark.parametrize("target", ["a", "./a", "sub/../a", "other", "sub/b"])
def test_links_inside_the_folder(target: str, folder: Path) -> None:
    (folder / "sub").mkdir()
    (folder / "sub" / "b").write_bytes(b"mine")
    (folder / "other").symlink_to("a")
    (folder / "link").symlink_to(target)
    assert read(folder / "link") == b"mine"


@pytest.mark.parametrize(
    "target", ["../secret", "{root}/secret", "up/secret", "out", "../model/../secret", "/dev/zero", "/proc/self/environ"]
)
def test_links_that_leave_the_folder(target: str, folder: Path) -> None:
    (folder / "up").symlink_to("..")
    (folder / "out").symlink_to("../secret")
    (folder / "link").symlink_to(target.format(root=folder.parent))
    with pytest.raises(InputError, match="is a link that leaves its folder"):
        read(folder / "link")


def test_a_folder_that_is_reached_by_a_link(folder: Path) -> None:
    """The person named the folder; how they got there is theirs."""
    (folder.parent / "short").symlink_to(folder)
    (folder / "link").symlink_to("a")
    assert read(folder.parent / "short" / "a") == b"mine"
    assert read(folder.parent / "short" / "link") == b"mine"


def snapshot(root: Path, target: str) -> Path:
    """A file in a snapshot of the hub's cache: `models--ORG--NAME/snapshots/REVISION/FILE`, a link into `blobs`."""
    repository = root / "models--org--name"
    (repository / "blobs").mkdir(parents=True)
    (repository / "blobs" / "0123abc").write_bytes(b"blob")
    (repository / "refs").mkdir()
    (repository / "refs" / "main").write_bytes(b"ref")
    (root / "models--org--other" / "blobs").mkdir(parents=True)
    (root / "models--org--other" / "blobs" / "0123abc").write_bytes(b"other")
    revision = repository / "snapshots" / "40e6"
    revision.mkdir(parents=True)
    (revision / "model.safetensors").symlink_to(target)
    return revision / "model.safetensors"


def test_a_snapshot_of_the_hubs_cache(tmp_path: Path) -> None:
    assert read(snapshot(tmp_path, "../../blobs/0123abc")) == b"blob"


@pytest.mark.parametrize(
    "target", ["../../refs/main", "../../../models--org--other/blobs/0123abc", "../../blobs/../refs/main", "../../../secret"]
)
def test_links_of_a_snapshot_that_lead_elsewhere(target: str, tmp_path: Path) -> None:
    (tmp_path / "secret").write_bytes(b"secret")
    path = snapshot(tmp_path, target)
    with pytest.raises(InputError, match="is a link that leaves its folder"):
        read(path)


def test_what_is_no_regular_file(folder: Path) -> None:
    os.mkfifo(folder / "pipe")
    with socket.socket(socket.AF_UNIX) as server:
        server.bind(str(folder / "socket"))
    for name, message in (
        ("pipe", "no regular file"),
        ("socket", "cannot read"),
        ("sub", "Is a directory"),
        ("none", "No such file"),
    ):
        (folder / "sub").mkdir(exist_ok=True)
        with pytest.raises(InputError, match=message):
            read(folder / name)
    with pytest.raises(InputError, match="no regular file"):
        read(Path("/dev/zero"))


def test_links_in_a_circle_and_to_nothing(folder: Path) -> None:
    (folder / "one").symlink_to("two")
    (folder / "two").symlink_to("one")
    (folder / "three").symlink_to("none")
    for name in ("one", "three"):
        with pytest.raises(InputError, match="cannot read"):
            read(folder / name)


def test_a_file_that_becomes_a_link_between_two_looks(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """What was no link when it was asked is opened without following one."""
    real = Path.is_symlink

    def swap(path: Path) -> bool:
        answer = real(path)
        if path.name == "a" and not answer:
            path.unlink()
            path.symlink_to("../secret")
        return answer

    monkeypatch.setattr(Path, "is_symlink", swap)
    with pytest.raises(InputError, match="cannot read"):
        read(folder / "a")


def test_a_limit_of_bytes(folder: Path) -> None:
    (folder / "large").write_bytes(bytes(1001))
    with pytest.raises(FileFormatError, match="has 1001 bytes, the limit is 1000"):
        read(folder / "large")
    assert read_bytes(folder / "large", 1001) == bytes(1001)
    os.truncate(folder / "large", 1 << 40)
    with pytest.raises(FileFormatError, match="the limit is 1000"):
        read(folder / "large")
    if Path("/proc/self/status").exists():  # says that it has no bytes, and has some
        with pytest.raises(FileFormatError, match="has more than 10 bytes"):
            read_bytes(Path("/proc/self/status"), 10)


def test_no_descriptor_is_left_open(folder: Path) -> None:
    (folder / "link").symlink_to("../secret")
    before = set(os.listdir("/proc/self/fd")) if Path("/proc/self/fd").exists() else set()
    for name in ("a", "link", "none"):
        for _ in range(20):
            try:
                read(folder / name)
            except InputError:
                continue
    if before:
        assert len(os.listdir("/proc/self/fd")) == len(before)
