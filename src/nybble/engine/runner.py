"""Runs a program on the machine: the C++ engine, or the numpy reference where the extension was not built.

Both take rows (tokens), each with its position and sequence, and give the logits of the rows that are wanted; what a sequence
held before a position stays until it is written again.
"""

from __future__ import annotations

from typing import Any, Protocol

import numpy as np
from numpy.typing import NDArray

from nybble import kernels
from nybble.engine import reference
from nybble.engine.program import Add, Attend, Cap, Embed, Linear, Matrix, Norm, Program, Select
from nybble.engine.weights import Weights

Ids = NDArray[np.int64]
Logits = NDArray[np.float32]

MOST_ROWS = 512
"""Rows of one run: a longer prompt is read in pieces."""


class Runner(Protocol):
    """What runs a program."""

    position_bytes: int
    """Bytes that the cache takes for one position of one sequence."""

    def reserve(self, sequences: int, positions: int) -> None:
        """Make room; drops what was cached."""

    def run(self, tokens: Ids, positions: Ids, sequences: Ids, wanted: Ids) -> Logits:
        """float32 [wanted, vocabulary]; all arguments int64, at most MOST_ROWS rows, `wanted` ascending row numbers."""


class NativeRunner:
    """The C++ engine."""

    def __init__(self, native: Any, program: Program, weights: Weights, threads: int, exact: bool, cache: str) -> None:
        self.vocabulary = program.vocabulary
        self.engine = native.Engine(threads, exact, cache)
        for operation in program.operations:
            self._add(operation, weights, threads)
        self.engine.finish(program.vocabulary, MOST_ROWS)
        self.position_bytes = 0

    def _add(self, operation: Any, weights: Weights, threads: int) -> None:
        engine = self.engine
        match operation:
            case Embed(tokens, positions, offset, scale):
                places = None if positions is None else weights.matrix(positions, threads)
                engine.embed(weights.matrix(tokens, threads), places, offset, scale)
            case Norm(source, target, centred, eps, name, bias):
                gain = _gain(weights, name, operation.gain_offset)
                engine.norm(source, target, centred, eps, gain, _bias(weights, name, bias))
            case Linear():
                laid = [weights.matrix(matrix, threads) for matrix in operation.matrices]
                biases = [_bias(weights, matrix.name, matrix.bias) for matrix in operation.matrices]
                activation, add, gated = operation.activation, operation.add, operation.gated
                engine.linear(operation.source, operation.target, laid, biases, activation, add, gated, 1.0)
            case Attend():
                o = operation
                gains = [_gain(weights, name, o.gain_offset) if name else [] for name in (o.query_norm, o.key_norm)]
                rotary = list(o.frequencies)
                engine.attention(o.layer, o.heads, o.shared, o.dimensions, rotary, False, o.scale, o.cap, o.window, *gains, o.eps)
            case Add(source, target):
                engine.add(source, target)
            case Select():
                engine.select()
            case Cap(cap):
                engine.cap(cap)

    def reserve(self, sequences: int, positions: int) -> None:
        self.engine.reserve(sequences, positions)
        self.position_bytes = self.engine.position_bytes

    def run(self, tokens: Ids, positions: Ids, sequences: Ids, wanted: Ids) -> Logits:
        out = np.empty((len(wanted), self.vocabulary), dtype=np.float32)
        self.engine.run(tokens, positions, sequences, wanted, out)
        return out


class ReferenceRunner:
    """numpy: computes a text anew for every token. Correct and slow."""

    def __init__(self, program: Program, weights: Weights) -> None:
        self.program, self.weights = program, weights
        self.position_bytes = 0
        self.texts: list[list[int]] = []

    def _decoded(self, matrix: Matrix) -> NDArray[np.float32]:
        laid = self.weights.matrix(matrix, 1)
        return kernels.rows_of(laid, np.arange(laid.rows))

    def reserve(self, sequences: int, positions: int) -> None:
        self.texts = [[] for _ in range(sequences)]

    def run(self, tokens: Ids, positions: Ids, sequences: Ids, wanted: Ids) -> Logits:
        out = np.empty((len(wanted), self.program.vocabulary), dtype=np.float32)
        place = {int(row): i for i, row in enumerate(wanted)}
        for row in range(len(tokens)):
            text = self.texts[int(sequences[row])]
            del text[int(positions[row]) :]
            text.append(int(tokens[row]))
            if row in place:
                ids = np.array(text, dtype=np.int64)
                out[place[row]] = reference.logits(self.program, ids, self._decoded, self.weights.vector)[-1]
        return out


def make_runner(program: Program, weights: Weights, threads: int, exact: bool, cache: str) -> Runner:
    """The C++ engine where the extension is built, the reference otherwise."""
    native = kernels.native()
    if native is None:
        return ReferenceRunner(program, weights)
    return NativeRunner(native, program, weights, threads, exact, cache)


def _gain(weights: Weights, name: str, offset: float) -> list[float]:
    return (weights.vector(f"{name}.weight") + np.float32(offset)).tolist()


def _bias(weights: Weights, name: str, there: bool) -> list[float]:
    return weights.vector(f"{name}.bias").tolist() if there else []
