"""The contract of an architecture's decoding table: the engine computes what transformers' model of the family computes."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from numpy.typing import NDArray

import nybble
from nybble import kernels
from nybble.containers import open_contents
from nybble.engine import Decoder, reference
from nybble.engine.program import make_program, supported
from nybble.engine.weights import Weights
from nybble.errors import InputError
from nybble.models.arch import table_for

Logits = NDArray[np.float32]
TOKENS = 40
"""Longer than every sliding window below."""

_SMALL: dict[str, Any] = {
    "vocab_size": 97, "hidden_size": 64, "intermediate_size": 112, "num_hidden_layers": 2, "num_attention_heads": 4,
    "num_key_value_heads": 2, "max_position_embeddings": 64, "bos_token_id": 1, "eos_token_id": 2, "pad_token_id": 0,
}  # fmt: skip
_GPT2 = {"vocab_size": 97, "n_positions": 64, "n_embd": 64, "n_layer": 2, "n_head": 4, "bos_token_id": 1, "eos_token_id": 2}
_OPT = {k: v for k, v in _SMALL.items() if k not in ("num_key_value_heads", "intermediate_size")}
_OPT |= {"ffn_dim": 96, "word_embed_proj_dim": 64}
_LLAMA3 = {"rope_type": "llama3", "factor": 4.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0,
           "original_max_position_embeddings": 16, "rope_theta": 500.0}  # fmt: skip

CASES: dict[str, tuple[str, dict[str, Any]]] = {
    "gpt2": ("GPT2LMHeadModel", _GPT2),
    "gpt2 untied, gelu": ("GPT2LMHeadModel", {**_GPT2, "tie_word_embeddings": False, "activation_function": "gelu"}),
    "gpt2 inner 100": ("GPT2LMHeadModel", {**_GPT2, "n_inner": 100, "n_head": 1, "activation_function": "relu"}),
    "llama": ("LlamaForCausalLM", _SMALL),
    "llama tied, biases": (
        "LlamaForCausalLM", {**_SMALL, "tie_word_embeddings": True, "attention_bias": True, "mlp_bias": True}
    ),
    "llama, heads of 20, one key head": ("LlamaForCausalLM", {**_SMALL, "head_dim": 20, "num_key_value_heads": 1}),
    "llama, 16 heads to one": (
        "LlamaForCausalLM", {**_SMALL, "num_attention_heads": 16, "head_dim": 8, "num_key_value_heads": 1}
    ),
    "llama, linear rope": (
        "LlamaForCausalLM", {**_SMALL, "rope_parameters": {"rope_type": "linear", "factor": 3.0, "rope_theta": 1e4}}
    ),
    "llama, llama3 rope": ("LlamaForCausalLM", {**_SMALL, "rope_parameters": _LLAMA3}),
    "llama, theta": ("LlamaForCausalLM", {**_SMALL, "rope_parameters": {"rope_type": "default", "rope_theta": 7e5}}),
    "mistral, no window": ("MistralForCausalLM", {**_SMALL, "sliding_window": None}),
    "mistral, window": ("MistralForCausalLM", {**_SMALL, "sliding_window": 8}),
    "qwen2": ("Qwen2ForCausalLM", _SMALL),
    "qwen2, window from layer 1": (
        "Qwen2ForCausalLM", {**_SMALL, "use_sliding_window": True, "sliding_window": 8, "max_window_layers": 1}
    ),
    "qwen3": ("Qwen3ForCausalLM", {**_SMALL, "head_dim": 24, "tie_word_embeddings": True}),
    "gemma": ("GemmaForCausalLM", {**_SMALL, "head_dim": 16}),
    "gemma2": (
        "Gemma2ForCausalLM",
        {**_SMALL, "head_dim": 16, "sliding_window": 8, "query_pre_attn_scalar": 20, "attn_logit_softcapping": 2.0,
         "final_logit_softcapping": 3.0},
    ),
    "opt": ("OPTForCausalLM", _OPT),
    "opt, gelu, no biases": ("OPTForCausalLM", {**_OPT, "activation_function": "gelu", "enable_bias": False}),
    "phi": ("PhiForCausalLM", {**_SMALL, "num_key_value_heads": 4}),
    "phi, a quarter rotated": (
        "PhiForCausalLM",
        {**_SMALL, "rope_parameters": {"rope_type": "default", "rope_theta": 1e4, "partial_rotary_factor": 0.25}},
    ),
}  # fmt: skip
"""Name -> (class of transformers, settings of its config)."""


pytestmark = pytest.mark.usefixtures("one_thread")


def make(name: str) -> Any:
    """A random model in evaluation mode, norms and biases random too; eager attention, which knows soft caps."""
    import transformers

    cls_name, settings = CASES[name]
    cls = getattr(transformers, cls_name)
    with torch.random.fork_rng():
        torch.manual_seed(len(name))
        model = cls._from_config(cls.config_class(**settings), attn_implementation="eager").eval()
        for parameter in model.parameters():
            parameter.data += 0.1 * torch.randn_like(parameter)
    return model


def some_ids(count: int = TOKENS) -> list[int]:
    return np.random.default_rng(7).integers(3, 97, count).tolist()


def torch_logits(model: Any, ids: list[int]) -> Logits:
    with torch.inference_mode():
        found: Logits = model(input_ids=torch.tensor([ids])).logits[0].float().numpy()
    return found


def apart(got: Logits, wanted: Logits) -> float:
    """The largest difference as a share of the largest logit."""
    return float(np.abs(got.astype(np.float64) - wanted).max() / np.abs(wanted).max())


@pytest.fixture(scope="module")
def saved(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], tuple[Path, Any]]:
    """A case's folder and its torch model, made once."""
    root, made = tmp_path_factory.mktemp("models"), dict[str, tuple[Path, Any]]()

    def get(name: str) -> tuple[Path, Any]:
        if name not in made:
            model = make(name)
            folder = root / str(len(made))
            model.save_pretrained(folder)
            made[name] = (folder, model)
        return made[name]

    return get


def test_every_table_with_decoding_is_tried() -> None:
    import transformers

    tried = {getattr(transformers, cls).config_class.model_type for cls, _ in CASES.values()}
    assert tried == set(supported())


@pytest.mark.parametrize("name", CASES)
def test_exact_logits_are_those_of_the_torch_model(name: str, saved: Any) -> None:
    folder, model = saved(name)
    ids = some_ids()
    wanted = torch_logits(model, ids)
    for cache in ("f32", "f16", "int16"):
        got = Decoder.load(folder, threads=1, exact=True, cache=cache).logits(ids)
        assert got.shape == (TOKENS, 97)
        error = apart(got, wanted)
        # Measured with an f32 cache: at most 2e-6. Halves have 11 bits, int16 12.
        assert error < (1e-5 if cache == "f32" else 2e-3), f"{name}, {cache} cache: {error:.2g}"


@pytest.mark.parametrize("name", CASES)
def test_the_reference_computes_the_same(name: str, saved: Any) -> None:
    folder, model = saved(name)
    ids = some_ids()
    contents = open_contents(folder)
    prefix = f"{table_for(str(contents.config['model_type'])).block.split('.')[0]}."
    weights = Weights(contents, prefix)
    program = make_program(contents.config, weights.shape_of)

    def decoded(matrix: Any) -> Logits:
        laid = weights.matrix(matrix, 1)
        return kernels.rows_of(laid, np.arange(laid.rows))

    found = reference.logits(program, np.array(ids), decoded, weights.vector)
    assert apart(found, torch_logits(model, ids)) < 1e-5
    assert apart(Decoder.load(folder, threads=1, exact=True).logits(ids), found) < 1e-5


@pytest.mark.parametrize("exact", [True, False], ids=["exact", "fast"])
@pytest.mark.parametrize("name", CASES)
def test_a_text_has_the_same_bits_however_it_is_read(name: str, exact: bool, saved: Any) -> None:
    """In one run, step by step, with one thread or two, alone or in a batch."""
    folder, _ = saved(name)
    ids = some_ids(24)
    decoder = Decoder.load(folder, threads=1, exact=exact)
    whole = decoder.logits(ids)
    for count in (1, 2, 3, 7, 24):
        np.testing.assert_array_equal(decoder.prefill(ids[:count]), whole[count - 1])
    two = Decoder.load(folder, threads=2, exact=exact)
    np.testing.assert_array_equal(two.logits(ids), whole)
    alone = decoder.generate(ids, max_new_tokens=20, stop_tokens=())
    text = [*ids, *alone]
    chosen = [int(row.argmax()) for row in decoder.logits(text)[len(ids) - 1 : -1]]
    assert alone == chosen, "single steps chose other tokens than one run over the text"
    prompts = [ids[:5], ids, ids[3:12], [ids[0]]]
    together = two.generate_batch(prompts, max_new_tokens=20, stop_tokens=())
    assert together == [decoder.generate(prompt, max_new_tokens=20, stop_tokens=()) for prompt in prompts]


@pytest.mark.parametrize("spec", ["int4:g32", "int8:channel", "nf4:g64,dq"])
@pytest.mark.parametrize("name", CASES)
def test_a_quantized_folder_decodes_like_its_torch_model(name: str, spec: str, saved: Any, tmp_path: Path) -> None:
    _, model = saved(name)
    folder = nybble.quantize(make(name), spec).save(tmp_path / "quantized")
    ids = some_ids()
    quantized = nybble.load(folder).model()
    quantized.set_attn_implementation("eager")
    wanted = torch_logits(quantized, ids)
    error = apart(Decoder.load(folder, threads=1, exact=True).logits(ids), wanted)
    assert error < 1e-5, f"{name}, {spec}: {error:.2g}"
    assert apart(torch_logits(model, ids), wanted) > 1e-3, "nothing was quantized"
    fast = apart(Decoder.load(folder, threads=1).logits(ids), wanted)
    assert 1e-5 < fast < 0.1, f"fast mode, {name}, {spec}: {fast:.2g}"


@pytest.mark.parametrize(
    ("name", "change", "message"),
    [
        ("gpt2", {"scale_attn_by_inverse_layer_idx": True}, "gpt2 with scale_attn_by_inverse_layer_idx False only"),
        ("phi", {"qk_layernorm": True}, "phi with qk_layernorm False only"),
        ("opt", {"do_layer_norm_before": False}, "opt with do_layer_norm_before True only"),
        ("llama", {"hidden_act": "mish"}, "activation 'mish'; the engine knows gelu"),
        ("llama", {"model_type": "bert"}, "cannot decode model_type 'bert'; it knows gemma, gemma2, gpt2"),
        (
            "llama",
            {"rope_parameters": {"rope_type": "yarn", "factor": 2.0}},
            "type 'yarn'; the engine knows default, linear, llama3",
        ),
        ("llama", {"num_hidden_layers": 3}, "no model.layers.2.input_layernorm.weight, which llama needs"),
        ("llama", {"num_attention_heads": 0}, "num_attention_heads 0, not a whole number from 1 to 65536"),
        ("llama", {"hidden_size": 128}, "has shape"),
    ],
)
def test_a_variant_that_it_cannot_run_is_one_line(
    name: str, change: dict[str, Any], message: str, saved: Any, tmp_path: Path
) -> None:
    import shutil

    folder = Path(shutil.copytree(saved(name)[0], tmp_path / "model"))
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps({**config, **change}))
    with pytest.raises(InputError, match=message) as caught:
        Decoder.load(folder, threads=1)
    assert "\n" not in str(caught.value)


def test_opt_with_projections_around_its_embeddings_is_refused(tmp_path: Path) -> None:
    import transformers

    config = transformers.OPTConfig(**{**_OPT, "word_embed_proj_dim": 32})
    transformers.OPTForCausalLM(config).save_pretrained(tmp_path / "opt")
    with pytest.raises(InputError, match=r"has shape .* not 64 columns; the engine cannot run it"):
        Decoder.load(tmp_path / "opt", threads=1)
