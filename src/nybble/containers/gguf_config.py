"""Between config.json and the keys of a GGUF file. What the keys are called follows from an architecture's table (models/arch).

`to_keys` and `to_config` are inverses in what llama.cpp knows of; the rest of a config.json (dropout, initial ranges) has no key.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from nybble.errors import FileFormatError, InputError, shown
from nybble.files.gguf_values import Value
from nybble.models.arch import Architecture, Decoding, Gguf, tables

WHOLE, FLOAT = "uint32", "float32"
LLAMA3 = {"low_freq_factor": 1.0, "high_freq_factor": 4.0, "original_max_position_embeddings": 8192}
"""What all models of Llama 3 have; a GGUF file holds only the factors that follow from it."""
IDS = {"bos": "bos_token_id", "eos": "eos_token_id", "padding": "pad_token_id"}
"""Part of a key of the tokenizer -> key of config.json."""
MOST = (1 << 31) - 1


def table_of(architecture: str, where: Path) -> Architecture:
    """The table of a value of `general.architecture`. Raises InputError, which lists those there are."""
    found = {table.gguf.architecture: table for table in tables().values() if table.gguf is not None}
    if architecture not in found:
        raise InputError(
            f"{where} is of architecture {shown(architecture)}; nybble reads GGUF files of {', '.join(sorted(found))}"
        )
    return found[architecture]


def parts_of(table: Architecture) -> tuple[Decoding, Gguf]:
    """What a table that GGUF knows has."""
    assert table.decoding is not None
    assert table.gguf is not None
    return table.decoding, table.gguf


def _keys(table: Architecture) -> dict[str, tuple[str, str]]:
    """Key without its architecture -> (key of config.json, kind), rotary positions and windows apart."""
    how, gguf = parts_of(table)
    keys = {
        "context_length": (how.context, WHOLE),
        "embedding_length": (how.width, WHOLE),
        "block_count": (how.layers, WHOLE),
        "feed_forward_length": (gguf.inner, WHOLE),
        "attention.head_count": (how.heads, WHOLE),
    }
    if gguf.shared_heads:
        keys["attention.head_count_kv"] = ("num_key_value_heads", WHOLE)
        keys["attention.key_length"] = keys["attention.value_length"] = ("head_dim", WHOLE)
    keys[f"attention.layer_norm_{'' if how.centred else 'rms_'}epsilon"] = (how.eps, FLOAT)
    return {**keys, **{key: (name, FLOAT) for key, name in gguf.keys.items()}}


def heads_of(config: Mapping[str, Any], table: Architecture, module: str) -> int:
    """Heads whose rows a matrix inside a block holds, where llama.cpp has them in another order; else 0."""
    how, gguf = parts_of(table)
    if module not in gguf.rotated:
        return 0
    heads = int(config[how.heads])
    return heads if module == how.attention_in[0] else int(config.get("num_key_value_heads") or heads)


def to_keys(config: Mapping[str, Any], table: Architecture, vocabulary: int) -> dict[str, Value]:
    """The keys of a config.json, each with its architecture before it.

    Raises InputError for a model that llama.cpp would run in another way, or not at all.
    """
    how, gguf = parts_of(table)
    check_same(config, table)
    keys: dict[str, Value] = {}
    for key, (name, kind) in _keys(table).items():
        value = _stated(config, how, gguf, name)
        if value is not None:
            keys[key] = Value(kind, int(value) if kind == WHOLE else float(np.float32(value)))
    if not how.positions:
        keys.update(_rotary_keys(config, how, gguf))
    if any(_windows(config, how)):
        window = int(config["sliding_window"])
        keys["attention.sliding_window"] = Value(WHOLE, window)
        if gguf.window == "unused":
            keys["context_length"] = Value(WHOLE, min(window, int(config[how.context])))
    keys["vocab_size"] = Value(WHOLE, vocabulary)
    return {f"{gguf.architecture}.{key}": value for key, value in keys.items()}


def _stated(config: Mapping[str, Any], how: Decoding, gguf: Gguf, name: str) -> Any:
    """A number of config.json, or what holds where it is not stated; None for a switch that is off."""
    value = config.get(name)
    if value is not None:
        return value
    if name == "num_key_value_heads":
        return config[how.heads]
    if name == "head_dim":
        return int(config[how.width]) // int(config[how.heads])
    if name == gguf.inner and name in ("n_inner",):
        return 4 * int(config[how.width])
    if name == how.eps:
        return 1e-5 if how.centred else 1e-6
    if name in gguf.keys.values():
        return None
    raise InputError(f"config.json has no {name}, which a GGUF file of {gguf.architecture} needs")


def check_same(config: Mapping[str, Any], table: Architecture) -> None:
    """Raise InputError where llama.cpp would compute something else than the model."""
    how, gguf = parts_of(table)
    for key in (how.heads, how.width, how.layers):
        if type(config.get(key)) is not int:
            raise InputError(f"config.json has {key} {shown(config.get(key))}, not a whole number; a GGUF file needs it")
    for key, value in (*how.requires, *gguf.requires):
        if config.get(key, value) != value:
            raise _other(gguf, f"with {key} {value!r} only", shown(config[key]))
    name = next((str(config[key]) for key in how.activation if config.get(key)), gguf.activations[0])
    if name not in gguf.activations:
        raise _other(gguf, f"with activation {gguf.activations[0]}", shown(name))
    windows = _windows(config, how)
    if any(windows) and not gguf.window:
        raise _other(gguf, "without a sliding window", f"sliding_window {config['sliding_window']}")
    if how.window_alternates and windows != [i % 2 == 0 for i in range(len(windows))]:
        raise _other(gguf, "with a window in every other layer", "other layer_types")
    scale = config.get(how.query_scale) if how.query_scale else None
    if scale is not None and scale != _query_scale(config, how, gguf):
        raise _other(gguf, f"with {how.query_scale} {_query_scale(config, how, gguf)}", shown(scale))
    if not how.positions:
        _rotary_keys(config, how, gguf)


def _query_scale(config: Mapping[str, Any], how: Decoding, gguf: Gguf) -> int:
    """The number whose inverse square root llama.cpp scales scores by, where an architecture has a key for it."""
    if config[how.layers] == gguf.widths_over_heads:
        return int(config[how.width]) // int(config[how.heads])
    return int(_stated(config, how, gguf, "head_dim"))


def _other(gguf: Gguf, runs: str, asked: str) -> InputError:
    return InputError(f"llama.cpp runs {gguf.architecture} {runs}, config.json says {asked}; as GGUF it would be another model")


def _windows(config: Mapping[str, Any], how: Decoding) -> list[bool]:
    """Which layers see a sliding window only (as engine/program.py has it)."""
    layers = int(config[how.layers])
    if not config.get("sliding_window") or config.get("use_sliding_window") is False:
        return [False] * layers
    types = config.get("layer_types")
    if isinstance(types, list) and len(types) == layers:
        return [kind == "sliding_attention" for kind in types]
    if how.window_alternates:
        return [i % 2 == 0 for i in range(layers)]
    if config.get("use_sliding_window"):
        return [i >= int(config.get("max_window_layers") or 0) for i in range(layers)]
    return [how.window_always and config.get("model_type") == "mistral"] * layers


def _rope(config: Mapping[str, Any]) -> tuple[dict[str, Any], str]:
    """(settings of rotary positions, their kind)."""
    settings = {**(config.get("rope_scaling") or {}), **(config.get("rope_parameters") or {})}
    return settings, str(settings.get("rope_type") or settings.get("type") or "default")


def _rotary_keys(config: Mapping[str, Any], how: Decoding, gguf: Gguf) -> dict[str, Value]:
    settings, kind = _rope(config)
    partial = settings.get("partial_rotary_factor") or config.get("partial_rotary_factor") or 1.0
    dimensions = int(float(_stated(config, how, gguf, "head_dim")) * float(partial))
    theta = settings.get("rope_theta") or config.get("rope_theta") or 10000.0
    keys = {"rope.dimension_count": Value(WHOLE, dimensions), "rope.freq_base": Value(FLOAT, float(np.float32(theta)))}
    if kind == "linear":
        keys["rope.scaling.type"] = Value.text("linear")
        keys["rope.scaling.factor"] = Value(FLOAT, float(np.float32(settings.get("factor") or 1.0)))
    elif kind == "llama3" and not gguf.rotated:
        raise _other(gguf, "without Llama 3's rotary positions", "rope_type llama3")
    elif kind not in ("default", "llama3"):
        raise InputError(f"config.json has rotary positions of type {shown(kind)}; as GGUF they are default, linear or llama3")
    return keys


def rope_factors(config: Mapping[str, Any], table: Architecture) -> NDArray[np.float32] | None:
    """Llama 3's divisors of the rotary frequencies, float32 [dimensions / 2], which llama.cpp has as a tensor; None elsewhere."""
    settings, kind = _rope(config)
    if kind != "llama3":
        return None
    how, gguf = parts_of(table)
    return _llama3(
        int(_stated(config, how, gguf, "head_dim")),
        float(settings.get("rope_theta") or config.get("rope_theta") or 1e4),
        settings,
    )


def _llama3(dimensions: int, theta: float, settings: Mapping[str, Any]) -> NDArray[np.float32]:
    try:
        factor, context = float(settings["factor"]), float(settings["original_max_position_embeddings"])
        low, high = float(settings["low_freq_factor"]), float(settings["high_freq_factor"])
    except (KeyError, TypeError, ValueError) as error:
        raise InputError(f"config.json has rotary positions of type llama3 without {error}") from error
    wave = 2 * math.pi * theta ** (np.arange(0, dimensions, 2, dtype=np.float64) / dimensions)
    smooth = np.clip((context / wave - low) / (high - low), 0, 1)
    return (1 / ((1 - smooth) / factor + smooth)).astype(np.float32)


class Keys:
    """The keys of a file, read with their types. Raises FileFormatError for one that is missing or of another type."""

    def __init__(self, metadata: Mapping[str, Value], where: Path) -> None:
        self.metadata = metadata
        self.where = where

    def text(self, key: str, default: str | None = None) -> str:
        """A text."""
        value = self.metadata.get(key)
        if value is None and default is not None:
            return default
        if value is None or not isinstance(value.data, bytes):
            raise self._wrong(key, value, "a text")
        return value.data.decode()

    def whole(self, key: str, default: int | None = None) -> int:
        """A whole number from 0 to 2^31 - 1."""
        value = self.metadata.get(key)
        if value is None and default is not None:
            return default
        if value is None or "int" not in value.kind or not isinstance(value.data, int) or not 0 <= value.data <= MOST:
            raise self._wrong(key, value, f"a whole number from 0 to {MOST}")
        return value.data

    def number(self, key: str, default: float | None = None) -> float:
        """A positive number."""
        value = self.metadata.get(key)
        if value is None and default is not None:
            return default
        if value is None or not isinstance(value.data, float) or not 0 < value.data < math.inf:
            raise self._wrong(key, value, "a positive float")
        return value.data

    def switch(self, key: str, default: bool) -> bool:
        """A bool."""
        value = self.metadata.get(key)
        if value is not None and (value.kind != "bool" or not isinstance(value.data, int)):
            raise self._wrong(key, value, "a bool")
        return default if value is None else bool(value.data)

    def texts(self, key: str) -> tuple[str, ...]:
        """An array of texts; empty where there is none."""
        value = self.metadata.get(key)
        if value is None:
            return ()
        if not isinstance(value.data, tuple):
            raise self._wrong(key, value, "an array of texts")
        return tuple(text.decode() for text in value.data)

    def numbers(self, key: str, count: int) -> NDArray[Any] | None:
        """An array of so many numbers; None where there is none."""
        value = self.metadata.get(key)
        if value is None:
            return None
        if not isinstance(value.data, np.ndarray) or len(value.data) != count:
            raise self._wrong(key, value, f"an array of {count} numbers")
        return value.data

    def _wrong(self, key: str, value: Value | None, wanted: str) -> FileFormatError:
        found = "is missing" if value is None else f"is {value} ({value.kind})"
        return FileFormatError(f"{self.where}: key {shown(key)} {found}; it should be {wanted}")


def to_config(
    keys: Keys, table: Architecture, shape: tuple[int, ...], tied: bool, factors: NDArray[np.float32] | None
) -> dict[str, Any]:
    """A config.json of a file's keys; `shape` is that of the table of tokens, `factors` is Llama 3's tensor, if any.

    Raises FileFormatError for keys that are missing or cannot be meant, InputError for a model that is not read here.
    """
    how, gguf = parts_of(table)
    name = gguf.architecture
    config: dict[str, Any] = {}
    for key, (target, kind) in _keys(table).items():
        full = f"{name}.{key}"
        optional = key in ("attention.head_count_kv", "attention.key_length", "attention.value_length") or key in gguf.keys
        if full not in keys.metadata and optional:
            continue
        if kind == FLOAT:
            config[target] = keys.number(full)
        else:
            value = keys.whole(full)
            if not value or config.setdefault(target, value) != value:
                raise FileFormatError(
                    f"{keys.where}: key {full} is {value}; nybble reads models where it is above 0 and as {target}"
                )
    if keys.whole(f"{name}.expert_count", 0):
        raise InputError(f"{keys.where} is a mixture of experts, which nybble does not read")
    _check_sizes(keys, config, how, gguf, shape)
    model_type = _model_type(keys, gguf, config)
    config["vocab_size"] = shape[0]
    config["model_type"] = model_type
    config["architectures"] = [gguf.classes[model_type]]
    config["tie_word_embeddings"] = tied
    config.update(dict.fromkeys(how.activation, gguf.activations[0]))
    if how.query_scale:
        config[how.query_scale] = _query_scale(config, how, gguf)
    if not how.positions:
        config["rope_parameters"] = _rope_parameters(keys, config, how, gguf, factors)
    for part, target in IDS.items():
        key = f"tokenizer.ggml.{part}_token_id"
        config[target] = keys.whole(key) if key in keys.metadata else None
    return config


def _model_type(keys: Keys, gguf: Gguf, config: dict[str, Any]) -> str:
    """The first model type of an architecture, or the last where a window is stated."""
    window = f"{gguf.architecture}.attention.sliding_window"
    if gguf.window and keys.whole(window, 0):
        config["sliding_window"] = keys.whole(window)
        return list(gguf.classes)[-1]
    return next(iter(gguf.classes))


def _rope_parameters(
    keys: Keys, config: Mapping[str, Any], how: Decoding, gguf: Gguf, factors: NDArray[np.float32] | None
) -> dict[str, Any]:
    prefix = f"{gguf.architecture}.rope."
    dimensions = int(_stated(config, how, gguf, "head_dim"))
    rope: dict[str, Any] = {"rope_type": "default", "rope_theta": keys.number(f"{prefix}freq_base", 10000.0)}
    rotated = keys.whole(f"{prefix}dimension_count", dimensions)
    if rotated != dimensions:
        rope["partial_rotary_factor"] = rotated / dimensions
    kind = keys.text(f"{prefix}scaling.type", "none")
    if kind == "linear":
        rope.update(rope_type="linear", factor=keys.number(f"{prefix}scaling.factor", 1.0))
    elif kind != "none":
        raise InputError(
            f"{keys.where} scales rotary positions by {shown(kind)}; nybble reads none, linear and Llama 3's factors"
        )
    if factors is not None:
        rope.update(rope_type="llama3", factor=float(factors.max()), **LLAMA3)
        known = _llama3(dimensions, rope["rope_theta"], rope)
        if factors.shape != known.shape or not np.allclose(factors, known, rtol=1e-5, atol=0):
            raise InputError(
                f"{keys.where} has factors of rotary positions (rope_freqs.weight) that are not Llama 3's; nybble reads no others"
            )
    return rope


def _check_sizes(keys: Keys, config: Mapping[str, Any], how: Decoding, gguf: Gguf, shape: tuple[int, ...]) -> None:
    width, heads = config[how.width], config[how.heads]
    if len(shape) != 2 or shape[1] != width:
        raise FileFormatError(
            f"{keys.where}: token_embd.weight has shape {list(shape)}, {gguf.architecture}.embedding_length is {width}"
        )
    shared = config.get("num_key_value_heads") or heads
    if heads % shared or (not config.get("head_dim") and width % heads):
        raise FileFormatError(
            f"{keys.where}: {width} dimensions, {heads} heads and {shared} key-value heads do not go into each other"
        )
