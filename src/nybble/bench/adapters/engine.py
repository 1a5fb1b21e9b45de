"""nybble's own engine (`nybble.engine.Decoder`), on folders that nybble wrote with rounding to nearest (`rtn`).

Speed does not depend on the method that chose the codes, so the quickest one makes the files.
"""

from __future__ import annotations

import importlib
from pathlib import Path
from typing import Any

from nybble.bench.adapters import Adapter, Runtime

TAGS = {"fp32": "F32", "fp16": "F16", "bf16": "BF16"}
CACHE_BYTES = 2  # the Decoder's default cache is float16


def packed_file(format: str, float_tag: str) -> str | None:
    """Folder name of a format written by nybble; None for the type that the float folder has already."""
    return None if TAGS.get(format) == float_tag else "nybble-" + format.replace(":", "-").replace(",", "-")


def write_packed(source: Path, target: Path, format: str, threads: int) -> None:
    """Quantize the float folder `source` to `format` and save it as the folder `target`."""
    import torch

    import nybble

    torch.set_num_threads(threads)
    nybble.quantize(source, format).save(target)


class EngineAdapter(Adapter):
    """nybble's engine; any format that nybble writes."""

    formats = ("fp32", "fp16", "int8:channel", "int4:g32", "nf4:g64")
    install = "nybble"
    modules = ("nybble.engine",)

    def file_for(self, format: str, float_tag: str) -> str | None:
        return packed_file(format, float_tag)

    def make(self, source: Path, target: Path, format: str, threads: int) -> None:
        write_packed(source, target, format, threads)

    def start(self, threads: int) -> None:
        importlib.import_module("nybble.engine")

    def load(self, path: Path, format: str, threads: int, exact: bool) -> Runtime:
        return Engine(path, threads, exact)


class Engine(Runtime):
    """A Decoder with the calls that a race makes."""

    def __init__(self, path: Path, threads: int, exact: bool) -> None:
        engine: Any = importlib.import_module("nybble.engine")
        self._path = path
        self._decoder = engine.Decoder.load(path, threads=threads, exact=exact)

    def generate(self, prompts: list[list[int]], new_tokens: int) -> list[list[int]]:
        options: dict[str, Any] = {"max_new_tokens": new_tokens, "stop_tokens": ()}
        if len(prompts) == 1:
            return [self._decoder.generate(prompts[0], **options)]
        return list(self._decoder.generate_batch(prompts, **options))

    def prefill(self, ids: list[int]) -> None:
        self._decoder.prefill(ids)

    def facts(self) -> dict[str, Any]:
        from nybble.bench.traffic import bytes_of_folder
        from nybble.version import __version__

        _, token_bytes = bytes_of_folder(self._path)
        weight_bytes = int(self._decoder.weight_bytes)
        return {
            "weight_bytes": weight_bytes,
            "token_bytes": token_bytes,
            "cache_element_bytes": CACHE_BYTES,
            "version": __version__,
        }


ADAPTER = EngineAdapter()
