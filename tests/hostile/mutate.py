"""Seeded damage: bytes, numbers of a binary file, tokens of a JSON text. A mutant is a function of its seed alone."""

from __future__ import annotations

import json
import re
import struct
from collections.abc import Sequence
from random import Random
from typing import Any

EDGES = (
    0, 1, 2, 3, 4, 5, 7, 8, 9, 12, 13, 16, 31, 32, 33, 63, 64, 127, 128, 255, 256, 511, 512, 513, 1023, 4096, 65535, 65536,
    (1 << 20) - 1, 1 << 20, (1 << 24) + 1, (1 << 31) - 1, 1 << 31, (1 << 31) + 1, (1 << 32) - 1, 1 << 32, (1 << 32) + 1,
    (1 << 42) + 1, (1 << 47) + 1, (1 << 62) - 1, 1 << 62, (1 << 63) - 1, 1 << 63, (1 << 63) + 1, (1 << 64) - 32, (1 << 64) - 1,
)  # fmt: skip
"""Numbers at which readers go wrong."""
BYTES = (0, 1, 2, 9, 10, 13, 31, 32, 34, 44, 47, 58, 91, 92, 93, 123, 125, 127, 128, 192, 237, 254, 255)
TOKENS = (
    "null", "true", "false", "0", "-0", "-1", "1", "2", "3", "64", "1.5", "1e5", "1e308", "1e999", "-1e999", "NaN", "Infinity",
    "-Infinity", "2147483647", "2147483648", "4294967296", "9223372036854775807", "9223372036854775808", "18446744073709551615",
    "18446744073709551616", "1" * 30, "1" * 5000, "0." + "1" * 500, "01", "+1", ".5", "1.", "0x10", '""', '"a"', '"\\u0000"',
    '"\\ud800"', '"\\udfff\\ud800"', '"\\n\\u001b[2J"', '"\\u202e"', '"../x"', '"../../etc/passwd"', '"/etc/passwd"',
    '"a/../../b.safetensors"', '"C:\\\\x"', '"__metadata__"', '"auto_map"', '"trust_remote_code"', '"_attn_implementation"',
    '"quantization_config"', '"quant_method"', '"weight_map"', '"nybble"', '"gptq"', '"awq"', '"bitsandbytes"',
    '"compressed-tensors"', '"float"', '"gguf"', '"llama"', '"gpt2"', '"opt"', '"F16"', '"F32"', '"BF16"', '"U8"', '"BOOL"',
    '"F8_E4M3"', '"C64"', '"int4:g32"', '"q4_k"', '"mxfp4"', "[]", "{}", "[[]]", '{"a":1,"a":2}', "[0]", "[1,2]", "[-1]",
    "[" * 40 + "]" * 40, "[" * 3000 + "]" * 3000, '{"a":' * 40 + "1" + "}" * 40, '"' + "a" * 3000 + '"', '"\u00e4"',
    "{", "}", "[", "]", ":", ",", '"', "'", " ", "\n", "\t", "\0", "/*x*/", "//x\n", "\ufeff",
)  # fmt: skip
"""What takes the place of a token."""
_TOKEN = re.compile(rb'"(?:[^"\\]|\\.)*"|-?[0-9]+(?:\.[0-9]+)?(?:[eE][-+]?[0-9]+)?|[A-Za-z]+|[^\sA-Za-z0-9]')


def place(random: Random, length: int, head: int) -> int:
    """Somewhere in a file, mostly in its head."""
    return random.randrange(max(1, min(length, head) if random.random() < 0.9 else length))


def damage(data: bytes, random: Random, head: int, fields: Sequence[int] = (), others: Sequence[bytes] = ()) -> bytes:
    """A binary file with one to four things done to it. `head`: where most is to be damaged; `fields`: where numbers of its
    format stand; `others`: files to take pieces of."""
    out = bytearray(data)
    for _ in range(random.choice((1, 1, 1, 2, 2, 3, 4))):
        at = place(random, len(out), head)
        kind = random.randrange(12)
        if not out:
            return bytes(out)
        if kind == 0:
            out[at] ^= 1 << random.randrange(8)
        elif kind == 1:
            out[at] = random.choice(BYTES)
        elif kind <= 5:
            _write_number(out, random, random.choice(fields) if fields and random.random() < 0.8 else at)
        elif kind == 6:  # a piece of this file or of another, over what is there
            piece = _piece(random, random.choice((data, *others)), head)
            out[at : at + len(piece)] = piece
        elif kind == 7:  # ... or in between
            out[at:at] = _piece(random, random.choice((data, *others)), head)
        elif kind == 8:
            del out[at : at + random.choice((1, 1, 2, 4, 8, random.randrange(1, 200)))]
        elif kind == 9:
            del out[random.choice((at, random.randrange(len(out)), max(0, len(out) - random.randrange(1, 64)))) :]
        elif kind == 10:
            out += bytes(random.choice(BYTES) for _ in range(random.choice((1, 4, 31, 32, 33, 64))))
        else:  # two bytes change places
            other = place(random, len(out), head)
            out[at], out[other] = out[other], out[at]
    return bytes(out)


def _write_number(out: bytearray, random: Random, at: int) -> None:
    """An edge, or what stands there with a small change, in 1 to 8 bytes."""
    width = random.choice((1, 2, 4, 4, 8, 8, 8))
    if at + width > len(out):
        return
    before = int.from_bytes(out[at : at + width], "little")
    new = random.choice(EDGES) if random.random() < 0.6 else before + random.choice((-32, -8, -1, 1, 2, 8, 32, len(out), before))
    out[at : at + width] = (new % (1 << 8 * width)).to_bytes(width, "little")


def _piece(random: Random, data: bytes, head: int) -> bytes:
    start = place(random, len(data), head)
    return data[start : start + random.choice((1, 2, 4, 8, 16, 40, 200))]


VALUES: tuple[Any, ...] = (
    None, True, False, 0, 1, -1, 2, 7, 63, 64.0, 0.5, -0.5, 1e-300, 1e300, float("nan"), float("inf"),
    "", "a", "0", "64", "\0", "\ud800", "../x", "/etc/passwd", "a" * 3000, "llama", "gpt2", "qwen3", "gemma2", "opt", "evil",
    "nybble", "gptq", "awq", "bitsandbytes", "gguf", "compressed-tensors", "float", "int4:g32", "int8:channel,asym", "nf4:g64,dq",
    "mxfp4", "q6_k", "fp16", "F32", "U8", "BOOL", "C64", "silu", "linear", "llama3", "model.safetensors",
    "model-00001-of-00002.safetensors", [], {}, [0], [1, 2], [[]], [-1, 4], ["a"],
    {"a": 1}, {"rope_type": "llama3"}, {"scheme": "dynamic"}, [None] * 40,
)  # fmt: skip
"""What takes the place of a value."""


def edit_tree(data: bytes, random: Random, others: Sequence[bytes] = ()) -> bytes:
    """A JSON text that is still one: one to three of its values changed, left out, exchanged, or under another key."""
    root = json.loads(data)
    for _ in range(random.choice((1, 1, 1, 2, 3))):
        nodes = _nodes(root)
        if not nodes:
            break
        outer, key = random.choice(nodes)
        kind = random.randrange(8)
        if kind <= 2:
            outer[key] = random.choice(VALUES)
        elif kind == 3:
            number = outer[key] if type(outer[key]) is int else 0
            outer[key] = random.choice((random.choice(EDGES), -random.choice(EDGES), number + 1, number - 1, number * 2, -number))
        elif kind == 4:
            found = _nodes(json.loads(random.choice((data, *others))))
            other, name = random.choice(found)
            outer[key] = other[name]
        elif kind == 5:
            del outer[key]
        elif kind == 6:
            other, name = random.choice(nodes)
            if name in other if isinstance(other, dict) else name < len(other):
                outer[key], other[name] = other[name], outer[key]
        elif isinstance(outer, dict):
            name = random.choice((key + "x", random.choice(list(outer)), "", "auto_map", "../x", "a\nb"))
            outer[name] = outer.pop(key)
        try:
            text = json.dumps(root)
        except (ValueError, RecursionError):  # a value came into itself
            return data
        root = json.loads(text)
    return json.dumps(root, ensure_ascii=random.random() < 0.5).encode("utf-8", "surrogatepass")


def _nodes(root: Any) -> list[tuple[Any, Any]]:
    """(container, key or place) of every value inside a JSON value."""
    found, waiting = [], [root]
    while waiting:
        outer = waiting.pop()
        keys = list(outer) if isinstance(outer, dict) else range(len(outer))
        found += [(outer, key) for key in keys]
        waiting += [outer[key] for key in keys if isinstance(outer[key], dict | list)]
    return found


def edit(data: bytes, random: Random, others: Sequence[bytes] = ()) -> bytes:
    """A JSON text with one to three of its values, tokens or bytes changed."""
    share = random.random()
    if share < 0.6:
        return edit_tree(data, random, others)
    if share < 0.65:
        return damage(data, random, len(data), others=others)
    tokens = [(match.start(), match.end()) for match in _TOKEN.finditer(data)]
    out = data
    for _ in range(random.choice((1, 1, 1, 2, 3))):
        if not tokens:
            return out
        start, end = random.choice(tokens)
        kind = random.randrange(9)
        if kind <= 3:
            out = out[:start] + random.choice(TOKENS).encode() + out[end:]
        elif kind == 4:  # a token of this text or of another
            source = random.choice((data, *others))
            found = random.choice(list(_TOKEN.finditer(source))).group()
            out = out[:start] + found + out[end:]
        elif kind == 5:
            out = out[:start] + out[end:]
        elif kind == 6:  # some tokens twice: also keys with their values
            last = tokens[min(len(tokens) - 1, tokens.index((start, end)) + random.choice((0, 1, 2, 3, 4, 8)))][1]
            out = out[:last] + random.choice((b"", b",", b" ")) + out[start:last] + out[last:]
        elif kind == 7:  # more before a token
            out = out[:start] + random.choice(TOKENS).encode() + random.choice((b"", b",", b":")) + out[start:]
        else:  # wrapped
            depth = random.choice((1, 1, 2, 30, 33, 500))
            out = out[:start] + b"[" * depth + out[start:end] + b"]" * depth + out[end:]
        tokens = [(match.start(), match.end()) for match in _TOKEN.finditer(out)]
    return out


def edit_header(data: bytes, random: Random, others: Sequence[bytes] = ()) -> bytes:
    """A safetensors file with its header edited; its length and the data are mostly put right again."""
    if random.random() < 0.25:
        return damage(data, random, 8 + int.from_bytes(data[:8], "little"), (0,))
    length = int.from_bytes(data[:8], "little")
    header = edit(data[8 : 8 + length], random, others)
    stated = (
        len(header) if random.random() < 0.95 else random.choice((length, 0, len(header) + 1, random.choice(EDGES) % (1 << 64)))
    )
    rest = data[8 + length :]
    if random.random() < 0.05:
        rest = rest[: random.randrange(len(rest) + 1)]
    return struct.pack("<Q", stated) + header + rest


KINDS = {0: "<B", 1: "<b", 2: "<H", 3: "<h", 4: "<I", 5: "<i", 6: "<f", 7: "<B", 10: "<Q", 11: "<q", 12: "<d"}
TEXTS = (
    "",
    "a",
    "llama",
    "gpt2",
    "gemma2",
    "none",
    "linear",
    "../x",
    "\0",
    "{}",
    '{"model_type": "llama"}',
    "[" * 50,
    "q" * 3000,
)


def gguf_value(random: Random) -> tuple[int, bytes]:
    """A type and a value of it, for a key of a GGUF file."""
    kind = random.choice((*KINDS, 8, 8, 9, 9))
    if kind == 8:
        text = random.choice(TEXTS).encode()
        return 8, struct.pack("<Q", len(text)) + text
    if kind == 9:
        inner = random.choice((*KINDS, 8))
        count = random.choice((0, 1, 2, 47, 48, 49))
        one = struct.pack("<Q", 1) + b"a" if inner == 8 else _scalar(random, inner)
        return 9, struct.pack("<IQ", inner, count) + one * count
    return kind, _scalar(random, kind)


def _scalar(random: Random, kind: int) -> bytes:
    size = struct.calcsize(KINDS[kind])
    if kind in (6, 12):
        return struct.pack(KINDS[kind], random.choice((0.0, -1.0, 1e-5, 0.5, 1.0, 1e30, float("inf"), float("nan"))))
    return (random.choice((0, 1, random.choice(EDGES))) % (1 << 8 * size)).to_bytes(size, "little")


def gguf_fields(data: bytes) -> tuple[list[int], int]:
    """Where the numbers of a valid GGUF file's head stand, and where its head ends."""
    fields, at = [4, 8, 16], 24
    n_tensors, n_keys = struct.unpack_from("<QQ", data, 8)

    def skip_text() -> None:
        nonlocal at
        fields.append(at)
        at += 8 + int.from_bytes(data[at : at + 8], "little")

    sizes = {0: 1, 1: 1, 2: 2, 3: 2, 4: 4, 5: 4, 6: 4, 7: 1, 10: 8, 11: 8, 12: 8}
    for _ in range(n_keys):
        skip_text()
        fields.append(at)
        kind = int.from_bytes(data[at : at + 4], "little")
        at += 4
        if kind == 8:
            skip_text()
        elif kind == 9:
            fields += [at, at + 4]
            inner, count = struct.unpack_from("<IQ", data, at)
            at += 12
            for _ in range(count):
                if inner == 8:
                    skip_text()
                else:
                    at += sizes[inner]
        else:
            fields.append(at)
            at += sizes[kind]
    for _ in range(n_tensors):
        skip_text()
        (dims,) = struct.unpack_from("<I", data, at)
        fields += [at, *(at + 4 + 8 * i for i in range(dims)), at + 4 + 8 * dims, at + 8 + 8 * dims]
        at += 16 + 8 * dims
    return fields, at
