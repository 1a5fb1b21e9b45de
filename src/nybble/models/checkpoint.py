"""A Hugging Face model folder on disk: found, checked and hashed before any library is let near it. No torch."""

from __future__ import annotations

import math
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from blake3 import blake3
from numpy.typing import NDArray

from nybble.errors import FileFormatError, InputError, OutputError, shown
from nybble.files.json_strict import MAX_BYTES, parse_object, read_object
from nybble.files.opening import read_bytes
from nybble.files.safetensors import SafetensorsFile, forget_pages
from nybble.models.config_check import check_config

INDEX = "model.safetensors.index.json"
SHARD = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]{0,200}\.safetensors")
"""What an index may name: one part of a path, of signs that no file system reads anything into."""
EXTRAS = (
    "generation_config.json",
    "tokenizer.json",
    "tokenizer_config.json",
    "special_tokens_map.json",
    "added_tokens.json",
    "vocab.json",
    "merges.txt",
    "vocab.txt",
    "tokenizer.model",
    "chat_template.jinja",
)
"""Files that go along with the weights, whatever becomes of those."""
DIGEST_WEIGHTS = 1 << 18
LARGEST_EXTRA = 1 << 28
"""Bytes of one of them: the largest tokenizers have a tenth of it."""


@dataclass(frozen=True)
class Checkpoint:
    """A checked model folder."""

    folder: Path
    config: dict[str, Any]
    files: tuple[Path, ...]
    """Its safetensors files, complete and well-formed."""

    @property
    def name(self) -> str:
        return self.folder.resolve().name

    @property
    def bytes(self) -> int:
        return sum(f.stat().st_size for f in self.files)

    @property
    def float_tag(self) -> str:
        """Type that its float tensors are stored in, by config.json: F32, F16 or BF16."""
        stated = str(self.config.get("dtype") or self.config.get("torch_dtype") or "float32")
        return {"float16": "F16", "bfloat16": "BF16"}.get(stated, "F32")

    def digest(self) -> str:
        """BLAKE3 over config.json and all tensors, wherever they lie."""
        found = {}
        for file in map(SafetensorsFile, self.files):
            for name, entry in file.entries.items():
                found[name] = entry.dtype, entry.shape, row_digests(file.read(name))
                forget_pages()
        return tensors_digest(self.folder, found)


def digest_rows(shape: tuple[int, ...]) -> int:
    """Rows that are hashed together: runs of them can be hashed in any order, and by several threads."""
    return max(1, DIGEST_WEIGHTS // max(1, math.prod(shape[1:])))


def row_digests(values: NDArray[Any]) -> list[str]:
    """BLAKE3 of every run of `digest_rows` rows of a tensor, or of some rows of one that begin with such a run."""
    values = values.reshape(1) if values.ndim == 0 else values
    step = digest_rows(values.shape)
    runs = (values[start : start + step] for start in range(0, len(values), step))
    return [blake3(np.ascontiguousarray(run).reshape(-1).view(np.uint8).data).hexdigest() for run in runs]


def tensors_digest(folder: Path, tensors: Mapping[str, tuple[str, tuple[int, ...], Sequence[str]]]) -> str:
    """BLAKE3 of a checkpoint, given the digests of each tensor's rows: name -> (dtype tag, shape, `row_digests`)."""
    digest = blake3(read_bytes(folder / "config.json", MAX_BYTES))
    for name, (tag, shape, runs) in sorted(tensors.items()):
        digest.update(f"{name} {tag} {list(shape)} {' '.join(runs)}\n".encode())
    return digest.hexdigest()


def open_checkpoint(folder: str | Path) -> Checkpoint:
    """Check a model folder: config.json, and every safetensors file against its header and index.

    Raises InputError for what is missing (and says what was looked for), FileFormatError for what is broken.
    """
    folder = Path(folder)
    if not folder.exists():
        raise InputError(f"no model folder {folder}; give a folder with config.json and *.safetensors, or a hub name")
    if not folder.is_dir():
        raise InputError(f"{folder} is a file; give the folder that holds config.json and *.safetensors")
    config = read_json(folder / "config.json")
    if "model_type" not in config:
        raise FileFormatError(f"{folder / 'config.json'} has no model_type, so the architecture is unknown")
    check_config(config, folder / "config.json")
    return Checkpoint(folder, config, tuple(_weight_files(folder)))


def unpickle_folder(folder: str | Path, target: str | Path) -> Path:
    """Make, in an existing empty folder, a checkpoint with safetensors of one that has its weights in *.bin files; returns
    `target`. Raises InputError and FileFormatError as `open_checkpoint` and `pickled_to_safetensors`, OutputError."""
    from nybble.files.pickled import pickled_to_safetensors  # starts processes, which nothing else here needs

    folder, target = Path(folder), Path(target)
    config = read_bytes(folder / "config.json", MAX_BYTES)
    check_config(parse_object(config, folder / "config.json"), folder / "config.json")
    pickled_to_safetensors(folder, target)
    for name in EXTRAS:
        if (folder / name).is_file():
            _copy(read_bytes(folder / name, LARGEST_EXTRA), target / name)
    _copy(config, target / "config.json")
    return target


def _copy(content: bytes, path: Path) -> None:
    try:
        path.write_bytes(content)
    except OSError as error:
        raise OutputError(f"cannot write {path}: {error.strerror or error}") from error


def check_tokenizer(folder: str | Path) -> None:
    """Raise InputError when a folder has no tokenizer file at all: known before anything is loaded."""
    if not any((Path(folder) / f).is_file() for f in ("tokenizer.json", "vocab.json", "tokenizer.model", "vocab.txt")):
        raise InputError(f"{folder} has no tokenizer (tokenizer.json); copy it there from the model's source")


def check_float(checkpoint: Checkpoint) -> None:
    """Raise InputError for a quantized folder where a float model is needed."""
    if "quantization_config" in checkpoint.config:
        raise InputError(f"{checkpoint.folder} is quantized already; give the float model that it was made from")


def is_causal(config: Mapping[str, Any]) -> bool:
    """Whether a config.json is of a model that predicts the next token."""
    name = (config.get("architectures") or [""])[0]
    return name.endswith(("ForCausalLM", "LMHeadModel"))


def read_json(path: Path) -> dict[str, Any]:
    """A JSON object from a file. Raises InputError when it cannot be read, FileFormatError when it is no JSON object."""
    return read_object(path)


def _weight_files(folder: Path) -> list[Path]:
    """The safetensors files of a folder, each checked. Raises InputError and FileFormatError as `open_checkpoint`."""
    if (folder / INDEX).is_file():
        return _indexed(folder)
    if (folder / "model.safetensors").is_file():
        SafetensorsFile(folder / "model.safetensors")
        return [folder / "model.safetensors"]
    if any(folder.glob("*.bin")) or any(folder.glob("*.pt")):
        raise InputError(
            f"{folder} has only pickled weights (*.bin), which can run code in programs that load them; "
            "nybble convert --allow-pickle makes safetensors of them without"
        )
    raise InputError(f"{folder} has no model.safetensors and no {INDEX}")


def _indexed(folder: Path) -> list[Path]:
    """The shards that an index names: files of the folder, which hold the tensors that it says, and no others."""
    index = folder / INDEX
    places = read_json(index).get("weight_map")
    if not isinstance(places, dict) or not places:
        raise FileFormatError(f"{index} names no shard")
    for name, shard in places.items():
        if not isinstance(shard, str) or not SHARD.fullmatch(shard):
            raise FileFormatError(
                f"{index} names {shown(shard)} for tensor {shown(name)}; a shard is a *.safetensors file of the same folder"
            )
    shards = sorted(set(places.values()))
    if shards != ["model.safetensors"] and (folder / "model.safetensors").exists():
        raise FileFormatError(f"{folder} holds model.safetensors beside an index of other files; remove what does not belong")
    held: dict[str, str] = {}
    for shard in shards:
        if not (folder / shard).is_file():
            raise InputError(f"{folder} lacks shard {shard}, which its index names; the download is incomplete")
        for name in SafetensorsFile(folder / shard).entries:
            if places.get(name) != shard:
                said = f"says is in {places[name]}" if name in places else "does not name"
                raise FileFormatError(f"{folder / shard} holds tensor {shown(name)}, which {INDEX} {said}")
            held[name] = shard
    for name, shard in places.items():
        if name not in held:
            raise FileFormatError(f"{folder / shard} lacks tensor {shown(name)}, which {INDEX} says it holds")
    return [folder / shard for shard in shards]
