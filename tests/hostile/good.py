"""Valid small files of every kind: what the catalogue spoils and the fuzzer mutates."""

from __future__ import annotations

import json
import struct
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from nybble.containers import find_container
from nybble.containers.contents import Contents
from nybble.formats import QTensor, parse_format

CONFIG: dict[str, Any] = {
    "model_type": "llama",
    "architectures": ["LlamaForCausalLM"],
    "dtype": "float16",
    "vocab_size": 48,
    "hidden_size": 64,
    "intermediate_size": 64,
    "num_hidden_layers": 1,
    "num_attention_heads": 2,
    "num_key_value_heads": 1,
    "max_position_embeddings": 32,
    "rms_norm_eps": 1e-5,
    "hidden_act": "silu",
    "tie_word_embeddings": False,
    "bos_token_id": 1,
    "eos_token_id": 2,
    "rope_parameters": {"rope_type": "default", "rope_theta": 10000.0},
}
BLOCK = "model.layers.0"
LINEARS: dict[str, tuple[int, int]] = {
    f"{BLOCK}.self_attn.q_proj.weight": (64, 64),
    f"{BLOCK}.self_attn.k_proj.weight": (32, 64),
    f"{BLOCK}.self_attn.v_proj.weight": (32, 64),
    f"{BLOCK}.self_attn.o_proj.weight": (64, 64),
    f"{BLOCK}.mlp.gate_proj.weight": (64, 64),
    f"{BLOCK}.mlp.up_proj.weight": (64, 64),
    f"{BLOCK}.mlp.down_proj.weight": (64, 64),
}
OTHERS: dict[str, tuple[int, ...]] = {
    "model.embed_tokens.weight": (48, 64),
    "lm_head.weight": (48, 64),
    "model.norm.weight": (64,),
    f"{BLOCK}.input_layernorm.weight": (64,),
    f"{BLOCK}.post_attention_layernorm.weight": (64,),
}

VARIANTS: dict[str, tuple[str, tuple[str, ...], dict[str, str]]] = {
    "float": ("float", (), {}),
    "nybble": ("nybble", ("int4:g32", "nf4:g64,dq", "int8:channel", "int3:g32,asym", "q4_0", "q5_1", "mxfp4"), {}),
    "nybble-sparse": ("nybble-sparse", ("int4:g32", "fp16", "int8:channel"), {}),
    "gptq": ("gptq", ("int4:g32",), {}),
    "gptq-v2": ("gptq", ("int3:g32,asym",), {"checkpoint_format": "gptq_v2"}),
    "awq": ("awq", ("int4:g32,asym",), {}),
    "compressed-tensors": ("compressed-tensors", ("int4:g32",), {}),
    "compressed-tensors-int8": ("compressed-tensors", ("int8:channel",), {}),
    "bitsandbytes": ("bitsandbytes", ("nf4:g32,dq",), {}),
    "bitsandbytes-int8": ("bitsandbytes", ("int8:channel",), {}),
}
"""Name -> (container, formats of its layers in turn, options)."""


def weights(seed: int = 0) -> dict[str, np.ndarray]:
    """Every tensor of the small model, float16."""
    rng = np.random.default_rng(seed)
    return {name: (rng.standard_normal(shape) * 0.1).astype(np.float16) for name, shape in {**LINEARS, **OTHERS}.items()}


def contents(formats: Sequence[str] = (), layers: int = len(LINEARS), pruned: bool = False) -> Contents:
    """The small model, its layers in these formats in turn; with fewer `layers` it is no whole model. `pruned`: most are zero."""
    floats = weights()
    for name in list(LINEARS)[layers:]:
        del floats[name]
    packed: dict[str, QTensor] = {}
    for i, name in enumerate(list(LINEARS)[:layers] if formats else ()):
        fmt = parse_format(formats[i % len(formats)])
        weight = floats.pop(name).astype(np.float32)
        packed[name] = QTensor(fmt, *fmt.round(weight * (np.abs(weight) > 0.1) if pruned else weight))
    return Contents(
        container="float",
        path=Path(),
        config=CONFIG,
        packed={name: (str(tensor.format), (tensor.shape[0], tensor.shape[1])) for name, tensor in packed.items()},
        floats={name: ("F16", array.shape) for name, array in floats.items()},
        read_packed=packed.__getitem__,
        read_float=floats.__getitem__,
        extras={"generation_config.json": b'{"eos_token_id": 2}\n'},
    )


def write_folder(folder: Path, variant: str = "float", layers: int = len(LINEARS)) -> Path:
    """A valid folder of a container."""
    container, formats, options = VARIANTS[variant]
    module = find_container(container)
    model = contents(formats, layers, pruned=variant == "nybble-sparse")
    settle = getattr(module, "settle", None)
    if settle is not None:
        read = model.read_packed
        model = Contents(**{**vars(model), "read_packed": lambda name: settle(read(name))})
    folder.mkdir(parents=True, exist_ok=True)
    module.write(folder, model, options)
    return folder


def safetensors(header: Any, data: bytes = b"", length: int | None = None) -> bytes:
    """A safetensors file from its header (JSON, or its bytes) and data."""
    encoded = header if isinstance(header, bytes) else json.dumps(header).encode()
    return struct.pack("<Q", len(encoded) if length is None else length) + encoded + data


def entry(dtype: Any = "U8", shape: Any = (4,), offsets: Any = (0, 4)) -> dict[str, Any]:
    """A tensor's entry in the header of a safetensors file."""
    return {"dtype": dtype, "shape": shape, "data_offsets": offsets}


def write_shards(folder: Path, layers: int = len(LINEARS)) -> dict[str, str]:
    """A valid folder of two shards; returns the map of its index."""
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "config.json").write_text(json.dumps(CONFIG))
    arrays = {name: array for name, array in weights().items() if name not in list(LINEARS)[layers:]}
    places = {name: f"model-0000{1 + i % 2}-of-00002.safetensors" for i, name in enumerate(arrays)}
    for shard in sorted(set(places.values())):
        header: dict[str, Any] = {}
        data = b""
        for name, array in arrays.items():
            if places[name] == shard:
                header[name] = entry("F16", array.shape, (len(data), len(data) + array.nbytes))
                data += array.tobytes()
        (folder / shard).write_bytes(safetensors(header, data))
    write_index(folder, {"metadata": {"total_size": 0}, "weight_map": places})
    return places


def write_index(folder: Path, index: Any) -> None:
    """An index, as JSON or as bytes."""
    content = index if isinstance(index, bytes) else json.dumps(index).encode()
    (folder / "model.safetensors.index.json").write_bytes(content)


U8, I8, U16, I16, U32, I32, F32, BOOL, STRING, ARRAY, U64, I64, F64 = range(13)
FORMS = {U8: "<B", I8: "<b", U16: "<H", I16: "<h", U32: "<I", I32: "<i", F32: "<f", BOOL: "<B", U64: "<Q", I64: "<q", F64: "<d"}
"""GGUF's types of values, and how struct calls them."""


@dataclass(frozen=True)
class Lie:
    """A text with another length than it says."""

    value: bytes
    length: int


def text(value: str | bytes | Lie, length: int | None = None) -> bytes:
    """A text of a GGUF file, with a length that may lie."""
    if isinstance(value, Lie):
        value, length = value.value, value.length
    encoded = value.encode() if isinstance(value, str) else value
    return struct.pack("<Q", len(encoded) if length is None else length) + encoded


def key(name: str | bytes, kind: int, value: Any) -> bytes:
    """A key of a GGUF file with a value: bytes stand as they are."""
    if isinstance(value, bytes):
        payload = value
    elif kind == STRING:
        payload = text(value)
    else:
        payload = struct.pack(FORMS[kind], value)
    return text(name) + struct.pack("<I", kind) + payload


def array(kind: int, values: Sequence[Any] | bytes, count: int | None = None) -> bytes:
    """The value of an array, to be given to `key` with ARRAY."""
    if isinstance(values, bytes):
        payload, found = values, 0
    elif kind == STRING:
        payload, found = b"".join(map(text, values)), len(values)
    else:
        payload, found = b"".join(struct.pack(FORMS[kind], value) for value in values), len(values)
    return struct.pack("<IQ", kind, found if count is None else count) + payload


@dataclass(frozen=True)
class Tensor:
    """A tensor of a GGUF file; every field may lie."""

    name: str | bytes | Lie = "w"
    dims: tuple[int, ...] = (4,)
    """Innermost first, as they stand."""
    type: int = 0
    data: bytes = b"\0" * 16
    offset: int | None = None
    n_dims: int | None = None

    def encode(self, offset: int) -> bytes:
        """Its entry."""
        count = len(self.dims) if self.n_dims is None else self.n_dims
        place = offset if self.offset is None else self.offset
        dims = b"".join(struct.pack("<Q", n % (1 << 64)) for n in self.dims)
        return text(self.name) + struct.pack("<I", count) + dims + struct.pack("<IQ", self.type, place)


def gguf(
    keys: Sequence[bytes] = (),
    tensors: Sequence[Tensor] = (),
    *,
    magic: bytes = b"GGUF",
    version: int = 3,
    counts: tuple[int | None, int | None] = (None, None),
    alignment: int = 32,
    after: bytes = b"",
) -> bytes:
    """A GGUF file. `counts` are those of tensors and keys that it claims."""
    infos, data = b"", b""
    for tensor in tensors:
        infos += tensor.encode(len(data))
        data += tensor.data + bytes(-len(tensor.data) % alignment)
    n_tensors, n_keys = (given if given is not None else len(found) for given, found in zip(counts, (tensors, keys), strict=True))
    head = magic + struct.pack("<IQQ", version, n_tensors, n_keys) + b"".join(keys) + infos
    return head + bytes(-len(head) % alignment) + data + after


ARCHITECTURE_KEYS: dict[str, tuple[int, Any]] = {
    "llama.context_length": (U32, 32),
    "llama.embedding_length": (U32, 64),
    "llama.block_count": (U32, 1),
    "llama.feed_forward_length": (U32, 64),
    "llama.attention.head_count": (U32, 2),
    "llama.attention.head_count_kv": (U32, 1),
    "llama.attention.layer_norm_rms_epsilon": (F32, 1e-5),
    "llama.rope.dimension_count": (U32, 32),
    "llama.rope.freq_base": (F32, 10000.0),
    "llama.vocab_size": (U32, 48),
}
TOKENS = ["<unk>", "<s>", "</s>", "<0x0A>", *(f"\u2581t{i}" for i in range(44))]
TOKENIZER_KEYS: dict[str, tuple[int, Any]] = {
    "tokenizer.ggml.model": (STRING, "llama"),
    "tokenizer.ggml.pre": (STRING, "default"),
    "tokenizer.ggml.tokens": (ARRAY, array(STRING, TOKENS)),
    "tokenizer.ggml.scores": (ARRAY, array(F32, [float(-i) for i in range(48)])),
    "tokenizer.ggml.token_type": (ARRAY, array(I32, [2, 3, 3, 6, *[1] * 44])),
    "tokenizer.ggml.bos_token_id": (U32, 1),
    "tokenizer.ggml.eos_token_id": (U32, 2),
    "tokenizer.ggml.unknown_token_id": (U32, 0),
    "tokenizer.ggml.add_bos_token": (BOOL, 1),
}
MODEL_KEYS: dict[str, tuple[int, Any]] = {
    "general.architecture": (STRING, "llama"),
    "general.name": (STRING, "small"),
    "general.file_type": (U32, 2),
    "general.quantization_version": (U32, 2),
    **ARCHITECTURE_KEYS,
    **TOKENIZER_KEYS,
}
SIZES = {0: (1, 4), 1: (1, 2), 2: (32, 18), 3: (32, 20), 6: (32, 22), 7: (32, 24), 8: (32, 34), 20: (32, 18), 30: (1, 2),
         39: (32, 17)}  # fmt: skip
"""Number of a ggml type -> (weights, bytes) of a block."""
MODEL_TENSORS: dict[str, tuple[tuple[int, ...], int]] = {
    "token_embd.weight": ((64, 48), 8),
    "blk.0.attn_norm.weight": ((64,), 0),
    "blk.0.attn_q.weight": ((64, 64), 2),
    "blk.0.attn_k.weight": ((64, 32), 6),
    "blk.0.attn_v.weight": ((64, 32), 7),
    "blk.0.attn_output.weight": ((64, 64), 20),
    "blk.0.ffn_norm.weight": ((64,), 0),
    "blk.0.ffn_gate.weight": ((64, 64), 3),
    "blk.0.ffn_up.weight": ((64, 64), 39),
    "blk.0.ffn_down.weight": ((64, 64), 1),
    "output_norm.weight": ((64,), 0),
    "output.weight": ((64, 48), 30),
}
"""Name -> (dimensions, innermost first; type)."""


def tensor_bytes(dims: Sequence[int], kind: int) -> bytes:
    """Data of a tensor: scales of 0.01 and codes that differ."""
    weights_, size = SIZES[kind]
    blocks = int(np.prod(dims)) // weights_
    if weights_ == 1:
        dtype = {0: np.float32, 1: np.float16, 30: np.uint16}[kind]
        return np.full(blocks, 0x3C24 if kind == 30 else 0.01, dtype).tobytes()
    block = np.arange(size, dtype=np.uint8)
    if kind == 39:
        block[0] = 120
    else:
        block[:2] = np.array([0.01], np.float16).view(np.uint8)
    if kind in (3, 7):
        block[2:4] = np.array([-0.08], np.float16).view(np.uint8)
    return block.tobytes() * blocks


def model_tensors(**changes: Any) -> list[Tensor]:
    """The tensors of the small model; a change is None (left out), or fields of a Tensor (names with _ for .)."""
    found = []
    for name, (dims, kind) in MODEL_TENSORS.items():
        change = changes.get(name.replace(".", "_"), {})
        if change is not None:
            fields = {"name": name, "dims": dims, "type": kind, **change}
            if "data" not in fields:
                fields["data"] = tensor_bytes(fields["dims"], fields["type"])
            found.append(Tensor(**fields))
    return found


def gguf_model(keys: Mapping[str, tuple[int, Any] | None] | None = None, tensors: Sequence[Tensor] | None = None) -> bytes:
    """A small model as a GGUF file, with keys changed, added, or left out (None)."""
    merged = {**MODEL_KEYS, **(keys or {})}
    encoded = [key(name, *value) for name, value in merged.items() if value is not None]
    return gguf(encoded, model_tensors() if tensors is None else tensors)
