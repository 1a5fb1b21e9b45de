"""Edits: a float model changed so that it computes the same and rounds better (AWQ, SmoothQuant).

Before a walk begins, block by block over the float model's own activations: for each place where a scale per channel can be
folded (models/folding.py), the scale is chosen (methods/steps/scaling.py) and put in. What comes after, the twin of a block,
the predictions that tuning aims at, the inputs of every layer, is then of the edited float model and needs to know nothing.

An edit is a value: the same one, applied to another copy of the float model, gives the same bits.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

from nybble.calibrate.blocks import Blocks
from nybble.calibrate.channels import channels_of
from nybble.calibrate.states import States
from nybble.calibrate.watching import catch_inputs
from nybble.calibrate.workers import Workers
from nybble.errors import NumericError
from nybble.files.safetensors import SafetensorsFile
from nybble.finished import FinishedBlocks
from nybble.formats import Format
from nybble.methods.steps.scaling import Scaled, awq_scale, smooth_scale
from nybble.methods.steps.settings import Settings
from nybble.models.arch import table_for
from nybble.models.float_weights import weight_view
from nybble.models.folding import Fold, folds
from nybble.models.shelf import Shelf

EDITS = "edits"
TOLERANCE = 1e-3
"""How far what a block adds may move, as a share of it, before an edit counts as wrong: far over any rounding of float32."""


@dataclass(frozen=True)
class Edit:
    """A scale folded in one place, or why that place is as it was."""

    source: str
    """Full name of the norm or matrix that is divided, without `.weight`; empty where a whole model is left as it is."""
    readers: tuple[str, ...] = ()
    """Full names of the matrices whose columns are multiplied."""
    fold: Fold | None = None
    scale: Tensor | None = None
    """float32 [K]; None: nothing was done."""
    before: float | None = None
    after: float | None = None
    """AWQ: squared error at the readers' outputs, rounded to nearest, as a share of the outputs' squares; without the scale
    and with it."""
    reason: str = ""
    """Why nothing was done."""


def edit_blocks(
    model: nn.Module,
    formats: Mapping[str, Format],
    settings: Settings,
    windows: NDArray[np.integer[Any]],
    workers: Workers,
    report: Callable[[str, int, int], None],
    shelf: Shelf | None = None,
    scratch: Path | None = None,
    finished: FinishedBlocks | None = None,
) -> list[Edit]:
    """Edit a float model in place, as `settings.edit` says, and give the account of every place.

    `formats` are those of the weights that will be rounded, by name; `windows` are token ids [windows, tokens]; `shelf` and
    `scratch` are as of `Blocks`: a block that is taken off a shelf again is edited again. Edits are kept in `finished`, and taken
    from there. A place is left alone where the scale would not cancel, where nothing that reads it is rounded, and where the
    block would compute something else. Raises BlocksError where the model is no row of blocks, NumericError that names the
    matrices.
    """
    config = getattr(model, "config", None)
    table = table_for(getattr(config, "model_type", ""))
    places, reason = folds(table, config)
    if reason or not formats:
        return [Edit("", reason=reason or "no weight is rounded")]
    shelf = shelf or Shelf()
    blocks = Blocks(model, windows, shelf, scratch)
    if not table.block.endswith(blocks.prefix + ".{i}"):
        return [Edit("", reason=f"the blocks are {blocks.prefix}, the table's are {table.block}")]
    states, edits = blocks.hidden, []
    for index, block in enumerate(blocks.modules):
        path = f"{blocks.prefix}.{index}"
        found = [_Place(model, path, place, formats) for place in places]
        with shelf.out(block):
            kept = None if finished is None else finished.find_arrays(EDITS, index)
            if kept is not None:
                done = [place.again(kept[1], *said) for place, said in zip(found, kept[0], strict=True)]
                apply_edits(model, done)
            else:
                # All scales of a block before any is folded: they do not depend on each other.
                wanted = [_choose(place, blocks, index, states, settings, workers) for place in found]
                done = _fold_checked(model, blocks, index, states[0], wanted)
                if finished is not None:
                    scales = {edit.source: edit.scale.numpy() for edit in done if edit.scale is not None}
                    finished.keep_arrays(EDITS, index, scales, [[edit.before, edit.after, edit.reason] for edit in done])
            blocks.advance(index, states, workers)
        shelf.redo(block, partial(apply_edits, model, done))
        edits += done
        report(f"editing {path}", index + 1, len(blocks))
    return edits


def apply_edits(model: nn.Module, edits: Iterable[Edit]) -> set[str]:
    """Put edits into a float model, in place. Names of the parameters that changed."""
    changed: set[str] = set()
    for edit in edits:
        if edit.scale is not None and edit.fold is not None:
            changed |= _fold(model, edit.source, edit.readers, edit.fold, edit.scale)
    return changed


def changed_by(model: nn.Module, edits: Iterable[Edit], prefix: str = "") -> set[str]:
    """Names of the parameters that edits change, of those that begin with a prefix."""
    names: set[str] = set()
    for edit in edits:
        if edit.scale is not None:
            names |= {f"{reader}.weight" for reader in edit.readers}
            own = model.get_submodule(edit.source)._parameters
            names |= {f"{edit.source}.{leaf}" for leaf in ("weight", "bias") if own.get(leaf) is not None}
    return {name for name in names if name.startswith(prefix)}


def summary(edits: Iterable[Edit]) -> dict[str, int]:
    """How many places were folded (`folded`), and how many left alone for each reason."""
    return dict(Counter(edit.reason or "folded" for edit in edits))


class _Place:
    """A fold in one block of one model."""

    def __init__(self, model: nn.Module, path: str, fold: Fold, formats: Mapping[str, Format]) -> None:
        self.fold, self.source = fold, f"{path}.{fold.source}"
        self.readers = tuple(f"{path}.{name}" for name in fold.readers)
        self.layers = [model.get_submodule(name) for name in self.readers]
        own = [formats.get(f"{name}.weight") for name in self.readers]
        self.rounded = [(layer, fmt) for layer, fmt in zip(self.layers, own, strict=True) if fmt is not None]
        self.reason = fold.reason
        module, source_format = model.get_submodule(self.source), formats.get(f"{self.source}.weight")
        if not self.rounded:
            self.reason = "nothing that reads it is rounded"
        elif module._parameters.get("weight") is None:
            self.reason = self.reason or "it has no gain to fold a scale into"
        elif not fold.norm and len(weight_view(module)) * fold.heads[1] != fold.part[1] * weight_view(self.layers[0]).shape[1]:
            self.reason = self.reason or "its rows are not the channels of what reads it"
        elif not fold.norm and source_format is not None and source_format.granularity == "tensor":
            self.reason = self.reason or "its rows share one scale, which would have to span theirs"

    def left(self, reason: str) -> Edit:
        return Edit(self.source, self.readers, self.fold, reason=reason)

    def again(self, scales: SafetensorsFile, before: float | None, after: float | None, reason: str) -> Edit:
        if reason:
            return self.left(reason)
        scale = torch.from_numpy(np.array(scales.read(self.source)))
        return Edit(self.source, self.readers, self.fold, scale, before, after)


def _choose(place: _Place, blocks: Blocks, index: int, states: States, settings: Settings, workers: Workers) -> Edit:
    if place.reason:
        return place.left(place.reason)
    layer = place.layers[0]
    with catch_inputs(layer):
        channels = channels_of(lambda w: blocks.inputs(index, states[w], layer), len(states), settings.edit == "awq", workers)
    weights = [weight_view(reader).detach().float().contiguous() for reader, _ in place.rounded]
    try:
        if settings.edit == "awq":
            scaled = awq_scale(weights, [fmt for _, fmt in place.rounded], channels, settings.scales, place.fold.heads)
        else:
            scaled = Scaled(smooth_scale(weights, channels, settings.smooth, place.fold.heads))
    except NumericError as error:
        raise NumericError(f"{', '.join(place.readers)}: {error}") from error
    scale = scaled.scale.float()
    if bool((scale == 1).all()):
        return place.left("no scale is better than none")
    return Edit(place.source, place.readers, place.fold, scale, scaled.before, scaled.after)


def _fold_checked(model: nn.Module, blocks: Blocks, index: int, state: Tensor, wanted: list[Edit]) -> list[Edit]:
    """Fold the edits of a block one by one; what changes the block's output beyond rounding is taken back."""
    before = blocks.run(index, state)
    step = float((before - state).float().norm())
    done = []
    for edit in wanted:
        if edit.scale is None or edit.fold is None:
            done.append(edit)
            continue
        kept = [
            (p, p.detach().clone()) for name in (edit.source, *edit.readers) for p in model.get_submodule(name).parameters(False)
        ]
        _fold(model, edit.source, edit.readers, edit.fold, edit.scale)
        moved = float((blocks.run(index, state) - before).float().norm())
        allowed = max(TOLERANCE, 16 * torch.finfo(before.dtype).eps) * step
        if not moved <= allowed:  # not a number counts as moved
            for parameter, values in kept:
                parameter.data.copy_(values)
            edit = Edit(
                edit.source, edit.readers, edit.fold, reason=f"it moved the block's output by {moved / (step or 1):.1g} of it"
            )
        done.append(edit)
    return done


def _fold(model: nn.Module, source: str, readers: tuple[str, ...], fold: Fold, scale: Tensor) -> set[str]:
    """Divide the source by a scale, float32 [K], and multiply the readers' columns by it. Names of what changed."""
    module = model.get_submodule(source)
    weight, bias = module._parameters["weight"], module._parameters.get("bias")
    assert weight is not None
    changed = {f"{source}.weight"} | {f"{name}.weight" for name in readers}
    with torch.no_grad():
        if fold.norm:
            weight.copy_((weight.float() + fold.gain_offset) / scale - fold.gain_offset)
            channels = slice(None)
            divisor = scale
        else:
            count, share = fold.heads
            divisor = scale.reshape(count // share, share, -1)[:, 0].reshape(-1)  # of one query head to a value head
            first = len(divisor) * fold.part[0]
            channels = slice(first, first + len(divisor))
            weight_view(module)[channels].div_(divisor[:, None])
        if bias is not None:
            bias[channels].div_(divisor)
            changed.add(f"{source}.bias")
        for name in readers:
            weight_view(model.get_submodule(name)).mul_(scale)
    return changed
