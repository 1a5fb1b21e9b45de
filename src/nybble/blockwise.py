"""A calibrated method from a model folder to a file, as a job that goes on after it was stopped.

Most methods need one block at a time: its weights are read from the checkpoint, what is decided of it goes to disk, and the
output is written from there, so that neither the float model nor the packed one is ever held. Tuning all layers together holds
it, as `run.quantize` does.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from hashlib import sha256
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray
from torch import nn

from nybble.calibrate.importance import check_windows
from nybble.calibrate.source import SELF
from nybble.calibrate.windows import CALIBRATION_LENGTH
from nybble.containers import Contents, open_contents
from nybble.convert import Conversion, convert, facts_of, streams
from nybble.converting import Progress
from nybble.edits import EDITS
from nybble.errors import BlocksError, NumericError
from nybble.files.job import BLOCKS, Job, how_to_go_on, open_job
from nybble.finished import BLOCK, FinishedBlocks
from nybble.forecast import resident
from nybble.formats import QTensor, parse_format
from nybble.formats.activations import Activations
from nybble.methods import Method
from nybble.methods.steps.choose import Account
from nybble.models.checkpoint import open_checkpoint
from nybble.models.describe import describe
from nybble.models.loading import context_length, empty_model, evaluating, load_model
from nybble.models.shelf import FileShelf, shelved_model
from nybble.observing import static_grids
from nybble.plan import Plan, PlanRow, Recipe, make_plan, prunes
from nybble.run import done_by, draw_windows, provenance_of, quantize, seeded, walk, windows_of
from nybble.tuner import TUNING
from nybble.walk import FISHER, Walk
from nybble.walk_forecast import WalkForecast, check_whole, forecast_walk


@dataclass(frozen=True)
class Calibration:
    """Which windows a method looks at."""

    texts: str | Sequence[str]
    """Texts, or "self": the model writes them."""
    windows: int
    """At most so many."""
    window: int | None
    """Tokens of one; None: the model's context, at most 2048."""
    packing: bool
    """Texts are joined; else each window lies in one of them."""
    seed: int
    """Of which windows are drawn, and of what a method draws."""


@dataclass(frozen=True)
class Made:
    """What came of it."""

    conversion: Conversion
    accounts: Mapping[str, Account]
    """What the method did to each weight."""


def quantize_folder(
    source: Path,
    target: Path,
    container: str,
    recipe: Recipe,
    calibration: Calibration,
    options: Mapping[str, str],
    restart: bool = False,
    memory: int | None = None,
    threads: int | None = None,
    announce: Callable[[str], None] = lambda remark: None,
    progress: Progress = lambda what, done, total: None,
) -> Made | None:
    """Quantize a checkpoint's folder by a calibrated method and write a container, `options` its own; what has the target's name
    is replaced. None where an earlier run had finished all but the tidying up.

    A run that was stopped goes on with the same arguments; `restart` forgets it. `memory` limits the bytes that this process
    holds, `threads` how many work; neither changes what is made. `announce` is told what it will take before the work, and what
    an earlier run left, if any. Raises as `run.quantize`, `forecast_walk` and `convert`.
    """
    standing = resident()
    facts = {
        "format": recipe.format,
        "method": recipe.method,
        "choice of weights": [list(recipe.keep), [list(rule) for rule in recipe.rules]],
        "container": [container, dict(options)],
        "calibration text": sha256("".join(calibration.texts).encode()).hexdigest(),
        "choice of windows": [calibration.windows, calibration.window, not calibration.packing, calibration.seed],
        **facts_of(open_contents(source)),
    }

    def foresee(model: nn.Module, plan: Plan, method: Method, shape: tuple[int, int], held: bool) -> WalkForecast:
        if calibration.texts == SELF:
            check_whole(model, standing, memory)
        reads, apart = open_checkpoint(source).bytes, not streams(container)
        found = forecast_walk(model, plan, method, shape, target, reads, standing, memory, threads, held, apart)
        announce(str(found))
        return found

    try:
        with open_job(target, facts, restart) as job:
            if job.published:
                return None
            finished = FinishedBlocks(job.folder / BLOCKS, job.journal)
            if job.begun:
                announce(f"going on with what is in {job.folder}{_told(finished)}")
            progress("loading the model", 0, 1)
            contents, accounts = _quantized(source, recipe, calibration, finished, job, foresee, progress)
            if finished.damaged:
                announce(f"{finished.damaged} blocks were not what had been written; they were made again")
            writing = _named("writing", progress)
            done = convert(
                contents, job.place, container, options=options, force=True, progress=writing, measures=container != "nybble"
            )
            job.publish()
            return Made(dataclasses.replace(done, path=target), accounts)
    except BaseException as error:
        if (remark := how_to_go_on(target, error)) is not None:
            announce(remark)
        raise


def goes_apart(method: Method, plan: Plan) -> bool:
    """Whether a method needs no more than one block of a model at a time."""
    settings = method.settings
    bits = [parse_format(row.format or "").bits for row in plan.packed if row.method != "cast"]
    walks = settings.walks or settings.activations == "static"
    return walks and not settings.tunes_together(bits) and not plan.is_cast


def _quantized(
    source: Path,
    recipe: Recipe,
    calibration: Calibration,
    finished: FinishedBlocks,
    job: Job,
    foresee: Callable[[nn.Module, Plan, Method, tuple[int, int], bool], WalkForecast],
    progress: Progress,
) -> tuple[Contents, Mapping[str, Account]]:
    checkpoint = open_checkpoint(source)
    method = seeded(recipe.method, calibration.seed)
    recipe = dataclasses.replace(recipe, method=str(method))
    shelved = shelved_model(checkpoint)
    model, shelf = shelved or (empty_model(source), None)
    plan = make_plan(describe(model, checkpoint.float_tag), recipe)
    length = calibration.window or min(context_length(model), CALIBRATION_LENGTH)
    if shelf is None or not goes_apart(method, plan):
        foresee(model, plan, method, (calibration.windows, length), True)
        return _held(source, recipe, calibration, finished, progress)
    writer, expected = model, None
    if calibration.texts == SELF:
        expected = foresee(model, plan, method, (calibration.windows, length), False)
        writer = load_model(source)
    with evaluating(writer):
        windows = draw_windows(
            writer,
            plan,
            calibration.texts,
            source,
            calibration.windows,
            calibration.window,
            calibration.seed,
            calibration.packing,
            progress,
        )
    del writer
    assert windows is not None, "a method that goes block by block reads calibration text"
    check_windows(model, windows)
    expected = expected or foresee(model, plan, method, (len(windows), windows.shape[1]), False)
    provenance = {**provenance_of(plan, source), "calibration": windows_of(windows)}
    scratch = None
    if expected.on_disk:
        scratch = job.folder / BLOCKS
        scratch.mkdir(exist_ok=True)
    walked, grids = None, dict[str, Activations]()
    try:
        if method.settings.walks:
            walked = walk(model, plan, windows, progress, None, finished, shelf, scratch, expected.threads)
            provenance |= done_by(walked)
        made = _Made(plan, method, shelf, finished, walked)
        if method.settings.activations == "static":
            moved = {} if walked is None else walked.moved
            grids = static_grids(
                *(model, plan, method.settings, windows, made.packed, moved),
                *(shelf, scratch, expected.threads, progress),
            )
    except BlocksError:
        if method.settings.blockwise:
            raise
        return _held(source, recipe, calibration, finished, progress)
    return made.contents(open_contents(source), grids, provenance), {} if walked is None else walked.accounts


def _held(
    source: Path, recipe: Recipe, calibration: Calibration, finished: FinishedBlocks, progress: Progress
) -> tuple[Contents, Mapping[str, Account]]:
    quantized = quantize(
        source,
        recipe.format,
        recipe.method,
        calibration.texts,
        recipe.keep,
        recipe.rules,
        progress=progress,
        windows=calibration.windows,
        window=calibration.window,
        seed=calibration.seed,
        packing=calibration.packing,
        finished=finished,
    )
    return quantized.contents(), quantized.accounts


class _Made:
    """What a walk made of a checkpoint, read from where that lies."""

    def __init__(self, plan: Plan, method: Method, shelf: FileShelf, finished: FinishedBlocks, walked: Walk | None) -> None:
        self._plan, self._method, self._shelf, self._finished = plan, method, shelf, finished
        self._rows: dict[str, PlanRow] = {row.tensor.name: row for row in plan.packed}
        became = {} if walked is None else {**walked.edited, **walked.moved}
        self._changed: dict[str, NDArray[np.float32]] = {name: value.numpy() for name, value in became.items()}

    def packed(self, name: str) -> QTensor:
        """A packed weight, its inputs as they come."""
        return self._finished.read(name) if name in self._finished else self._rounded(self._rows[name])

    def contents(self, source: Contents, grids: Mapping[str, Activations], provenance: Mapping[str, Any]) -> Contents:
        """All of it as a container takes it; `grids` are the static ones."""
        outliers = self._method.settings.threshold
        schemes = {
            name: Activations(str(row.activations), threshold=outliers if row.activations == "outliers" else 0.0)
            for name, row in self._rows.items()
            if row.activations
        } | dict(grids)
        floats = {}
        for tensor in (row.tensor for row in self._plan.rows if row.format is None):
            tag, stored = self._shelf.stored(tensor.name)
            floats[tensor.name] = "F32" if tensor.name in self._changed else tag, tuple(stored.shape)
        return dataclasses.replace(
            source,
            container="nybble",
            packed={name: (str(row.format), (row.tensor.shape[0], row.tensor.shape[1])) for name, row in self._rows.items()},
            floats=floats,
            read_packed=lambda name: dataclasses.replace(self.packed(name), activations=schemes.get(name)),
            read_float=lambda name: self._changed[name] if name in self._changed else self._shelf.stored(name)[1],
            schemes=schemes,
            provenance=provenance,
        )

    def _rounded(self, row: PlanRow) -> QTensor:
        """A weight that no walk decides."""
        name = row.tensor.name
        weight = self._changed[name] if name in self._changed else self._shelf.float32(name)
        if row.tensor.kind == "conv1d":
            weight = np.ascontiguousarray(weight.T)
        try:
            return self._method.quantize(weight, parse_format(str(row.format)), prune=prunes(row))
        except NumericError as error:
            raise NumericError(f"{name}: {error}") from error


def _told(finished: FinishedBlocks) -> str:
    """How far an earlier run came, as far as it said."""
    counts = {
        "blocks edited": len(finished.numbers(EDITS)),
        "windows weighed": len(finished.numbers(FISHER)),
        "blocks and other weights decided": len(finished.numbers(BLOCK)),
        "steps of tuning": max(finished.numbers(TUNING), default=0),
    }
    said = ", ".join(f"{count} {what}" for what, count in counts.items() if count)
    return f": {said}" if said else ""


def _named(what: str, progress: Progress) -> Progress:
    return lambda _, done, total: progress(what, done, total)
