"""Mutants of valid files through nybble's readers, in worker processes that are watched: no crash, no hang, little memory, and
no error but our own.

    python tests/hostile/fuzz.py --count 1000000 --seed 1
    python tests/hostile/fuzz.py --seed 1 --only 12345     # one mutant again: what it is, and what became of it

A mutant follows from the seed and its number. Each is written to a file, opened, and every tensor of it is read; some that open
are decoded by the engine. A worker may use ROOM more memory than it had before (by a limit of the system's: more is an error),
and SECONDS of processor time for one mutant; one that takes longer or dies is counted, and the others go on.
"""

from __future__ import annotations

import argparse
import collections
import contextlib
import json
import mmap
import os
import resource
import shutil
import signal
import struct
import subprocess
import sys
import tempfile
import time
import traceback
import tracemalloc
from dataclasses import dataclass, field
from pathlib import Path

from catalogue import read_all
from mutants import SPREAD, Seed, in_place, make_seeds, mutant

from nybble.errors import FileFormatError, InputError, NumericError, NybbleError, UsageError
from nybble.files.gguf import GgufFile
from nybble.files.safetensors import SafetensorsFile

SECONDS = 2.0
LONGEST_WALL = 30.0
"""For a mutant that waits for something instead of computing."""
TIMES, ROOM = 4, 64 << 20
DECODED = 16
"""Every so many-th mutant is also decoded where it opens."""
TRACED = 101
"""Every so many-th mutant has its allocations counted."""
LONGEST_MESSAGE = 1000
ALLOWED = (FileFormatError, InputError, NumericError, UsageError)


def try_one(seed: Seed, decoded: bool) -> str | None:
    """Open and read all of it. None: it was accepted; else the error's class. Raises whatever must not come."""
    try:
        if seed.kind == "safetensors":
            file = SafetensorsFile(seed.opened)
            for name in file.entries:
                file.read(name)
        else:
            if seed.kind == "gguf":
                raw = GgufFile(seed.opened)
                for name in raw.tensors:
                    raw.raw(name)
            read_all(seed.opened)
            if decoded:
                _decode(seed.opened)
    except NybbleError as error:
        if not isinstance(error, ALLOWED):
            raise
        check_message(str(error), len(str(seed.opened)))
        return type(error).__name__
    return None


def check_message(message: str, path: int) -> None:
    """Raise ValueError for a message that is no printable line, or a long one beside a path of so many characters."""
    if not message.isprintable() or len(message) > LONGEST_MESSAGE + path:
        raise ValueError(f"a message that is no short line: {message[:200]!a}")


def _decode(path: Path) -> None:
    """Three tokens through the engine."""
    from nybble.engine import Decoder

    decoder = Decoder.load(path, threads=1)
    decoder.generate([1, 2], max_new_tokens=2, stop_tokens=())


class Worker:
    """What a worker process does with its share of the mutants."""

    def __init__(self, root: Path, progress: Path) -> None:
        self.seeds = make_seeds(root)
        self.counts: collections.Counter[str] = collections.Counter()
        self.longest = (0.0, -1)
        self.traced = (0, -1)
        with open(progress, "r+b") as file:
            self.progress = mmap.mmap(file.fileno(), 8)
        for index in range(len(SPREAD)):  # imports and caches are not the mutants'
            chosen = self.seeds[SPREAD[index % len(SPREAD)]]
            for seed in chosen:
                with contextlib.suppress(NybbleError):
                    try_one(seed, True)
        self.resident = 0
        """Bytes in memory when the limit was last said."""

    def limit(self) -> None:
        """From here on a mutant that takes too much memory gets a MemoryError. Said again now and then: what a process holds
        grows a little by what mutants are made of."""
        pages, self.resident = (int(n) * mmap.PAGESIZE for n in Path("/proc/self/statm").read_text().split()[:2])
        largest = max(len(seed.data) for seeds in self.seeds.values() for seed in seeds)
        resource.setrlimit(resource.RLIMIT_AS, (pages + ROOM + TIMES * largest, resource.RLIM_INFINITY))

    def run(self, seed: int, start: int, stop: int, step: int) -> None:
        """Every mutant of a share; failures are printed as they come, counts at the end."""
        for index in range(start, stop, step):
            self.progress[:8] = struct.pack("<q", index)
            chosen, data = mutant(self.seeds, seed, index)
            with in_place(chosen, data):
                self._one(chosen, index, len(data))
            if self.counts.total() == 1000:
                self._tell()
                self.limit()
        self._tell()

    def _tell(self) -> None:
        """Print what there is to count, and begin anew: a worker that dies takes little with it."""
        grown = max(0, _resident() - self.resident)
        summary = {"counts": self.counts, "longest": self.longest, "traced": self.traced, "resident": grown}
        print(json.dumps({"summary": summary}), flush=True)
        self.counts.clear()

    def _one(self, chosen: Seed, index: int, size: int) -> None:
        traced = index % TRACED == 0
        if traced:
            tracemalloc.start()
        began = time.process_time()
        try:
            outcome = try_one(chosen, index % DECODED == 0)
        except Exception as error:
            where = traceback.extract_tb(error.__traceback__)[-1]
            failure = (
                f"{chosen.kind}: {type(error).__name__}: {str(error)[:200]} ({Path(where.filename).name} line {where.lineno})"
            )
            print(json.dumps({"failure": [index, failure]}), flush=True)
            outcome = "failed"
        seconds = time.process_time() - began
        if traced:
            peak = tracemalloc.get_traced_memory()[1]
            tracemalloc.stop()
            self.traced = max(self.traced, (peak, index))
            if peak > TIMES * size + ROOM:
                print(json.dumps({"failure": [index, f"{chosen.kind}: {peak} bytes of memory for a file of {size}"]}), flush=True)
        else:
            self.longest = max(self.longest, (seconds, index))
        self.counts[f"{chosen.kind} {outcome or 'accepted'}"] += 1


def _resident() -> int:
    """The most memory that this process had at once, in bytes."""
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024


@dataclass
class Result:
    """What came of a run."""

    mutants: int = 0
    counts: collections.Counter[str] = field(default_factory=collections.Counter)
    failures: list[tuple[int, str]] = field(default_factory=list)
    """Number of a mutant, what was wrong: another exception, too much memory."""
    crashes: list[tuple[int, str]] = field(default_factory=list)
    hangs: list[tuple[int, str]] = field(default_factory=list)
    longest: tuple[float, int] = (0.0, -1)
    """Seconds of processor time, number of the mutant."""
    traced: tuple[int, int] = (0, -1)
    """Bytes allocated at once, number of the mutant."""
    resident: int = 0
    """Bytes by which the memory of a worker grew at most over a thousand mutants."""
    seconds: float = 0.0

    @property
    def clean(self) -> bool:
        """Nothing came that must not."""
        return not (self.failures or self.crashes or self.hangs)

    def report(self) -> str:
        """For a person."""
        accepted = sum(count for name, count in self.counts.items() if name.endswith("accepted"))
        lines = [
            f"{self.mutants} mutants in {self.seconds:.0f} s ({self.mutants / self.seconds:.0f}/s), {accepted} accepted",
            f"crashes {len(self.crashes)}, hangs {len(self.hangs)}, other errors or too much memory {len(self.failures)}",
            f"longest {self.longest[0] * 1000:.0f} ms (mutant {self.longest[1]})",
            f"highest allocation {self.traced[0] / 2**20:.1f} MiB (of every {TRACED}th mutant), "
            f"memory of a worker never grew by more than {self.resident / 2**20:.1f} MiB over a thousand; "
            f"the limit is {ROOM >> 20} MiB",
            ", ".join(f"{name} {count}" for name, count in sorted(self.counts.items())),
        ]
        bad = [("crash", self.crashes), ("hang", self.hangs), ("failure", self.failures)]
        lines += [f"{what} of mutant {index}: {why}" for what, found in bad for index, why in found[:20]]
        return "\n".join(lines)


class _Share:
    """A worker process and its share, watched."""

    def __init__(self, root: Path, program: str, seed: int, share: int, shares: int, count: int) -> None:
        self.program, self.seed, self.shares, self.count, self.next = program, seed, shares, count, share
        self.root = root / str(share)
        self.root.mkdir()
        self.progress = self.root / "progress"
        self.out = self.root / "out"
        self.process: subprocess.Popen[bytes] | None = None
        self.at, self.since, self.cpu = -1, 0.0, 0.0

    def start(self) -> None:
        self.progress.write_bytes(struct.pack("<q", -1))
        models = self.root / f"models{self.next}"
        models.mkdir()
        command = [sys.executable, self.program, "--worker", str(models), str(self.progress), str(self.seed), str(self.next),
                   str(self.count), str(self.shares)]  # fmt: skip
        environment = {**os.environ, "OPENBLAS_NUM_THREADS": "1", "OMP_NUM_THREADS": "1", "MALLOC_ARENA_MAX": "1"}
        with open(self.out, "ab") as out:
            self.process = subprocess.Popen(command, stdout=out, stderr=subprocess.DEVNULL, env=environment)
        self.at, self.since, self.cpu = -1, time.monotonic(), 0.0

    def watch(self, result: Result) -> bool:
        """Look after it once; False when it is done."""
        assert self.process is not None
        code = self.process.poll()
        index = struct.unpack("<q", self.progress.read_bytes())[0]
        if code == 0:
            return False
        if code is not None:
            if index < 0:
                raise RuntimeError(f"a worker died before its first mutant ({code})")
            result.crashes.append((index, f"exit code {code}" if code > 0 else signal.Signals(-code).name))
            return self._go_on(index)
        used = _processor_seconds(self.process.pid)
        if index != self.at:
            self.at, self.since, self.cpu = index, time.monotonic(), used
        elif index >= 0 and (used - self.cpu > SECONDS or time.monotonic() - self.since > LONGEST_WALL):
            self.process.kill()
            self.process.wait()
            result.hangs.append((index, f"{used - self.cpu:.1f} s of processor time"))
            return self._go_on(index)
        return True

    def _go_on(self, index: int) -> bool:
        self.next = index + self.shares
        if self.next >= self.count:
            return False
        self.start()
        return True

    def collect(self, result: Result) -> None:
        """What it printed."""
        for line in self.out.read_text().splitlines():
            found = json.loads(line)
            if "failure" in found:
                result.failures.append((found["failure"][0], found["failure"][1]))
            else:
                summary = found["summary"]
                result.counts.update(summary["counts"])
                result.longest = max(result.longest, tuple(summary["longest"]))
                result.traced = max(result.traced, tuple(summary["traced"]))
                result.resident = max(result.resident, summary["resident"])


def _processor_seconds(pid: int) -> float:
    try:
        fields = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
    except OSError:
        return 0.0
    return (int(fields[11]) + int(fields[12])) / os.sysconf("SC_CLK_TCK")


def run(count: int, seed: int = 1, workers: int = 2, program: str = __file__) -> Result:
    """Mutants 0 to `count` - 1 of a seed. `program` is what the workers run, with the arguments that `main` takes."""
    memory = "/dev/shm" if os.access("/dev/shm", os.W_OK) else None  # half the time would go into a disk's bookkeeping
    root = Path(tempfile.mkdtemp(prefix="nybble-fuzz-", dir=memory))
    result = Result(mutants=count)
    began = time.monotonic()
    shares = [_Share(root, program, seed, share, workers, count) for share in range(workers)]
    try:
        for share in shares:
            share.start()
        running = shares
        while running:
            time.sleep(0.1)
            running = [share for share in running if share.watch(result)]
        for share in shares:
            share.collect(result)
    finally:
        for share in shares:
            if share.process is not None and share.process.poll() is None:
                share.process.kill()
                share.process.wait()
        shutil.rmtree(root)
    result.seconds = time.monotonic() - began
    return result


def show(seed: int, index: int) -> None:
    """One mutant again, in a folder that stays."""
    root = Path(tempfile.mkdtemp(prefix="nybble-mutant-"))
    chosen, data = mutant(make_seeds(root), seed, index)
    (chosen.folder / chosen.file).write_bytes(data)
    print(f"{chosen.kind} in {chosen.opened}")
    print(try_one(chosen, index % DECODED == 0) or "accepted")


def main() -> None:
    """The command line."""
    if sys.argv[1:2] == ["--worker"]:
        models, progress, *numbers = sys.argv[2:]
        seed, start, stop, step = map(int, numbers)
        worker = Worker(Path(models), Path(progress))
        worker.limit()
        worker.run(seed, start, stop, step)
        return
    parser = argparse.ArgumentParser(description=__doc__.partition("\n\n")[0])
    parser.add_argument("--count", type=int, default=1_000_000)
    parser.add_argument("--seed", type=int, default=1)
    parser.add_argument("--workers", type=int, default=2)
    parser.add_argument("--only", type=int)
    given = parser.parse_args()
    if given.only is not None:
        show(given.seed, given.only)
        return
    result = run(given.count, given.seed, given.workers)
    print(result.report())
    sys.exit(not result.clean)


if __name__ == "__main__":
    main()
