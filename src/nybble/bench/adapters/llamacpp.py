"""llama.cpp through llama-cpp-python's low-level calls: the least Python a token that a Python caller can have.

F16 is written by nybble; llama.cpp's own quantizer makes Q8_0 and Q4_0 of it, with its default choice of
types (Q4_0 keeps a head, or a table tied to it, in Q6_K where the width allows).
"""

from __future__ import annotations

import ctypes
import importlib
from pathlib import Path
from typing import Any

from nybble.bench.adapters import Adapter, Runtime
from nybble.errors import InputError, MeasureError

TYPES = {"Q8_0": "LLAMA_FTYPE_MOSTLY_Q8_0", "Q4_0": "LLAMA_FTYPE_MOSTLY_Q4_0"}
CACHE_BYTES = 2  # llama.cpp's default cache is float16
CELLS = 256
"""A context is a multiple of this many positions."""


def _library() -> Any:
    return importlib.import_module("llama_cpp")


class LlamaCppAdapter(Adapter):
    """llama.cpp on GGUF files."""

    formats = ("F16", "Q8_0", "Q4_0")
    install = "llama-cpp-python gguf"
    modules = ("llama_cpp", "gguf")
    half = "F16.gguf"

    def __init__(self) -> None:
        self._silence: Any = None

    def file_for(self, format: str, float_tag: str) -> str | None:
        return f"{format}.gguf"

    def make(self, source: Path, target: Path, format: str, threads: int) -> None:
        self.start(threads)
        llama = _library()
        settings = llama.llama_model_quantize_default_params()
        settings.ftype, settings.nthread = getattr(llama, TYPES[format]), threads
        if llama.llama_model_quantize(str(source).encode(), str(target).encode(), settings) != 0:
            raise InputError(f"llama.cpp could not write this model as {format}")

    def start(self, threads: int) -> None:
        llama = _library()
        self._silence = llama.llama_log_callback(lambda level, text, user: None)  # kept: the library holds no reference
        llama.llama_log_set(self._silence, ctypes.c_void_p(0))
        llama.llama_backend_init()

    def load(self, path: Path, format: str, threads: int, exact: bool) -> Runtime:
        return LlamaCpp(path, threads)


class LlamaCpp(Runtime):
    """One model, and a context for as many sequences as were asked for last."""

    def __init__(self, path: Path, threads: int) -> None:
        self._llama, self._numpy = _library(), importlib.import_module("numpy")
        self._path, self._threads = path, threads
        self._model = self._llama.llama_model_load_from_file(str(path).encode(), self._llama.llama_model_default_params())
        if not self._model:
            raise MeasureError(f"llama.cpp cannot load {path.name}")
        self._vocabulary = self._llama.llama_vocab_n_tokens(self._llama.llama_model_get_vocab(self._model))
        self._context: Any = None
        self._rows, self._room = 0, 0

    def generate(self, prompts: list[list[int]], new_tokens: int) -> list[list[int]]:
        context = self._empty_context(len(prompts), len(prompts[0]) + new_tokens)
        rows, start = prompts, 0
        done: list[list[int]] = [[] for _ in prompts]
        for _ in range(new_tokens):
            chosen = self._step(context, rows, start)
            start += len(rows[0])
            rows = [[token] for token in chosen]
            for row, token in zip(done, chosen, strict=True):
                row.append(token)
        return done

    def prefill(self, ids: list[int]) -> None:
        self._step(self._empty_context(1, len(ids)), [ids], 0)

    def _empty_context(self, rows: int, tokens: int) -> Any:
        """A context for `rows` sequences of `tokens` positions, its cache empty."""
        llama = self._llama
        if rows != self._rows or tokens > self._room:
            if self._context:
                llama.llama_free(self._context)
            self._rows, self._room = rows, -(-tokens // CELLS) * CELLS
            settings = llama.llama_context_default_params()
            settings.n_ctx, settings.n_seq_max = rows * self._room, rows
            settings.n_batch = settings.n_ubatch = max(self._room, rows * CELLS // 4)
            settings.n_threads = settings.n_threads_batch = self._threads
            self._context = llama.llama_init_from_model(self._model, settings)
            if not self._context:
                raise MeasureError(f"llama.cpp made no context for {rows} sequences of {self._room} tokens")
        llama.llama_memory_clear(llama.llama_get_memory(self._context), False)
        return self._context

    def _step(self, context: Any, rows: list[list[int]], start: int) -> list[int]:
        """Run rows[i] from position `start` on; the likeliest next token of each row."""
        llama = self._llama
        batch = llama.llama_batch_init(sum(map(len, rows)), 0, 1)
        places = []
        for row, ids in enumerate(rows):
            for i, token in enumerate(ids):
                at = batch.n_tokens
                batch.token[at], batch.pos[at] = token, start + i
                batch.n_seq_id[at], batch.seq_id[at][0] = 1, row
                batch.logits[at] = i == len(ids) - 1
                batch.n_tokens += 1
            places.append(batch.n_tokens - 1)
        code = llama.llama_decode(context, batch)
        llama.llama_batch_free(batch)
        if code != 0:
            raise MeasureError(f"llama_decode gave code {code} for {len(rows)} sequences at position {start}")
        as_array = self._numpy.ctypeslib.as_array
        logits = (as_array(llama.llama_get_logits_ith(context, at), (self._vocabulary,)) for at in places)
        return [int(row.argmax()) for row in logits]

    def facts(self) -> dict[str, Any]:
        gguf: Any = importlib.import_module("gguf")
        tensors = {tensor.name: tensor for tensor in gguf.GGUFReader(self._path).tensors}
        tables = ["position_embd.weight"] + (["token_embd.weight"] if "output.weight" in tensors else [])
        token_bytes = sum(int(tensor.n_bytes) for tensor in tensors.values())
        for name in tables:
            if name in tensors:
                token_bytes -= int(tensors[name].n_bytes) - int(tensors[name].n_bytes) // int(tensors[name].shape[1])
        return {
            "weight_bytes": self._path.stat().st_size,
            "token_bytes": token_bytes,
            "cache_element_bytes": CACHE_BYTES,
            "version": self._llama.__version__,
        }


ADAPTER = LlamaCppAdapter()
