"""Model folders as they are opened: shards and index agree, config.json says what can be, nothing leaves the folder."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from nybble.errors import FileFormatError, InputError
from nybble.files.safetensors import write
from nybble.models.checkpoint import open_checkpoint, unpickle_folder
from nybble.models.config_check import check_config, check_no_code

LLAMA: dict[str, Any] = {
    "model_type": "llama",
    "architectures": ["LlamaForCausalLM"],
    "hidden_size": 64,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 128,
    "rms_norm_eps": 1e-6,
    "rope_parameters": {"rope_type": "llama3", "rope_theta": 500000.0, "factor": 8.0, "low_freq_factor": 1.0,
                        "high_freq_factor": 4.0, "original_max_position_embeddings": 8192},
    "eos_token_id": [1, 2],
}  # fmt: skip


def shards(folder: Path, places: dict[str, str]) -> Path:
    for shard in set(places.values()):
        write(folder / shard, {name: np.zeros(2, np.float32) for name, place in places.items() if place == shard}, {})
    (folder / "config.json").write_text(json.dumps(LLAMA))
    (folder / "model.safetensors.index.json").write_text(json.dumps({"metadata": {}, "weight_map": places}))
    return folder


def test_shards(tmp_path: Path) -> None:
    places = {
        "a": "model-00001-of-00002.safetensors",
        "b": "model-00002-of-00002.safetensors",
        "c": "model-00001-of-00002.safetensors",
    }
    checkpoint = open_checkpoint(shards(tmp_path, places))
    assert [file.name for file in checkpoint.files] == ["model-00001-of-00002.safetensors", "model-00002-of-00002.safetensors"]
    assert checkpoint.bytes == sum(file.stat().st_size for file in checkpoint.files)
    assert len(checkpoint.digest()) == 64


def test_an_index_of_one_shard(tmp_path: Path) -> None:
    assert [file.name for file in open_checkpoint(shards(tmp_path, {"a": "model.safetensors"})).files] == ["model.safetensors"]


def test_a_snapshot_of_the_hubs_cache(tmp_path: Path) -> None:
    """Every file of it is a link into the blobs of the same repository."""
    revision, blobs = tmp_path / "models--a--b" / "snapshots" / "0f3a", tmp_path / "models--a--b" / "blobs"
    revision.mkdir(parents=True)
    blobs.mkdir()
    shards(revision, {"a": "model-00001-of-00002.safetensors", "b": "model-00002-of-00002.safetensors"})
    for i, file in enumerate(sorted(revision.iterdir())):
        file.rename(blobs / f"blob{i}")
        file.symlink_to(f"../../blobs/blob{i}")
    assert len(open_checkpoint(revision).files) == 2
    moved = tmp_path / "copied"
    moved.mkdir()
    for file in sorted(revision.iterdir()):
        (moved / file.name).symlink_to(file.resolve())
    with pytest.raises(InputError, match="link that leaves its folder"):
        open_checkpoint(moved)


def test_configs_of_real_models_pass() -> None:
    check_config(LLAMA, "x")
    check_config({**LLAMA, "head_dim": None, "sliding_window": None, "rope_scaling": None, "pad_token_id": -1}, "x")
    check_config({"model_type": "evil-not-known", "hidden_size": [1, 2], "num_attention_heads": -3}, "x")  # is not ours to judge
    gemma = {"model_type": "gemma2", "hidden_size": 64, "num_attention_heads": 4, "query_pre_attn_scalar": 256,
             "attn_logit_softcapping": 50.0, "final_logit_softcapping": None, "head_dim": 256}  # fmt: skip
    check_config(gemma, "x")


def test_every_default_config_of_transformers_passes() -> None:
    """What transformers writes for the architectures that we have tables of."""
    transformers = pytest.importorskip("transformers")
    from nybble.models.arch import tables

    for name in tables():
        config = json.loads(transformers.AutoConfig.for_model(name).to_json_string(use_diff=False))
        check_config(config, name)


@pytest.mark.parametrize(
    "value",
    [
        {"auto_map": {}},
        {"a": {"trust_remote_code": False}},
        {"a": [[{"b": {"_attn_implementation_internal": None}}]]},
        {"attn_implementation": "eager"},
        {"_ATTN_IMPLEMENTATION": "x"},
        {"sub_attn_implementation_2": "x"},
        {"_attn_implementation_autoset": "org/kernels"},
        {"_attn_implementation_autoset": 1},
    ],
)
def test_keys_that_run_code(value: dict[str, Any]) -> None:
    with pytest.raises(InputError, match=r"^x asks to run code of its own"):
        check_no_code(value, "x")


def test_a_switch_that_transformers_left_everywhere_is_no_code() -> None:
    for value in (True, False, None):
        check_no_code({"_attn_implementation_autoset": value, "text_config": {"_attn_implementation_autoset": value}}, "x")


def test_a_pickled_folder_becomes_one_that_opens(tmp_path: Path) -> None:
    torch = pytest.importorskip("torch")
    old, new = tmp_path / "old", tmp_path / "new"
    old.mkdir()
    new.mkdir()
    torch.save({"a": torch.arange(6.0)}, old / "pytorch_model.bin")
    (old / "config.json").write_text(json.dumps(LLAMA))
    (old / "tokenizer.json").write_text("{}")
    (old / "evil.py").write_text("raise SystemExit")
    assert unpickle_folder(old, new) == new
    assert sorted(file.name for file in new.iterdir()) == ["config.json", "model.safetensors", "tokenizer.json"]
    assert open_checkpoint(new).config == LLAMA


def test_a_pickled_folder_whose_tokenizer_is_somebody_elses_secret(tmp_path: Path) -> None:
    torch = pytest.importorskip("torch")
    old, new = tmp_path / "old", tmp_path / "new"
    old.mkdir()
    new.mkdir()
    torch.save({"a": torch.arange(6.0)}, old / "pytorch_model.bin")
    (tmp_path / "secret").write_text("secret")
    (old / "config.json").write_text(json.dumps(LLAMA))
    (old / "tokenizer.json").symlink_to("../secret")
    with pytest.raises(InputError, match="link that leaves its folder"):
        unpickle_folder(old, new)
    assert not (new / "config.json").exists()


def test_a_folder_that_runs_code_is_not_unpickled(tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text(json.dumps({**LLAMA, "auto_map": {}}))
    with pytest.raises(InputError, match="asks to run code"):
        unpickle_folder(tmp_path, tmp_path)


def test_no_model_type(tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text("{}")
    with pytest.raises(FileFormatError, match="has no model_type"):
        open_checkpoint(tmp_path)
