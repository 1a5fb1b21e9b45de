"""Jobs killed and hindered at every call that changes the disk, and at random moments; what comes of them must not differ.

    python tests/torture/torture.py [--jobs rtn,gguf,...] [--every 1] [--random 300] [--seed 0]

Every job is first run in peace: its output's digests and the calls it makes (counted by faults.c) are the reference. Then

    kill      at the k-th call, for every k: the same command again must end with the same bytes, and nothing else be left
    fail      ENOSPC, then EIO at the k-th write, sync or allocation and all after it: an exit code, one line that names a path
              and bytes, no output and an earlier one untouched; without the fault the same command must end with the same bytes
    random    SIGKILL after a random time, up to three times in a row

`--every n` takes each n-th of the calls. Every command is a process of its own, forked from one that has imported all that it
needs: what takes time is the work, not the start.
"""

from __future__ import annotations

import argparse
import errno
import hashlib
import json
import os
import random
import shutil
import signal
import subprocess
import sys
import tempfile
import threading
import time
import traceback
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

HERE = Path(__file__).parent
SAID_EVERY = 60
"""Seconds."""
BATCH_BYTES = 20_000
"""Small, so that a small job has many pieces."""
TEXT = "".join(f"def f{i}(x):\n    return x * {i} + {i * i}\n\n\n" for i in range(400))


@dataclass(frozen=True)
class Task:
    """A command whose output is `name` in the folder it runs in."""

    kind: str
    arguments: tuple[str, ...]
    name: str
    volatile: tuple[str, ...] = ()
    """Files of the output that hold times."""


def tasks(model: Path, text: Path) -> dict[str, Task]:
    """Every kind of job."""
    calibrated = ("--calibrate", str(text), "--windows", "3", "--window", "32")
    found = (
        Task("rtn", ("quantize", str(model), "--to", "int4:g32", "-o", "out"), "out"),
        Task("gguf", ("quantize", str(model), "--to", "q8_0", "-o", "out.gguf"), "out.gguf"),
        Task("folder", ("quantize", str(model), "--to", "int4:g32", "--file", "gptq", "-o", "out"), "out"),
        Task("convert", ("convert", str(model), "out", "--file", "float", "--to", "fp16"), "out"),
        Task("gptq", ("quantize", str(model), "--to", "int4:g32", "--method", "gptq", *calibrated, "-o", "out"), "out"),
        Task("awq", ("quantize", str(model), "--to", "int4:g32", "--method", "awq", *calibrated, "-o", "out"), "out"),
        Task("guided", ("quantize", str(model), "--to", "int4:g32", "--method", "guided", *calibrated, "-o", "out"), "out"),
        Task("tune", ("quantize", str(model), "--to", "int3:g32", "--method", "best:tune=4", *calibrated, "-o", "out"), "out"),
        Task(
            "train",
            (
                *("train", str(model), "--text", str(text), "--steps", "4", "--batch", "2", "--window", "32"),
                *("--threads", "1", "--save-every", "1", "-o", "out"),
            ),
            "out",
            ("training/log.jsonl", "training/report.md", "training/loss.png", "training/loss.svg", "training/run.json"),
        ),
    )
    return {task.kind: task for task in found}


def build(folder: Path) -> Path:
    """The library of faults.c. Raises RuntimeError where there is no compiler."""
    made = folder / "faults.so"
    compiler = shutil.which("cc") or shutil.which("gcc")
    if compiler is None or not sys.platform.startswith("linux"):
        raise RuntimeError("faults are injected on Linux, by a library that a C compiler makes")
    subprocess.run([compiler, "-O1", "-shared", "-fPIC", "-o", str(made), str(HERE / "faults.c"), "-ldl"], check=True)
    return made


def small_model(folder: Path) -> Path:
    """A GPT-2 of two blocks with a tokenizer of its own, and random weights."""
    import torch
    from transformers import GPT2Config, GPT2LMHeadModel

    from nybble.train.start import make_tokenizer

    tokenizer = make_tokenizer([TEXT], 300)
    torch.manual_seed(0)
    shape = GPT2Config(vocab_size=300, n_positions=64, n_embd=64, n_layer=2, n_head=2, eos_token_id=0, bos_token_id=0)
    model = GPT2LMHeadModel(shape)
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder


class Torture:
    """One job, its reference, and ways to hurt it."""

    def __init__(self, task: Task, server: Server, work: Path) -> None:
        self.task, self.server, self.work = task, server, work
        self.folder = work / task.kind
        self.log = work / f"{task.kind}.log"
        self.fresh()
        self.seconds = -time.monotonic()
        done = self.run()
        assert done.returncode == 0, done.stderr
        self.seconds += time.monotonic()
        self.reference = self.digests()
        self.calls = self.count("wsrtum")
        self.writes = self.count("wstm")

    def fresh(self) -> None:
        """An empty folder."""
        shutil.rmtree(self.folder, ignore_errors=True)
        self.folder.mkdir(parents=True)

    def run(self, at: int = 0, act: str = "", on: str = "wsrtum", more: Sequence[str] = (), again: bool = False) -> Done:
        """The command, with a fault or without."""
        return self.start(at, act, on, more, again).wait()

    def start(self, at: int = 0, act: str = "", on: str = "wsrtum", more: Sequence[str] = (), again: bool = False) -> Done:
        environment = {
            "FAULTS_BELOW": str(self.folder),
            "FAULTS_AT": str(at),
            "FAULTS_DO": act,
            "FAULTS_ON": on,
            "FAULTS_LOG": str(self.log),
        }
        if again:
            environment["FAULTS_AGAIN"] = "1"
        self.log.unlink(missing_ok=True)
        return self.server.start([*self.task.arguments, *more], environment, self.folder)

    def count(self, on: str) -> int:
        """How many calls of some kinds the command makes."""
        self.fresh()
        done = self.run(on=on)
        assert done.returncode == 0, done.stderr
        return len(self.log.read_text(encoding="utf-8").splitlines())

    def digests(self) -> dict[str, str]:
        """SHA-256 of the output's files by their names."""
        out = self.folder / self.task.name
        files = [out] if out.is_file() else sorted(path for path in out.rglob("*") if path.is_file())
        return {
            str(path.relative_to(self.folder)): ""
            if str(path.relative_to(out)) in self.task.volatile
            else hashlib.sha256(path.read_bytes()).hexdigest()
            for path in files
        }

    def settle(self, what: str, more: Sequence[str] = ()) -> None:
        """Run until it is done, and compare."""
        left = {path.name for path in self.folder.iterdir()}
        if left != {self.task.name} or self.digests() != self.reference:  # it was not over already
            done = self.run(more=more)
            over = done.returncode == 1 and "exists" in done.stderr  # killed when all was done but the tidying up
            assert done.returncode == 0 or over, f"{what}: {done.stderr}"
        self.check(what)

    def check(self, what: str) -> None:
        """The output is the reference, and nothing else is there."""
        found = self.digests()
        differ = sorted(name for name in {*found, *self.reference} if found.get(name) != self.reference.get(name))
        assert not differ, f"{what}: another output ({', '.join(differ)})"
        left = {path.name for path in self.folder.iterdir()} - {self.task.name}
        assert not left, f"{what}: {sorted(left)} is left"

    def kill_at(self, k: int) -> None:
        """SIGKILL at the k-th call."""
        self.fresh()
        done = self.run(k, "kill")
        assert done.returncode in (-signal.SIGKILL, 0), f"kill at call {k}: exit {done.returncode}, {done.stderr}"
        self.settle(f"{self.task.kind}, killed at call {k}")

    def fail_at(self, k: int, error: int) -> None:
        """A disk that fails from the k-th call on, with an earlier output in place."""
        what = f"{self.task.kind}, {errno.errorcode[error]} at call {k}"
        self.fresh()
        done = self.run(k, str(error), "wstm", again=True)
        if done.returncode != 0:
            self.check_said(what, done)
            there, whole = self.folder / self.task.name, self.reference
            if self.task.kind == "train":  # its folder holds the run; without config.json it is no model, and pages come last
                there = there / "config.json"
                whole = {name: digest for name, digest in whole.items() if "/training/" not in name or name in self.digests()}
            assert not there.exists() or self.digests() == whole, f"{what}: half an output"
        self.settle(what)
        if self.task.kind == "train":
            return
        done = self.run(k, str(error), "wstm", ["--force"], again=True)
        if done.returncode != 0:
            self.check_said(what, done)
            assert self.digests() == self.reference, f"{what}: the earlier output is not what it was"
        self.settle(f"{what}, in place of an earlier one", ["--force"])

    def check_said(self, what: str, done: Done) -> None:
        """One line that says where and how much."""
        said = [line for line in done.stderr.splitlines() if line.startswith("nybble: error:")]
        assert done.returncode == 1, f"{what}: exit {done.returncode}, {done.stderr}"
        assert len(said) == 1, f"{what}: {done.stderr}"
        assert "Traceback" not in done.stderr, f"{what}: {done.stderr}"
        assert str(self.folder) in said[0] or self.task.name in said[0], f"{what}: {said[0]}"

    def kill_randomly(self, chance: random.Random) -> None:
        """SIGKILL at random moments, up to three times."""
        self.fresh()
        what = f"{self.task.kind}, killed at random"
        for _ in range(chance.randint(1, 3)):
            running = self.start()
            running.kill_after(chance.random() * self.seconds * 1.1)
        self.settle(what)


class Server:
    """A process, with the library of faults, that forks one for every command."""

    def __init__(self, library: Path, work: Path) -> None:
        self.errors = work / "stderr"
        environment = {**os.environ, "LD_PRELOAD": str(library), "OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1"}
        pipe = subprocess.PIPE
        self.process = subprocess.Popen(
            [sys.executable, str(Path(__file__).resolve()), "--serve"], env=environment, stdin=pipe, stdout=pipe, text=True
        )

    def start(self, arguments: Sequence[str], environment: Mapping[str, str], folder: Path) -> Done:
        """Begin `nybble ARGUMENTS...` in a folder; one at a time."""
        order = {"arguments": list(arguments), "environment": environment, "folder": str(folder), "errors": str(self.errors)}
        assert self.process.stdin is not None
        self.process.stdin.write(json.dumps(order) + "\n")
        self.process.stdin.flush()
        return Done(self, int(self.answer()))

    def answer(self) -> str:
        """The next line that the process says."""
        assert self.process.stdout is not None
        line = self.process.stdout.readline()
        assert line, "the process that forks is gone"
        return line

    def close(self) -> None:
        """End it."""
        assert self.process.stdin is not None
        assert self.process.stdout is not None
        self.process.stdin.close()
        self.process.wait(60)
        self.process.stdout.close()


class Done:
    """A command under way, or over."""

    def __init__(self, server: Server, process: int) -> None:
        self.server, self.process = server, process
        self.returncode, self.stderr = 0, ""

    def wait(self) -> Done:
        """Until it is over."""
        self.returncode = int(self.server.answer())
        self.stderr = self.server.errors.read_text(encoding="utf-8", errors="replace")
        return self

    def kill_after(self, seconds: float) -> None:
        """Kill it if it takes longer."""
        timer = threading.Timer(seconds, os.kill, (self.process, signal.SIGKILL))
        timer.start()
        self.wait()
        timer.cancel()


def serve() -> None:
    """Fork for every line of standard input: say the process, and when it is over, how."""
    import torch  # noqa: F401  # what the commands import
    import transformers  # noqa: F401

    import nybble.blockwise
    import nybble.containers.streaming
    import nybble.files.pieces
    import nybble.report.training
    import nybble.train.session
    import nybble.tuner
    from nybble.cli import main as command

    nybble.files.pieces.BATCH_BYTES = BATCH_BYTES
    nybble.tuner.PATIENCE = 0  # every step is kept
    for line in sys.stdin:
        order = json.loads(line)
        process = os.fork()
        if not process:
            code = 1
            try:
                os.environ.update(order["environment"])
                os.chdir(order["folder"])
                errors = os.open(order["errors"], os.O_WRONLY | os.O_CREAT | os.O_TRUNC, 0o644)
                os.dup2(errors, 1)
                os.dup2(errors, 2)
                sys.argv = ["nybble", *order["arguments"]]
                command()
                code = 0
            except SystemExit as error:
                code = error.code if isinstance(error.code, int) else int(error.code is not None)
            except BaseException:
                traceback.print_exc()
            finally:
                sys.stderr.flush()
                os._exit(code)
        print(process, flush=True)
        _, status = os.waitpid(process, 0)
        print(os.waitstatus_to_exitcode(status), flush=True)


def attacks(torture: Torture, every: int, shots: int, seed: int) -> Iterator[tuple[str, Callable[[], None]]]:
    """(what, how) of all that is done to a job."""
    for k in range(1, torture.calls + 1, every):
        yield f"kill at {k} of {torture.calls}", lambda k=k: torture.kill_at(k)  # type: ignore[misc]
    for error in (errno.ENOSPC, errno.EIO):
        for k in range(1, torture.writes + 1, every):
            yield f"{errno.errorcode[error]} at {k} of {torture.writes}", lambda k=k, e=error: torture.fail_at(k, e)  # type: ignore[misc]
    chance = random.Random(seed)
    for shot in range(shots):
        yield f"random {shot + 1} of {shots}", lambda: torture.kill_randomly(chance)


def main() -> int:
    """Run all; the exit code is 1 where anything differed."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--jobs", default="rtn,gguf,folder,convert,gptq,awq,guided,tune,train")
    parser.add_argument("--every", type=int, default=1)
    parser.add_argument("--random", type=int, default=50)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--serve", action="store_true", help=argparse.SUPPRESS)
    given = parser.parse_args()
    if given.serve:
        serve()
        return 0
    wrong = 0
    with tempfile.TemporaryDirectory(prefix="torture-") as name:
        work = Path(name)
        model = small_model(work / "model")
        server = Server(build(work), work)
        text = work / "text.txt"
        text.write_text(TEXT, encoding="utf-8")
        known = tasks(model, text)
        for kind in given.jobs.split(","):
            began, done = time.monotonic(), 0
            torture = Torture(known[kind], server, work)
            said = began
            for what, attack in attacks(torture, given.every, given.random, given.seed):
                if time.monotonic() - said > SAID_EVERY:
                    said = time.monotonic()
                    print(f"{kind}: {what} after {said - began:.0f} s", file=sys.stderr, flush=True)
                try:
                    attack()
                except AssertionError as error:
                    wrong += 1
                    print(f"{kind}: {what}: {' '.join(str(error).split())[:500]}", flush=True)
                done += 1
            print(f"{kind}: {done} attacks in {time.monotonic() - began:.0f} s", flush=True)
        server.close()
    print("all outputs are the same" if not wrong else f"{wrong} differ")
    return 1 if wrong else 0


if __name__ == "__main__":
    sys.exit(main())
