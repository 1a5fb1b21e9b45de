"""How a training run goes: everything that its result depends on, beside the model and the text."""

from __future__ import annotations

import json
import math
from dataclasses import asdict, dataclass
from typing import Any

from nybble.errors import UsageError, unknown_name

PRECISIONS = ("fp32", "bf16", "fp16")
OPTIMIZERS = ("adamw", "adamw8bit", "adamw4bit")


@dataclass(frozen=True)
class Settings:
    """Raises UsageError, from `check`, for what cannot be."""

    steps: int
    """Updates of the weights."""
    batch: int = 8
    """Windows of one step, over all processes and passes together."""
    micro: int = 8
    """Windows that one process passes through the model at once; gradients of several passes are summed up to a step."""
    window: int = 256
    """Tokens of a window."""
    learning_rate: float = 1e-3
    """The highest; reached after `warmup` steps, then falling along a cosine to `final` of it."""
    final: float = 0.1
    warmup: int = 20
    weight_decay: float = 0.1
    """Decoupled (AdamW), of matrices; biases and norms have none."""
    beta1: float = 0.9
    beta2: float = 0.95
    clip: float = 1.0
    """Largest norm of all gradients together; 0: none."""
    precision: str = "fp32"
    """Of products and activations: autocast. Weights and states of the optimizer stay as they are."""
    optimizer: str = "adamw"
    wide_embeddings: bool = True
    """Optimizers of few bits keep 32 for embeddings (the stable embedding rule)."""
    gradient_checkpointing: bool = False
    """Compute activations again in the backward pass instead of keeping them."""
    seed: int = 0
    evaluate_every: int = 100
    """Steps between measurements of the held-out loss; 0: only at the end."""
    save_every: int = 100
    """Steps between checkpoints; 0: none before the end."""
    qat: str | None = None
    """Format that weights have in every pass (quantization-aware training), and that the result is saved in."""
    qat_method: str = "rtn"
    """What chooses the codes and scales that it begins with, and what becomes of inputs: a method's spec."""
    qat_scales: str = "fit"
    """`fit`, `fixed` or `learned`, see fake.py."""
    qat_observe: int = 0
    """Steps in which static grids of inputs follow what they see."""
    keep: tuple[str, ...] = ()
    rules: tuple[tuple[str, str], ...] = ()
    """With `qat`, as in a recipe."""
    share: float = 1.0
    """Of the loss that a teacher, where there is one, has."""
    temperature: float = 1.0
    hidden: float = 0.0
    """Weight of the distance between the teacher's and the student's hidden states, added to the loss."""
    shard: bool = False
    """Weights, gradients and states in parts, one with each process (FSDP)."""
    keep_zeros: bool = False
    """Weights of matrices that are zero at the start stay so: training after pruning."""

    def check(self) -> None:
        """Raise UsageError for a value that makes no sense, saying which may be."""
        whole = {"steps": 1, "batch": 1, "micro": 1, "window": 2, "warmup": 0, "seed": 0, "evaluate_every": 0, "save_every": 0}
        whole["qat_observe"] = 0
        for name, least in whole.items():
            value = getattr(self, name)
            if type(value) is not int or not least <= value < 1 << 40:
                raise UsageError(f"{name.replace('_', ' ')} {value!r} must be a whole number from {least} on")
        for name, low, high in (("learning_rate", 0, 100), ("weight_decay", 0, 100), ("clip", 0, 1e9), ("final", 0, 1)):
            value = getattr(self, name)
            if not (isinstance(value, int | float) and math.isfinite(value) and low <= value <= high):
                raise UsageError(f"{name.replace('_', ' ')} {value!r} must lie between {low} and {high}")
        for name in ("beta1", "beta2"):
            if not 0 <= getattr(self, name) < 1:
                raise UsageError(f"{name} {getattr(self, name)!r} must lie between 0 and 1, below 1")
        if self.precision not in PRECISIONS:
            raise unknown_name("precision", self.precision, PRECISIONS)
        if self.optimizer not in OPTIMIZERS:
            raise unknown_name("optimizer", self.optimizer, OPTIMIZERS)
        if self.shard and (self.optimizer != "adamw" or self.precision == "fp16" or self.qat or self.keep_zeros):
            raise UsageError("--shard goes with optimizer adamw and precision fp32 or bf16, without QAT and --keep-zeros")
        if self.qat_observe and self.gradient_checkpointing:
            raise UsageError("gradient checkpointing passes inputs twice, and observers would see them twice: use one of the two")
        if self.warmup > self.steps:
            raise UsageError(f"warmup of {self.warmup} steps is longer than the run of {self.steps}")

    def passes(self, processes: int) -> int:
        """Passes through the model that one process makes for a step. Raises UsageError where the batch cannot be shared so."""
        if self.batch % processes:
            raise UsageError(f"batch of {self.batch} windows cannot be shared by {processes} processes: give a multiple of them")
        mine = self.batch // processes
        if mine > self.micro and mine % self.micro:
            raise UsageError(f"{mine} windows of a process are no multiple of micro {self.micro}")
        return max(1, mine // self.micro)

    def learning_rate_at(self, step: int) -> float:
        """Learning rate of a step, counted from 0: linear warm-up, then half a cosine (Loshchilov and Hutter 2017)."""
        if step < self.warmup:
            return self.learning_rate * (step + 1) / self.warmup
        done = (step - self.warmup) / max(1, self.steps - self.warmup)
        return self.learning_rate * (self.final + (1 - self.final) * 0.5 * (1 + math.cos(math.pi * done)))

    def facts(self) -> dict[str, Any]:
        """What a run that goes on must have in common with the one it goes on from, as JSON has it."""
        facts: dict[str, Any] = json.loads(json.dumps(asdict(self)))
        return facts
