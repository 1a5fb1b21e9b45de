"""What the engine's operations compute, in plain numpy: the specification of the C++ engine, its test oracle, and the path
without the extension. One text at a time, every weight as decoded floats, sums in float64: exact mode without its speed.
`shorts` rounds what attention multiplies as a cache of int16 does.
"""

from __future__ import annotations

import math
from collections.abc import Callable

import numpy as np
from numpy.typing import NDArray

from nybble.engine.program import Add, Attend, Cap, Embed, Linear, Matrix, Norm, Program, Select

Rows = NDArray[np.float64]
Lookup = Callable[[Matrix], NDArray[np.float32]]
Vector = Callable[[str], NDArray[np.float32]]


SPAN = 64
"""Positions whose softmax weights are rounded with one step."""


def logits(program: Program, ids: NDArray[np.int64], weight: Lookup, vector: Vector, shorts: bool = False) -> NDArray[np.float32]:
    """float32 [T, vocabulary] for ids int64 [T]. `weight(matrix)` is the decoded weight float32 [out, in], `vector(name)` a
    norm's gain or a bias."""
    buffers: dict[str, Rows] = {}
    for operation in program.operations:
        match operation:
            case Embed():
                x = weight(operation.tokens)[ids].astype(np.float64) * operation.scale
                if operation.positions is not None:
                    x = x + weight(operation.positions)[np.arange(len(ids)) + operation.offset]
                buffers["residual"] = x
            case Norm():
                buffers[operation.target] = norm(operation, buffers[operation.source], vector)
            case Linear():
                y = linear(operation, buffers[operation.source], weight, vector)
                buffers[operation.target] = buffers[operation.target] + y if operation.add else y
            case Attend():
                buffers["mixed"] = attend(operation, buffers["projected"], vector, shorts)
            case Add():
                buffers[operation.target] = buffers[operation.target] + buffers[operation.source]
            case Select():
                pass  # all rows are wanted here
            case Cap():
                buffers["logits"] = operation.cap * np.tanh(buffers["logits"] / operation.cap)
    return buffers["logits"].astype(np.float32)


def norm(operation: Norm, x: Rows, vector: Vector) -> Rows:
    """LayerNorm or RMSNorm of rows [T, K]."""
    if operation.centred:
        x = x - x.mean(-1, keepdims=True)
    y = (
        x
        / np.sqrt((x * x).mean(-1, keepdims=True) + operation.eps)
        * (vector(f"{operation.name}.weight") + operation.gain_offset)
    )
    return y + vector(f"{operation.name}.bias") if operation.bias else y


def linear(operation: Linear, x: Rows, weight: Lookup, vector: Vector) -> Rows:
    """activation(x @ W.T + bias) of all matrices side by side, or activation(first) * second."""
    parts = []
    for matrix in operation.matrices:
        y = x @ weight(matrix).astype(np.float64).T
        parts.append(y + vector(f"{matrix.name}.bias") if matrix.bias else y)
    if operation.gated:
        return activate(parts[0], operation.activation) * parts[1]
    return activate(np.concatenate(parts, axis=1), operation.activation)


def activate(x: Rows, name: str) -> Rows:
    """The activations of feed-forward layers."""
    if name == "gelu":
        return x * 0.5 * (1 + np.vectorize(math.erf)(x / math.sqrt(2)))
    if name == "gelu_tanh":
        return 0.5 * x * (1 + np.tanh(math.sqrt(2 / math.pi) * (x + 0.044715 * x**3)))
    if name == "gelu_quick":
        return x / (1 + np.exp(-1.702 * x))
    if name == "silu":
        return x / (1 + np.exp(-x))
    return np.maximum(x, 0) if name == "relu" else x


def rotate(x: Rows, frequencies: tuple[float, ...]) -> Rows:
    """Rotary positions: x [T, heads, dimensions], rows at positions 0 to T - 1."""
    if not frequencies:
        return x
    half = len(frequencies)
    # Angles in float32, as the models were trained.
    angle = np.arange(len(x), dtype=np.float32)[:, None, None] * np.array(frequencies, dtype=np.float32)
    cosine, sine = np.cos(angle.astype(np.float64)), np.sin(angle.astype(np.float64))
    first, second, rest = x[..., :half], x[..., half : 2 * half], x[..., 2 * half :]
    return np.concatenate([first * cosine - second * sine, second * cosine + first * sine, rest], axis=-1)


def whole(x: Rows, terms: int) -> tuple[Rows, Rows]:
    """x as whole numbers with one step for the last axis, so small that the sum of `terms` products of two fits 32 bits."""
    most = min(math.floor(math.sqrt((2**31 - 1) / terms)), 2**15 - 1)
    step = np.abs(x).max(-1, keepdims=True) / most
    return np.rint(x / np.where(step > 0, step, 1)), step


def attend(operation: Attend, projected: Rows, vector: Vector, shorts: bool = False) -> Rows:
    """Causal attention of one text: projected [T, (heads + 2 shared) * dimensions] to [T, heads * dimensions]."""
    o, count = operation, len(projected)
    x = projected.reshape(count, o.heads + 2 * o.shared, o.dimensions)
    query, key, value = x[:, : o.heads], x[:, o.heads : o.heads + o.shared], x[:, o.heads + o.shared :]
    for_heads = [(query, o.query_norm), (key, o.key_norm)]
    query, key = (
        rotate(norm(Norm("", "", False, o.eps, name, False, o.gain_offset), part, vector) if name else part, o.frequencies)
        for part, name in for_heads
    )
    key, value = (np.repeat(part, o.heads // o.shared, axis=1) for part in (key, value))
    value_step = np.ones((*value.shape[:2], 1))
    if shorts:  # a head's dimensions are filled up to a multiple of 16
        query, key = (np.multiply(*whole(x, -(-o.dimensions // 16) * 16)) for x in (query, key))
        value, value_step = whole(value, SPAN)
    score = np.einsum("qhd,khd->hqk", query, key) * o.scale
    if o.cap:
        score = o.cap * np.tanh(score / o.cap)
    distance = np.arange(count)[:, None] - np.arange(count)
    seen = (distance >= 0) & (distance < (o.window or count))
    score = np.where(seen, score, -np.inf)
    weights = np.exp(score - score.max(-1, keepdims=True))
    total = weights.sum(-1).T[..., None]
    weights = weights * value_step[:, :, 0].T[:, None]
    if shorts:
        spans = np.pad(weights, ((0, 0), (0, 0), (0, -count % SPAN))).reshape(*weights.shape[:2], -1, SPAN)
        weights = np.multiply(*whole(spans, SPAN)).reshape(*weights.shape[:2], -1)[..., :count]
    mixed: Rows = np.einsum("hqk,khd->qhd", weights, value) / total
    return mixed.reshape(count, -1)
