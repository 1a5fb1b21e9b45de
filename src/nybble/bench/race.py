"""Racing: every racer's file made once, then rounds over all racers, each turn in a new process.

    A B C A B C ...    so that what else the machine does falls on all alike

The parent imports no torch. Whatever a peer does wrong costs the race that peer and one line; a failure of nybble's own
is raised by the caller after the others have been shown.
"""

from __future__ import annotations

import datetime
import os
import shutil
import tempfile
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from hashlib import sha256
from pathlib import Path
from typing import Any

from nybble import demo, kernels
from nybble.bench.adapters import OURS, adapter_of
from nybble.bench.child import Children
from nybble.bench.racers import DEFAULT_FORMATS, Racer, check_pythons, parse_against, parse_formats
from nybble.bench.standing import Race, Standing
from nybble.bench.traffic import cached_numbers
from nybble.bench.workload import WHAT, Workload, plan_workload
from nybble.errors import InputError, NybbleError, OutputError, UsageError, unknown_name
from nybble.evaluate import memory
from nybble.models.checkpoint import Checkpoint, check_float, is_causal, open_checkpoint
from nybble.models.hub import resolve
from nybble.models.shapes import check_shape
from nybble.version import __version__

Progress = Callable[[str, str, float], None]
"""Called with (racer or empty, what is being done, fraction of the whole run done)."""
BANDWIDTH_BYTES, BANDWIDTH_REPEATS = 1 << 29, 5
CONTEXT_KEYS = ("n_positions", "max_position_embeddings", "n_ctx")


def race(
    model: str | Path | None = None,
    *,
    shape: str | None = None,
    formats: str = DEFAULT_FORMATS,
    against: str = "",
    threads: int | None = None,
    rounds: int = 3,
    repeats: int = 5,
    what: str = ",".join(WHAT),
    exact: bool = False,
    work: str | Path | None = None,
    peer_pythons: Sequence[tuple[str, str]] = (),
    download: bool = False,
    progress: Progress | None = None,
    remark: Callable[[str], None] | None = None,
) -> Race:
    """Race nybble's engine in some formats against peers, on a model folder (default: the model that ships).

    `shape` races random weights of a known shape instead. `work` is a folder where the files of each racer are kept for
    the next race; without it they are removed. `peer_pythons` are (runtime, path of the Python that has it). `remark` is
    told in one line what is left out. Raises NybbleError subclasses: wrong arguments, a model that cannot be raced.
    """
    ours, peers = parse_formats(formats), parse_against(against)
    pythons = check_pythons(peer_pythons, peers)
    if shape is not None and model is not None:
        raise UsageError("--shape makes a model of random weights: give no MODEL with it")
    if shape is not None:
        check_shape(shape)
    for name, value in (("threads", threads), ("rounds", rounds), ("repeats", repeats)):
        if value is not None and value < 1:
            raise UsageError(f"{name} is {value}; the least is 1")
    settings = Settings(threads or memory.machine()["cores"], rounds, repeats, exact, check_what(what))
    scratch = Path(tempfile.mkdtemp(prefix="nybble-bench-"))
    try:
        children = Children(scratch, settings.threads, pythons)
        steps = _Steps(progress, 1 + len(ours) + len(peers) + rounds * len([*ours, *peers]))
        files = Path(work) if work is not None else scratch
        if shape is not None:
            steps.next(f"{shape} shape", "writing random weights")
            folder = _make_once(files / f"shape-{shape}-{__version__}" / "model", children, {"do": "shape", "shape": shape})
        else:
            folder = resolve(model, download) if model is not None else demo.model_folder()
        checkpoint = open_checkpoint(folder)
        check_float(checkpoint)
        if not is_causal(checkpoint.config):
            raise InputError(f"{folder} does not predict the next token; a race needs a causal language model")
        files = folder.parent if shape is not None else files / f"{checkpoint.name}-{_key(checkpoint)}"
        name = f"{shape} shape, random weights" if shape else (checkpoint.name if model is not None else demo.NAME)
        run = _Run(checkpoint, files, children, settings, steps, remark or (lambda line: None))
        return run.race(name, run.admit([*ours, *peers]))
    finally:
        shutil.rmtree(scratch, ignore_errors=True)


def check_what(what: str) -> list[str]:
    """The parts of the work load named in `decode,prefill,batch`. UsageError for none or an unknown one."""
    parts = [part.strip() for part in what.split(",") if part.strip()]
    for part in parts:
        if part not in WHAT:
            raise unknown_name("part of the work load", part, WHAT)
    if not parts:
        raise UsageError(f"--what names nothing; name some of {', '.join(WHAT)}")
    return parts


@dataclass(frozen=True)
class Settings:
    """How a race is run."""

    threads: int
    rounds: int
    repeats: int
    exact: bool
    what: list[str]


class _Steps:
    """Tells how far the whole run is."""

    def __init__(self, progress: Progress | None, total: int) -> None:
        self._progress, self._total, self._done = progress, total, 0

    def next(self, head: str, what: str) -> None:
        if self._progress:
            self._progress(head, what, min(self._done / self._total, 1.0))
        self._done += 1


class _Run:
    """A race of one model: what all its racers share."""

    def __init__(
        self,
        checkpoint: Checkpoint,
        files: Path,
        children: Children,
        settings: Settings,
        steps: _Steps,
        remark: Callable[[str], None],
    ) -> None:
        self._checkpoint, self._files, self._children = checkpoint, files, children
        self._settings, self._steps, self._remark = settings, steps, remark
        self._skipped: list[str] = []
        self._workload = workload_of(checkpoint.config)
        for note in self._workload.notes:
            remark(note)

    def admit(self, racers: list[Racer]) -> dict[Racer, Path]:
        """Racers whose runtime is there and whose file is made, with that file."""
        absent: dict[str, str | None] = {}
        admitted = {}
        for racer in racers:
            self._steps.next(str(racer), "making its file")
            adapter = adapter_of(racer.runtime)
            if racer.runtime not in absent:
                check = {"do": "check", "runtime": racer.runtime}
                absent[racer.runtime] = self._children.run(check, f"the check for {racer.runtime}")["missing"]
                if absent[racer.runtime]:
                    self._skip(f"{racer.runtime} is skipped: no {absent[racer.runtime]} here; pip install {adapter.install}")
            if absent[racer.runtime]:
                continue
            name = adapter.file_for(racer.format, self._checkpoint.float_tag)
            source = str(self._checkpoint.folder.resolve())
            job = {
                "do": "make",
                "runtime": racer.runtime,
                "format": racer.format,
                "source": source,
                "threads": self._settings.threads,
            }
            try:
                if name and adapter.half:
                    half = {"do": "convert", "runtime": OURS, "source": source, "container": Path(adapter.half).suffix[1:]}
                    job["source"] = str(_make_once(self._files / adapter.half, self._children, half).resolve())
                made = _make_once(self._files / name, self._children, job) if name else self._checkpoint.folder
                admitted[racer] = made.resolve()
            except OutputError:
                raise  # no disk for one is none for all
            except NybbleError as error:
                self._skip(f"{racer} is skipped: {error}")
        return admitted

    def race(self, name: str, paths: dict[Racer, Path]) -> Race:
        """All rounds. Raises InputError when nobody is there to race."""
        if not paths:
            raise InputError(f"nobody can race: {self._skipped[-1]}")
        standings = [Standing(racer) for racer in paths]
        loads = []
        for number in range(self._settings.rounds):
            loads.append(os.getloadavg()[0] if hasattr(os, "getloadavg") else 0.0)
            for standing in standings:
                self._steps.next(f"round {number + 1}: {standing.racer}", "racing")
                if standing.failed is None:
                    self._turn(standing, paths[standing.racer], number)
        done = Race(
            model=name,
            threads=self._settings.threads,
            rounds=self._settings.rounds,
            repeats=self._settings.repeats,
            exact=self._settings.exact,
            workload=self._workload,
            cached_numbers=cached_numbers(self._checkpoint.config),
            loads=tuple(loads),
            machine={**memory.machine(), "instruction_set": kernels.instruction_set()},
            created=datetime.datetime.now(datetime.timezone.utc).isoformat(timespec="seconds"),
            standings=tuple(standings),
            skipped=tuple(self._skipped),
        )
        if not done.finished:
            raise InputError(f"no racer finished: {self._skipped[-1]}")
        return done

    def _turn(self, standing: Standing, path: Path, number: int) -> None:
        racer = standing.racer
        job = {
            "do": "measure",
            "runtime": racer.runtime,
            "format": racer.format,
            "path": str(path),
            "threads": self._settings.threads,
            "exact": self._settings.exact,
            "repeats": self._settings.repeats,
            "what": self._settings.what,
            "workload": self._workload.as_job(self._settings.repeats),
        }
        try:
            before = self._bandwidth()
            standing.turns.append(self._children.run(job, str(racer)))
            standing.bandwidths.append(max(before, self._bandwidth()))
            standing.rounds.append(number)
        except NybbleError as error:
            standing.failed = str(error)
            self._skip(f"{racer} failed: {error}")

    def _bandwidth(self) -> float:
        return kernels.read_bandwidth(BANDWIDTH_BYTES, self._settings.threads, BANDWIDTH_REPEATS)

    def _skip(self, line: str) -> None:
        self._skipped.append(line)
        self._remark(line)


def workload_of(config: dict[str, Any]) -> Workload:
    """The work load for a model with this config.json. InputError when it states no vocabulary or context."""
    context = next((config[key] for key in CONTEXT_KEYS if isinstance(config.get(key), int)), None)
    vocabulary = config.get("vocab_size")
    if not isinstance(vocabulary, int) or context is None:
        raise InputError(f"config.json of this {config.get('model_type')} states no vocab_size or no {CONTEXT_KEYS[1]}")
    return plan_workload(vocabulary, context)


def failures_of_ours(done: Race) -> list[str]:
    """Lines about nybble's own racers among those left out."""
    return [line for line in done.skipped if line.startswith(f"{OURS} ")]


def _make_once(target: Path, children: Children, job: dict[str, Any]) -> Path:
    """`target`, made by a worker unless it is there already; it appears complete or not at all."""
    if target.exists():
        return target
    part = target.with_name(f"{target.name}.part")
    _make_folder(target.parent)
    _remove(part)
    try:
        children.run({**job, "target": str(part.absolute())}, f"the process making {target.name}")
        part.rename(target)
    except OSError as error:
        if isinstance(error, OutputError):
            raise
        raise OutputError(f"cannot write {target}: {error.strerror or error}") from error
    finally:
        _remove(part)
    return target


def _make_folder(path: Path) -> None:
    try:
        path.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise OutputError(f"cannot make the work folder {path}: {error.strerror or error}") from error


def _remove(path: Path) -> None:
    if path.is_dir():
        shutil.rmtree(path)
    else:
        path.unlink(missing_ok=True)


def _key(checkpoint: Checkpoint) -> str:
    """What tells this model's files from another's in a work folder: place, sizes and times of its files, and our version."""
    stats = [(path.name, path.stat().st_size, path.stat().st_mtime_ns) for path in checkpoint.files]
    return sha256(repr((str(checkpoint.folder.resolve()), stats, __version__)).encode()).hexdigest()[:12]
