"""Calibrated methods carried out: block by block, with one block's statistics in memory at a time.

Two streams of hidden states may go through the model: the float one, X, and that of the model as quantized so far, Y. For
every group of layers that are fed the same tensor, in the order they run: statistics over all windows, codes for each
weight, the decoded weight put in its place; then the block as a whole may be tuned, and the streams go one block on. Weights
outside the blocks come last, and then, where the method asks for it, all layers are tuned together. The model given is left
holding decoded weights, and the biases and norms that were moved.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Collection, Mapping
from dataclasses import dataclass, field, replace
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

from nybble.calibrate.blocks import Blocks
from nybble.calibrate.fisher import token_weights
from nybble.calibrate.importance import mean_squares
from nybble.calibrate.predictions import Predictions
from nybble.calibrate.states import States, copied
from nybble.calibrate.statistics import CHUNK, Statistics, Sums
from nybble.calibrate.watching import catch_inputs, inputs_of
from nybble.calibrate.workers import Workers
from nybble.edits import Edit, changed_by, edit_blocks
from nybble.errors import NumericError
from nybble.finished import Block, FinishedBlocks
from nybble.formats import Format, QTensor
from nybble.methods import Method
from nybble.methods.steps.bias import moved_bias
from nybble.methods.steps.choose import Account, choose
from nybble.methods.steps.latent import Latent
from nybble.methods.steps.settings import Settings
from nybble.methods.steps.wanted import wanted
from nybble.models.float_weights import float_weight, put_weight, weight_view
from nybble.models.mapped import trim
from nybble.models.shelf import Shelf
from nybble.tuner import Tuner

FISHER = "fisher"
Progress = Callable[[str, int, int], None]


@dataclass
class Walk:
    """One model on its way through a calibrated method."""

    model: nn.Module
    """Its weights are replaced as they are decided."""
    layers: Mapping[str, nn.Module]
    """Weight name -> the module that owns it."""
    formats: Mapping[str, Format]
    """What the weights become; those of `layers` that are not here stay."""
    settings: Settings
    windows: NDArray[np.integer[Any]]
    row_groups: Mapping[str, int]
    """Name -> in how many equal parts a weight's rows fall (query, key and value in one matrix: 3); 1 where not given."""
    workers: Workers
    progress: Progress | None = None
    tensors: dict[str, QTensor] = field(default_factory=dict)
    accounts: dict[str, Account] = field(default_factory=dict)
    edits: list[Edit] = field(default_factory=list)
    """What was changed in the float model before the walk."""
    moved: dict[str, Tensor] = field(default_factory=dict)
    """Name -> what a bias or a norm's gain became, float32."""
    edited: dict[str, Tensor] = field(default_factory=dict)
    """Name -> what an edit made of a tensor that stays in float, float32 as the model holds it, where `holds` is off."""
    history: list[tuple[int, float]] = field(default_factory=list)
    """Of tuning all layers together: (step, KL on the windows held back)."""
    block_histories: list[list[tuple[int, float]]] = field(default_factory=list)
    """Of tuning blocks: (step, mean squared error of what the block gives, on the windows held back)."""
    finished: FinishedBlocks | None = None
    """Where blocks are kept that are decided, and taken from."""
    shelf: Shelf = field(default_factory=Shelf)
    """Where the model's weights are."""
    scratch: Path | None = None
    """Folder for hidden states; None: they stay in memory."""
    holds: bool = True
    """Whether `tensors` keeps what `finished` has too."""
    places: dict[str, NDArray[np.float32]] | None = None
    """Name -> float32 [N, K]: where each weight would rather be, as far as its code stays the nearest; None: nobody asks."""
    _inside: set[str] = field(default_factory=set)
    """Weights of linear layers inside the blocks, as the walk comes to them: what may be pruned."""

    _done: set[str] = field(default_factory=set)
    """Weights that are decided."""

    def run(self) -> None:
        """Fill `tensors`, `accounts`, `edits`, `moved`. Raises NumericError naming the weight, BlocksError where a model is no
        row of blocks."""
        for parameter in self.model.parameters() if self.settings.blockwise else ():  # else it may be somebody's, and stays
            parameter.requires_grad_(False)
        if self.settings.edit != "none":  # from here on the edited float model is the float model
            self.edits = edit_blocks(
                *(self.model, self.formats, self.settings, self.windows, self.workers, self._report),
                *(self.shelf, self.scratch, self.finished),
            )
        self._tuner = Tuner(self.model, self.layers, self.settings, len(self.windows), self.workers, self._report)
        self._tuned = any(self.settings.tunes(fmt.bits) for fmt in self.formats.values())
        together = self.settings.tunes_together(fmt.bits for fmt in self.formats.values())
        predictions = Predictions(self.model, self.windows, self.workers) if together else None
        self._counts = self._token_weights() if self.settings.fisher else {}
        self._others(*self._blocks())
        if predictions is not None:
            best, self.history = self._tuner.together(predictions, self.finished)
            self._take_tuned(best)

    def _token_weights(self) -> dict[str, list[Tensor]]:
        modules = {name: module for name, module in self.layers.items() if not isinstance(module, nn.Embedding)}
        groups = {name: self.row_groups.get(name, 1) for name in modules}

        def report(done: int, total: int) -> None:
            self._report("weighing tokens", done, total)

        def find(window: int) -> dict[str, Tensor] | None:
            found = None if self.finished is None else self.finished.find_arrays(FISHER, window)
            return None if found is None else {key: torch.from_numpy(np.array(found[1].read(key))) for key in found[1].entries}

        def keep(window: int, sums: dict[str, Tensor]) -> None:
            if self.finished is not None:
                self.finished.keep_arrays(FISHER, window, {key: value.numpy() for key, value in sums.items()}, None)

        settings = self.settings
        return token_weights(
            *(self.model, modules, groups, self.windows, settings.fisher, settings.seed, self.workers),
            *(self.shelf, self.scratch, report, find, keep),
        )

    def _blocks(self) -> tuple[Blocks, States]:
        """Walk through the blocks; returns them, and what the last one gives."""
        blocks = Blocks(self.model, self.windows, self.shelf, self.scratch)
        present = blocks.hidden
        floats = copied(present, self.scratch) if self.settings.float_stream else present
        for index, block in enumerate(blocks.modules):
            with self.shelf.out(block):
                self._block(blocks, index, present, floats)
            trim()
        return blocks, present

    def _block(self, blocks: Blocks, index: int, present: States, floats: States) -> None:
        """Decide the weights of one block, and bring both streams through it."""
        settings, block = self.settings, blocks.modules[index]
        if not settings.blockwise:
            self._weigh_block(blocks, index, present)
            return
        layers = self._layers_of(block)
        known = None if self.finished is None else self.finished.find(index)
        twin = copy.deepcopy(block) if settings.float_stream else None
        if known is not None:
            self._take(known)
        before = set(self.moved)
        twins = {} if twin is None else dict(zip(map(id, block.modules()), twin.modules(), strict=True))
        for group in blocks.calls(index, present[0], layers) if layers and known is None else ():
            layer = layers[group[0]]
            inputs = partial(_look, blocks, index, present, layer, None)
            float_inputs = partial(_look, blocks, index, floats, twins.get(id(layer), layer), twin)
            with catch_inputs(layer, twins.get(id(layer))):
                if settings.inputs == "float":
                    stats = self._statistics(group, float_inputs, None)
                else:
                    stats = self._statistics(group, inputs, float_inputs if settings.target > 0 else None)
            self._inside |= set(group)
            for name in group:
                self._decide(name, stats[name])
        if twin is not None:
            blocks.advance(index, floats, self.workers, twin)
            if self._tuned and settings.block_tune and layers and known is None:
                self._tune_block(blocks, index, present, floats)
        if known is None:
            edited: set[str] = set()
            if not self.holds:
                edited = changed_by(self.model, self.edits, f"{blocks.prefix}.{index}.") - set(layers)
                self.edited |= {name: self.model.get_parameter(name).detach().clone() for name in edited}
            self._keep(index, [name for name in layers if name in self.tensors], set(self.moved) - before, edited)
        blocks.advance(index, present, self.workers)

    def _layers_of(self, block: nn.Module) -> dict[str, nn.Module]:
        inside = {id(module) for module in block.modules()}
        return {name: layer for name, layer in self.layers.items() if name in self.formats and id(layer) in inside}

    def _weigh_block(self, blocks: Blocks, index: int, states: States) -> None:
        """Choose scales for the weights of one block by how large the inputs of each column are. What is looked at is the float
        model, which stays as it is."""
        layers = self._layers_of(blocks.modules[index])
        known = None if self.finished is None else self.finished.find(index)
        if known is not None:
            self._take(known)
        count = len(self.windows)
        for group in blocks.calls(index, states[0], layers) if layers and known is None else ():
            self._inside |= set(group)
            with catch_inputs(layers[group[0]]):
                importance = mean_squares(partial(_look, blocks, index, states, layers[group[0]], None), count, self.workers)
            for name in group:
                self._search(name, importance)
        if known is None:
            self._keep(index, [name for name in layers if name in self.tensors], ())
        blocks.advance(index, states, self.workers)

    def _search(self, name: str, importance: NDArray[np.float32] | None) -> None:
        """Codes of a weight by the search alone."""
        method = Method("", (), self.settings)
        weight = float_weight(self.layers[name])
        try:
            self.tensors[name] = method.quantize(weight, self.formats[name], importance, prune=name in self._inside)
        except NumericError as error:
            raise NumericError(f"{name}: {error}") from error
        self._done.add(name)
        self._report(name, len(self._done), len(self.formats))

    def _keep(self, index: int, names: Collection[str], moved: Collection[str], edited: Collection[str] = ()) -> None:
        """Have what was decided on disk."""
        if self.finished is None:
            return
        tensors = {name: tensor for name, tensor in self.tensors.items() if name in names}  # in the order they were decided
        accounts = {name: self.accounts[name] for name in tensors if name in self.accounts}
        became = {name: self.moved[name].numpy() for name in sorted(moved)}
        edits = {name: self.edited[name].numpy() for name in sorted(edited)}
        latents = self._tuner.latents if self.settings.tune else {}
        positions = {name: latents[name].positions.numpy() for name in tensors if name in latents}
        self.finished.keep(index, Block(tensors, accounts, became, edits, positions))
        if not self.holds:
            for name in tensors:
                del self.tensors[name]

    def _take(self, block: Block) -> None:
        """Put what an earlier run decided in its place."""
        for name, value in block.moved.items():
            self._move(name, torch.from_numpy(value))
        self.edited |= {name: torch.from_numpy(value) for name, value in block.edited.items()}
        for name, tensor in block.tensors.items():
            if self.holds:
                self.tensors[name] = tensor
            if name in block.accounts:
                self.accounts[name] = block.accounts[name]
            if name in block.positions:
                self._tuner.latents[name] = Latent.at(tensor, torch.from_numpy(block.positions[name]))
            if self.settings.blockwise:
                put_weight(self.layers[name], tensor.decode())
            self._done.add(name)
            self._report(name, len(self._done), len(self.formats))

    def _others(self, blocks: Blocks, states: States) -> None:
        """Weights outside the blocks, and those in blocks that no window reaches. A linear layer has the statistics of its
        inputs; a table that is only looked up has none: every column counts alike. A head that is also a table: both. `states`
        are what the last block gives."""
        for number, name in enumerate([name for name in self.formats if name not in self._done]):
            known = None if self.finished is None else self.finished.find(len(blocks) + number)
            with self.shelf.out(self.layers[name]):
                if known is not None:
                    self._take(known)
                else:
                    before = set(self.moved)
                    self._decide_other(name, blocks, states)
                    self._keep(len(blocks) + number, [name], set(self.moved) - before)
            if self.finished is not None and not self.holds and self.settings.blockwise:
                self.shelf.redo(self.layers[name], partial(self._put_again, name, self.finished))

    def _put_again(self, name: str, finished: FinishedBlocks) -> None:
        put_weight(self.layers[name], finished.read(name).decode())

    def _decide_other(self, name: str, blocks: Blocks, states: States) -> None:
        layer = self.layers[name]
        head = self.model.get_output_embeddings()  # type: ignore[operator]
        alike = torch.eye(weight_view(layer).shape[1], dtype=torch.float64)
        user: nn.Module = layer
        tied = head is not None and head is not layer and head._parameters["weight"] is layer._parameters["weight"]
        if tied:
            user = head
        if isinstance(user, nn.Embedding):
            self._decide_unseen(name, alike)
            return
        with blocks.skipped(states) as run, torch.no_grad(), catch_inputs(user):
            found = inputs_of(user, lambda: run(0))
            if found is None or len(found) != self.windows.shape[1]:
                self._decide_unseen(name, alike)
                return

            def inputs(w: int) -> Tensor:
                found = inputs_of(user, lambda: run(w))
                assert found is not None
                return found

            if not self.settings.blockwise:
                self._search(name, mean_squares(inputs, len(self.windows), self.workers))
                return
            stats = self._statistics([name], inputs, None)[name]
        if tied:
            moment = stats.moments[0]
            stats = Statistics([(moment + moment.diagonal().mean() * alike) / 2], None, stats.tokens)
        self._decide(name, stats)

    def _decide_unseen(self, name: str, alike: Tensor) -> None:
        """Codes of a weight of whose inputs nothing is known."""
        if self.settings.blockwise:
            self._decide(name, Statistics([alike], None, 0))
        else:
            self._search(name, None)

    def _statistics(
        self, group: list[str], inputs: Callable[[int], Tensor], float_inputs: Callable[[int], Tensor] | None
    ) -> dict[str, Statistics]:
        """Statistics for the weights of a group, which share their inputs; one for all, unless tokens count differently. They
        are around means for weights whose bias may move."""
        length, count = self.windows.shape[1], len(self.windows)
        moving = [name for name in group if self._moves_bias(name)]
        centre = inputs(0).mean(0) if moving else None
        weighted = [name for name in group if name in self._counts]
        keys: list[str] = weighted or [group[0]]

        def chunk(start: int) -> dict[str, Sums]:
            sums: dict[str, Sums] = {}
            with torch.no_grad():
                for w in range(start, min(start + CHUNK, count)):
                    y = inputs(w)
                    x = None if float_inputs is None else float_inputs(w)
                    for key in keys:
                        counts = [c[w * length : (w + 1) * length] for c in self._counts[key]] if weighted else [None]
                        sums.setdefault(key, Sums(centre=centre)).add_window(y, x, counts)
            return sums

        total: dict[str, Sums] = {}
        for part in self.workers.map(chunk, range(0, count, CHUNK)):
            for key, sums in part.items():
                total[key] = sums if key not in total else total[key].add(sums)
        found = {key: sums.finish() for key, sums in total.items()}
        result = {name: found[name if name in found else keys[0]] for name in group}
        return {name: stats if name in moving else stats.around_zero() for name, stats in result.items()}

    def _moves_bias(self, name: str) -> bool:
        layer = self.layers[name]
        return self.settings.bias and not isinstance(layer, nn.Embedding) and layer._parameters.get("bias") is not None

    def _decide(self, name: str, stats: Statistics) -> None:
        layer = self.layers[name]
        weight = float_weight(layer)
        try:
            settings = self.settings if name in self._inside else replace(self.settings, mask="none")
            tensor, account = choose(weight, self.formats[name], settings, stats, self.workers.each)
        except NumericError as error:
            raise NumericError(f"{name}: {error}") from error
        self.tensors[name], self.accounts[name] = tensor, account
        if self._tuned or (self.places is not None and not tensor.format.is_cast):
            latent = Latent(tensor, wanted(tensor, torch.from_numpy(weight), self.settings, stats, account.damping))
            if self._tuned:
                self._tuner.latents[name] = latent
            if self.places is not None:
                self.places[name] = latent.place().numpy()
        decoded = tensor.decode()
        if stats.means is not None:
            self._move(name.removesuffix("weight") + "bias", moved_bias(_bias(layer), weight, decoded, stats))
        put_weight(layer, decoded)
        self._done.add(name)
        self._report(name, len(self._done), len(self.formats))

    def _move(self, name: str, value: Tensor) -> None:
        """Put a value in the place of a bias or a norm's gain."""
        self.moved[name] = value
        with torch.no_grad():
            self.model.get_parameter(name).copy_(value)

    def _tune_block(self, blocks: Blocks, index: int, inputs: States, aims: States) -> None:
        """Tune the weights of one block that are decided: those that a window reaches."""
        reached = {name: self.tensors[name] for name in self._layers_of(blocks.modules[index]) if name in self.tensors}
        best, history = self._tuner.block(blocks, index, inputs, aims, reached)
        self.block_histories.append(history)
        self._take_tuned(best)
        if not self.settings.tune:
            self._tuner.latents.clear()

    def _take_tuned(self, best: Mapping[str, QTensor | Tensor]) -> None:
        for name, value in best.items():
            if isinstance(value, Tensor):
                self.moved[name] = value
                continue
            self.tensors[name] = value
            if self.places is not None:
                self.places[name] = self._tuner.latents[name].again(value).place().numpy()

    def _report(self, what: str, done: int, total: int) -> None:
        if self.progress:
            self.progress(what, done, total)


def _bias(layer: nn.Module) -> Tensor:
    bias = layer._parameters["bias"]
    assert bias is not None
    return bias.detach()


def _look(blocks: Blocks, index: int, states: States, layer: nn.Module, whole: nn.Module | None, window: int) -> Tensor:
    return blocks.inputs(index, states[window], layer, whole)
