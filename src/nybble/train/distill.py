"""Distillation: a student learns what a teacher would say of each token, not only which one came (Hinton et al. 2015)."""

from __future__ import annotations

import copy
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional

from nybble.errors import InputError, UsageError
from nybble.train.blocks import blocks_of
from nybble.train.loop import Loss, language_loss


def distillation_loss(teacher: nn.Module, share: float = 1.0, temperature: float = 1.0, hidden: float = 0.0) -> Loss:
    """`share` * KL(teacher || student) * temperature^2 + (1 - share) * cross-entropy, nats per token, + `hidden` * distance of
    the hidden states; the teacher stays as it is.

    The distance is the mean of 1 - cosine over tokens and the student's blocks, each beside the teacher's block as deep in it
    (Sanh et al. 2019, section 3). Raises UsageError for numbers out of range.
    """
    if not (0 < share <= 1 and 0 < temperature <= 100 and 0 <= hidden <= 1000):
        raise UsageError(
            f"distillation with share {share:g}, temperature {temperature:g} and hidden {hidden:g}: give 0 to 1, up to 100, "
            "and up to 1000"
        )
    teacher.eval().requires_grad_(False)

    def loss(model: nn.Module, ids: Tensor) -> Tensor:
        more = {"output_hidden_states": True} if hidden else {}
        with torch.no_grad():
            theirs = teacher(input_ids=ids, use_cache=False, **more)
            wanted = functional.log_softmax(theirs.logits.float() / temperature, -1)
        ours = model(input_ids=ids, use_cache=False, **more)
        logits = ours.logits.float()
        found = functional.log_softmax(logits / temperature, -1)
        # The last position is another token's, as in cross-entropy; a teacher has something to say of it too.
        divergence = functional.kl_div(found, wanted, log_target=True, reduction="none").sum(-1).mean() * temperature**2
        if hidden:
            divergence = divergence + hidden / share * hidden_distance(ours.hidden_states, theirs.hidden_states)
        if share == 1:
            return divergence
        truth = functional.cross_entropy(logits[:, :-1].flatten(0, 1), ids[:, 1:].flatten())
        return share * divergence + (1 - share) * truth

    return loss


def hidden_distance(ours: Sequence[Tensor], theirs: Sequence[Tensor]) -> Tensor:
    """Mean of 1 - cosine of states [B, T, width], those of the embedding and of each block; of theirs those as deep. The
    embedding's are left out."""
    last, deepest = len(ours) - 1, len(theirs) - 1
    total = ours[0].new_zeros(())
    for i in range(1, last + 1):
        beside = theirs[round(i * deepest / last)]
        total = total + (1 - functional.cosine_similarity(ours[i].float(), beside.float(), dim=-1)).mean()
    return total / last


def check_teacher(teacher: Any, student: Any, hidden: bool = False) -> None:
    """Raise InputError where two models do not speak of the same tokens, or their hidden states cannot be compared."""
    ours, theirs = student.config.get_text_config(), teacher.config.get_text_config()
    if ours.vocab_size != theirs.vocab_size:
        raise InputError(
            f"the teacher has {theirs.vocab_size:,} tokens, the student {ours.vocab_size:,}; they must share a tokenizer"
        )
    if hidden and ours.hidden_size != theirs.hidden_size:
        raise InputError(
            f"hidden states of the teacher have {theirs.hidden_size} columns, those of the student {ours.hidden_size}; leave "
            "--hidden out"
        )


def fewer_layers(model: Any, layers: int) -> Any:
    """A new model with `layers` of a model's blocks, spread evenly, the first and the last among them, and all the rest as it is
    (Sanh et al. 2019 begin DistilBERT so). Raises UsageError for more than there are, InputError where blocks are not found."""
    blocks = blocks_of(model)
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
    for i, block in enumerate(blocks_of(student)):
        block.load_state_dict(blocks[kept[i]].state_dict())
    student.generation_config = model.generation_config
    return student


__all__ = ["check_teacher", "distillation_loss", "fewer_layers", "language_loss"]
