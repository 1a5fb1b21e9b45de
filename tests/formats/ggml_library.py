"""ggml's own C code, called through the library that comes with llama-cpp-python: the oracle for its formats.

The library is found beside an installed llama_cpp (which is not imported), or where NYBBLE_GGML_LIBRARY says.
"""

from __future__ import annotations

import ctypes
import importlib.util
import os
from pathlib import Path
from typing import Any

import numpy as np
from ggml_layout import SIZES, unpack
from numpy.typing import NDArray

ENVIRONMENT = "NYBBLE_GGML_LIBRARY"
DECODERS = {name: f"dequantize_row_{name.replace('_k', '_K')}" for name in SIZES}


def find() -> Path | None:
    """libggml-base of llama-cpp-python, or None."""
    named = os.environ.get(ENVIRONMENT)
    if named:
        return Path(named)
    spec = importlib.util.find_spec("llama_cpp")
    if spec is None or not spec.submodule_search_locations:
        return None
    folder = Path(spec.submodule_search_locations[0])
    found = [path for name in ("libggml-base.so", "libggml-base.dylib", "ggml-base.dll") for path in folder.rglob(name)]
    return found[0] if found else None


class Ggml:
    """The library, with arrays."""

    def __init__(self, path: Path) -> None:
        self._library = ctypes.CDLL(str(path))
        self._quantize = self._library.ggml_quantize_chunk
        self._quantize.restype = ctypes.c_size_t
        self._quantize.argtypes = [ctypes.c_int, ctypes.c_void_p, ctypes.c_void_p, *[ctypes.c_int64] * 3, ctypes.c_void_p]

    def block_bytes(
        self, name: str, weight: NDArray[np.float32], importance: NDArray[np.float32] | None = None
    ) -> NDArray[np.uint8]:
        """uint8 [N, blocks, bytes of a block] of a weight [N, K]; importance [K]."""
        number, columns, size = SIZES[name]
        weight = np.ascontiguousarray(weight, np.float32)
        rows, count = weight.shape
        out = np.empty((rows, count // columns, size), np.uint8)
        given = None if importance is None else np.ascontiguousarray(importance, np.float32)
        at = None if given is None else given.ctypes.data
        written = self._quantize(number, weight.ctypes.data, out.ctypes.data, 0, rows, count, at)
        assert written == out.nbytes
        return out

    def round(
        self, name: str, weight: NDArray[np.float32], importance: NDArray[np.float32] | None = None
    ) -> tuple[NDArray[np.uint8], dict[str, NDArray[Any]]]:
        """(codes, params) as nybble's formats have them."""
        return unpack(name, self.block_bytes(name, weight, importance))

    def decode(self, name: str, blocks: NDArray[np.uint8]) -> NDArray[np.float32]:
        """float32 [N, K] of bytes [N, blocks, bytes of a block]."""
        blocks = np.ascontiguousarray(blocks)
        out = np.empty((blocks.shape[0], blocks.shape[1] * SIZES[name][1]), np.float32)
        decoder = getattr(self._library, DECODERS[name])
        decoder.argtypes, decoder.restype = [ctypes.c_void_p, ctypes.c_void_p, ctypes.c_int64], None
        decoder(blocks.ctypes.data, out.ctypes.data, out.size)
        return out

    def fuses_products(self) -> bool:
        """Whether its compiler rounds a product and an addition at once: seen in blocks of q4_0 where that changes a code."""
        rng = np.random.default_rng(0)
        block = np.zeros((4096, 32), np.float32)
        block[:, 0] = -rng.uniform(1, 2, 4096)
        inverse = np.float32(1) / (block[:, 0] / np.float32(-8))
        block[:, 1:] = (rng.integers(-7, 7, (4096, 31)) + np.float32(0.5)) / inverse[:, None]
        product = block.astype(np.float64) * inverse[:, None]
        plain = (product.astype(np.float32) + np.float32(8.5)).astype(np.int8).clip(0, 15)
        fused = (product + 8.5).astype(np.float32).astype(np.int8).clip(0, 15)
        assert (plain != fused).any()
        found = self.round("q4_0", block)[0]
        assert (found == plain).all() or (found == fused).all()
        return bool((found != plain).any())
