"""Folders of shards whose index lies or leads out of the folder."""

from __future__ import annotations

import json
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

from catalogue import Build, Case, refused_for_a_link
from good import entry, safetensors, write_index, write_shards

from nybble.errors import FileFormatError, InputError

SHARDS = ("model-00001-of-00002.safetensors", "model-00002-of-00002.safetensors")
NORM = "model.norm.weight"
INDEX = "model.safetensors.index.json"
ELSEWHERE = "a shard is a .* file of the same folder"


def places(change: Callable[[dict[str, Any]], Any]) -> Build:
    """The map of a good index, changed."""

    def build(folder: Path) -> None:
        write_index(folder, {"metadata": {}, "weight_map": change(write_shards(folder))})

    return build


def named(shard: Any) -> Build:
    """One tensor is said to be in another shard."""
    return places(lambda found: {**found, NORM: shard})


def raw(content: Callable[[], bytes]) -> Build:
    """An index of these bytes."""

    def build(folder: Path) -> None:
        write_shards(folder)
        write_index(folder, content())

    return build


def index(value: Any) -> Build:
    """An index of this JSON."""
    return raw(lambda: json.dumps(value).encode())


def disk(change: Callable[[Path], Any]) -> Build:
    """A good folder whose files are changed."""

    def build(folder: Path) -> None:
        write_shards(folder)
        change(folder)

    return build


def outside(folder: Path, name: str = SHARDS[0]) -> Path:
    """A shard is moved to the folder above."""
    target = folder.parent / f"outside-{folder.name}.safetensors"
    (folder / name).rename(target)
    return target


def linked(folder: Path) -> None:
    target = outside(folder)
    (folder / SHARDS[0]).symlink_to(f"../{target.name}")


def linked_twice(folder: Path) -> None:
    """A link to a link in the folder that leads out."""
    target = outside(folder)
    (folder / "other").symlink_to(target)
    (folder / SHARDS[0]).symlink_to("other")


def folder_linked(folder: Path) -> None:
    """The shard lies in a subfolder that leads out."""
    target = outside(folder)
    (folder / "sub").symlink_to("..")
    (folder / SHARDS[0]).symlink_to(f"sub/{target.name}")


def index_linked(folder: Path) -> None:
    (folder / INDEX).rename(folder.parent / f"index-{folder.name}.json")
    (folder / INDEX).symlink_to(f"../index-{folder.name}.json")


def false_snapshot(folder: Path) -> None:
    """Laid out like a snapshot of the hub's cache, with a link beside its blobs, not into them."""
    target = outside(folder)
    (folder / "blobs").mkdir()
    (folder / SHARDS[0]).symlink_to(f"blobs/../../{target.name}")


def pipe(folder: Path) -> None:
    (folder / SHARDS[0]).unlink()
    os.mkfifo(folder / SHARDS[0])


def tensor_twice(folder: Path) -> None:
    (folder / SHARDS[1]).write_bytes(safetensors({NORM: entry("F16", (64,), (0, 128))}, bytes(128)))
    (folder / SHARDS[0]).write_bytes(
        safetensors({NORM: entry("F16", (64,), (0, 128)), "b": entry("U8", (0,), (128, 128))}, bytes(128))
    )
    write_index(folder, {"weight_map": {NORM: SHARDS[1], "b": SHARDS[0]}})


def copies() -> bytes:
    """20 MB of JSON that would be 500 MB in memory."""
    return b'{"weight_map":{"a":[' + b"{}," * 6_600_000 + b"{}]}}"


WRONG: dict[str, tuple[Build, str]] = {
    "a shard in the folder above": (named("../model-00001-of-00002.safetensors"), ELSEWHERE),
    "a shard two folders above, by way of one that is here": (named("sub/../../secret.safetensors"), ELSEWHERE),
    "a shard at the root": (named("/etc/passwd.safetensors"), ELSEWHERE),
    "a shard of another drive": (named("C:\\model.safetensors"), ELSEWHERE),
    "a shard in the folder above, backwards": (named("..\\model.safetensors"), ELSEWHERE),
    "a shard in a folder below": (named("sub/model.safetensors"), ELSEWHERE),
    "a shard that begins with a dot": (named(".model.safetensors"), ELSEWHERE),
    "a shard that is the folder": (named("."), ELSEWHERE),
    "a shard without a name": (named(""), ELSEWHERE),
    "a shard of another kind": (named("pytorch_model.bin"), ELSEWHERE),
    "a shard with a NUL": (named("model\0.safetensors"), ELSEWHERE),
    "a shard with a line break": (named("model\n.safetensors"), ELSEWHERE),
    "a shard that is a number": (named(3), ELSEWHERE),
    "a shard that is a list": (named([SHARDS[0]]), ELSEWHERE),
    "a shard that is null": (named(None), ELSEWHERE),
    "a shard of 10,000 letters": (named("a" * 10_000 + ".safetensors"), ELSEWHERE),
    "an address of the network": (named("https://example.org/model.safetensors"), ELSEWHERE),
    "no tensors": (places(lambda found: {}), "names no shard"),
    "the map is a list": (places(list), "names no shard"),
    "the map is missing": (index({"metadata": {}}), "names no shard"),
    "the index is a list": (index([1]), "holds a list, not an object"),
    "the index is a number": (index(3), "holds a int, not an object"),
    "the index is empty": (raw(lambda: b""), "is not JSON"),
    "the index is cut short": (raw(lambda: b'{"weight_map": {"a": "b'), "is not JSON"),
    "the index is not UTF-8": (raw(lambda: b'{"weight_map": {"\xff": "a"}}'), "is not JSON"),
    "the index nests 100,000 deep": (raw(lambda: b'{"weight_map":' + b"[" * 100_000 + b"]" * 100_000 + b"}"), "nests deeper"),
    "the index nests 200 deep": (raw(lambda: b'{"weight_map":' + b"[" * 200 + b"]" * 200 + b"}"), "nests deeper than 32"),
    "the index takes 24 times its size in memory": (raw(copies), "too many to read safely"),
    "a tensor twice in the map": (
        raw(lambda: json.dumps({"weight_map": {NORM: SHARDS[0]}}).replace("}}", f', "{NORM}": "{SHARDS[1]}"}}}}').encode()),
        f"key '{NORM}' stands twice",
    ),
    "the map twice": (raw(lambda: b'{"weight_map": {"a": "b.safetensors"}, "weight_map": {}}'), "key 'weight_map' stands twice"),
    "NaN beside the map": (raw(lambda: b'{"metadata": NaN, "weight_map": {"a": "b.safetensors"}}'), "NaN is not JSON"),
    "a number of 5,000 digits": (raw(lambda: b'{"metadata": ' + b"9" * 5000 + b"}"), "does not fit 64 bits"),
    "a tensor in the other shard": (places(lambda f: {**f, NORM: next(s for s in SHARDS if s != f[NORM])}), "says is in"),
    "a tensor that no shard holds": (places(lambda found: {**found, "x": SHARDS[0]}), "lacks tensor 'x'"),
    "a tensor that the index does not name": (places(lambda f: {n: s for n, s in f.items() if n != NORM}), "does not name"),
    "a tensor in two shards": (disk(tensor_twice), "says is in"),
    "a whole model beside the shards": (
        disk(lambda folder: (folder / "model.safetensors").write_bytes(safetensors({"a": entry()}, b"1234"))),
        "beside an index of other files",
    ),
    "a shard cut short": (disk(lambda folder: os.truncate(folder / SHARDS[1], 2000)), "is not a valid safetensors file"),
    "a shard that is empty": (disk(lambda folder: os.truncate(folder / SHARDS[1], 0)), "is not a valid safetensors file"),
}
OTHER: dict[str, Case] = {
    "a shard that is not there": Case(
        "index", places(lambda found: {**found, "x": "model-00000.safetensors"}), "lacks shard", InputError
    ),
    "a shard that is a pipe": Case("index", disk(pipe), "lacks shard|is no regular file", InputError),
    "a shard that is a folder": Case(
        "index", disk(lambda f: ((f / SHARDS[0]).unlink(), (f / SHARDS[0]).mkdir())), "lacks shard|Is a directory", InputError
    ),
    "a shard that is a link out of the folder": refused_for_a_link("index", disk(linked)),
    "a shard that is a link to a link": refused_for_a_link("index", disk(linked_twice)),
    "a shard behind a folder that is a link": refused_for_a_link("index", disk(folder_linked)),
    "a link that only looks like one of the hub's cache": refused_for_a_link("index", disk(false_snapshot)),
    "an index that is a link out of the folder": refused_for_a_link("index", disk(index_linked)),
    "an index that is a folder and no model": Case(
        "index",
        disk(lambda f: ((f / INDEX).unlink(), (f / INDEX).mkdir())),
        "has no model.safetensors and no model.safetensors.index.json",
        InputError,
    ),
}

CASES: dict[str, Case] = {name: Case("index", build, match, FileFormatError) for name, (build, match) in WRONG.items()} | OTHER
