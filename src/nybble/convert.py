"""From one container to another: codes are carried over where the other holds the same values, and what that costs elsewhere is
measured (converting.py). No torch.

What was written is read again and compared before it gets its name. Containers that can be streamed are written piece by piece
(containers/streaming.py); of others every tensor is kept as it is made. Either way a run that was stopped goes on where it was.
"""

from __future__ import annotations

import dataclasses
import os
import platform
import tempfile
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from hashlib import sha256
from pathlib import Path
from typing import Any

import numpy as np

from nybble.containers import find_container, open_contents
from nybble.containers.contents import Contents
from nybble.containers.saving import check_room, check_target, container_of, digest_of, save, write_checked
from nybble.containers.streaming import Group, Stream, made_ahead, run_stream
from nybble.converting import NO_COST, Cost, Progress, Step, Work, candidate_specs, describe_contents
from nybble.errors import UsageError
from nybble.files.job import BLOCKS, Job, how_to_go_on, open_job, remove
from nybble.files.safetensors import forget_pages
from nybble.finished import Block, FinishedBlocks, notes_of
from nybble.forecast import Forecast, forecast
from nybble.formats import QTensor, parse_format
from nybble.formats.activations import Activations
from nybble.methods import parse_method
from nybble.models.checkpoint import open_checkpoint, row_digests, tensors_digest, unpickle_folder
from nybble.models.filling import check_filling
from nybble.models.mapped import give_back
from nybble.plan import Recipe, make_plan
from nybble.version import __version__

PLACEHOLDER = "0" * 64
"""Stands for a digest that is not known before all is read: what it replaces is as long."""
MOST_THREADS = 4


@contextmanager
def opened(path: str | Path, allow_pickle: bool = False) -> Iterator[Contents]:
    """What a path holds; with `allow_pickle` also a folder that has its weights in *.bin files only, which are first written
    as safetensors into a temporary folder. Errors as of `open_contents`."""
    path = Path(path)
    if not (allow_pickle and path.is_dir() and not any(path.glob("*.safetensors"))):
        yield open_contents(path)
        return
    with tempfile.TemporaryDirectory(prefix="nybble-") as folder:
        copy = Path(folder) / path.resolve().name  # a model's name is its folder's
        copy.mkdir()
        contents = open_contents(unpickle_folder(path, copy))
        pickled = tuple(sorted(path.glob("*.bin")))
        yield dataclasses.replace(contents, files=pickled, bytes=sum(file.stat().st_size for file in pickled))


@dataclass(frozen=True)
class Conversion:
    """What was done, tensor by tensor."""

    path: Path
    container: str
    steps: tuple[Step, ...]
    bytes: int
    """On disk."""

    @property
    def changed(self) -> tuple[Step, ...]:
        """The steps that did not keep every value."""
        return tuple(step for step in self.steps if not step.exact)

    @property
    def error(self) -> float:
        """Squared error over all tensors that changed, as a share of their squares."""
        energy = sum(step.energy for step in self.changed)
        return sum(step.error * step.energy for step in self.changed) / energy if energy else 0.0


def convert(
    source: str | Path | Contents,
    target: str | Path,
    container: str | None = None,
    to: str | None = None,
    method: str = "rtn",
    keep: Sequence[str] = (),
    rules: Sequence[tuple[str, str]] = (),
    options: Mapping[str, str] | None = None,
    force: bool = False,
    progress: Progress | None = None,
    restart: bool = False,
    threads: int | None = None,
    memory: int | None = None,
    announce: Callable[[str], None] = lambda remark: None,
    measures: bool = True,
    provenance: Mapping[str, Any] | None = None,
) -> Conversion:
    """Write a model in another container.

    `source` is whatever `open_contents` opens; `container` follows from the name of `target` where it is not given: gguf for
    `.gguf`, else nybble. `to` is a format or mix for every weight, with `keep` and `rules` as in a recipe; without it every
    weight keeps its format as far as the container has it. `method` chooses codes where a weight is rounded: one that reads no
    calibration text. A run that was stopped goes on with the same arguments; `restart` forgets it. `threads` make tensors at
    once; `memory` limits the bytes that this process holds; `announce` is told what it will take before the work, and what an
    earlier run left, if any. Without `measures` the steps do not say what rounding cost. `provenance` is added to what the file
    says of itself; a `source_blake3` in it is filled in. Raises UsageError for what the container cannot hold, which it lists,
    and where a run of something else was stopped; InputError for the source; NumericError naming the tensor; OutputError where
    the target cannot be written.
    """
    target = Path(target)
    module = find_container(container_of(target, container))
    parsed = parse_method(method)
    if parsed.settings.calibrated:
        raise UsageError(f"method {parsed} reads calibration text; convert rounds without: nybble quantize --file {container}")
    if to is None and (keep or rules):
        raise UsageError("keep and rules say what else becomes of some weights; give the format of the others with --to")
    chosen = check_target(module.NAME, target, force, options or {})
    contents = source if isinstance(source, Contents) else open_contents(source)
    recipe = Recipe(to, str(parsed), tuple(keep), tuple(rules)) if to else None
    plan = make_plan(describe_contents(contents), recipe) if recipe else None
    if plan is not None:
        shapes = {name: shape for held in (contents.packed, contents.floats) for name, (_, shape) in held.items()}
        check_filling(contents.config, shapes, contents.path)
    work = Work(contents, module, plan, parsed, None if contents.files else progress, measures)
    made: dict[str, Any] = (
        {} if plan is None else {"plan_hash": plan.hash, "format": plan.recipe.format, "method": plan.recipe.method}
    )
    if plan is not None and provenance is not None:
        made["bits_per_weight"] = round(plan.bpw, 6)
    known = {**contents.provenance, **made, **(provenance or {})}
    result = work.contents(known)
    if hasattr(module, "check"):
        module.check(result)
    if not contents.files:  # in memory already
        check_room(target, work.bytes)
        size = save(result, target, module.NAME, chosen, force, work.digests.__getitem__)
        return Conversion(target, module.NAME, work.steps(), size)
    facts = {
        "format": None if recipe is None else recipe.format,
        "method": str(parsed),
        "choice of weights": [list(keep), [list(rule) for rule in rules]],
        "container": [module.NAME, chosen],
        "way of measuring": measures,
        **facts_of(contents),
    }
    pace = _Pace(threads or min(MOST_THREADS, os.cpu_count() or 1), memory, progress, announce)
    work.parts = {}
    try:
        if streams(module.NAME):
            _in_pieces(target, module.stream(result, chosen), work, result, facts, restart, pace)
        else:
            _by_tensors(target, work, result, chosen, facts, restart, pace)
    except BaseException as error:
        if (remark := how_to_go_on(target, error)) is not None:
            announce(remark)
        raise
    size = target.stat().st_size if target.is_file() else sum(file.stat().st_size for file in target.iterdir())
    return Conversion(target, module.NAME, work.steps(), size)


@dataclass(frozen=True)
class _Pace:
    """How it is to be made, and who is told."""

    threads: int
    memory: int | None
    progress: Progress | None
    announce: Callable[[str], None]

    def report(self, done: int, total: int) -> None:
        if self.progress is not None:
            self.progress("", done, total)


def _in_pieces(
    target: Path, stream: Stream, work: Work, result: Contents, facts: Mapping[str, Any], restart: bool, pace: _Pace
) -> None:
    """Write a container that can be streamed."""
    known = dict(result.provenance)
    with open_job(target, {**facts, "layout": sha256(stream.head(known)).hexdigest()}, restart) as job:
        if job.published:
            _count(job, work)
            return
        expected = forecast(stream, result, work.method, target, pace.threads, pace.memory, work.source.bytes)
        pace.announce(str(expected))
        if job.begun:
            pace.announce(f"going on with what is in {job.folder}")
        damaged = _stream(job, stream, work, known, pace, expected)
        if damaged:
            pace.announce(f"{damaged} pieces in {job.folder} were not what had been written; they were made again")
        work.module.read(job.place)
        job.publish()


def _by_tensors(
    target: Path,
    work: Work,
    result: Contents,
    options: Mapping[str, str],
    facts: Mapping[str, Any],
    restart: bool,
    pace: _Pace,
) -> None:
    """Write a container whose layout depends on what is in it: what is rounded is kept tensor by tensor, then put together."""
    names = [name for name, (spec, _) in result.packed.items() if name in work.source.floats and not parse_format(spec).is_cast]
    with open_job(target, facts, restart) as job:
        if job.published:
            _count(job, work)
            return
        finished = FinishedBlocks(job.folder / BLOCKS, job.journal)
        whole = [
            Group(name, shape, partial(_arrays, result, name), by_rows=work.carries(name))  # nothing is made of it
            for name, (_, shape) in result.packed.items()
        ]
        rounded = result.by_rows.intersection(names)
        apart = [dataclasses.replace(group, by_rows=True) for group in whole if group.name in rounded]
        size = 2 * work.bytes  # what is kept, and the output
        rough, tried = (Stream("", groups, {}, size, lambda _: b"") for groups in (whole, apart))
        expected = forecast(rough, result, work.method, target, pace.threads, pace.memory, work.source.bytes, tried)
        pace.announce(str(expected))
        if job.begun:
            pace.announce(f"going on with what is in {job.folder}")

        def make(name: str) -> Block:
            assert work.parts is not None
            tensor = result.read_packed(name)
            return Block({name: tensor}, note=work.parts.pop((name, 0))[0])

        jobs = ((index, finished.find(index) or partial(make, name)) for index, name in enumerate(names))
        for index, block in made_ahead(jobs, expected.threads):
            name = names[index]
            if name not in finished:
                finished.keep(index, block)
            work.add(name, _cost(block.note))
            forget_pages()
            pace.report(index + 1, len(names))
        if finished.damaged:
            pace.announce(f"{finished.damaged} tensors in {job.folder} were not what had been written; they were made again")
        provenance = dict(result.provenance)
        if provenance.get("source_blake3") == PLACEHOLDER:
            provenance["source_blake3"] = open_checkpoint(work.source.path).digest()
            forget_pages()
        work.parts = None  # what is not kept is made, and measured, as it is written

        def read(name: str) -> QTensor:
            if name not in finished:
                return result.read_packed(name)
            tensor = work.with_scheme(name, finished.read(name))
            work.digests[name] = digest_of(tensor)
            return tensor

        remove(job.place)
        if work.module.FOLDER:
            job.place.mkdir()
        written = dataclasses.replace(result, read_packed=read, provenance=provenance)
        write_checked(work.module, job.place, written, options, work.digests.__getitem__)
        job.publish()


def _arrays(result: Contents, name: str, rows: slice | None) -> Mapping[str, Any]:
    """A weight as its format stores it, or some rows."""
    stored: Mapping[str, Any] = result.part(name, rows).stored()
    return stored


def streams(container: str) -> bool:
    """Whether a container is written piece by piece, by runs that go on after they were stopped."""
    return hasattr(find_container(container), "stream")


def made_by(source: Path, recipe: Recipe) -> dict[str, Any]:
    """What a file says of how it was made: versions, recipe, source; the source's digest is filled in when it has been read."""
    return {
        "nybble": __version__,
        "numpy": np.__version__,
        "python": platform.python_version(),
        "keep": list(recipe.keep),
        "rules": [list(rule) for rule in recipe.rules],
        "source": source.resolve().name,
        "source_blake3": PLACEHOLDER,
    }


def facts_of(contents: Contents) -> dict[str, Any]:
    """What tells that a source is the same as before, file by file, and that the same program reads it."""
    found: dict[str, Any] = {
        "version of nybble": __version__,
        "config": sha256(repr(sorted(contents.config.items(), key=str)).encode()).hexdigest(),
    }
    for file in contents.files:
        status = file.stat()
        found[f"file {file.name}"] = [status.st_size, status.st_mtime_ns]
    for name, content in sorted(contents.extras.items()):
        found[f"file {name}"] = sha256(content).hexdigest()
    return found


def _stream(job: Job, stream: Stream, work: Work, known: dict[str, Any], pace: _Pace, expected: Forecast) -> int:
    """Make what is missing of a job's output, all but its name; returns how many pieces were damaged."""
    work.hashes = known.get("source_blake3") == PLACEHOLDER
    digests: dict[str, list[str]] = {}

    def watch(name: str, rows: slice | None, note: Any) -> Any:
        if note is None and work.parts is not None:
            cost, found = work.parts.pop((name, rows.start if rows else 0), (NO_COST, None))
            note = (*cost, found)
        work.add(name, _cost(note))
        digests.setdefault(name, []).extend(note[3] or ())
        if name in work.source.floats:
            give_back(work.source_rows(name, rows))
        return note

    def provenance() -> Mapping[str, Any]:
        if not work.hashes:
            return known
        # what nothing is made of (a tied head) has not come by
        found = {
            name: (tag, shape, digests.get(name) or row_digests(work.source.read_float(name)))
            for name, (tag, shape) in work.source.floats.items()
        }
        return {**known, "source_blake3": tensors_digest(work.source.path, found)}

    return run_stream(job, stream, watch, provenance, pace.report, expected.threads, expected.rows_weights)


def _count(job: Job, work: Work) -> None:
    """Take up what a finished job said of its tensors."""
    for record in job.journal.records:
        for key, _, _, note in record.get("pieces", ()):
            work.add(key.partition("[")[0], _cost(note))
    for name, note in notes_of(job.journal):
        work.add(name, _cost(note))


def _cost(note: Any) -> Cost:
    """What a piece's note says of its cost."""
    return bool(note[0]), float(note[1]), float(note[2])


def stay_float(source: str | Path, container: str, recipe: Recipe) -> list[str]:
    """Names of the weights of a float model that a container has as floats whatever the recipe says (tables of tokens in a GPTQ
    folder): they need not be rounded first. Raises UsageError for what it cannot hold, before any work."""
    module = find_container(container)
    contents = open_contents(source)
    packed, schemes, found = {}, {}, []
    for row in make_plan(describe_contents(contents), recipe).packed:
        name, asked = row.tensor.name, parse_format(str(row.format))
        rows, columns = row.tensor.shape
        specs = candidate_specs(module, contents, name, asked, (rows, columns), asked=True)
        if all(parse_format(spec).is_cast for spec in specs) and not asked.is_cast:
            found.append(name)
        packed[name] = str(asked) if str(asked) in specs else specs[0], (rows, columns)
        if row.activations:
            schemes[name] = Activations(row.activations)
    if hasattr(module, "check"):
        others = {name: given for name, given in contents.floats.items() if name not in packed}
        module.check(dataclasses.replace(contents, packed=packed, floats=others, schemes=schemes))
    return found
