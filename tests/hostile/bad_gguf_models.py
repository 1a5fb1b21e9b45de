"""GGUF files that are well formed and hold no model: keys of another type or size, tensors that are missing or do not fit."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

from catalogue import Case, of_bytes
from good import (
    ARRAY,
    BOOL,
    F32,
    F64,
    I32,
    I64,
    MODEL_KEYS,
    STRING,
    TOKENS,
    U8,
    U32,
    U64,
    Tensor,
    array,
    gguf,
    gguf_model,
    key,
    model_tensors,
    tensor_bytes,
)

from nybble.errors import FileFormatError, InputError

Make = Callable[[], bytes]


def keys(**changes: Any) -> Make:
    """The small model with keys changed: _ for the dots of their names behind the first word, None leaves one out."""
    return lambda: gguf_model({_full(name): value for name, value in changes.items()})


def _full(name: str) -> str:
    return next(k for k in (*MODEL_KEYS, *EXTRA) if k.replace(".", "_") == name)


EXTRA = (
    "llama.expert_count", "llama.attention.key_length", "llama.attention.value_length", "llama.rope.scaling.type",
    "llama.rope.scaling.factor", "llama.attention.sliding_window", "split.count", "tokenizer.ggml.merges",
    "tokenizer.ggml.add_space_prefix", "nybble.config", "nybble.provenance", "tokenizer.chat_template",
)  # fmt: skip
"""Keys that the small model has not."""


def tensors(**changes: Any) -> Make:
    """The small model with tensors changed, or left out (None)."""
    return lambda: gguf_model(tensors=model_tensors(**changes))


def poison(name: str, at: int, new: bytes) -> Make:
    """The small model with some bytes of a tensor changed."""

    def make() -> bytes:
        found = model_tensors()
        place = next(i for i, tensor in enumerate(found) if tensor.name == name)
        data = found[place].data
        found[place] = Tensor(**{**vars(found[place]), "data": data[:at] + new + data[at + len(new) :]})
        return gguf_model(tensors=found)

    return make


def other(name: str, dims: tuple[int, ...] = (64,), kind: int = 0) -> Make:
    """The small model with a tensor more."""
    return lambda: gguf_model(tensors=[*model_tensors(), Tensor(name, dims, kind, tensor_bytes(dims, kind))])


def byte_level(**changes: Any) -> Make:
    """The small model with a tokenizer of the other kind."""
    found: Mapping[str, Any] = {
        "tokenizer.ggml.model": (STRING, "gpt2"),
        "tokenizer.ggml.pre": (STRING, "gpt-2"),
        "tokenizer.ggml.scores": None,
        "tokenizer.ggml.merges": (ARRAY, array(STRING, ["a b"])),
    }
    return lambda: gguf_model({**found, **{_full(name): value for name, value in changes.items()}})


INF, NAN = b"\x00\x7c", b"\x00\x7e"

WRONG: dict[str, tuple[Make, str]] = {
    "no architecture": (keys(general_architecture=None), "key 'general.architecture' is missing"),
    "architecture is a number": (keys(general_architecture=(U32, 3)), r"key 'general.architecture' is 3 \(uint32\); .* a text"),
    "architecture is an array": (keys(general_architecture=(ARRAY, array(STRING, ["llama"]))), "should be a text"),
    "no number of blocks": (keys(llama_block_count=None), "key 'llama.block_count' is missing"),
    "number of blocks is a text": (keys(llama_block_count=(STRING, "1")), "should be a whole number"),
    "number of blocks is a float": (keys(llama_block_count=(F32, 1.0)), "should be a whole number"),
    "number of blocks is an array": (keys(llama_block_count=(ARRAY, array(U32, [1]))), "should be a whole number"),
    "number of blocks is negative": (keys(llama_block_count=(I32, -1)), "should be a whole number"),
    "0 blocks": (keys(llama_block_count=(U32, 0)), "llama.block_count is 0"),
    "513 blocks": (keys(llama_block_count=(U32, 513)), "more blocks than its 12 tensors can be"),
    "2^31 - 1 blocks": (keys(llama_block_count=(U32, (1 << 31) - 1)), "more blocks than its 12 tensors can be"),
    "2^64 - 1 blocks": (keys(llama_block_count=(U64, (1 << 64) - 1)), "should be a whole number"),
    "two blocks of which one is there": (keys(llama_block_count=(U32, 2)), r"lacks tensor blk\.1\."),
    "no width": (keys(llama_embedding_length=None), "key 'llama.embedding_length' is missing"),
    "width 0": (keys(llama_embedding_length=(U32, 0)), "llama.embedding_length is 0"),
    "another width": (keys(llama_embedding_length=(U32, 128)), r"token_embd.weight has shape \[48, 64\]"),
    "width that is 32 bits too wide": (keys(llama_embedding_length=(U64, (1 << 32) + 64)), "should be a whole number"),
    "0 heads": (keys(llama_attention_head_count=(U32, 0)), "head_count is 0"),
    "heads that do not divide the width": (keys(llama_attention_head_count=(U32, 7)), "not a multiple|do not go into each other"),
    "an array of heads": (keys(llama_attention_head_count=(ARRAY, array(U32, [2]))), "should be a whole number"),
    "more heads than the width": (keys(llama_attention_head_count=(U32, 1 << 20)), "head_count|num_attention_heads|do not go"),
    "0 key heads": (keys(llama_attention_head_count_kv=(U32, 0)), "head_count_kv is 0"),
    "key heads that do not divide the heads": (keys(llama_attention_head_count_kv=(U32, 3)), "not a multiple|do not go"),
    "keys and values of different length": (
        keys(llama_attention_key_length=(U32, 32), llama_attention_value_length=(U32, 16)),
        "value_length is 16",
    ),
    "epsilon is a text": (keys(llama_attention_layer_norm_rms_epsilon=(STRING, "1e-5")), "should be a positive float"),
    "epsilon is 0": (keys(llama_attention_layer_norm_rms_epsilon=(F32, 0.0)), "should be a positive float"),
    "epsilon is negative": (keys(llama_attention_layer_norm_rms_epsilon=(F32, -1e-5)), "should be a positive float"),
    "epsilon is NaN": (keys(llama_attention_layer_norm_rms_epsilon=(F32, float("nan"))), "should be a positive float"),
    "epsilon is infinite": (keys(llama_attention_layer_norm_rms_epsilon=(F32, float("inf"))), "should be a positive float"),
    "epsilon is a whole number": (keys(llama_attention_layer_norm_rms_epsilon=(U32, 1)), "should be a positive float"),
    "epsilon is 2": (keys(llama_attention_layer_norm_rms_epsilon=(F32, 2.0)), "rms_norm_eps 2"),
    "a rotary base of 1e300": (keys(llama_rope_freq_base=(F64, 1e300)), "rope_theta"),
    "a rotary base below 0": (keys(llama_rope_freq_base=(F32, -1.0)), "should be a positive float"),
    "0 rotary dimensions": (keys(llama_rope_dimension_count=(U32, 0)), "partial_rotary_factor"),
    "more rotary dimensions than a head has": (keys(llama_rope_dimension_count=(U32, 1 << 20)), "partial_rotary_factor"),
    "rotary scaling that is a number": (keys(llama_rope_scaling_type=(U32, 1)), "should be a text"),
    "a rotary factor that is a text": (
        keys(llama_rope_scaling_type=(STRING, "linear"), llama_rope_scaling_factor=(STRING, "2")),
        "should be a positive float",
    ),
    "context 0": (keys(llama_context_length=(U32, 0)), "context_length is 0"),
    "context of 2^63": (keys(llama_context_length=(U64, 1 << 63)), "should be a whole number"),
    "a width of the feed-forward part of 0": (keys(llama_feed_forward_length=(U32, 0)), "feed_forward_length is 0"),
    "a number of experts that is a text": (keys(llama_expert_count=(STRING, "8")), "should be a whole number"),
    "number of parts is a text": (keys(split_count=(STRING, "2")), "should be a whole number"),
    "an end token that is a text": (keys(tokenizer_ggml_eos_token_id=(STRING, "</s>")), "should be a whole number"),
    "an end token of 2^40": (keys(tokenizer_ggml_eos_token_id=(U64, 1 << 40)), "should be a whole number"),
    "an end token that is negative": (keys(tokenizer_ggml_eos_token_id=(I64, -5)), "should be a whole number"),
    "a first token beyond all tokens": (keys(tokenizer_ggml_bos_token_id=(U32, 48)), "is 48, there are 48 tokens|bos_token_id"),
    "tokens are numbers": (keys(tokenizer_ggml_tokens=(ARRAY, array(U32, [1, 2]))), "should be an array of texts"),
    "tokens are one text": (keys(tokenizer_ggml_tokens=(STRING, "a b c")), "should be an array of texts"),
    "a token too few": (keys(tokenizer_ggml_tokens=(ARRAY, array(STRING, TOKENS[:-1]))), "it has 47 tokens"),
    "a token too many": (keys(tokenizer_ggml_tokens=(ARRAY, array(STRING, [*TOKENS, "x"]))), "it has 49 tokens"),
    "a token twice": (keys(tokenizer_ggml_tokens=(ARRAY, array(STRING, ["a", "a", *TOKENS[2:]]))), "a token stands twice"),
    "scores of bytes, read as floats by others": (
        keys(tokenizer_ggml_scores=(ARRAY, array(U8, [1] * 48))),
        "scores is missing or holds",
    ),
    "scores are texts": (keys(tokenizer_ggml_scores=(ARRAY, array(STRING, ["1"] * 48))), "an array of 48 numbers"),
    "a score too few": (keys(tokenizer_ggml_scores=(ARRAY, array(F32, [0.0] * 47))), "an array of 48 numbers"),
    "a score that is NaN": (keys(tokenizer_ggml_scores=(ARRAY, array(F32, [float("nan")] * 48))), "scores is missing or holds"),
    "no scores": (keys(tokenizer_ggml_scores=None), "scores is missing"),
    "a type of tokens too many": (keys(tokenizer_ggml_token_type=(ARRAY, array(I32, [1] * 49))), "an array of 48 numbers"),
    "types of tokens are floats": (
        keys(tokenizer_ggml_token_type=(ARRAY, array(F32, [float("nan")] * 48))),
        "is an array of float32, not of whole numbers",
    ),
    "types of tokens are one number": (keys(tokenizer_ggml_token_type=(U32, 1)), "an array of 48 numbers"),
    "a merge that is no pair": (byte_level(tokenizer_ggml_merges=(ARRAY, array(STRING, ["ab"]))), "is no pair of tokens"),
    "merges are numbers": (byte_level(tokenizer_ggml_merges=(ARRAY, array(U32, [1]))), "should be an array of texts"),
    "a switch that is a number": (keys(tokenizer_ggml_add_space_prefix=(U32, 1)), "should be a bool"),
    "a tokenizer of a type that is a number": (keys(tokenizer_ggml_model=(U32, 1)), "should be a text"),
    "a template that is a number": (keys(tokenizer_chat_template=(BOOL, 1)), "should be a text"),
    "a config.json that is not JSON": (keys(nybble_config=(STRING, "{]")), "is not JSON"),
    "a config.json that nests 100,000 deep": (keys(nybble_config=(STRING, "[" * 100_000 + "]" * 100_000)), "nests deeper"),
    "a config.json with a key twice": (keys(nybble_config=(STRING, '{"a": 1, "a": 2}')), "stands twice"),
    "a config.json that is a number": (keys(nybble_config=(U32, 1)), "should be a text"),
    "a provenance that is a list": (keys(nybble_provenance=(STRING, "[]")), "holds a list, not an object"),
    "a matrix is missing": (tensors(blk_0_attn_q_weight=None), r"lacks tensor blk\.0\.attn_q\.weight"),
    "a norm is missing": (tensors(output_norm_weight=None), r"lacks tensor output_norm\.weight"),
    "tokens in one dimension": (tensors(token_embd_weight={"dims": (3072,)}), r"shape \[3072\]"),
    "tokens in three dimensions": (tensors(token_embd_weight={"dims": (64, 24, 2)}), r"shape \[2, 24, 64\]"),
    "a matrix in three dimensions": (tensors(blk_0_attn_q_weight={"dims": (64, 32, 2)}), "where a matrix belongs"),
    "a matrix in one dimension": (tensors(blk_0_attn_q_weight={"dims": (4096,)}), "where a matrix belongs"),
    "queries that their heads cannot share": (tensors(blk_0_attn_q_weight={"dims": (64, 63)}), "which 2 heads cannot share|63"),
    "a scale that is infinite": (poison("blk.0.attn_q.weight", 0, INF), "blocks whose scale is not finite"),
    "a scale that is NaN": (poison("token_embd.weight", 34, NAN), "blocks whose scale is not finite"),
    "a shift that is NaN": (poison("blk.0.attn_v.weight", 2, NAN), "blocks whose shift is not finite"),
    "an exponent beyond all floats": (poison("blk.0.ffn_up.weight", 17, b"\xff"), "blocks whose exponent is not finite"),
    "factors of rotary positions that are NaN": (other("rope_freqs.weight", (16,), 0), "no divisors from 1 on"),
}
UNREADABLE: dict[str, tuple[Make, str]] = {
    "an architecture that nobody knows": (keys(general_architecture=(STRING, "evil")), "evil"),
    "an architecture like a path": (keys(general_architecture=(STRING, "../../evil")), "evil"),
    "an architecture of a megabyte": (keys(general_architecture=(STRING, "a" * 1_000_000)), "aaa"),
    "an architecture with a line break": (keys(general_architecture=(STRING, "a\nb\x1b[2J")), "a.*b"),
    "one of two parts": (keys(split_count=(U32, 2)), "is one of 2 parts"),
    "a mixture of experts": (keys(llama_expert_count=(U32, 8)), "a mixture of experts"),
    "rotary scaling that nobody knows": (keys(llama_rope_scaling_type=(STRING, "evil")), "scales rotary positions by 'evil'"),
    "no table of tokens": (tensors(token_embd_weight=None), "has no tensor token_embd.weight"),
    "no tensors at all": (lambda: gguf([key(name, *value) for name, value in MODEL_KEYS.items()]), "holds no model"),
    "a tensor too many": (other("blk.0.evil.weight"), "has no place in a model"),
    "a tensor of a block too many": (other("blk.1.attn_norm.weight"), "has no place in a model"),
    "a tensor's name that leaves the folder": (other("../../etc/passwd"), "has no place in a model"),
    "a tensor's name at the root": (other("/etc/passwd"), "has no place in a model"),
    "a tensor's name with an escape sequence": (other("\x1b[2J\n"), "has no place in a model"),
    "a matrix of whole numbers": (
        tensors(blk_0_attn_q_weight={"type": 26, "data": bytes(4 * 4096)}),
        "is I32; nybble reads",
    ),
    "a matrix of doubles": (tensors(blk_0_attn_q_weight={"type": 28, "data": bytes(8 * 4096)}), "is F64; nybble reads"),
    "a matrix of a type that is not decoded": (
        tensors(blk_0_attn_q_weight={"dims": (256, 16), "type": 16, "data": bytes(66 * 16)}),
        "is IQ2_XXS; nybble reads",
    ),
    "a config.json that runs code": (
        keys(nybble_config=(STRING, '{"model_type": "llama", "auto_map": {"AutoModel": "evil.Model"}}')),
        "asks to run code of its own",
    ),
    "a config.json that names kernels": (
        keys(nybble_config=(STRING, '{"model_type": "llama", "_attn_implementation_internal": "evil/kernels"}')),
        "asks to run code of its own",
    ),
}

CASES: dict[str, Case] = {
    **{name: Case("gguf", of_bytes(make), match, FileFormatError) for name, (make, match) in WRONG.items()},
    **{name: Case("gguf", of_bytes(make), match, InputError) for name, (make, match) in UNREADABLE.items()},
}
