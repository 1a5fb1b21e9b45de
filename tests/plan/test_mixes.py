"""The mixes of ggml's formats: which weight gets which, against what llama.cpp's quantizer gave for the same shapes.

The expected layers were read off files that llama_model_quantize (llama-cpp-python 0.3.36) wrote; tests/interop reads them off
again where that is installed.
"""

from __future__ import annotations

import pytest

from nybble.errors import UsageError
from nybble.mixes import MIXES, find_mix, mix_names
from nybble.models.info import TensorInfo
from nybble.plan import Recipe, canonical, make_plan


def info(
    name: str, role: str, block: int | None, shape: tuple[int, int] = (256, 256), aliases: tuple[str, ...] = ()
) -> TensorInfo:
    return TensorInfo(name, aliases, "embedding" if "table" in role else "linear", shape, "F32", block, role, "")


def gpt2(layers: int, tied: bool = True) -> list[TensorInfo]:
    tensors = [
        info("wte.weight", "token table", None, (512, 256), ("lm_head.weight",) if tied else ()),
        info("wpe.weight", "position table", None),
    ]
    for i in range(layers):
        tensors += [
            info(f"h.{i}.c_attn.weight", "query, key and value", i, (768, 256)),
            info(f"h.{i}.attn.c_proj.weight", "attention output", i),
            info(f"h.{i}.c_fc.weight", "mlp up", i, (1024, 256)),
            info(f"h.{i}.mlp.c_proj.weight", "mlp down", i, (256, 1024)),
        ]
    return tensors + ([] if tied else [info("lm_head.weight", "head", None, (512, 256))])


def llama(layers: int, value_rows: int) -> list[TensorInfo]:
    tensors = [info("embed.weight", "token table", None), info("lm_head.weight", "head", None)]
    for i in range(layers):
        tensors += [info(f"{i}.q.weight", "query", i), info(f"{i}.v.weight", "value", i, (value_rows, 256))]
        tensors += [info(f"{i}.down.weight", "mlp down", i), info(f"{i}.up.weight", "mlp up", i)]
    return tensors


def formats(tensors: list[TensorInfo], mix: str, role: str) -> list[str | None]:
    return [row.format for row in make_plan(tensors, Recipe(mix)).rows if row.tensor.role == role]


def test_q4_k_m_of_gpt2() -> None:
    tensors = gpt2(12)
    fine = [i for i in range(12) if i not in (1, 2, 4, 5, 7, 8)]
    for role in ("query, key and value", "mlp down"):
        assert formats(tensors, "q4_k_m", role) == ["q6_k" if i in fine else "q4_k" for i in range(12)]
    assert set(formats(tensors, "q4_k_m", "attention output") + formats(tensors, "q4_k_m", "mlp up")) == {"q4_k"}
    assert formats(tensors, "q4_k_m", "token table") == ["q6_k"]  # the head is tied to it
    assert formats(tensors, "q4_k_m", "position table") == [None]
    assert formats(gpt2(12, tied=False), "q4_k_m", "token table") == ["q4_k"]
    assert formats(gpt2(12, tied=False), "q4_k_m", "head") == ["q6_k"]


def test_q4_k_m_of_32_layers() -> None:
    coarse = {4, 5, 7, 8, 10, 11, 13, 14, 16, 17, 19, 20, 22, 23, 25, 26}
    assert formats(llama(32, 256), "q4_k_m", "value") == ["q4_k" if i in coarse else "q6_k" for i in range(32)]


@pytest.mark.parametrize(
    ("mix", "role", "expected"),
    [
        ("q3_k_m", "query, key and value", ["q5_k"] * 2 + ["q4_k"] * 10),
        ("q3_k_m", "mlp down", ["q4_k"] * 12),
        ("q3_k_l", "attention output", ["q5_k"] * 12),
        ("q4_k_s", "query, key and value", ["q5_k"] * 4 + ["q4_k"] * 8),
        ("q4_k_s", "mlp down", ["q5_k"] + ["q4_k"] * 11),
        ("q5_k_s", "mlp down", ["q5_k"] * 12),
        ("mix:q2_k", "mlp down", ["q3_k"] * 12),
        ("q2_k_s", "mlp down", ["q4_k"] + ["q2_k"] * 11),
        ("mix:iq4_xs", "mlp down", ["q5_k"] + ["iq4_xs"] * 11),
        ("mix:q8_0", "token table", ["q8_0"]),
        ("mix:q4_0", "token table", ["q6_k"]),
    ],
)
def test_layers(mix: str, role: str, expected: list[str]) -> None:
    assert formats(gpt2(12), mix, role) == expected


def test_few_value_heads_are_dear() -> None:
    assert formats(llama(12, 64), "mix:q2_k", "value") == ["q4_k"] * 12
    assert formats(llama(12, 128), "mix:q2_k", "value") == ["q3_k"] * 12


def test_rows_that_are_no_multiple_of_256_fall_back() -> None:
    rows = make_plan(
        [info("a.q.weight", "query", 0, (64, 64)), info("b.down.weight", "mlp down", 0, (64, 172))], Recipe("q4_k_m")
    ).rows
    assert [row.format for row in rows] == ["q5_0", "fp16"]
    assert "no multiple of 256: q5_0, not q4_k" in rows[0].reason


def test_names() -> None:
    assert {"q4_k_m", "q5_k_m", "q3_k_m", "q2_k_s", "mix:q4_0"} <= set(mix_names())
    assert len(mix_names()) == len(MIXES)
    assert find_mix("q4_0") is None
    assert find_mix("Q4_K_M") is not None
    assert canonical(" Q4_K_M") == "q4_k_m"
    assert canonical("int4") == "int4:channel"
    with pytest.raises(UsageError, match=r"did you mean .*q4_k_m"):
        canonical("q4_k_n")
