"""A Hugging Face model folder on disk: found, checked and hashed before any library is let near it. No torch."""

from __future__ import annotations

import json
from dataclasses import dataclass
from hashlib import sha256
from pathlib import Path
from typing import Any

from nybble.errors import FileFormatError, InputError
from nybble.files.safetensors import SafetensorsFile, file_sha256

INDEX = "model.safetensors.index.json"
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

    def sha256(self) -> str:
        """SHA-256 over config.json and all weight files in order."""
        digest = sha256((self.folder / "config.json").read_bytes())
        for file in self.files:
            digest.update(file_sha256(file).encode())
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
    for key in ("auto_map", "trust_remote_code"):
        if key in config:
            raise InputError(f"{folder / 'config.json'} asks to run code of its own ({key}); nybble never does: remove it")
    files = _weight_files(folder)
    for file in files:
        SafetensorsFile(file)
    return Checkpoint(folder, config, tuple(files))


def check_tokenizer(folder: str | Path) -> None:
    """Raise InputError when a folder has no tokenizer file at all: known before anything is loaded."""
    if not any((Path(folder) / f).is_file() for f in ("tokenizer.json", "vocab.json", "tokenizer.model", "vocab.txt")):
        raise InputError(f"{folder} has no tokenizer (tokenizer.json); copy it there from the model's source")


def check_float(checkpoint: Checkpoint) -> None:
    """Raise InputError for a quantized folder where a float model is needed."""
    if "quantization_config" in checkpoint.config:
        raise InputError(f"{checkpoint.folder} is quantized already; give the float model that it was made from")


def is_causal(config: dict[str, Any]) -> bool:
    """Whether a config.json is of a model that predicts the next token."""
    name = (config.get("architectures") or [""])[0]
    return name.endswith(("ForCausalLM", "LMHeadModel"))


def read_json(path: Path) -> dict[str, Any]:
    """A JSON object from a file. Raises InputError when it cannot be read, FileFormatError when it is no JSON object."""
    try:
        return parse_json(path.read_bytes(), path)
    except OSError as error:
        raise InputError(f"cannot read {path}: {error.strerror or error}") from error


def parse_json(content: bytes, path: Path) -> dict[str, Any]:
    """A JSON object from the bytes of a file. Raises FileFormatError, naming `path`, when they are no JSON object."""
    try:
        value = json.loads(content.decode("utf-8"))
    except (ValueError, RecursionError) as error:
        raise FileFormatError(f"{path} is not JSON: {error}") from error
    if not isinstance(value, dict):
        raise FileFormatError(f"{path} holds a {type(value).__name__}, not an object")
    return value


def _weight_files(folder: Path) -> list[Path]:
    if (folder / INDEX).is_file():
        shards = read_json(folder / INDEX).get("weight_map", {})
        names = sorted(set(shards.values())) if isinstance(shards, dict) else []
        if not names:
            raise FileFormatError(f"{folder / INDEX} names no shard")
        for name in names:
            if not isinstance(name, str) or Path(name).name != name or not name.endswith(".safetensors"):
                raise FileFormatError(f"{folder / INDEX} names {name!r}; a shard is a *.safetensors file of the same folder")
            if not (folder / name).is_file():
                raise InputError(f"{folder} lacks shard {name}, which its index names; the download is incomplete")
        return [folder / name for name in names]
    if (folder / "model.safetensors").is_file():
        return [folder / "model.safetensors"]
    if any(folder.glob("*.bin")) or any(folder.glob("*.pt")):
        raise InputError(f"{folder} has only pickled weights (*.bin), which can run code; convert them to safetensors first")
    raise InputError(f"{folder} has no model.safetensors and no {INDEX}")
