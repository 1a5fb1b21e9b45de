"""From config.json to a list of operations: what each table's variants become, and which are refused."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest

from nybble.engine.program import Add, Attend, Cap, Embed, Linear, Norm, Program, Select, make_program, supported
from nybble.engine.rotary import frequencies
from nybble.errors import InputError

LLAMA = {
    "model_type": "llama", "hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4, "num_key_value_heads": 2,
    "max_position_embeddings": 64, "rms_norm_eps": 1e-6, "hidden_act": "silu",
}  # fmt: skip
GPT2 = {
    "model_type": "gpt2", "n_embd": 32, "n_layer": 2, "n_head": 4, "n_positions": 64, "layer_norm_epsilon": 1e-5,
    "activation_function": "gelu_new",
}  # fmt: skip
Shapes = Callable[[str], tuple[int, ...] | None]


def llama_shapes(*missing: str, bias: bool = False) -> Shapes:
    """The tensors of a Llama of 97 tokens, without those whose names contain one of `missing`."""

    def shape_of(name: str) -> tuple[int, ...] | None:
        if any(part in name for part in missing) or (name.endswith(".bias") and not bias):
            return None
        if name.endswith(".bias") or "norm" in name:
            return (32,)
        rows = {"embed_tokens": 97, "lm_head": 97, "k_proj": 16, "v_proj": 16, "gate_proj": 48, "up_proj": 48}
        return next((count for part, count in rows.items() if part in name), 32), 48 if "down_proj" in name else 32

    return shape_of


def gpt2_shapes(name: str) -> tuple[int, ...] | None:
    if "lm_head" in name:
        return None
    if name.endswith(".bias"):
        return None if "wte" in name or "wpe" in name else (32,)
    if "ln_" in name:
        return (32,)
    return (97, 32) if "wte" in name else (64, 32) if "wpe" in name else (32, 96)


def of_kind(program: Program, kind: type) -> list[Any]:
    return [operation for operation in program.operations if type(operation) is kind]


def attends(**change: Any) -> list[Any]:
    return of_kind(make_program({**LLAMA, **change}, llama_shapes()), Attend)


def test_a_llama_block() -> None:
    program = make_program(LLAMA, llama_shapes())
    kinds = [type(operation) for operation in program.operations]
    block = [Norm, Linear, Attend, Linear, Norm, Linear, Linear]
    chosen = kinds.index(Select)
    assert kinds.count(Select) == 1
    assert Attend in kinds[:chosen], "the last layer's attention fills the cache with all rows"
    assert Attend not in kinds[chosen:]
    assert [kind for kind in kinds if kind is not Select] == [Embed, *block, *block, Norm, Linear]
    assert (program.vocabulary, program.context) == (97, 64)
    norm, projected, attend, out, _, gated, down = program.operations[1:8]
    assert isinstance(norm, Norm)
    assert (norm.centred, norm.eps, norm.bias, norm.gain_offset, norm.target) == (False, 1e-6, False, 0.0, "normed")
    assert isinstance(projected, Linear)
    assert [m.name for m in projected.matrices] == [f"model.layers.0.self_attn.{part}_proj" for part in "qkv"]
    assert isinstance(attend, Attend)
    assert (attend.heads, attend.shared, attend.dimensions, attend.window, attend.cap) == (4, 2, 8, 0, 0.0)
    assert attend.scale == 1 / math.sqrt(8)
    assert isinstance(out, Linear)
    assert (out.source, out.target, out.add) == ("mixed", "residual", True)
    assert isinstance(gated, Linear)
    assert (gated.gated, gated.activation, len(gated.matrices)) == (True, "silu", 2)
    assert isinstance(down, Linear)
    assert (down.source, down.add, down.gated) == ("inner", True, False)


def test_a_gpt2_block() -> None:
    program = make_program(GPT2, gpt2_shapes)
    embed = program.operations[0]
    assert isinstance(embed, Embed)
    assert embed.positions is not None
    assert (embed.positions.name, embed.offset, embed.scale) == ("transformer.wpe", 0, 1.0)
    projected = of_kind(program, Linear)[0]
    assert [(m.name, m.transposed, m.bias) for m in projected.matrices] == [("transformer.h.0.attn.c_attn", True, True)]
    head = program.operations[-1]
    assert isinstance(head, Linear)
    assert [(m.name, m.transposed, m.bias) for m in head.matrices] == [("transformer.wte", False, False)]
    assert of_kind(program, Attend)[0].frequencies == ()
    assert of_kind(program, Linear)[2].activation == "gelu_tanh"


def test_the_head_is_tied_where_the_config_or_the_file_says_so() -> None:
    def head(config: dict[str, Any], shapes: Shapes) -> str:
        return str(of_kind(make_program(config, shapes), Linear)[-1].matrices[0].name)

    assert head(LLAMA, llama_shapes()) == "lm_head"
    assert head({**LLAMA, "tie_word_embeddings": True}, llama_shapes()) == "model.embed_tokens"
    assert head(LLAMA, llama_shapes("lm_head")) == "model.embed_tokens"
    assert head({**LLAMA, "model_type": "gemma"}, llama_shapes()) == "model.embed_tokens"
    assert head(GPT2, gpt2_shapes) == "transformer.wte"


def test_biases_are_used_where_the_checkpoint_has_them() -> None:
    assert not any(m.bias for o in of_kind(make_program(LLAMA, llama_shapes()), Linear) for m in o.matrices)
    with_biases = of_kind(make_program(LLAMA, llama_shapes(bias=True)), Linear)
    assert all(m.bias for o in with_biases for m in o.matrices)


@pytest.mark.parametrize(
    ("change", "windows"),
    [
        ({}, [0, 0]),
        ({"sliding_window": 8}, [0, 0]),  # Llama has none
        ({"model_type": "mistral", "sliding_window": 8}, [8, 8]),
        ({"model_type": "mistral", "sliding_window": None}, [0, 0]),
        ({"model_type": "qwen2", "sliding_window": 8, "use_sliding_window": False, "max_window_layers": 0}, [0, 0]),
        ({"model_type": "qwen2", "sliding_window": 8, "use_sliding_window": True, "max_window_layers": 1}, [0, 8]),
        ({"model_type": "qwen3", "sliding_window": 8, "layer_types": ["sliding_attention", "full_attention"]}, [8, 0]),
        ({"model_type": "mistral", "sliding_window": 8, "layer_types": ["full_attention", "sliding_attention"]}, [0, 8]),
    ],
)
def test_which_layers_see_a_window(change: dict[str, Any], windows: list[int]) -> None:
    assert [attend.window for attend in attends(**change)] == windows


def test_gemma_2() -> None:
    config = {
        **LLAMA, "model_type": "gemma2", "sliding_window": 8, "query_pre_attn_scalar": 100, "attn_logit_softcapping": 50.0,
        "final_logit_softcapping": 30.0, "hidden_activation": "gelu_pytorch_tanh", "head_dim": 16,
    }  # fmt: skip
    program = make_program(config, llama_shapes())
    assert [attend.window for attend in of_kind(program, Attend)] == [8, 0]
    assert [(attend.cap, attend.scale, attend.dimensions) for attend in of_kind(program, Attend)] == [(50.0, 0.1, 16)] * 2
    assert program.operations[-1] == Cap(30.0)
    assert len(of_kind(program, Add)) == 4
    assert {norm.gain_offset for norm in of_kind(program, Norm)} == {1.0}
    assert of_kind(program, Embed)[0].scale == float(np.float32(math.sqrt(32)))
    plain = make_program({**config, "final_logit_softcapping": None, "attn_logit_softcapping": None}, llama_shapes())
    assert not of_kind(plain, Cap)
    assert of_kind(plain, Attend)[0].cap == 0.0


def test_qwen_3_norms_its_heads() -> None:
    attend = attends(model_type="qwen3", head_dim=24)[1]
    assert (attend.query_norm, attend.key_norm) == ("model.layers.1.self_attn.q_norm", "model.layers.1.self_attn.k_norm")
    assert attend.dimensions == 24


@pytest.mark.parametrize(
    ("change", "missing", "message"),
    [
        ({"model_type": "bloom"}, (), f"cannot decode model_type 'bloom'; it knows {', '.join(supported())}"),
        ({"model_type": None}, (), "cannot decode model_type 'None'"),
        ({"hidden_size": None}, (), "hidden_size None, not a positive whole number"),
        ({"num_attention_heads": -4}, (), "num_attention_heads -4"),
        ({"num_hidden_layers": "2"}, (), "num_hidden_layers '2'"),
        ({"max_position_embeddings": 0}, (), "max_position_embeddings 0"),
        ({"hidden_act": "mish"}, (), "activation 'mish'; the engine knows gelu"),
        ({"hidden_act": None}, (), "activation ''; the engine knows"),
        ({"hidden_size": 64}, (), r"model.embed_tokens.weight has shape \(97, 32\), not 64 columns"),
        ({}, ("embed_tokens",), "has no matrix model.embed_tokens.weight, which llama needs"),
        ({}, ("1.mlp.up_proj",), "has no matrix model.layers.1.mlp.up_proj.weight, which llama needs"),
        ({}, ("0.input_layernorm",), "has no model.layers.0.input_layernorm.weight, which llama needs"),
        ({"model_type": "phi", "qk_layernorm": True}, (), "decodes phi with qk_layernorm False only, config.json says True"),
    ],
)
def test_what_cannot_be_run_is_one_line(change: dict[str, Any], missing: tuple[str, ...], message: str) -> None:
    with pytest.raises(InputError, match=message) as caught:
        make_program({**LLAMA, **change}, llama_shapes(*missing))
    assert "\n" not in str(caught.value)


def transformers_frequencies(kind: str, settings: dict[str, Any]) -> Any:
    import transformers
    from transformers.modeling_rope_utils import ROPE_INIT_FUNCTIONS

    parameters = {"rope_type": kind, "rope_theta": 10000.0, **settings}
    config = transformers.LlamaConfig(
        hidden_size=64, num_attention_heads=2, max_position_embeddings=256, rope_parameters=parameters
    )
    return ROPE_INIT_FUNCTIONS[kind](config, "cpu")[0].numpy()


@pytest.mark.parametrize(
    ("kind", "settings"),
    [
        ("linear", {"factor": 3.0}),
        ("linear", {"factor": 8.0, "rope_theta": 500000.0}),
        ("llama3", {"factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0, "original_max_position_embeddings": 32}),
        ("llama3", {"factor": 32.0, "low_freq_factor": 1.0, "high_freq_factor": 2.0, "original_max_position_embeddings": 64}),
    ],
)
def test_scaled_rotations_are_those_of_transformers(kind: str, settings: dict[str, Any]) -> None:
    wanted = transformers_frequencies(kind, settings)
    new = {"rope_parameters": {"rope_type": kind, "rope_theta": 10000.0, **settings}}
    old = {"rope_theta": settings.get("rope_theta", 10000.0), "rope_scaling": {"type": kind, **settings}}
    for config in (new, old):
        np.testing.assert_allclose(frequencies(config, 32), wanted, rtol=1e-6)


def test_plain_rotations() -> None:
    plain = frequencies({}, 8)
    np.testing.assert_allclose(plain, [1.0, 0.1, 0.01, 0.001], rtol=1e-6)
    assert frequencies({"rope_theta": 10000.0}, 8) == frequencies({"rope_parameters": {"rope_theta": 10000.0}}, 8) == plain
    assert len(frequencies({"partial_rotary_factor": 0.5}, 16)) == 4
    assert all(f == float(np.float32(f)) for f in plain)


@pytest.mark.parametrize("kind", ["yarn", "dynamic", "longrope"])
def test_unknown_rotations_are_refused(kind: str) -> None:
    with pytest.raises(InputError, match=f"type '{kind}'; the engine knows default, linear, llama3"):
        frequencies({"rope_scaling": {"rope_type": kind, "factor": 2.0}}, 8)


@pytest.mark.parametrize("kind", ["linear", "llama3"])
def test_rotations_without_their_factor_are_refused(kind: str) -> None:
    with pytest.raises(InputError, match="factor"):
        frequencies({"rope_scaling": {"rope_type": kind}}, 8)
