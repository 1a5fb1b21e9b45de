"""What a config.json may say, before anything acts on it: types and limits of the keys that we use, and keys that run code.

transformers once let a key of config.json alone fetch and run code (CVE-2026-4372), whatever the caller had said about trusting
it; so such keys are refused wherever they stand, before that library sees the folder.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from nybble.errors import FileFormatError, InputError, shown
from nybble.models.arch import Decoding, table_for

RUNS_CODE = re.compile(r"auto_map|trust_remote_code|.*attn_implementation.*", re.IGNORECASE)
HARMLESS = {"_attn_implementation_autoset": (True, False, None)}
"""What transformers 4.45 to 4.52 left in every config.json: a switch that names nothing."""

MOST_LAYERS = 10_000
MOST_HEADS = 65_536
MOST_WIDE = 1 << 24
"""Numbers along the side of a matrix: hidden, inner, vocabulary."""
MOST_POSITIONS = 1 << 31

TEXTS = ("model_type", "dtype", "torch_dtype", "hidden_act", "hidden_activation", "activation_function")
SWITCHES = ("tie_word_embeddings", "use_sliding_window", "attention_bias", "mlp_bias")
WHOLE = {
    "head_dim": MOST_WIDE,
    "num_key_value_heads": MOST_HEADS,
    "intermediate_size": MOST_WIDE,
    "n_inner": MOST_WIDE,
    "ffn_dim": MOST_WIDE,
    "word_embed_proj_dim": MOST_WIDE,
    "vocab_size": MOST_WIDE,
    "sliding_window": MOST_POSITIONS,
}
"""Key -> the largest whole number from 1 on; null and absent say nothing."""
POSITIVE = ("rope_theta", "query_pre_attn_scalar")
"""Numbers above 0."""
SMALLEST, LARGEST = 1e-6, 1e12
"""Of these, and of any number that describes rotary positions: beyond them float32 overflows."""


def check_config(config: Mapping[str, Any], where: str | Path) -> None:
    """Raise InputError for a config.json that wants to run code, FileFormatError for one whose values cannot be meant.

    Numbers are checked for architectures that we have a table of; what others mean by them is transformers' to know.
    """
    check_no_code(config, where)
    _check_general(config, where)
    table = table_for(str(config.get("model_type")))
    if table.decoding is not None:
        _check_numbers(config, table.decoding, where)
        _check_rotary(config, where)


def check_no_code(value: Any, where: str | Path) -> None:
    """Raise InputError for a key, at any depth, by which a file asks other programs to run code."""
    waiting = [value]
    while waiting:
        outer = waiting.pop()
        if isinstance(outer, Mapping):
            for key, inner in outer.items():
                if RUNS_CODE.fullmatch(key) and not (key in HARMLESS and any(inner is allowed for allowed in HARMLESS[key])):
                    raise InputError(f"{where} asks to run code of its own ({shown(key)}); nybble never does: remove it")
        waiting.extend(outer.values() if isinstance(outer, Mapping) else outer if isinstance(outer, list) else ())


def _wrong(where: str | Path, key: str, value: Any, needed: str) -> FileFormatError:
    return FileFormatError(f"{where} has {key} {shown(value)}, not {needed}")


def _check_general(config: Mapping[str, Any], where: str | Path) -> None:
    for key in TEXTS:
        if not isinstance(config.get(key), str | None) or len(config.get(key) or "") > 100:
            raise _wrong(where, key, config[key], "a short text")
    for key in SWITCHES:
        if not isinstance(config.get(key), bool | None):
            raise _wrong(where, key, config[key], "true or false")
    names = config.get("architectures")
    if names is not None and not (
        isinstance(names, list) and all(isinstance(name, str) and name.isidentifier() for name in names)
    ):
        raise _wrong(where, "architectures", names, "a list of class names")
    if "quantization_config" in config and not isinstance(config["quantization_config"], dict):
        raise _wrong(where, "quantization_config", config["quantization_config"], "an object")
    for key in ("bos_token_id", "eos_token_id", "pad_token_id"):
        value = config.get(key)
        for token in value if isinstance(value, list) else [value]:
            if token is not None and not (type(token) is int and -1 <= token < MOST_WIDE):  # -1: some say "none" so
                raise _wrong(where, key, value, "a token's id")


def _check_numbers(config: Mapping[str, Any], how: Decoding, where: str | Path) -> None:
    limits = {**WHOLE, how.width: MOST_WIDE, how.layers: MOST_LAYERS, how.heads: MOST_HEADS, how.context: MOST_POSITIONS}
    for key, most in limits.items():
        value = config.get(key)
        if value is not None and not (type(value) is int and 1 <= value <= most):
            raise _wrong(where, key, value, f"a whole number from 1 to {most}")
    heads, shared, width = (config.get(key) for key in (how.heads, "num_key_value_heads", how.width))
    if heads and shared and heads % shared:
        raise _wrong(where, how.heads, heads, f"a multiple of num_key_value_heads {shared}")
    if heads and width and not config.get("head_dim") and width % heads:
        raise _wrong(where, how.width, width, f"a multiple of {how.heads} {heads}")
    for key in (*POSITIVE, how.score_cap, how.logit_cap):
        if key and config.get(key) is not None:
            _number(where, key, config[key], SMALLEST, LARGEST)
    if how.eps and how.eps in config:
        _number(where, how.eps, config[how.eps], 0.0, 1.0)
    last = config.get("max_window_layers")
    if last is not None and not (type(last) is int and 0 <= last <= MOST_LAYERS):
        raise _wrong(where, "max_window_layers", last, f"a whole number from 0 to {MOST_LAYERS}")
    types = config.get("layer_types")
    if types is not None and not (isinstance(types, list) and all(isinstance(name, str) for name in types)):
        raise _wrong(where, "layer_types", types, "a list of texts")


def _check_rotary(config: Mapping[str, Any], where: str | Path) -> None:
    if config.get("partial_rotary_factor") is not None:
        _number(where, "partial_rotary_factor", config["partial_rotary_factor"], SMALLEST, 1.0)
    for key in ("rope_parameters", "rope_scaling"):
        settings = config.get(key)
        if settings is None:
            continue
        if not isinstance(settings, dict):
            raise _wrong(where, key, settings, "an object")
        parts = [settings, *(part for part in settings.values() if isinstance(part, dict))]  # Gemma 3: one per type of layer
        for part in parts:
            for name, value in part.items():
                if name in ("rope_type", "type"):
                    if not isinstance(value, str | None) or len(value or "") > 100:
                        raise _wrong(where, f"{key}.{shown(name)}", value, "a short text")
                elif not isinstance(value, dict | list | str | bool | None):
                    _number(where, f"{key}.{shown(name)}", value, SMALLEST, 1.0 if name == "partial_rotary_factor" else LARGEST)
                elif name in ("factor", "rope_theta", "partial_rotary_factor", "low_freq_factor", "high_freq_factor",
                              "original_max_position_embeddings") and value is not None:  # fmt: skip
                    raise _wrong(where, f"{key}.{name}", value, "a number")


def _number(where: str | Path, key: str, value: Any, above: float, most: float) -> None:
    if type(value) not in (int, float) or not above <= value <= most or value == 0:
        raise _wrong(where, key, value, f"a number {'from' if above else 'above'} {above:g} to {most:g}")
