"""Bytes that a token reads, by hand."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from nybble.bench.traffic import bytes_of_folder, bytes_per_token, cached_numbers


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory, tiny: Callable[..., Any]) -> Path:
    import nybble

    root = tmp_path_factory.mktemp("traffic")
    for name in ("gpt2", "llama", "llama-tied"):
        tiny(name).save_pretrained(root / name)
        nybble.quantize(root / name, "int4:g32").save(root / f"{name}-int4")
    return root


def parameters(folder: Path) -> int:
    from transformers import AutoModelForCausalLM

    return sum(parameter.numel() for parameter in AutoModelForCausalLM.from_pretrained(folder).parameters())


def test_a_tied_table_is_read_whole_and_a_position_table_by_the_row(folders: Path) -> None:
    held, read = bytes_of_folder(folders / "gpt2")
    assert held == 4 * parameters(folders / "gpt2")
    assert read == held - 4 * 63 * 64  # one of the 64 positions, 64 wide


def test_an_untied_table_is_read_by_the_row(folders: Path) -> None:
    held, read = bytes_of_folder(folders / "llama")
    assert held == 4 * parameters(folders / "llama")
    assert read == held - 4 * 96 * 64  # one of the 97 rows
    held, read = bytes_of_folder(folders / "llama-tied")
    assert held == read == 4 * parameters(folders / "llama-tied")


def test_packed_weights_count_as_packed(folders: Path) -> None:
    held, read = bytes_of_folder(folders / "llama-int4")
    row = 64 // 2 + 2 * 2  # codes of 64 weights, float16 scales of two groups
    norms = 4 * 5 * 64
    matrices = 2 * (2 * 64 * row + 2 * 32 * row + 2 * 112 * row + 64 * (112 // 2 + 2 * 4))
    assert held == 2 * 97 * row + matrices + norms
    assert read == held - 96 * row


def test_the_torch_adapter_counts_the_same(folders: Path) -> None:
    from transformers import AutoModelForCausalLM

    from nybble.bench.adapters.torch import bytes_of_modules

    for name in ("gpt2", "llama", "llama-tied"):
        assert bytes_of_modules(AutoModelForCausalLM.from_pretrained(folders / name)) == bytes_of_folder(folders / name)


def test_the_cache_by_hand() -> None:
    assert cached_numbers({"n_layer": 12, "n_embd": 768, "n_head": 12}) == 2 * 12 * 768
    llama = {"num_hidden_layers": 16, "hidden_size": 2048, "num_attention_heads": 32, "num_key_value_heads": 8}
    assert cached_numbers(llama) == 2 * 16 * 8 * 64
    assert cached_numbers({**llama, "head_dim": 128}) == 2 * 16 * 8 * 128
    # 50 new tokens after 5: the i-th reads 5 + i positions, 29.5 on average
    assert bytes_per_token(1000, 10, 5, 50) == 1000 + 295
    assert bytes_per_token(1000, 10, 5, 1) == 1050
