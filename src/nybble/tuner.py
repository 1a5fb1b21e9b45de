"""Tuning on a model in the middle of a walk: a block by itself, or all weights together, and what is kept of that on its way.

methods/steps/tuning.py is the loop; here are the losses it goes down, and where its values are put.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field

import numpy as np
import torch
from torch import Tensor, nn

from nybble.calibrate.blocks import Blocks
from nybble.calibrate.predictions import Predictions
from nybble.calibrate.states import States
from nybble.calibrate.workers import Workers
from nybble.files.safetensors import SafetensorsFile, forget_pages
from nybble.finished import FinishedBlocks
from nybble.formats import QTensor
from nybble.methods.steps.latent import FloatLatent, Latent, Sign
from nybble.methods.steps.settings import Settings
from nybble.methods.steps.tuning import Pace, Standing, tune
from nybble.models.float_weights import put_weight, turned

TUNING = "tuning"
PATIENCE = 20
"""What is kept of a tuning is kept again after so many times as long as keeping it took."""

History = list[tuple[int, float]]
"""(step, loss on the windows held back)."""


@dataclass
class Tuner:
    """The weights of a model that are tuned."""

    model: nn.Module
    layers: Mapping[str, nn.Module]
    """Weight name -> the module that owns it."""
    settings: Settings
    windows: int
    workers: Workers
    report: Callable[[str, int, int], None]
    latents: dict[str, Latent] = field(default_factory=dict)
    """Weights that are decided and will be tuned."""

    def block(
        self, blocks: Blocks, index: int, inputs: States, aims: States, tensors: Mapping[str, QTensor]
    ) -> tuple[dict[str, QTensor | Tensor], History]:
        """Tune weights of one block, `tensors` as they were decided, so that what it makes of `inputs` comes near what the float
        block makes of its own. Returns the best, which is in its place."""
        signed = {name: self.latents[name].again(tensor, Sign) for name, tensor in tensors.items() if name in self.latents}
        stride = 1 / self.settings.block_tune  # half a level in all, as SignRound has it
        pace = Pace(self.settings.block_tune, stride, stride, self.settings.batch, self.settings.seed)

        def slope(leaves: dict[str, Tensor], indices: list[int]) -> dict[str, Tensor]:
            values = list(leaves.values())
            found = self.workers.mean_tensors(lambda w: blocks.slope(index, inputs[w], aims[w], values), indices)
            return dict(zip(leaves, found, strict=True))

        def loss(indices: Sequence[int]) -> float:
            def one(w: int) -> float:
                return float((blocks.run(index, inputs[w]) - aims[w]).float().square().mean())

            return self.workers.mean(one, indices)

        best, history = self._tune(dict(signed), pace, slope, loss, f"tuning {blocks.prefix}.{index}, error")
        for name, latent in signed.items():
            value = best[name]
            assert isinstance(value, QTensor)
            self.latents[name] = latent.again(value)
        return best, history

    def together(self, predictions: Predictions, finished: FinishedBlocks | None) -> tuple[dict[str, QTensor | Tensor], History]:
        """Tune all weights together, and norms and biases where the method has it so; what is kept on the way is among the
        blocks. Returns the best, which is in its place."""
        settings = self.settings
        latents: dict[str, Latent | FloatLatent] = dict(self.latents)
        if settings.norms:
            # one number a channel, none of them in what is rounded or looked up
            found = {name: value for name, value in self.model.named_parameters() if value.dim() == 1}
            latents |= {name: FloatLatent(value) for name, value in found.items()}
        pace = Pace(settings.tune, settings.travel, settings.gain, settings.batch, settings.seed)
        keeper = None if finished is None else KeptTuning(finished)
        return self._tune(latents, pace, predictions.slope, predictions.mean_loss, "tuning, KL", keeper)

    def _tune(
        self,
        latents: Mapping[str, Latent | FloatLatent],
        pace: Pace,
        slope: Callable[[dict[str, Tensor], list[int]], dict[str, Tensor]],
        loss: Callable[[Sequence[int]], float],
        what: str,
        keeper: KeptTuning | None = None,
    ) -> tuple[dict[str, QTensor | Tensor], History]:
        """Tune. `slope(leaves, windows)`: the loss's gradient by parameters of the model, by name."""
        leaves: dict[str, Tensor] = {}
        for name, latent in latents.items():
            parameter = (
                self.model.get_parameter(name) if isinstance(latent, FloatLatent) else self.layers[name]._parameters["weight"]
            )
            assert parameter is not None
            leaves[name] = parameter.requires_grad_(True)

        def slopes(indices: list[int]) -> dict[str, Tensor]:
            found = slope(leaves, indices)
            return {name: turned(self.layers[name], each) if name in self.layers else each for name, each in found.items()}

        def show(name: str, value: Tensor) -> None:
            if name in self.layers:
                put_weight(self.layers[name], value.numpy())
            else:
                leaves[name].data.copy_(value)

        def report(so_far: float, step: int, steps: int) -> None:
            self.report(f"{what} {so_far:.3g}", step, steps)

        best, history = tune(latents, pace, self.windows, slopes, loss, show, self.workers.each, report, keeper)
        for name, value in best.items():
            leaves[name].requires_grad_(False)
            show(name, torch.from_numpy(value.decode()) if isinstance(value, QTensor) else value)
        return best, history


class KeptTuning:
    """How far a tuning is, on disk among the blocks of a job, so that one that was stopped goes on."""

    def __init__(self, finished: FinishedBlocks) -> None:
        self._finished = finished
        self._due = time.monotonic()

    def find(self) -> Standing | None:
        """The last one that is what was written; None where there is none."""
        for step in reversed(self._finished.numbers(TUNING)):
            if self._finished.path(TUNING, step).exists():  # else a later one took its place
                found = self._finished.find_arrays(TUNING, step)
                if found is not None:
                    return Standing(step, [(at, loss) for at, loss in found[0]], _Stored(found[1]))
        return None

    def due(self) -> bool:
        """Whether it is time to keep one again: keeping takes a small share of the time."""
        return time.monotonic() >= self._due

    def keep(self, standing: Standing) -> None:
        """Keep one in place of the last. Raises OutputError."""
        began = time.monotonic()
        arrays = {name: value.numpy() for name, value in standing.tensors.items()}
        self._finished.keep_arrays(TUNING, standing.step, arrays, standing.history)
        for step in self._finished.numbers(TUNING):
            if step != standing.step:
                self._finished.path(TUNING, step).unlink(missing_ok=True)
        now = time.monotonic()
        self._due = now + PATIENCE * (now - began)


class _Stored(Mapping[str, Tensor]):
    """A file's arrays, each read when it is asked for: together they are larger than the model."""

    def __init__(self, file: SafetensorsFile) -> None:
        self._file = file

    def __getitem__(self, name: str) -> Tensor:
        found = torch.from_numpy(np.array(self._file.read(name)))
        forget_pages()
        return found

    def __iter__(self) -> Iterator[str]:
        return iter(self._file.entries)

    def __len__(self) -> int:
        return len(self._file.entries)
