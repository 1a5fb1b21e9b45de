"""Which ranges of a block the search of ggml's formats should try (formats/ggml_tries.py): from a large pool, one after the other
the one that lowers the error of a sample of blocks most.

Half of the blocks are of real weights (safetensors files given), the others normal and heavy-tailed. With importance: mean
squares of activations whose columns differ a little, much, and by single outliers.

    python bench/ggml_tries.py [model.safetensors ...]
"""

from __future__ import annotations

import argparse
import textwrap
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from nybble import demo
from nybble.files.safetensors import SafetensorsFile
from nybble.formats.ggml_search import SHAPES, search_of
from nybble.kernels import Search, reference_search

Array = NDArray[np.float32]
BLOCKS = 12_000
LENGTHS = {
    "q2_k": (20, 32), "q3_k": (12, 32), "q4_k": (28, 64), "q5_k": (32, 64), "q6_k": (16, 40), "iq4_nl": (20, 40), "q4_0": (0, 32),
    "q5_0": (0, 32), "q8_0": (0, 24),
}  # fmt: skip
"""Name -> how many for all columns alike, and for weighed ones; 0: not searched without importance."""


RAISED = (-0.5, -0.25, 0, 0.25, 0.5, 0.75, 1, 1.5, 2, 3, 4, 6, 9)


def pool(name: str) -> list[tuple[float, float]]:
    """(steps in the range of a block, by how many its lower end is raised)."""
    top = float(np.ptp(SHAPES[name].levels))
    if SHAPES[name].shifted:
        unit = top / 15
        near = np.arange(1.6 if top < 5 else top * 0.6, top + 3.01, 0.2 if top < 5 else 0.25)
        far = np.arange(near[-1] + unit, 2.4 * top, unit)
        return [(round(float(c), 2), t) for c in (*near, *far) for t in RAISED if t < top * 0.7]
    half = float(-SHAPES[name].levels[0])
    share = (*np.arange(0.5, 1.3, 1 / 64), *np.arange(1.3, 3.5, 0.05))
    return [(round(sign * half * float(x), 2), 0.0) for x in share for sign in (-1, 1)]


def blocks_of(name: str, matrices: list[Array], weighed: bool, random: np.random.Generator) -> tuple[Array, Array]:
    """(weights, importance), [1, columns, blocks]; every block counts by its squares."""
    size, parts = SHAPES[name].block, []
    for matrix in matrices:
        view = matrix.reshape(-1, size)
        parts.append(view[random.integers(0, len(view), BLOCKS // 2 // len(matrices))])
    parts += [random.standard_normal((BLOCKS // 4, size)), random.standard_t(4, (BLOCKS // 4, size))]
    w = np.concatenate(parts).astype(np.float32)
    h = np.ones_like(w)
    if weighed:
        kind = random.integers(0, 3, (len(w), 1))
        h = np.exp(random.standard_normal(w.shape) * np.where(kind == 0, 0.5, 1.5)).astype(np.float32)
        h[(random.random(w.shape) < 0.03) & (kind == 2)] *= 200
    w /= np.sqrt((h * w * w).sum(1, keepdims=True)) + np.float32(1e-30)
    return np.ascontiguousarray(w.T[None]), np.ascontiguousarray(h.T[None])


def errors(how: Search, w: Array, h: Array) -> Array:
    """Of every try, [T, blocks]: rounded again after the least squares fit."""
    runs = reference_search._Runs(w, h, how)
    low, width = runs.ends()
    found = []
    for steps, raised in how.tries:
        s = width / steps
        o = low + s * raised if how.shifted else low
        s, o, _ = runs.settle(runs.sums(s, o), s, o)
        found.append(runs.sums(s, o).e[0])
    return np.array(found)


def chosen(error: Array, count: int) -> list[int]:
    """Greedily."""
    least, places = np.full(error.shape[1], np.inf), []
    for _ in range(count):
        places.append(int(np.minimum(error, least).sum(1).argmin()))
        least = np.minimum(least, error[places[-1]])
    return places


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("files", type=Path, nargs="*", help="safetensors; without any the model that ships")
    matrices: list[Array] = []
    for path in parser.parse_args().files or [demo.model_folder() / "model.safetensors"]:
        file = SafetensorsFile(path)
        for name, entry in file.entries.items():
            if len(entry.shape) == 2 and min(entry.shape) >= 128:
                values = np.asarray(file.read(name), np.float32)
                matrices.append(np.ascontiguousarray(values.T if ".h." in f".{name}" else values))
    for name, lengths in LENGTHS.items():
        for weighed, count in enumerate(lengths):
            if not count:
                continue
            w, h = blocks_of(name, matrices, bool(weighed), np.random.default_rng(0))
            tries = pool(name)
            how = search_of(name, bool(weighed))
            error = errors(how._replace(tries=np.array(tries, np.float32)), w, h)
            places = chosen(error, count)
            best, now = error.min(0).sum(), errors(how, w, h).min(0).sum()
            if SHAPES[name].shifted:
                words = [f"({tries[i][0]:g}, {tries[i][1]:g})" for i in places]
            else:
                words = [f"{tries[i][0]:g}" for i in places]
            print(textwrap.fill(f'"{name}": ({", ".join(words)}),', 124, initial_indent="    ", subsequent_indent="        "))
            share, todays = error[places].min(0).sum() / best, now / best
            note = f"weighed {bool(weighed)}: {count} of {len(tries)}: {share:.4f} of the pool's error"
            print(f"    # {note}; today's {len(how.tries)}: {todays:.4f}")


if __name__ == "__main__":
    main()
