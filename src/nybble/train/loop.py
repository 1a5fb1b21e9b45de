"""The training loop: batches, gradients, steps, measurements, checkpoints."""

from __future__ import annotations

import json
import math
import time
from collections.abc import Callable, Mapping
from contextlib import nullcontext
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch.nn import functional
from torch.nn.parallel import DistributedDataParallel

from nybble.errors import InputError, NumericError
from nybble.files.folder import write_whole
from nybble.models.loading import evaluating
from nybble.train import checkpoints
from nybble.train.data import Text
from nybble.train.fake import scale_parameters
from nybble.train.optimizers import make_optimizer
from nybble.train.precision import computing, multiplying, scaler_of
from nybble.train.settings import Settings
from nybble.train.sharding import full, put_back, shard, whole_states, whole_weights
from nybble.train.world import World

LOG, CHECKPOINTS = "log.jsonl", "checkpoints"
SKIPS = 30
"""Steps in a row that fp16 may skip before a run is given up: its scale has fallen to a millionth of a thousandth by then."""


@dataclass(frozen=True)
class Step:
    """A line of the log."""

    step: int
    """Counted from 1."""
    loss: float
    """Nats per token, of the step's own windows before its update."""
    learning_rate: float
    gradient: float
    """Norm of all gradients together, before they are cut."""
    seconds: float
    scale: float | None = None
    """fp16: what the loss was multiplied by."""
    skipped: bool = False
    """fp16: a gradient overflowed, nothing was changed."""
    held_out: float | None = None
    """Nats per token of the held-out text after the step, where it was measured."""


Loss = Callable[[torch.nn.Module, torch.Tensor], torch.Tensor]
"""Of a model and token ids [B, T], a mean over tokens to take gradients of."""


def language_loss(model: torch.nn.Module, ids: torch.Tensor) -> torch.Tensor:
    """Cross-entropy of each token but the first, given those before it; nats per token, in float32."""
    logits = model(input_ids=ids, use_cache=False).logits
    return functional.cross_entropy(logits[:, :-1].float().flatten(0, 1), ids[:, 1:].flatten())


def held_out_loss(model: torch.nn.Module, windows: NDArray[np.int64], size: int, device: torch.device) -> float:
    """Nats per token of token windows [N, T], `size` of them at a time, in float32."""
    total = 0.0
    with evaluating(model), torch.inference_mode():
        for start in range(0, len(windows), size):
            ids = torch.from_numpy(windows[start : start + size]).to(device)
            total += float(language_loss(model, ids)) * len(ids)
    return total / len(windows)


class Trainer:
    """Trains a model in place. The same run, stopped anywhere and begun again on its folder, gives the same weights."""

    def __init__(
        self,
        model: torch.nn.Module,
        text: Text,
        held_out: NDArray[np.int64],
        settings: Settings,
        folder: Path,
        world: World,
        facts: Mapping[str, Any] | None = None,
        loss: Loss = language_loss,
    ) -> None:
        """`held_out`: windows [N, T] to measure on. `facts`: what else the result depends on; checkpoints of runs with other ones
        are refused. Raises UsageError for settings that cannot be."""
        settings.check()
        self.passes = settings.passes(world.size)
        self.model, self.text, self.held_out = model.to(world.device), text, held_out
        self.settings, self.folder, self.world, self.loss = settings, folder, world, loss
        self.facts = {**settings.facts(), "text": text.sha256, "processes": world.size, **(facts or {})}
        if settings.gradient_checkpointing:
            _checkpoint_activations(model)
        self.plain_class = type(model)
        """As it was before anything was taken apart."""
        self.sharded = settings.shard and world.size > 1
        if self.sharded:
            shard(self.model, world)
        self.optimizer = make_optimizer(model, settings)
        self.scaler = scaler_of(settings.precision, world.device)
        alone = self.sharded or world.size == 1
        self.parallel = self.model if alone else DistributedDataParallel(self.model)
        self.done = 0
        self._kept: list[tuple[torch.nn.Parameter, torch.Tensor]] = []

    def go_on(self) -> int:
        """Take up the newest checkpoint of the folder, if there is one; returns the steps that are done."""
        path = checkpoints.newest(self.folder / CHECKPOINTS)
        if path is None:
            if self.world.first:
                (self.folder / LOG).unlink(missing_ok=True)
            return 0
        standing = checkpoints.load(path, self.facts)
        if self.sharded:
            put_back(self.model, self.optimizer, standing.model, standing.optimizer)
        else:
            self.model.load_state_dict(standing.model, strict=True)
            self.optimizer.load_state_dict(standing.optimizer)
        if standing.scaler:
            self.scaler.load_state_dict(standing.scaler)
        self.done = standing.step
        if self.world.first:
            checkpoints.tidy(self.folder / CHECKPOINTS)
            lines = [line for line in read_log(self.folder) if line.step <= self.done]
            write_whole({self.folder / LOG: "".join(json.dumps(asdict(line)) + "\n" for line in lines).encode()})
        return self.done

    def run(self, watch: Callable[[Step], None] = lambda step: None) -> None:
        """All steps that are left. `watch` sees each. Raises NumericError where the loss is no number any more; the newest
        checkpoint stays. KeyboardInterrupt comes through after a checkpoint of the last whole step."""
        self.folder.mkdir(parents=True, exist_ok=True)
        skipped = 0
        self.model.train()
        if self.settings.keep_zeros:
            scales = {id(p) for p in scale_parameters(self.model)}  # their moves begin at zero too
            matrices = [p for p in self.model.parameters() if p.dim() == 2 and id(p) not in scales]
            self._kept = [(p, (p.detach() != 0).to(p.dtype)) for p in matrices if bool((p == 0).any())]
            if not self._kept:
                raise InputError("no weight of this model is zero, so there are no zeros to keep; prune it first")
        with (self.folder / LOG).open("a", encoding="utf-8") if self.world.first else nullcontext() as log:
            try:
                while self.done < self.settings.steps:
                    step = self._step()
                    skipped = skipped + 1 if step.skipped else 0
                    if skipped > SKIPS:
                        raise NumericError(f"gradients overflowed in {skipped} steps of fp16 in a row; train in bf16 or fp32")
                    if log is not None:
                        log.write(json.dumps(asdict(step)) + "\n")
                        log.flush()
                    watch(step)
                    every = self.settings.save_every
                    if (every and self.done % every == 0) or self.done == self.settings.steps:
                        self.save()
            except KeyboardInterrupt:
                self.save()
                raise

    def save(self) -> None:
        """A checkpoint of where the run stands."""
        weights = self.weights()
        moments = whole_states(self.model, self.optimizer) if self.sharded else self.optimizer.state_dict()
        if self.world.first and self.done:
            standing = checkpoints.Standing(self.done, weights, moments, self.scaler.state_dict())
            checkpoints.save(self.folder / CHECKPOINTS, standing, self.facts)
        self.world.wait()

    def weights(self) -> dict[str, torch.Tensor]:
        """The model's state dict, put together in the first process where it is in parts. All processes call it."""
        return whole_weights(self.model) if self.sharded else dict(self.model.state_dict())

    def evaluate(self) -> float:
        """Nats per token of the held-out windows, in float32."""
        return held_out_loss(self.model, self.held_out, self.settings.micro, self.world.device)

    def _step(self) -> Step:
        began, settings = time.perf_counter(), self.settings
        rate = settings.learning_rate_at(self.done)
        for group in self.optimizer.param_groups:
            group["lr"] = rate
        loss = self.world.mean(self._gradients())
        self.scaler.unscale_(self.optimizer)
        for parameter, kept in self._kept:
            if parameter.grad is not None:
                parameter.grad.mul_(kept)
        norm = full(torch.nn.utils.clip_grad_norm_(self.model.parameters(), settings.clip or math.inf))
        scale = float(self.scaler.get_scale()) if self.scaler.is_enabled() else None
        if scale is None and not (math.isfinite(loss) and math.isfinite(norm)):
            raise NumericError(
                f"step {self.done + 1}: loss {loss:g}, gradient norm {norm:g}; the run has diverged: lower the learning rate "
                f"({rate:g}) or its warm-up's slope; checkpoints of before are kept"
            )
        self.scaler.step(self.optimizer)
        self.scaler.update()
        with torch.no_grad():
            for parameter, kept in self._kept:
                parameter.mul_(kept)
        self.optimizer.zero_grad(set_to_none=True)
        self.done += 1
        skipped = scale is not None and self.scaler.get_scale() < scale
        seconds, every = time.perf_counter() - began, settings.evaluate_every
        measured = self.done == settings.steps or (every and self.done % every == 0)
        held_out = self.evaluate() if measured and len(self.held_out) else None
        return Step(self.done, loss, rate, norm, seconds, scale, skipped, held_out)

    def _gradients(self) -> float:
        """Gradients of this process's share of the step's windows; returns their mean loss."""
        windows = self.text.batch(self.done, self.settings.batch)[self.world.rank :: self.world.size]
        # What drops out depends on the step alone: a run that goes on has no generator to restore, in any process.
        torch.manual_seed((self.settings.seed * 1_000_003 + self.done) * self.world.size + self.world.rank)
        parts = np.array_split(windows, self.passes)
        total = 0.0
        for i, part in enumerate(parts):
            ids = torch.from_numpy(part).to(self.world.device)
            alone = self.world.size > 1 and i + 1 < len(parts)  # only the last pass meets the other processes
            precision, device = self.settings.precision, self.world.device
            with self.parallel.no_sync() if alone else nullcontext(), multiplying(precision, device):  # type: ignore[operator]
                with computing(precision, device):
                    loss = self.loss(self.parallel, ids) / len(parts)
                self.scaler.scale(loss).backward()
            total += float(loss.detach())
        return total


def _checkpoint_activations(model: Any) -> None:
    """transformers 5.6 renamed the method and warns of the old name."""
    enable = getattr(model, "activation_checkpointing_enable", None) or model.gradient_checkpointing_enable
    enable({"use_reentrant": False})


def read_log(folder: Path) -> list[Step]:
    """The log of a run so far; a last line that was cut off is left out."""
    found = []
    path = folder / LOG
    for line in path.read_text(encoding="utf-8").splitlines() if path.exists() else []:
        try:
            found.append(Step(**json.loads(line)))
        except (ValueError, TypeError):
            break
    return found
