"""One training run, from text to a folder that transformers and all of nybble open."""

from __future__ import annotations

import hashlib
import json
import shutil
from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

from nybble.calibrate.windows import calibration_windows, token_windows
from nybble.errors import InputError, OutputError, UsageError
from nybble.files.folder import write_whole, writing
from nybble.files.job import new_folder
from nybble.methods import parse_method
from nybble.models.loading import quiet
from nybble.plan import Plan, Recipe
from nybble.quantized import Quantized
from nybble.train import checkpoints
from nybble.train.data import Text, hold_back, join_tokens
from nybble.train.distill import check_teacher, distillation_loss
from nybble.train.loop import CHECKPOINTS, LOG, Loss, Step, Trainer, held_out_loss, language_loss, read_log
from nybble.train.qat import Beginning, convert, prepare_from
from nybble.train.settings import Settings
from nybble.train.start import Start
from nybble.train.world import World
from nybble.version import __version__

TRAINING = "training"
"""Folder inside the output: log, checkpoints, report."""
RUN = "run.json"
HELD_OUT_WINDOWS = 64
MODEL_FILES = ("model.safetensors", "config.json", "generation_config.json", "tokenizer.json", "tokenizer_config.json")


@dataclass(frozen=True)
class Trained:
    """What came of a run."""

    folder: Path
    steps: list[Step]
    before: float
    """Held-out loss of the model that training began with, nats per token."""
    rounded: float | None
    """The same with its weights rounded (by QAT's method), before the first step, where they are trained so."""
    after: float
    tokens: int
    """Of the text that was learnt from."""
    parameters: int


def check_folder(output: Path) -> None:
    """Raise OutputError where a run cannot be written, or where something else is there already. Changes nothing."""
    if output.exists() and not output.is_dir():
        raise OutputError(f"output {output} is a file; name a folder")
    if output.is_dir() and any(output.iterdir()) and not (output / TRAINING / RUN).is_file():
        raise OutputError(f"output folder {output} holds something else than a training run; name another")


def _make_folder(output: Path, restart: bool) -> None:
    """The folder of a run; with `restart` what an earlier one left goes away. Called when nothing can be wrong any more."""
    if restart:
        shutil.rmtree(output / TRAINING, ignore_errors=True)
        for name in MODEL_FILES:
            (output / name).unlink(missing_ok=True)
    (output / TRAINING).mkdir(parents=True, exist_ok=True)
    for cut_off in (output / TRAINING).glob(".*.part"):  # files that a killed process was writing
        cut_off.unlink()
    (output / TRAINING / RUN).touch()


def train(
    start: Start,
    documents: list[str],
    held_out: list[str] | None,
    settings: Settings,
    output: Path,
    world: World,
    teacher: Any = None,
    watch: Callable[[Step], None] = lambda step: None,
    begun: Callable[[Trainer, int], None] = lambda trainer, done: None,
    restart: bool = False,
    progress: Callable[[str, int, int], None] | None = None,
) -> Trained:
    """Train a model and save it in `output`; a run that is there goes on where it stopped.

    `held_out` is measured on; without it every twentieth document (or the end of each) is held back. `begun` is told the steps
    that are done before any further, `progress` how far a method is that chooses where QAT begins. With `restart` a run that is
    there is forgotten, once nothing can be wrong any more. Raises
    UsageError, InputError, NumericError, OutputError.
    """
    if settings.window > start.context:
        raise UsageError(f"window of {settings.window} tokens is longer than the model's context of {start.context}")
    if held_out is None:
        documents, held_out = hold_back(documents)
    text = Text(join_tokens(start.tokenizer, documents, start.end), settings.window, settings.seed)
    windows = _windows(start, held_out, settings.window)
    training = output / TRAINING
    facts: dict[str, Any] = {"model": start.name, "weights": _digest(start.model)}
    facts["held_out_text"] = hashlib.sha256(windows.tobytes()).hexdigest()
    loss: Loss = language_loss
    if teacher is not None:
        check_teacher(teacher, start.model, settings.hidden > 0)
        facts["teacher"] = _digest(teacher)
        loss = distillation_loss(teacher.to(world.device), settings.share, settings.temperature, settings.hidden)
    settings.check()
    settings.passes(world.size)
    check_folder(output)
    checkpoints.check_room(training / CHECKPOINTS, sum(p.numel() for p in start.model.parameters()), settings.optimizer)
    start.model.to(world.device)
    measure = partial(held_out_loss, start.model, windows, settings.micro, world.device)
    known = {} if restart else _known(training, facts, settings)
    before = known.get("before") or measure()
    restored = not restart and checkpoints.newest(training / CHECKPOINTS) is not None
    begin = None if settings.qat is None else _beginning(start, text, settings, world, restored)
    plan = None if begin is None else prepare_from(start.model.cpu(), begin, progress)  # methods work on the CPU
    start.model.to(world.device)
    rounded = (known.get("rounded") or measure()) if plan else None
    with writing(output):
        world.wait()
        if world.first:
            _make_folder(output, restart)
        world.wait()
        trainer = Trainer(start.model, text, windows, settings, training, world, facts, loss)
        done = trainer.go_on()  # refuses a run that is there and is another
        if world.first:
            told = {"facts": facts, "settings": settings.facts(), "before": before, "rounded": rounded}
            write_whole({training / RUN: json.dumps(told, indent=1).encode()})
        begun(trainer, done)
        trainer.run(watch)
        steps = read_log(training)
        parameters = sum(p.numel() for p in start.model.parameters())
        weights = trainer.weights()
        if world.first and plan:
            _save_packed(start, output, plan)
        elif world.first:
            save(start if not trainer.sharded else _in_one_piece(start, trainer.plain_class, weights), output)
    after = next((step.held_out for step in reversed(steps) if step.held_out is not None), float("nan"))
    return Trained(output, steps, before, rounded, after, len(text.ids), parameters)


def _beginning(start: Start, text: Text, settings: Settings, world: World, restored: bool) -> Beginning:
    """Where QAT begins: its method, calibrated on windows of the text that is learnt from."""
    recipe = Recipe(str(settings.qat), settings.qat_method, settings.keep, settings.rules)
    windows = None
    if parse_method(settings.qat_method).uses_calibration and not restored:
        windows = calibration_windows(text.ids.astype(np.int64), start.context, seed=settings.seed)
    observe = settings.qat_observe * settings.passes(world.size)
    return Beginning(recipe, settings.qat_scales, windows, observe, restored)


def _in_one_piece(start: Start, kind: type[Any], weights: dict[str, torch.Tensor]) -> Start:
    """The model whose parts all processes hold."""
    model = kind(start.model.config)
    model.load_state_dict(weights)
    model.tie_weights()
    model.generation_config = start.model.generation_config
    return replace(start, model=model)


def _save_packed(start: Start, output: Path, plan: Plan) -> None:
    """Convert a model that was trained with rounded weights, and put it into the output folder."""
    convert(start.model.cpu())
    provenance = {
        "nybble": __version__,
        "torch": torch.__version__,
        "format": plan.recipe.format,
        "method": plan.recipe.method,
        "trained": "qat",
        "keep": list(plan.recipe.keep),
        "rules": [list(rule) for rule in plan.recipe.rules],
        "plan_hash": plan.hash,
        "bits_per_weight": round(plan.bpw, 6),
        "source": Path(start.name).name,
    }
    made = output / TRAINING / "model"
    Quantized(start.model.eval(), plan.hash, None, provenance, None).save(made, force=True)
    with quiet():
        start.tokenizer.save_pretrained(made)
    _put(made, output)


def save(start: Start, output: Path) -> None:
    """Put model and tokenizer into the output folder. Raises OutputError."""
    made = output / TRAINING / "model"
    with new_folder(made, force=True, marker="config.json") as work, quiet():
        start.model.save_pretrained(work, max_shard_size="100GB")
        start.tokenizer.save_pretrained(work)
    _put(made, output)


def _put(made: Path, output: Path) -> None:
    """Move files where they belong, each whole, config.json last: without it the folder is no model."""
    (output / "config.json").unlink(missing_ok=True)
    for path in sorted(made.iterdir(), key=lambda p: p.name == "config.json"):
        path.replace(output / path.name)
    made.rmdir()


def _known(training: Path, facts: dict[str, Any], settings: Settings) -> dict[str, Any]:
    """What an earlier go of the same run measured before its first step."""
    try:
        known = json.loads((training / RUN).read_text(encoding="utf-8") or "{}")
        return known if (known.get("facts"), known.get("settings")) == (facts, settings.facts()) else {}
    except (OSError, ValueError, AttributeError):
        return {}


def _windows(start: Start, documents: list[str], window: int) -> NDArray[np.int64]:
    try:
        ids = join_tokens(start.tokenizer, documents, start.end)
        return token_windows(ids.astype(np.int64), window, HELD_OUT_WINDOWS).ids
    except InputError as error:
        raise InputError(f"held-out text: {error}") from error


def _digest(model: torch.nn.Module) -> str:
    digest = hashlib.sha256()
    for name, tensor in sorted(model.state_dict().items()):
        digest.update(name.encode())
        digest.update(tensor.detach().cpu().contiguous().view(torch.uint8).numpy().tobytes() if tensor.numel() else b"")
    return digest.hexdigest()


__all__ = ["CHECKPOINTS", "LOG", "TRAINING", "Trained", "check_folder", "save", "train"]
