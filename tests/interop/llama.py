"""llama.cpp, through llama-cpp-python, as the tests use it: a file's logits, its greedy text, its tokenizer, its metadata."""

from __future__ import annotations

import ctypes
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray
from readers import reader

llama_cpp = reader("llama_cpp")
CONTEXT = 256
FLOAT_CACHE = 0
"""GGML_TYPE_F32: keys and values in float32, so that only weights and activations are rounded."""
FILE_TYPES = {
    name: getattr(llama_cpp, f"LLAMA_FTYPE_MOSTLY_{name}")
    for name in (
        *("F16", "BF16", "Q4_0", "Q4_1", "Q5_0", "Q5_1", "Q8_0", "Q2_K", "Q2_K_S", "Q3_K_S", "Q3_K_M", "Q3_K_L"),
        *("Q4_K_S", "Q4_K_M", "Q5_K_S", "Q5_K_M", "Q6_K", "IQ4_NL", "IQ4_XS"),
    )
}
_silence: Any = llama_cpp.llama_log_callback(lambda level, text, user: None)  # kept: the library holds no reference


class Llama:
    """A loaded file. One thread: others that wait spin, which is slow beside other work."""

    def __init__(self, path: Path, **settings: Any) -> None:
        self._llama = llama_cpp.Llama(
            str(path), n_ctx=CONTEXT, n_batch=CONTEXT, n_ubatch=CONTEXT, n_threads=1, n_threads_batch=1, logits_all=True,
            type_k=FLOAT_CACHE, type_v=FLOAT_CACHE, verbose=False, **settings,
        )  # fmt: skip
        self.metadata: dict[str, str] = self._llama.metadata

    def logits(self, ids: Sequence[int]) -> NDArray[np.float32]:
        """float32 [T, vocabulary]."""
        self._llama.reset()
        self._llama.eval(list(ids))
        found: NDArray[np.float32] = self._llama._scores[: len(ids)].copy()
        return found

    def greedy(self, ids: Sequence[int], count: int) -> list[int]:
        """The `count` likeliest next ids, one after another; nothing ends them."""
        self._llama.reset()
        found: list[int] = []
        new = list(ids)
        for _ in range(count):
            self._llama.eval(new)
            new = [int(self._llama._scores[self._llama.n_tokens - 1].argmax())]
            found += new
        return found

    def encode(self, text: str, special: bool = False) -> list[int]:
        """Ids of a text, without a token that begins it."""
        ids: list[int] = self._llama.tokenize(text.encode(), add_bos=False, special=special)
        return ids

    def decode(self, ids: Sequence[int]) -> bytes:
        """The text of ids, token by token as llama.cpp's programs print it. llama-cpp-python's own cuts tokens at 32 bytes;
        llama_detokenize takes spaces away before punctuation."""
        vocabulary = llama_cpp.llama_model_get_vocab(self._llama.model)
        text, piece = b"", ctypes.create_string_buffer(512)
        for token in ids:
            size = llama_cpp.llama_token_to_piece(vocabulary, token, piece, len(piece), 0, True)
            assert size >= 0
            text += piece.raw[:size]
        return text

    @property
    def ends(self) -> tuple[int, int]:
        """(id that begins a text, id that ends it); -1 for none."""
        return self._llama.token_bos(), self._llama.token_eos()

    def close(self) -> None:
        self._llama.close()


def quantize(source: Path, target: Path, file_type: str, pure: bool = False, importance: Mapping[str, int] | None = None) -> bool:
    """llama.cpp's own quantizer: a file of floats to one of `file_type`; whether it did. `pure`: every weight in that type.
    `importance`: name of each tensor -> its columns, all of importance 1."""
    llama_cpp.llama_log_set(_silence, ctypes.c_void_p(0))
    settings = llama_cpp.llama_model_quantize_default_params()
    settings.ftype, settings.nthread, settings.pure = FILE_TYPES[file_type], 1, pure
    kept = []  # what the settings point to
    if importance:
        table = (llama_cpp.llama_model_imatrix_data * (len(importance) + 1))()
        for entry, (name, columns) in zip(table, importance.items(), strict=False):
            kept.append((ctypes.c_float * columns)(*[1.0] * columns))
            entry.name, entry.data, entry.size = name.encode(), kept[-1], columns
        settings.imatrix = table
    return int(llama_cpp.llama_model_quantize(str(source).encode(), str(target).encode(), settings)) == 0


def widen(source: Path, target: Path) -> bool:
    """llama.cpp's own decoding of a file's weights: written as float32; whether it did."""
    llama_cpp.llama_log_set(_silence, ctypes.c_void_p(0))
    settings = llama_cpp.llama_model_quantize_default_params()
    settings.ftype, settings.nthread, settings.allow_requantize = llama_cpp.LLAMA_FTYPE_ALL_F32, 1, True
    return int(llama_cpp.llama_model_quantize(str(source).encode(), str(target).encode(), settings)) == 0
