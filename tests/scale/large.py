"""Llama-like checkpoints of any size, for runs under a memory limit (tests/scale/run.sh).

python tests/scale/large.py FOLDER --gb 60     the widths of the 70 B model; tensors are holes, which read as zeros and take
                                               no room
python tests/scale/large.py FOLDER --drawn     the shape of a model of 1.1 B parameters, drawn weights, with a tokenizer
"""

from __future__ import annotations

import argparse
import json
import sysconfig
from pathlib import Path
from typing import Any

import numpy as np

from nybble.files.safetensors import layout

SHARD_BYTES = 5 * 10**9


def sparse_config(gigabytes: float) -> dict[str, Any]:
    """config.json of a Llama of about so many gigabytes in bfloat16, with the widths of the 70 B model."""
    hidden, inner, vocabulary, heads, key_heads = 8192, 28672, 128256, 64, 8
    keys = hidden // heads * key_heads
    block = 2 * hidden * hidden + 2 * hidden * keys + 3 * hidden * inner
    layers = max(1, round((gigabytes * 1e9 / 2 - 2 * vocabulary * hidden) / block))
    return config(hidden, inner, layers, heads, key_heads, vocabulary)


def drawn_config(layers: int = 22) -> dict[str, Any]:
    """config.json of the shape of TinyLlama, 1.1 B parameters."""
    return config(2048, 5632, layers, 32, 4, 32000)


def config(hidden: int, inner: int, layers: int, heads: int, key_heads: int, vocabulary: int) -> dict[str, Any]:
    """config.json of a Llama."""
    return {
        "architectures": ["LlamaForCausalLM"],
        "model_type": "llama",
        "hidden_size": hidden,
        "intermediate_size": inner,
        "num_hidden_layers": layers,
        "num_attention_heads": heads,
        "num_key_value_heads": key_heads,
        "vocab_size": vocabulary,
        "max_position_embeddings": 8192,
        "rms_norm_eps": 1e-5,
        "rope_theta": 500000.0,
        "hidden_act": "silu",
        "tie_word_embeddings": False,
        "torch_dtype": "bfloat16",
    }


def shapes(config: dict[str, Any]) -> dict[str, tuple[int, ...]]:
    """Name -> shape of every tensor."""
    hidden, inner = config["hidden_size"], config["intermediate_size"]
    keys = hidden // config["num_attention_heads"] * config["num_key_value_heads"]
    found: dict[str, tuple[int, ...]] = {"model.embed_tokens.weight": (config["vocab_size"], hidden)}
    for i in range(config["num_hidden_layers"]):
        at = f"model.layers.{i}"
        for name, rows, columns in (
            ("self_attn.q_proj", hidden, hidden),
            ("self_attn.k_proj", keys, hidden),
            ("self_attn.v_proj", keys, hidden),
            ("self_attn.o_proj", hidden, hidden),
            ("mlp.gate_proj", inner, hidden),
            ("mlp.up_proj", inner, hidden),
            ("mlp.down_proj", hidden, inner),
        ):
            found[f"{at}.{name}.weight"] = (rows, columns)
        found[f"{at}.input_layernorm.weight"] = found[f"{at}.post_attention_layernorm.weight"] = (hidden,)
    return {**found, "model.norm.weight": (hidden,), "lm_head.weight": (config["vocab_size"], hidden)}


def make(folder: Path, config: dict[str, Any], shard_bytes: int = SHARD_BYTES, drawn: bool = False) -> int:
    """Make the folder; returns the bytes that its tensors seem to take. They are zero, or `drawn`."""
    folder.mkdir(parents=True)
    shards: list[dict[str, tuple[int, ...]]] = [{}]
    taken = 0
    for name, shape in shapes(config).items():
        size = 2 * shape[0] * (shape[1] if len(shape) > 1 else 1)
        if taken + size > shard_bytes and shards[-1]:
            shards.append({})
            taken = 0
        shards[-1][name] = shape
        taken += size
    places, total = {}, 0
    for i, shard in enumerate(shards):
        file = f"model-{i + 1:05}-of-{len(shards):05}.safetensors"
        head, where = layout({name: ("BF16", shape) for name, shape in shard.items()}, {"format": "pt"})
        with open(folder / file, "wb") as out:
            out.write(head)
            out.truncate(len(head) + sum(length for _, length in where.values()))
            if drawn:
                for name, (start, _) in where.items():
                    out.seek(start)
                    draw(out, shard[name], np.random.default_rng([*name.encode()]))
        places.update(dict.fromkeys(shard, file))
        total += sum(length for _, length in where.values())
    index = {"metadata": {"total_size": total}, "weight_map": places}
    (folder / "model.safetensors.index.json").write_text(json.dumps(index, indent=1), encoding="utf-8")
    (folder / "config.json").write_text(json.dumps(config, indent=1), encoding="utf-8")
    return total


def draw(out: Any, shape: tuple[int, ...], chance: np.random.Generator) -> None:
    """Write a tensor in bfloat16: gains of 1, matrices of a spread that keeps hidden states in bounds."""
    if len(shape) == 1:
        out.write((np.ones(shape, np.float32).view(np.uint32) >> 16).astype("<u2").tobytes())
        return
    for start in range(0, shape[0], 1024):
        rows = chance.standard_normal((min(1024, shape[0] - start), shape[1]), np.float32) * np.float32(0.02)
        out.write((rows.view(np.uint32) >> 16).astype("<u2").tobytes())


def text() -> str:
    """Some text, which every Python brings along."""
    return "\n\n".join(path.read_text(encoding="utf-8") for path in sorted(Path(sysconfig.get_path("stdlib")).glob("*.py"))[:60])


def main() -> None:
    """From the command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", type=Path)
    parser.add_argument("--gb", type=float, default=60)
    parser.add_argument("--drawn", action="store_true")
    parser.add_argument("--layers", type=int, default=22, help="of the drawn one")
    given = parser.parse_args()
    if not given.drawn:
        total = make(given.folder, sparse_config(given.gb))
        print(f"{given.folder}: {total / 1e9:.1f} GB, none of it on the disk")
        return
    from nybble.train.start import make_tokenizer  # imports torch

    total = make(given.folder, drawn_config(given.layers), drawn=True)
    make_tokenizer([text()], 4096).save_pretrained(given.folder)
    (given.folder / "calibration.txt").write_text(text(), encoding="utf-8")
    print(f"{given.folder}: {total / 1e9:.1f} GB")


if __name__ == "__main__":
    main()
