"""config.json that is broken, asks for code to be run, or says what cannot be."""

from __future__ import annotations

import json
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

from catalogue import Build, Case, refused_for_a_link
from good import CONFIG, write_folder

from nybble.errors import FileFormatError, InputError

RUNS = "asks to run code of its own"


def raw(content: Callable[[], bytes]) -> Build:
    """A good folder with these bytes as config.json."""

    def build(folder: Path) -> None:
        write_folder(folder)
        (folder / "config.json").write_bytes(content())

    return build


def changed(**entries: Any) -> Build:
    """A good folder whose config.json has these entries besides."""
    return raw(lambda: json.dumps({**CONFIG, **entries}).encode())


def code(**entries: Any) -> Case:
    """A config.json that wants to run code."""
    return Case("config", changed(**entries), RUNS, InputError)


def without(*keys: str) -> Build:
    return raw(lambda: json.dumps({key: value for key, value in CONFIG.items() if key not in keys}).encode())


def disk(change: Callable[[Path], Any]) -> Build:
    """A good folder whose files are changed."""

    def build(folder: Path) -> None:
        write_folder(folder)
        change(folder)

    return build


def linked(name: str) -> Build:
    """A file of the folder is a link to one outside."""

    def change(folder: Path) -> None:
        secret = folder.parent / f"secret-{folder.name}"
        secret.write_bytes((folder / name).read_bytes() if (folder / name).exists() else b"secret")
        (folder / name).unlink(missing_ok=True)
        (folder / name).symlink_to(f"../{secret.name}")

    return disk(change)


def pipe(folder: Path) -> None:
    (folder / "config.json").unlink()
    os.mkfifo(folder / "config.json")


def lists() -> bytes:
    """21 MB of JSON that would be 450 MB in memory."""
    return b'{"model_type":"llama","x":[' + b"[]," * 7_000_000 + b"[]]}"


def sparse(folder: Path) -> None:
    os.truncate(folder / "config.json", 1 << 40)


WRONG: dict[str, tuple[Build, str]] = {
    "empty": (raw(lambda: b""), "is not JSON"),
    "cut short": (raw(lambda: json.dumps(CONFIG).encode()[:-20]), "is not JSON"),
    "not UTF-8": (raw(lambda: b'{"model_type": "ll\xe4ma"}'), "is not JSON.*utf-8"),
    "UTF-16": (raw(lambda: json.dumps(CONFIG).encode("utf-16")), "is not JSON"),
    "with a byte order mark": (raw(lambda: b"\xef\xbb\xbf" + json.dumps(CONFIG).encode()), "is not JSON"),
    "a list": (raw(lambda: b"[]"), "holds a list, not an object"),
    "a text": (raw(lambda: b'"llama"'), "holds a str, not an object"),
    "null": (raw(lambda: b"null"), "holds a NoneType, not an object"),
    "two objects": (raw(lambda: b"{}{}"), "is not JSON"),
    "with a comment": (raw(lambda: b'{"model_type": "llama" /* a comment */}'), "is not JSON"),
    "Python's literals": (raw(lambda: b"{'model_type': 'llama'}"), "is not JSON"),
    "an instruction of pickle": (raw(lambda: b"cos\nsystem\n(S'true'\ntR."), "is not JSON"),
    "nested 100,000 deep": (raw(lambda: b'{"model_type":' + b"[" * 100_000 + b"]" * 100_000 + b"}"), "nests deeper"),
    "nested 100,000 deep in objects": (raw(lambda: b'{"a":' * 100_000 + b"1" + b"}" * 100_000), "nests deeper"),
    "nested 40 deep": (changed(x=json.loads("[" * 40 + "]" * 40)), "nests deeper than 32"),
    "memory of 22 times its size": (raw(lists), "too many to read safely"),
    "a terabyte": (disk(sparse), "has 1099511627776 bytes, the limit is"),
    "model_type twice": (raw(lambda: b'{"model_type": "gpt2", "model_type": "llama"}'), "key 'model_type' stands twice"),
    "a key twice far inside": (raw(lambda: b'{"model_type": "x", "a": [{"b": {"c": 1, "c": 2}}]}'), "key 'c' stands twice"),
    "a key twice, once escaped": (raw(lambda: b'{"model_type": "a", "model\\u005ftype": "b"}'), "'model_type' stands twice"),
    "NaN": (raw(lambda: b'{"model_type": "llama", "rms_norm_eps": NaN}'), "NaN is not JSON"),
    "Infinity": (raw(lambda: b'{"model_type": "llama", "rope_theta": Infinity}'), "Infinity is not JSON"),
    "a float beyond all floats": (raw(lambda: b'{"model_type": "llama", "rope_theta": 1e999}'), "too large for a float"),
    "a float of a million digits": (raw(lambda: b'{"x": 1.' + b"1" * 1_000_000 + b"}"), "a number of 1000002 characters"),
    "a whole number of 70 bits": (changed(hidden_size=1 << 70), "does not fit 64 bits"),
    "a whole number of 5,000 digits": (raw(lambda: b'{"x": ' + b"1" * 5000 + b"}"), "does not fit 64 bits"),
    "half a surrogate pair": (raw(lambda: b'{"model_type": "\\ud800"}'), "not JSON|not safe to read"),
    "no model_type": (without("model_type"), "has no model_type"),
    "model_type is a list": (changed(model_type=["llama"]), "model_type .* not a short text"),
    "model_type of a megabyte": (changed(model_type="a" * 1_000_000), "not a short text"),
    "dtype is a number": (changed(dtype=16), "dtype 16, not a short text"),
    "architectures is a text": (changed(architectures="LlamaForCausalLM"), "not a list of class names"),
    "architectures names a module": (changed(architectures=["os.system"]), "not a list of class names"),
    "architectures holds an object": (changed(architectures=[{}]), "not a list of class names"),
    "tie_word_embeddings is a text": (changed(tie_word_embeddings="false"), "not true or false"),
    "hidden_size 0": (changed(hidden_size=0), "hidden_size 0, not a whole number from 1"),
    "hidden_size is negative": (changed(hidden_size=-64), "hidden_size -64"),
    "hidden_size is a float": (changed(hidden_size=64.0), "hidden_size 64.0"),
    "hidden_size is true": (changed(hidden_size=True), "hidden_size True"),
    "hidden_size is a text": (changed(hidden_size="64"), "hidden_size '64'"),
    "hidden_size of 2^40": (changed(hidden_size=1 << 40), "hidden_size 1099511627776"),
    "2^31 layers": (changed(num_hidden_layers=1 << 31), "num_hidden_layers 2147483648, not a whole number from 1 to 10000"),
    "no heads": (changed(num_attention_heads=0), "num_attention_heads 0"),
    "heads that do not divide the width": (
        changed(num_attention_heads=7, num_key_value_heads=None),
        "hidden_size 64, not a multiple",
    ),
    "key heads that do not divide the heads": (
        changed(num_attention_heads=4, num_key_value_heads=3),
        "num_attention_heads 4, not",
    ),
    "more key heads than heads": (changed(num_key_value_heads=4), "num_attention_heads 2, not a multiple"),
    "a context of 2^62": (changed(max_position_embeddings=1 << 62), "max_position_embeddings"),
    "a window below zero": (changed(sliding_window=-1), "sliding_window -1"),
    "epsilon is negative": (changed(rms_norm_eps=-1e-5), "rms_norm_eps -1e-05, not a number (from|above)"),
    "epsilon is a text": (changed(rms_norm_eps="1e-5"), "rms_norm_eps '1e-5'"),
    "rotary positions are a list": (changed(rope_parameters=[1]), "rope_parameters .*not an object"),
    "rotary base of 0": (
        changed(rope_parameters={"rope_type": "default", "rope_theta": 0}),
        "rope_theta. 0, not a number (from|above)",
    ),
    "rotary factor is a list": (changed(rope_parameters={"rope_type": "linear", "factor": [2]}), "factor .*not a number"),
    "rotary part of 1e300": (changed(partial_rotary_factor=1e300), "partial_rotary_factor 1e\\+300"),
    "rotary kind is an object": (changed(rope_parameters={"rope_type": {}}), "not a short text"),
    "an end token of 2^40": (changed(eos_token_id=1 << 40), "eos_token_id 1099511627776, not a token's id"),
    "an end token that is a text": (changed(eos_token_id="</s>"), "eos_token_id '</s>', not a token's id"),
    "end tokens that are objects": (changed(eos_token_id=[1, {}]), "not a token's id"),
}
OTHER: dict[str, Case] = {
    "auto_map": code(auto_map={"AutoModelForCausalLM": "modeling_evil.Model"}),
    "auto_map of another repository": code(auto_map={"AutoConfig": "evil/repository--configuration.Config"}),
    "trust_remote_code": code(trust_remote_code=True),
    "trust_remote_code far inside": code(text_config={"a": [{"trust_remote_code": True}]}),
    "auto_map far inside": code(rope_parameters={"x": {"auto_map": {}}}),
    "_attn_implementation_internal, CVE-2026-4372": code(_attn_implementation_internal="evil/kernels"),
    "attn_implementation": code(attn_implementation="evil/kernels"),
    "_attn_implementation": code(_attn_implementation="flash_attention_2"),
    "_attn_implementation_autoset that names something": code(_attn_implementation_autoset="evil/kernels"),
    "auto_map in quantization_config": code(
        quantization_config={"quant_method": "bitsandbytes", "load_in_8bit": True, "auto_map": {}}
    ),
    "a pipe": Case("config", disk(pipe), "is no regular file", InputError),
    "a folder": Case(
        "config", disk(lambda f: ((f / "config.json").unlink(), (f / "config.json").mkdir())), "Is a directory", InputError
    ),
    "missing": Case("config", disk(lambda f: (f / "config.json").unlink()), "No such file", InputError),
    "a link out of the folder": refused_for_a_link("config", linked("config.json")),
    "a tokenizer that is a link out of the folder": refused_for_a_link("config", linked("tokenizer.json")),
    "generation settings that are a link out of the folder": refused_for_a_link("config", linked("generation_config.json")),
    "weights that are a link out of the folder": refused_for_a_link("config", linked("model.safetensors")),
    "quantization of an unknown method": Case(
        "config", changed(quantization_config={"quant_method": "evil"}), "quant_method 'evil'", InputError
    ),
    "quantization by a module": Case(
        "config", changed(quantization_config={"quant_method": "os.path"}), "quant_method 'os.path'", InputError
    ),
    "quantization by a helper module of ours": Case(
        "config", changed(quantization_config={"quant_method": "contents"}), "quant_method 'contents'", InputError
    ),
    "quantization_config is a list": Case("config", changed(quantization_config=[]), "quant_method None", InputError),
    "quantization without a method": Case("config", changed(quantization_config={"bits": 4}), "quant_method None", InputError),
    "quantization by a list": Case("config", changed(quantization_config={"quant_method": ["gptq"]}), "quant_method", InputError),
}

CASES: dict[str, Case] = {name: Case("config", build, match, FileFormatError) for name, (build, match) in WRONG.items()} | OTHER
