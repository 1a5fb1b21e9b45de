"""The catalogue of bad files through other projects' readers, each file in a process of its own that is watched.

    python tests/hostile/peers.py                          # those that are installed; a table on standard output
    python tests/hostile/peers.py --write docs/security.md # ... and into the page
    python tests/hostile/peers.py --list gguf-py           # what became of each file there

What a reader takes is not always wrong of it: some of what nybble refuses is a rule of ours (docs/security.md).
"""

from __future__ import annotations

import argparse
import collections
import importlib.metadata
import importlib.util
import json
import os
import re
import resource
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import bad_containers
import bad_gguf
import bad_pickles
import good
from catalogue import READERS, Build, Case, catalogue

SECONDS = 2.0
WALL_SECONDS = 20.0
TIMES, ROOM = 4, 64 << 20
MOST_MEMORY = 6 << 30
OUTCOMES = ("refused", "accepted", "another exception", "over 2 s", "crashed")
BEGIN, END = "<!-- peers -->", "<!-- /peers -->"


@dataclass(frozen=True)
class Peer:
    """A reader, the kinds of files it is for, how it reads one, and the exceptions by which it means to refuse one."""

    name: str
    package: str
    kinds: tuple[str, ...]
    prepare: Callable[[], tuple[Callable[[str, Path], object], tuple[type[BaseException], ...]]]
    """Imports it: (read a file of a kind, exceptions)."""

    @property
    def version(self) -> str:
        """Of the installed package."""
        return importlib.metadata.version(self.package)

    @property
    def installed(self) -> bool:
        """Whether it can be run here."""
        try:
            return bool(self.version)
        except importlib.metadata.PackageNotFoundError:
            return False


def _nybble() -> Any:
    from nybble.errors import NybbleError

    return lambda kind, path: READERS[kind](path), (NybbleError,)


def _gguf_py() -> Any:
    import gguf

    def read(_: str, path: Path) -> object:
        reader = gguf.GGUFReader(path)
        return [field.contents() for field in reader.fields.values()], [tensor.data.sum() for tensor in reader.tensors]

    return read, (ValueError, OSError, KeyError)  # KeyError is what it raises for a key that stands twice


def _llama_cpp() -> Any:
    import llama_cpp

    def read(_: str, path: Path) -> None:
        llama_cpp.Llama(str(path), n_ctx=16, n_threads=1, verbose=False).eval([1, 5])

    return read, (ValueError,)


def _safetensors() -> Any:
    import safetensors

    def read(_: str, path: Path) -> object:
        with safetensors.safe_open(path, framework="numpy") as file:
            return file.metadata(), [file.get_tensor(name) for name in file.keys()]  # noqa: SIM118  # it is no dictionary

    return read, (safetensors.SafetensorError, OSError)


def _transformers() -> Any:
    os.environ["HF_HUB_OFFLINE"] = "1"
    import torch
    import transformers
    from huggingface_hub.errors import StrictDataclassError
    from safetensors import SafetensorError

    torch.set_num_threads(1)
    folder = tempfile.mkdtemp()
    small = transformers.LlamaConfig(
        hidden_size=32, intermediate_size=32, num_hidden_layers=1, num_attention_heads=2, vocab_size=16
    )
    transformers.LlamaForCausalLM(small).save_pretrained(folder)
    transformers.AutoModelForCausalLM.from_pretrained(folder)  # what is imported late is imported now
    shutil.rmtree(folder)
    clean = (OSError, ValueError, RuntimeError, ImportError, SafetensorError, StrictDataclassError)
    return lambda _, path: transformers.AutoModelForCausalLM.from_pretrained(path, local_files_only=True), clean


def _torch() -> Any:
    import pickle

    import torch

    torch.set_num_threads(1)
    # RuntimeError is what its zip reader raises
    return lambda _, path: torch.load(path, weights_only=True), (pickle.UnpicklingError, RuntimeError, OSError, EOFError)


FORMAT, MODEL = "gguf, the format", "gguf, the model in it"
PEERS = (
    Peer("nybble", "nybble", (FORMAT, MODEL, "safetensors", "index", "config", "containers", "pickle"), _nybble),
    Peer("gguf-py", "gguf", (FORMAT,), _gguf_py),
    Peer("llama.cpp (llama-cpp-python)", "llama_cpp_python", (FORMAT, MODEL), _llama_cpp),
    Peer("safetensors", "safetensors", ("safetensors",), _safetensors),
    Peer("transformers", "transformers", ("index", "config"), _transformers),
    Peer("torch.load, weights_only", "torch", ("pickle",), _torch),
)


def _read_in_child(read: Callable[[str, Path], object], clean: tuple[type[BaseException], ...], kind: str, path: Path) -> str:
    """The outcome, in a process that may end here."""
    devnull = os.open(os.devnull, os.O_RDWR)
    for descriptor in (0, 1, 2):
        os.dup2(devnull, descriptor)
    resource.setrlimit(resource.RLIMIT_CPU, (4, 4))
    resource.setrlimit(resource.RLIMIT_AS, (MOST_MEMORY, MOST_MEMORY))
    resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
    try:
        read(kind, path)
    except clean as error:
        return f"refused\n{type(error).__name__}: {error}"
    except BaseException as error:  # whatever there is: that is the question
        return f"another exception\n{type(error).__name__}: {error}"
    return "accepted\n"


def try_file(
    read: Callable[[str, Path], object], clean: tuple[type[BaseException], ...], kind: str, path: Path
) -> tuple[str, str, float, int]:
    """(outcome, message, seconds of processor time, bytes by which memory grew) of one file."""
    resident = int(Path("/proc/self/statm").read_text().split()[1]) * os.sysconf("SC_PAGE_SIZE")
    ours, theirs = os.pipe()
    child = os.fork()
    if child == 0:
        try:
            os.write(theirs, _read_in_child(read, clean, kind, path).encode("utf-8", "replace")[:4000])
        finally:
            os._exit(0)
    os.close(theirs)
    end = time.monotonic() + WALL_SECONDS
    while not (found := os.wait4(child, os.WNOHANG))[0]:
        if time.monotonic() > end:
            os.kill(child, signal.SIGKILL)
        time.sleep(0.002)
    _, status, usage = found
    answer = os.read(ours, 4000).decode("utf-8", "replace")
    os.close(ours)
    seconds, grown = usage.ru_utime + usage.ru_stime, max(0, usage.ru_maxrss * 1024 - resident)
    outcome, _, message = answer.partition("\n")
    if os.WIFSIGNALED(status):
        killer = os.WTERMSIG(status)
        slow = killer in (signal.SIGXCPU, signal.SIGKILL)
        outcome, message = ("over 2 s" if slow else "crashed"), signal.Signals(killer).name
    elif seconds > SECONDS:
        outcome, message = "over 2 s", f"{seconds:.1f} s, then {outcome}"
    return outcome, " ".join(message.split())[:200], seconds, grown


def _work(name: str) -> None:
    """A reader's own process: files come in as lines, what became of them goes out as lines."""
    peer = next(peer for peer in PEERS if peer.name == name)
    read, clean = peer.prepare()
    for line in sys.stdin:
        kind, path, size = json.loads(line)
        outcome, message, seconds, grown = try_file(read, clean, kind, Path(path))
        answer = {
            "outcome": outcome,
            "message": message,
            "seconds": seconds,
            "memory": outcome != "crashed" and grown > TIMES * size + ROOM,
        }
        sys.stdout.write(json.dumps(answer) + "\n")
        sys.stdout.flush()


VALID: dict[str, Build] = {
    "gguf": lambda folder: good.gguf_model(),
    "safetensors": lambda folder: good.safetensors({"a": good.entry()}, b"1234"),
    "index": good.write_shards,
    "config": good.write_folder,
    "pickle": lambda folder: bad_pickles.good(),
}
"""Files that nothing is wrong with."""


def kind_of(name: str, case: Case) -> str:
    """The row of the table that a case belongs to: what only containers of nybble's are asked is apart, and so is what a reader
    of the format alone need not see."""
    short = name.removeprefix(f"{case.kind}: ")
    if case.kind == "gguf" and ("config.json" in short or "provenance" in short):  # keys of nybble's own
        return "containers"
    if case.kind == "gguf":
        return FORMAT if short in bad_gguf.CASES else MODEL
    return "containers" if short in bad_containers.CASES and case.kind == "config" else case.kind


def run(peer: Peer, folder: Path) -> dict[str, dict[str, Any]]:
    """Case -> what became of it."""
    mine = {name: case for name, case in catalogue().items() if kind_of(name, case) in peer.kinds}
    mine = {
        f"valid: {kind}": Case(kind, build, "") for kind, build in VALID.items() if kind in {c.kind for c in mine.values()}
    } | mine
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "OPENBLAS_NUM_THREADS": "1", "PYTHONWARNINGS": "ignore"}
    process = subprocess.Popen(
        [sys.executable, __file__, "--work", peer.name], stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL,
        text=True, env=environment, cwd=folder,
    )  # fmt: skip
    assert process.stdin is not None
    assert process.stdout is not None
    found = {}
    for i, (name, case) in enumerate(mine.items()):
        place = folder / f"{i}" / "model"
        place.mkdir(parents=True)
        path = case.make(place)
        files = [path] if path.is_file() else [file for file in place.rglob("*") if file.is_file() and not file.is_symlink()]
        size = sum(file.lstat().st_size for file in files)
        process.stdin.write(json.dumps([case.kind, str(path), size]) + "\n")
        process.stdin.flush()
        found[name] = json.loads(process.stdout.readline()) | {"kind": kind_of(name, case)}
        shutil.rmtree(place.parent)
    process.stdin.close()
    process.wait()
    for name in [name for name in found if name.startswith("valid: ")]:
        if found.pop(name)["outcome"] != "accepted":
            raise RuntimeError(
                f"{peer.name} does not read the valid file that is spoiled ({name}); its figures would say nothing"
            )
    return found


def table(results: dict[str, dict[str, dict[str, Any]]]) -> str:
    """A Markdown table of readers and kinds."""
    lines = ["| reader | kind | files | refused cleanly | accepted | another exception | over 2 s | crashed | too much memory |",
             "| --- | --- | ---: | ---: | ---: | ---: | ---: | ---: | ---: |"]  # fmt: skip
    for peer in PEERS:
        for kind in peer.kinds if peer.name in results else ():
            rows = [row for row in results[peer.name].values() if row["kind"] == kind]
            count = collections.Counter(row["outcome"] for row in rows)
            memory = sum(row["memory"] for row in rows)
            figures = [len(rows), *(count[outcome] for outcome in OUTCOMES), memory]
            lines.append(f"| {peer.name} {peer.version} | {kind} | {' | '.join(map(str, figures))} |")
    return "\n".join(lines)


def main() -> None:
    """The command line."""
    if sys.argv[1:2] == ["--work"]:
        _work(sys.argv[2])
        return
    parser = argparse.ArgumentParser(description=__doc__.partition("\n\n")[0])
    parser.add_argument("--write", type=Path)
    parser.add_argument("--list", help="show each file of one reader")
    given = parser.parse_args()
    results = {}
    for peer in PEERS:
        if given.list not in (None, peer.name) or not peer.installed:
            continue
        with tempfile.TemporaryDirectory(prefix="nybble-peers-") as folder:
            results[peer.name] = run(peer, Path(folder))
        if given.list:
            for name, row in results[peer.name].items():
                print(f"{row['outcome']}{' MEMORY' if row['memory'] else ''}\t{name}\t{row['message']}")
        print(f"{peer.name} {peer.version}: {len(results[peer.name])} files", file=sys.stderr)
    made = table(results)
    print(made)
    if given.write:
        text = given.write.read_text(encoding="utf-8")
        given.write.write_text(
            re.sub(f"{BEGIN}.*{END}", lambda _: f"{BEGIN}\n{made}\n{END}", text, flags=re.DOTALL), encoding="utf-8"
        )


if __name__ == "__main__":
    main()
