"""How near `nybble quantize` comes to what the disk and the rounding kernels allow, from a cold cache.

A Llama-like checkpoint of random bfloat16 is written once. Every round measures, one after another:

    disk     the checkpoint read from a cold cache, 8 MB at a time, nothing done with it
    kernel   the same number of weights widened, rounded and packed from memory, in as many threads
    run      `nybble quantize` as a process of its own, from a cold cache, start, syncs and reading back included

The ratio is the time of the slower of the first two over that of the run: 1 is a run that costs nothing beside them.

Run: .venv/bin/python bench/streaming.py FOLDER [--gb 4] [--to int4:g64] [--rounds 3] [--threads 2]
"""

from __future__ import annotations

import argparse
import json
import os
import shutil
import subprocess
import sys
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from statistics import median

import numpy as np

from nybble.containers.streaming import ROWS_WEIGHTS
from nybble.files.safetensors import layout, widen
from nybble.formats import parse_format
from nybble.methods import parse_method

HIDDEN, INNER, VOCABULARY = 4096, 11008, 32000
READ_BYTES = 1 << 23


def make(folder: Path, gigabytes: float) -> None:
    """Random bfloat16 weights in the shape of a Llama of 7 B parameters, with fewer blocks."""
    block = 4 * HIDDEN * HIDDEN + 3 * HIDDEN * INNER
    layers = max(1, round((gigabytes * 5e8 - 2 * VOCABULARY * HIDDEN) / block))
    shapes: dict[str, tuple[int, ...]] = {"model.embed_tokens.weight": (VOCABULARY, HIDDEN)}
    for i in range(layers):
        for name in ("q_proj", "k_proj", "v_proj", "o_proj"):
            shapes[f"model.layers.{i}.self_attn.{name}.weight"] = (HIDDEN, HIDDEN)
        for name in ("gate_proj", "up_proj"):
            shapes[f"model.layers.{i}.mlp.{name}.weight"] = (INNER, HIDDEN)
        shapes[f"model.layers.{i}.mlp.down_proj.weight"] = (HIDDEN, INNER)
        for name in ("input_layernorm", "post_attention_layernorm"):
            shapes[f"model.layers.{i}.{name}.weight"] = (HIDDEN,)
    shapes |= {"model.norm.weight": (HIDDEN,), "lm_head.weight": (VOCABULARY, HIDDEN)}
    folder.mkdir(parents=True)
    config = {
        "architectures": ["LlamaForCausalLM"], "model_type": "llama", "hidden_size": HIDDEN, "intermediate_size": INNER,
        "num_hidden_layers": layers, "num_attention_heads": 32, "num_key_value_heads": 32, "vocab_size": VOCABULARY,
        "max_position_embeddings": 4096, "rms_norm_eps": 1e-5, "hidden_act": "silu", "tie_word_embeddings": False,
        "torch_dtype": "bfloat16",
    }  # fmt: skip
    (folder / "config.json").write_text(json.dumps(config), encoding="utf-8")
    head, places = layout({name: ("BF16", shape) for name, shape in shapes.items()}, {"format": "pt"})
    random = np.random.default_rng(0)
    values = (random.standard_normal(1 << 22, dtype=np.float32) * np.float32(0.02)).view(np.uint32) >> np.uint32(16)
    piece = values.astype(np.uint16)
    with open(folder / "model.safetensors", "wb") as out:
        out.write(head)
        for _, length in places.values():
            for start in range(0, length // 2, len(piece)):
                out.write(np.roll(piece, start % 9973)[: length // 2 - start].tobytes())
        out.flush()
        os.fsync(out.fileno())


def forget(path: Path) -> None:
    """Have the system drop what it holds of a file."""
    with open(path, "rb") as file:
        os.fsync(file.fileno())
        os.posix_fadvise(file.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)


def disk(path: Path) -> float:
    """Seconds to read a file from the disk."""
    forget(path)
    buffer = bytearray(READ_BYTES)
    began = time.perf_counter()
    with open(path, "rb", buffering=0) as file:
        while file.readinto(buffer):
            pass
    return time.perf_counter() - began


def kernel(weights: int, spec: str, threads: int) -> float:
    """Seconds to widen, round and pack so many weights that are in memory."""
    fmt, method = parse_format(spec), parse_method("rtn")
    rows = ROWS_WEIGHTS // HIDDEN
    values = np.random.default_rng(1).integers(0x3A00, 0x3D00, (rows, HIDDEN)).astype(np.uint16)

    def one(_: int) -> None:
        method.quantize(widen("BF16", values, ""), fmt).stored()

    one(0)
    count = -(-weights // values.size)
    began = time.perf_counter()
    with ThreadPoolExecutor(threads) as pool:
        list(pool.map(one, range(count)))
    return (time.perf_counter() - began) * weights / (count * values.size)


def run(folder: Path, target: Path, spec: str, threads: int) -> float:
    """Seconds of the command."""
    shutil.rmtree(target, ignore_errors=True)
    forget(folder / "model.safetensors")
    command = [
        sys.executable,
        "-m",
        "nybble",
        "quantize",
        str(folder),
        "--to",
        spec,
        "--threads",
        str(threads),
        "-o",
        str(target),
    ]
    began = time.perf_counter()
    subprocess.run(command, check=True, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    return time.perf_counter() - began


def main() -> None:
    """Measure and print a table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", type=Path)
    parser.add_argument("--gb", type=float, default=4)
    parser.add_argument("--to", default="int4:g64")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--threads", type=int, default=min(4, os.cpu_count() or 1))
    given = parser.parse_args()
    source = given.folder / "source"
    if not source.exists():
        make(source, given.gb)
    file = source / "model.safetensors"
    size = file.stat().st_size
    found = []
    for _ in range(given.rounds):
        reading, rounding = disk(file), kernel(size // 2, given.to, given.threads)
        found.append((reading, rounding, run(source, given.folder / "out", given.to, given.threads)))
    times = [median(each) for each in zip(*found, strict=True)]
    print(f"{size / 1e9:.2f} GB of bfloat16 to {given.to}, {given.threads} threads, median of {given.rounds}\n")
    print("| | s | GB/s |\n|---|--:|--:|")
    for name, seconds in zip(("disk", "kernel", "run"), times, strict=True):
        print(f"| {name} | {seconds:.2f} | {size / seconds / 1e9:.2f} |")
    ratios = [max(a, b) / c for a, b, c in found]
    print(f"\nratio {median(ratios):.2f} ({min(ratios):.2f} to {max(ratios):.2f})")
    shutil.rmtree(given.folder / "out", ignore_errors=True)


if __name__ == "__main__":
    main()
