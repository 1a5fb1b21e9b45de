"""Distillation: a student learns what a teacher would say of each token, not only which one came (Hinton et al. 2015)."""

from __future__ import annotations

import copy
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional

from nybble.errors import InputError, UsageError
from nybble.train.loop import Loss, language_loss


def distillation_loss(teacher: nn.Module, share: float = 1.0, temperature: float = 1.0) -> Loss:
    """`share` * KL(teacher || student) * temperature^2 + (1 - share) * cross-entropy, nats per token; the teacher stays as it is.

    Raises UsageError for a share or temperature out of range.
    """
    if not (0 < share <= 1 and 0 < temperature <= 100):
        raise UsageError(f"distillation with share {share:g} and temperature {temperature:g}: give 0 to 1, and up to 100")
    teacher.eval().requires_grad_(False)

    def loss(model: nn.Module, ids: Tensor) -> Tensor:
        with torch.no_grad():
            wanted = functional.log_softmax(teacher(input_ids=ids, use_cache=False).logits.float() / temperature, -1)
        logits = model(input_ids=ids, use_cache=False).logits.float()
        found = functional.log_softmax(logits / temperature, -1)
        # The last position is another token's, as in cross-entropy; a teacher has something to say of it too.
        divergence = functional.kl_div(found, wanted, log_target=True, reduction="none").sum(-1).mean() * temperature**2
        if share == 1:
            return divergence
        truth = functional.cross_entropy(logits[:, :-1].flatten(0, 1), ids[:, 1:].flatten())
        return share * divergence + (1 - share) * truth

    return loss


def check_teacher(teacher: Any, student: Any) -> None:
    """Raise InputError where two models do not speak of the same tokens."""
    ours, theirs = student.config.get_text_config().vocab_size, teacher.config.get_text_config().vocab_size
    if ours != theirs:
        raise InputError(f"the teacher has {theirs:,} tokens, the student {ours:,}; they must share a tokenizer")


def fewer_layers(model: Any, layers: int) -> Any:
    """A new model with `layers` of a model's blocks, spread evenly, the first and the last among them, and all the rest as it is
    (Sanh et al. 2019 begin DistilBERT so). Raises UsageError for more than there are, InputError where blocks are not found."""
    blocks = _blocks(model)
    if not 1 <= layers <= len(blocks):
        raise UsageError(f"{layers} layers of {len(blocks)}: give 1 to {len(blocks)}")
    kept = [round(i * (len(blocks) - 1) / max(1, layers - 1)) for i in range(layers)]
    config = copy.deepcopy(model.config)
    key = next((key for key in ("n_layer", "num_hidden_layers", "num_layers") if hasattr(config, key)), None)
    if key is None:
        raise InputError(f"the config of {type(model).__name__} does not say how many layers it has")
    setattr(config, key, layers)
    if getattr(config, "layer_types", None):
        config.layer_types = [config.layer_types[i] for i in kept]
    with torch.random.fork_rng(devices=[]):
        student = type(model)(config)
    student.load_state_dict(model.state_dict(), strict=False)
    for i, block in enumerate(_blocks(student)):
        block.load_state_dict(blocks[kept[i]].state_dict())
    student.generation_config = model.generation_config
    return student


def _blocks(model: nn.Module) -> nn.ModuleList:
    found = [module for module in model.modules() if isinstance(module, nn.ModuleList) and len(module) > 0]
    if not found:
        raise InputError(f"{type(model).__name__} has no list of blocks")
    return max(found, key=lambda module: sum(p.numel() for p in module.parameters()))


__all__ = ["check_teacher", "distillation_loss", "fewer_layers", "language_loss"]
