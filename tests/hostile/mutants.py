"""The valid models that are mutated, and the mutant of a number."""

from __future__ import annotations

import contextlib
import functools
import math
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from random import Random

import good
import mutate

KINDS = {"gguf": 8, "safetensors": 4, "index": 2, "config": 4, "weights": 2}
"""Share of each kind: `weights` are the safetensors files of quantized folders."""
LAYERS = 2
"""Of the folders: few, so that a mutant takes a millisecond."""
WHOLE = ("float", "nybble")
"""Folders that are whole models, for the engine."""
SPREAD = [kind for kind, share in KINDS.items() for _ in range(share)]


@dataclass
class Seed:
    """A valid model, the file of it that is mutated, and how."""

    kind: str
    folder: Path
    file: str
    data: bytes
    mutate: Callable[[bytes, Random], bytes]

    @property
    def opened(self) -> Path:
        """What is opened: the file itself, or the folder."""
        return self.folder / self.file if self.kind in ("gguf", "safetensors") else self.folder


def make_seeds(root: Path) -> dict[str, list[Seed]]:
    """Every valid model, in folders below `root`."""
    seeds: dict[str, list[Seed]] = {kind: [] for kind in KINDS}

    def add(kind: str, folder: Path, file: str, change: Callable[[bytes, Random], bytes]) -> None:
        seeds[kind].append(Seed(kind, folder, file, (folder / file).read_bytes(), change))

    small = good.gguf_model(dict.fromkeys(good.TOKENIZER_KEYS))
    for i, data in enumerate((good.gguf_model(), small)):
        fields, head = mutate.gguf_fields(data)
        folder = root / f"gguf{i}"
        folder.mkdir()
        (folder / "model.gguf").write_bytes(data)
        keys = None if data is not small else dict.fromkeys(good.TOKENIZER_KEYS)
        change = functools.partial(change_gguf, keys=keys, fields=fields, head=head, other=small)
        add("gguf", folder, "model.gguf", change)
    single = root / "safetensors"
    single.mkdir()
    header = {
        "__metadata__": {"format": "pt"},
        "a": good.entry(),
        "b": good.entry("F16", (2, 3), (4, 16)),
        "c": good.entry("BOOL", (), (16, 17)),
    }
    (single / "model.safetensors").write_bytes(good.safetensors(header, bytes(17)))
    add("safetensors", single, "model.safetensors", mutate.edit_header)
    good.write_shards(root / "index", LAYERS)
    add("index", root / "index", "model.safetensors.index.json", mutate.edit)
    folders = [good.write_folder(root / name, name, len(good.LINEARS) if name in WHOLE else LAYERS) for name in good.VARIANTS]
    texts = tuple((folder / "config.json").read_bytes() for folder in folders)
    for folder in folders:
        add("config", folder, "config.json", functools.partial(mutate.edit, others=texts))
        add("weights", folder, "model.safetensors", mutate.edit_header)
    return seeds


def change_gguf(
    data: bytes, random: Random, keys: Mapping[str, None] | None, fields: list[int], head: int, other: bytes
) -> bytes:
    """A GGUF file with its bytes damaged, or made anew with other keys and tensors."""
    if random.random() < 0.5:
        return mutate.damage(data, random, head, fields, (other,))
    changed: dict[str, tuple[int, bytes] | None] = dict(keys or {})
    names = [
        *good.MODEL_KEYS,
        "llama.rope.scaling.type",
        "llama.expert_count",
        "nybble.config",
        "general.alignment",
        "split.count",
    ]
    for _ in range(random.choice((0, 1, 1, 1, 2))):
        changed[random.choice(names)] = None if random.random() < 0.1 else mutate.gguf_value(random)
    tensors = good.model_tensors()
    for _ in range(random.choice((0, 0, 1, 1, 2))):
        place = random.randrange(len(tensors))
        name, dims, kind = tensors[place].name, tensors[place].dims, random.choice((tensors[place].type, *good.SIZES))
        if random.random() < 0.5:
            dims = tuple(random.choice((*dims, 1, 2, 31, 32, 64, 96, 128)) for _ in range(random.choice((1, 2, 2, 3))))
        if random.random() < 0.2:
            name = random.choice([tensor.name for tensor in tensors] + ["../x", "rope_freqs.weight", "blk.1.attn_q.weight"])
        blocks, size = good.SIZES[kind]
        raw = random.randbytes(math.prod(dims) // blocks * size) if random.random() < 0.5 else good.tensor_bytes(dims, kind)
        tensors[place] = good.Tensor(name, dims, kind, raw)
    if random.random() < 0.1:
        del tensors[random.randrange(len(tensors))]
    return good.gguf_model(changed, tensors)


def mutant(seeds: dict[str, list[Seed]], seed: int, index: int) -> tuple[Seed, bytes]:
    """The mutant of a number: what it is made of, and its bytes."""
    random = Random(f"{seed}:{index}")
    kind = SPREAD[index % len(SPREAD)]
    chosen = random.choice(seeds[kind])
    return chosen, chosen.mutate(chosen.data, random)


@contextlib.contextmanager
def in_place(seed: Seed, data: bytes) -> Iterator[None]:
    """The mutant stands where the valid file stood; that comes back."""
    path = seed.folder / seed.file
    path.unlink()
    path.write_bytes(data)
    yield
    if seed.opened == seed.folder:
        path.unlink()
        path.write_bytes(seed.data)
