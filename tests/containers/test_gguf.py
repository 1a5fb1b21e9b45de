"""GGUF as a container: every architecture there and back, written twice to the same bytes, and what it refuses. What llama.cpp
makes of the files: tests/interop; hostile ones: tests/hostile."""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from nybble.containers import Contents, gguf, open_contents
from nybble.containers.gguf_config import LLAMA3
from nybble.containers.gguf_names import order_back, order_of_rows
from nybble.containers.saving import digest_of
from nybble.errors import FileFormatError, InputError, UsageError
from nybble.files.gguf import GgufFile, Tensor, write_gguf
from nybble.files.gguf_blocks import LAYOUTS
from nybble.files.gguf_values import Value
from nybble.formats import QTensor, parse_format
from nybble.formats.activations import Activations
from nybble.models.arch import tables

NAMES = ("gpt2", "gpt2-untied", "llama", "llama-tied", "mistral", "qwen2", "qwen3", "phi", "gemma", "gemma2")


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory, tiny: Callable[..., Any]) -> Callable[[str], Path]:
    """The folder of a tiny model, by the name of its family."""
    root = tmp_path_factory.mktemp("models")

    def folder(name: str) -> Path:
        if not (root / name).exists():
            tiny(name).save_pretrained(root / name)
            config = json.loads((root / name / "config.json").read_text())
            config.update({"query_pre_attn_scalar": 16} if name == "gemma2" else {})
            (root / name / "config.json").write_text(json.dumps(config))
        return root / name

    return folder


def written(contents: Contents, path: Path) -> Contents:
    gguf.write(path, contents, {})
    return gguf.read(path)


def rewritten(path: Path, target: Path, change: Callable[[dict[str, Value]], None], drop: str = "") -> Path:
    """A GGUF file again, with other keys, without a tensor."""
    file = GgufFile(path)
    metadata = dict(file.metadata)
    change(metadata)
    tensors = [
        Tensor(name, entry.type.name, entry.shape, lambda name=name: file.raw(name))  # type: ignore[misc]
        for name, entry in file.tensors.items()
        if name != drop
    ]
    write_gguf(target, metadata, tensors)
    return target


def with_config(contents: Contents, **changes: Any) -> Contents:
    config = {key: value for key, value in {**contents.config, **changes}.items() if value is not ...}
    return dataclasses.replace(contents, config=config)


@pytest.mark.parametrize("name", NAMES)
def test_there_and_back(name: str, folders: Callable[[str], Path], tmp_path: Path) -> None:
    source = open_contents(folders(name))
    found = written(source, tmp_path / "a.gguf")
    assert found.container == "gguf"
    assert found.config == source.config
    assert found.floats.keys() == source.floats.keys()
    assert found.packed == {}
    for tensor, (tag, shape) in source.floats.items():
        assert found.floats[tensor] == (tag, shape)
        expected, values = source.read_float(tensor), found.read_float(tensor)
        if "gemma" in name and len(shape) == 1:  # stored plus 1, and what a norm computes with is just that
            assert np.array_equal(values + np.float32(1), expected + np.float32(1))
        else:
            assert np.array_equal(values, expected)
    gguf.write(tmp_path / "b.gguf", found, {})
    assert (tmp_path / "b.gguf").read_bytes() == (tmp_path / "a.gguf").read_bytes()


@pytest.mark.parametrize("name", NAMES)
def test_the_config_follows_from_llama_cpps_keys(
    name: str,
    folders: Callable[[str], Path],
    tmp_path: Path,
    ids: Any,
    logits: Callable[..., Any],
) -> None:
    """Without the config.json that we keep in it, a file still gives a model with the same logits."""
    torch = pytest.importorskip("torch")
    transformers = pytest.importorskip("transformers")
    gguf.write(tmp_path / "a.gguf", open_contents(folders(name)), {})
    rewritten(tmp_path / "a.gguf", tmp_path / "b.gguf", lambda keys: keys.pop("nybble.config"))
    found = gguf.read(tmp_path / "b.gguf")
    (tmp_path / "config.json").write_text(json.dumps(found.config))
    config = transformers.AutoConfig.from_pretrained(tmp_path)
    model = transformers.AutoModelForCausalLM.from_config(config).eval()
    assert type(model).__name__ == found.config["architectures"][0]
    state = {tensor: torch.from_numpy(found.read_float(tensor).copy()) for tensor in found.floats}
    missing = model.load_state_dict(state, strict=False)
    assert missing.unexpected_keys == []
    assert set(missing.missing_keys) <= {"lm_head.weight"}
    model.tie_weights()
    original = transformers.AutoModelForCausalLM.from_pretrained(folders(name)).eval()
    difference = (logits(model, ids) - logits(original, ids)).abs().max()
    assert float(difference) <= (1e-6 if "gemma" in name else 0)


@pytest.mark.parametrize("spec", [*LAYOUTS, "fp16", "bf16", "fp32"])
@pytest.mark.parametrize("name", ["gpt2", "llama"])
def test_codes_are_kept(name: str, spec: str, folders: Callable[[str], Path], tmp_path: Path) -> None:
    """Every matrix packed, codes and params as random as can be: Llama's query and key rows change places and come back."""
    fmt, source = parse_format(spec), open_contents(folders(name))
    rng = np.random.default_rng(3)
    tensors: dict[str, QTensor] = {}
    table = tables()[str(source.config["model_type"])]
    for tensor, (_, shape) in source.floats.items():
        if len(shape) == 2 and "wpe" not in tensor:
            rows = shape[1] if tensor.split("h.0.")[-1].removesuffix(".weight") in table.transposed else shape[0]
            weight = rng.standard_normal((rows, 256)).astype(np.float32)
            tensors[tensor] = QTensor(fmt, *fmt.round(weight))
    contents = dataclasses.replace(
        source,
        config={**source.config, **({"n_embd": 256, "n_head": 4} if name == "gpt2" else {"hidden_size": 256, "head_dim": 16})},
        packed={tensor: (spec, value.shape) for tensor, value in tensors.items()},
        floats={tensor: facts for tensor, facts in source.floats.items() if tensor not in tensors},
        read_packed=tensors.__getitem__,
    )
    found = written(contents, tmp_path / "a.gguf")
    if fmt.is_cast:
        tag = {"fp16": "F16", "bf16": "BF16", "fp32": "F32"}[spec]
        assert all(found.floats[tensor][0] == tag for tensor in tensors)
        again = {tensor: found.float32(tensor) for tensor in tensors}
        assert all(again[t].shape in (value.shape, value.shape[::-1]) for t, value in tensors.items())
        assert all(np.array_equal(np.sort(again[t], None), np.sort(value.decode(), None)) for t, value in tensors.items())
    else:
        assert found.packed == contents.packed
        assert all(digest_of(found.read_packed(tensor)) == digest_of(value) for tensor, value in tensors.items())
    file = GgufFile(tmp_path / "a.gguf")
    assert {entry.type.name for inside, entry in file.tensors.items() if "norm" in inside or inside.endswith("bias")} == {"F32"}
    gguf.write(tmp_path / "b.gguf", found, {})
    assert (tmp_path / "b.gguf").read_bytes() == (tmp_path / "a.gguf").read_bytes()


def test_rotated_rows_by_their_meaning() -> None:
    """Query times key after each runtime's own rotation is the same number: what the order of rows is for."""
    heads, width = 3, 8
    rng = np.random.default_rng(0)
    order = order_of_rows(heads * width, heads)
    assert order[:width].tolist() == [0, 4, 1, 5, 2, 6, 3, 7]
    assert np.array_equal(order[order_back(heads * width, heads)], np.arange(heads * width))
    angles = 10000.0 ** (-np.arange(width // 2) * 2 / width)

    def turned(x: np.ndarray, position: int, neighbours: bool) -> np.ndarray:
        first, second = (x[0::2], x[1::2]) if neighbours else (x[: width // 2], x[width // 2 :])
        cos, sin = np.cos(position * angles), np.sin(position * angles)
        return np.concatenate((first * cos - second * sin, first * sin + second * cos))

    query, key = rng.standard_normal((2, heads * width))
    for head in range(heads):
        rows = slice(head * width, (head + 1) * width)
        expected = turned(query[rows], 11, False) @ turned(key[rows], 4, False)
        found = turned(query[order][rows], 11, True) @ turned(key[order][rows], 4, True)
        assert found == pytest.approx(expected, rel=1e-12)


def test_names_and_layout_of_gpt2(folders: Callable[[str], Path], tmp_path: Path) -> None:
    source = open_contents(folders("gpt2"))
    gguf.write(tmp_path / "a.gguf", source, {})
    file = GgufFile(tmp_path / "a.gguf")
    assert list(file.tensors)[:4] == [
        "token_embd.weight",
        "position_embd.weight",
        "blk.0.attn_norm.weight",
        "blk.0.attn_norm.bias",
    ]
    assert list(file.tensors)[-2:] == ["output_norm.weight", "output_norm.bias"]  # the head is tied
    assert file.tensors["blk.1.attn_qkv.weight"].shape == (192, 64)
    assert np.array_equal(file.elements("blk.1.attn_qkv.weight"), source.read_float("transformer.h.1.attn.c_attn.weight").T)
    keys = {key: str(value) for key, value in file.metadata.items()}
    expected = {
        "general.architecture": "'gpt2'",
        "general.name": "'gpt2'",
        "general.quantization_version": "2",
        "general.file_type": "0",
        "gpt2.context_length": "64",
        "gpt2.embedding_length": "64",
        "gpt2.block_count": "2",
        "gpt2.feed_forward_length": "256",
        "gpt2.attention.head_count": "4",
        "gpt2.attention.layer_norm_epsilon": "1e-05",
        "gpt2.vocab_size": "97",
        "tokenizer.ggml.model": "'none'",
    }
    assert {key: keys[key] for key in expected} == expected


def test_names_without_the_base_models_part(folders: Callable[[str], Path], tmp_path: Path) -> None:
    """Old GPT-2 checkpoints call their tensors `h.0...` and carry masks as buffers."""
    source = open_contents(folders("gpt2"))
    names = {name.removeprefix("transformer."): name for name in source.floats}
    floats = {short: source.floats[name] for short, name in names.items()} | {"h.0.attn.bias": ("U8", (1, 1, 64, 64))}
    old = dataclasses.replace(source, floats=floats, read_float=lambda name: source.read_float(names[name]))
    gguf.write(tmp_path / "a.gguf", source, {})
    gguf.write(tmp_path / "b.gguf", old, {})
    assert (tmp_path / "b.gguf").read_bytes() == (tmp_path / "a.gguf").read_bytes()


def test_llama_3s_rotary_factors(folders: Callable[[str], Path], tmp_path: Path) -> None:
    rope = {"rope_type": "llama3", "rope_theta": 500000.0, "factor": 8.0, **LLAMA3}
    source = with_config(open_contents(folders("llama")), rope_parameters=rope)
    assert written(source, tmp_path / "a.gguf").config == source.config
    factors = GgufFile(tmp_path / "a.gguf").elements("rope_freqs.weight")
    assert factors[0] == 1
    assert factors[-1] == 8
    path = rewritten(tmp_path / "a.gguf", tmp_path / "b.gguf", lambda keys: keys.pop("nybble.config"))
    assert gguf.read(path).config["rope_parameters"] == rope
    other = with_config(source, rope_parameters={**rope, "low_freq_factor": 2.0})
    assert written(other, tmp_path / "c.gguf").config == other.config
    path = rewritten(tmp_path / "c.gguf", tmp_path / "d.gguf", lambda keys: keys.pop("nybble.config"))
    with pytest.raises(InputError, match=r"factors of rotary positions .* that are not Llama 3's"):
        gguf.read(path)


def test_a_window_that_llama_cpp_leaves_out(folders: Callable[[str], Path], tmp_path: Path) -> None:
    """It lets Mistral's positions see all before them, so a file states no more context than the window."""
    source = with_config(open_contents(folders("mistral")), sliding_window=24)
    found = written(source, tmp_path / "a.gguf")
    assert found.config == source.config
    assert found.details["metadata"]["llama.context_length"] == Value("uint32", 24)
    path = rewritten(tmp_path / "a.gguf", tmp_path / "b.gguf", lambda keys: keys.pop("nybble.config"))
    config = gguf.read(path).config
    assert (config["model_type"], config["sliding_window"], config["max_position_embeddings"]) == ("mistral", 24, 24)


def test_a_kept_config_counts_only_where_the_keys_say_the_same(folders: Callable[[str], Path], tmp_path: Path) -> None:
    source = open_contents(folders("llama"))
    gguf.write(tmp_path / "a.gguf", source, {})

    def other(key: str, value: Value) -> dict[str, Any]:
        path = rewritten(tmp_path / "a.gguf", tmp_path / "b.gguf", lambda keys: keys.update({key: value}))
        return dict(gguf.read(path).config)

    assert other("general.name", Value.text("x")) == source.config
    changed = other("llama.rope.freq_base", Value("float32", 5000.0))
    assert changed["rope_parameters"]["rope_theta"] == 5000
    assert "initializer_range" not in changed
    assert other("llama.attention.sliding_window", Value("uint32", 32))["model_type"] == "mistral"
    hostile = {**source.config, "auto_map": {"AutoModel": "x.y"}}
    with pytest.raises(InputError, match=r"key nybble.config asks to run code of its own"):
        other("nybble.config", Value.text(json.dumps(hostile)))
    with pytest.raises(FileFormatError, match=r"key nybble.config"):
        other("nybble.config", Value.text("{"))


def test_what_others_wrote_is_kept(folders: Callable[[str], Path], tmp_path: Path) -> None:
    """Keys that nobody here knows, the name of a mix, another alignment."""
    gguf.write(tmp_path / "a.gguf", open_contents(folders("llama")), {})

    def change(keys: dict[str, Value]) -> None:
        keys.pop("nybble.config")
        keys["general.quantized_by"] = Value.text("somebody")
        keys["quantize.imatrix.chunks_count"] = Value("int32", 128)
        keys["general.file_type"] = Value("uint32", 17)

    first = gguf.read(rewritten(tmp_path / "a.gguf", tmp_path / "b.gguf", change))
    assert first.details["file_type"] == "Q5_K_M"
    again = written(first, tmp_path / "c.gguf")
    assert again.details["metadata"] == first.details["metadata"]
    assert (tmp_path / "c.gguf").read_bytes() == (tmp_path / "b.gguf").read_bytes()


def test_provenance_and_the_name_of_a_mix(folders: Callable[[str], Path], tmp_path: Path) -> None:
    source = dataclasses.replace(open_contents(folders("llama")), provenance={"format": "q4_k_m", "plan_hash": "ü"})
    found = written(source, tmp_path / "a.gguf")
    assert found.provenance == source.provenance
    assert found.details["file_type"] == "Q4_K_M"
    plain = dataclasses.replace(found, provenance={})
    assert written(plain, tmp_path / "b.gguf").provenance == {}


def test_candidates() -> None:
    def of(spec: str, columns: int = 64, kind: str = "linear") -> tuple[str, ...]:
        return gguf.candidates(parse_format(spec), (8, columns), kind)

    assert [of(f"int{bits}:g32")[0] for bits in range(2, 9)] == ["q4_0"] * 3 + ["q5_0"] + ["q8_0"] * 3
    assert of("int4:g128") == of("int4:channel") == of("int4:tensor") == ("q4_0",)
    assert of("int4:g64,asym") == ("q4_1", "q5_0")
    assert of("int5:g64,asym") == ("q5_1", "q8_0")
    assert of("int8:channel") == ("q8_0",)
    assert of("nf4:g64") == of("fp4:g64") == ()
    assert of("int4:g64", columns=172) == ("fp16", "fp32")
    assert all(of(spec, 256) == (spec,) for spec in (*LAYOUTS, "fp32", "fp16", "bf16"))
    assert of("q4_k", 256, "positions") == of("fp16", kind="positions") == ("fp32",)
    assert of("int4:g64", kind="embedding") == of("int4:g64", kind="head") == ("q4_0",)


def test_a_packed_table_of_positions_becomes_floats(folders: Callable[[str], Path], tmp_path: Path) -> None:
    source, fmt, name = open_contents(folders("gpt2")), parse_format("q8_0"), "transformer.wpe.weight"
    table = QTensor(fmt, *fmt.round(source.read_float(name)))
    packed = dataclasses.replace(
        source,
        packed={name: ("q8_0", table.shape)},
        floats={key: value for key, value in source.floats.items() if key != name},
        read_packed=lambda _: table,
    )
    found = written(packed, tmp_path / "a.gguf")
    assert found.floats[name][0] == "F32"
    assert np.array_equal(found.read_float(name), table.decode())


@pytest.mark.parametrize(
    ("name", "changes", "message"),
    [
        ("opt", {}, "nybble writes no GGUF file of model_type 'opt'; use another --file"),
        ("gpt_neo", {}, "nybble writes no GGUF file of model_type 'gpt_neo'"),
        ("gpt2", {"activation_function": "relu"}, "llama.cpp runs gpt2 with activation gelu_new, config.json says 'relu'"),
        ("gpt2", {"scale_attn_by_inverse_layer_idx": True}, "with scale_attn_by_inverse_layer_idx False only"),
        ("gpt2", {"n_layer": None}, "config.json has n_layer None, not a whole number"),
        ("llama", {"rope_parameters": {"rope_type": "yarn"}}, "rotary positions of type 'yarn'; as GGUF they are"),
        ("llama", {"intermediate_size": ...}, "config.json has no intermediate_size, which a GGUF file of llama needs"),
        (
            "qwen2",
            {"use_sliding_window": True, "sliding_window": 8, "layer_types": ["sliding_attention"] * 2},
            "without a sliding",
        ),
        ("qwen2", {"rope_parameters": {"rope_type": "llama3"}}, "without Llama 3's rotary positions"),
        ("gemma", {"tie_word_embeddings": False}, "with tie_word_embeddings True only"),
        ("gemma2", {"query_pre_attn_scalar": 99}, "with query_pre_attn_scalar 16, config.json says 99"),
        ("gemma2", {"layer_types": ["full_attention"] * 2, "sliding_window": 8}, "a window in every other layer"),
    ],
)
def test_models_that_llama_cpp_would_run_in_another_way(
    name: str, changes: dict[str, Any], message: str, folders: Callable[[str], Path], tmp_path: Path
) -> None:
    with pytest.raises(InputError, match=message) as raised:
        gguf.write(tmp_path / "a.gguf", with_config(open_contents(folders(name)), **changes), {})
    assert len(str(raised.value).splitlines()) == 1
    assert not (tmp_path / "a.gguf").exists()


def test_contents_without_a_place_in_a_file(folders: Callable[[str], Path], tmp_path: Path) -> None:
    source = open_contents(folders("llama"))
    odd = dataclasses.replace(source, floats={**source.floats, "model.extra.weight": ("F32", (4,))})
    with pytest.raises(InputError, match=r"tensor 'model.extra.weight' has no place in a GGUF file of llama"):
        gguf.write(tmp_path / "a.gguf", odd, {})
    lacking = dataclasses.replace(source, floats={n: facts for n, facts in source.floats.items() if "1.mlp.up" not in n})
    with pytest.raises(InputError, match=r"has no tensor model.layers.1.mlp.up_proj.weight, which a GGUF file needs"):
        gguf.write(tmp_path / "a.gguf", lacking, {})
    whole = dataclasses.replace(source, floats={**source.floats, "model.norm.weight": ("I32", (64,))})
    with pytest.raises(InputError, match=r"tensor 'model.norm.weight' is I32 \[64\], which a GGUF file cannot hold"):
        gguf.write(tmp_path / "a.gguf", whole, {})
    rounded = dataclasses.replace(source, schemes={"model.norm.weight": Activations("dynamic")})
    with pytest.raises(UsageError, match=r"gguf holds weights only, model.norm.weight rounds its activations \(dynamic\)"):
        gguf.write(tmp_path / "a.gguf", rounded, {})
    assert list(tmp_path.iterdir()) == []


def _set(key: str, value: Value) -> Callable[[dict[str, Value]], None]:
    return lambda keys: keys.update({key: value})


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (
            _set("general.architecture", Value.text("falcon")),
            "of architecture 'falcon'; nybble reads GGUF files of gemma, gemma2, gpt2,",
        ),
        (lambda keys: keys.pop("general.architecture"), "key 'general.architecture' is missing; it should be a text"),
        (_set("general.architecture", Value("uint32", 1)), "key 'general.architecture' is 1 .uint32.; it should be a text"),
        (_set("split.count", Value("uint16", 3)), "is one of 3 parts; join them first"),
        (lambda keys: keys.pop("llama.block_count"), "key 'llama.block_count' is missing; it should be a whole number"),
        (_set("llama.block_count", Value("uint32", 1 << 30)), "more blocks than its [0-9]+ tensors can be"),
        (_set("llama.block_count", Value("uint32", 3)), "lacks tensor blk.2.attn_norm.weight"),
        (_set("llama.block_count", Value("uint32", 1)), "tensor 'blk.1.attn_norm.weight' has no place in a model of type llama"),
        (_set("llama.attention.head_count", Value("uint32", 0)), "key llama.attention.head_count is 0"),
        (
            _set("llama.attention.head_count", Value("uint32", 7)),
            "64 dimensions, 7 heads and 2 key-value heads do not go into each",
        ),
        (
            _set("llama.attention.head_count", Value.array("uint32", [4, 4])),
            "is 2 x uint32 .uint32.; it should be a whole number",
        ),
        (_set("llama.attention.value_length", Value("uint32", 8)), "key llama.attention.value_length is 8"),
        (
            _set("llama.attention.layer_norm_rms_epsilon", Value("float32", float("nan"))),
            "is nan .float32.; it should be a positive",
        ),
        (
            _set("llama.embedding_length", Value("uint32", 32)),
            r"token_embd.weight has shape \[97, 64\], llama.embedding_length is 32",
        ),
        (_set("llama.expert_count", Value("uint32", 8)), "is a mixture of experts, which nybble does not read"),
        (_set("llama.rope.scaling.type", Value.text("yarn")), "scales rotary positions by 'yarn'"),
        (_set("tokenizer.ggml.tokens", Value.texts(["a"])), "it has 1 tokens, token_embd.weight has 97 rows"),
        (_set("tokenizer.ggml.bos_token_id", Value("float32", 1.0)), "key 'tokenizer.ggml.bos_token_id' is 1 .float32."),
        (_set("nybble.provenance", Value.text("[]")), "key nybble.provenance holds a list, not an object"),
    ],
)
def test_files_that_are_refused(
    change: Callable[[dict[str, Value]], None], message: str, folders: Callable[[str], Path], tmp_path: Path
) -> None:
    gguf.write(tmp_path / "a.gguf", open_contents(folders("llama")), {})
    path = rewritten(tmp_path / "a.gguf", tmp_path / "b.gguf", change)
    with pytest.raises(InputError, match=message) as raised:
        gguf.read(path)
    assert len(str(raised.value).splitlines()) == 1


def test_a_missing_tensor_and_types_that_are_not_read(folders: Callable[[str], Path], tmp_path: Path) -> None:
    gguf.write(tmp_path / "a.gguf", open_contents(folders("llama")), {})
    path = rewritten(tmp_path / "a.gguf", tmp_path / "b.gguf", lambda keys: None, drop="blk.1.ffn_up.weight")
    with pytest.raises(FileFormatError, match=r"lacks tensor blk.1.ffn_up.weight"):
        gguf.read(path)
    path = rewritten(tmp_path / "a.gguf", tmp_path / "b.gguf", lambda keys: None, drop="token_embd.weight")
    with pytest.raises(InputError, match=r"has no tensor token_embd.weight: it holds no model"):
        gguf.read(path)
    path = rewritten(tmp_path / "a.gguf", tmp_path / "b.gguf", lambda keys: None, drop="output.weight")
    assert gguf.read(path).config["tie_word_embeddings"] is True
    file = GgufFile(tmp_path / "a.gguf")
    tensors = [
        Tensor(name, "I32" if name == "blk.0.ffn_up.weight" else entry.type.name, entry.shape, lambda name=name: file.raw(name))  # type: ignore[misc]
        for name, entry in file.tensors.items()
    ]
    write_gguf(tmp_path / "c.gguf", file.metadata, tensors)
    with pytest.raises(InputError, match=r"tensor 'blk.0.ffn_up.weight' is I32; nybble reads F32, F16, BF16, Q4_0"):
        gguf.read(tmp_path / "c.gguf")


def test_scales_that_are_no_numbers(folders: Callable[[str], Path], tmp_path: Path) -> None:
    source, fmt, name = open_contents(folders("llama")), parse_format("q8_0"), "model.embed_tokens.weight"
    codes, params = fmt.round(source.read_float(name))
    params["scale"][3, 1] = np.inf
    bad = dataclasses.replace(
        source,
        packed={name: ("q8_0", (97, 64))},
        floats={key: value for key, value in source.floats.items() if key != name},
        read_packed=lambda _: QTensor(fmt, codes, params),
    )
    found = written(bad, tmp_path / "a.gguf")
    with pytest.raises(FileFormatError, match=r"tensor 'token_embd.weight' has 1 blocks whose scale is not finite"):
        found.read_packed(name)


def test_recognizes_by_what_a_file_begins_with(folders: Callable[[str], Path], tmp_path: Path) -> None:
    gguf.write(tmp_path / "a.bin", open_contents(folders("gpt2")), {})
    assert gguf.recognizes(tmp_path / "a.bin")
    assert open_contents(tmp_path / "a.bin").container == "gguf"
    (tmp_path / "b.gguf").write_bytes(b"GGM")
    assert not gguf.recognizes(tmp_path / "b.gguf")
    assert not gguf.recognizes(tmp_path)
    assert not gguf.recognizes(tmp_path / "missing.gguf")


def test_every_table_holds_all_of_its_matrices_and_norms() -> None:
    with_gguf = {name: table for name, table in tables().items() if table.gguf is not None}
    assert sorted(with_gguf) == ["gemma", "gemma2", "gpt2", "llama", "mistral", "phi", "qwen2", "qwen3"]
    for table in with_gguf.values():
        how, names = table.decoding, table.gguf
        assert how is not None
        assert names is not None
        wanted = {
            *table.linears,
            how.attention_norm,
            how.mlp_norm,
            how.query_norm,
            how.key_norm,
            how.attention_after,
            how.mlp_after,
        }
        assert set(names.inside) == wanted - {""}
        assert {*names.before, *names.after} == {*table.others, how.final_norm}
        assert len(set(names.inside.values())) == len(names.inside)
        assert set(names.classes) == set(table.model_types)
