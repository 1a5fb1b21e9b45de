"""Optimizers by name."""

from __future__ import annotations

from typing import Any

import torch

from nybble.train.adam import Adam8bit, groups_of
from nybble.train.fake import scale_parameters
from nybble.train.settings import Settings

BITS = {"adamw8bit": 8, "adamw4bit": 4}


def make_optimizer(model: torch.nn.Module, settings: Settings) -> torch.optim.Optimizer:
    """The optimizer that settings name: weight decay for matrices, none for biases, norms and the scales that are learned."""
    groups = groups_of(model, settings.weight_decay, wide=settings.wide_embeddings)
    scales = {id(p) for p in scale_parameters(model)}
    for group in groups:
        group["params"] = [p for p in group["params"] if id(p) not in scales]
    if scales:
        groups.append({"params": scale_parameters(model), "weight_decay": 0.0})
    used: list[dict[str, Any]] = [group for group in groups if group["params"]]
    arguments: dict[str, Any] = {"lr": settings.learning_rate, "betas": (settings.beta1, settings.beta2), "eps": 1e-8}
    if settings.optimizer in BITS:
        return Adam8bit(used, **arguments, bits=BITS[settings.optimizer])
    for group in used:
        group.pop("wide", None)
    return torch.optim.AdamW(used, **arguments)
