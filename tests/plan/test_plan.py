"""Plans: every tensor a row with its reason, patterns, exact bytes, and a hash that means the same everywhere."""

from __future__ import annotations

import json
import struct
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

import nybble
from nybble.errors import UsageError
from nybble.files.native import open_native
from nybble.models.describe import describe
from nybble.models.info import TensorInfo
from nybble.plan import Recipe, make_plan

TENSORS = (
    TensorInfo("wte.weight", ("lm_head.weight",), "embedding", (96, 172), "F16", None, "token table", ""),
    TensorInfo("h.0.ln.weight", (), "float", (172,), "F16", 0, "", "norm gain or other vector"),
    TensorInfo("h.0.up.weight", (), "linear", (128, 172), "F16", 0, "mlp up", ""),
    TensorInfo("h.0.down.weight", (), "conv1d", (172, 128), "F16", 0, "mlp down", ""),
    TensorInfo("h.0.mask", (), "float", (4, 4), "bool", 0, "", "not a floating-point tensor"),
)


def formats_of(**recipe: Any) -> dict[str, str | None]:
    return {row.tensor.name: row.format for row in make_plan(TENSORS, Recipe(**recipe)).rows}


def test_a_plan_written_out_by_hand() -> None:
    plan = make_plan(TENSORS, Recipe("int4:g64", keep=("down",)))
    assert [(row.format, row.method, row.bits, row.reason) for row in plan.rows] == [
        # a row of 172: 86 bytes of codes, 3 scales of 2 bytes
        ("int4:g64", "rtn", 8 * 96 * (86 + 6),
         "embedding weight; tied with lm_head.weight; short last block: 2 of 64 columns, then one of 44"),
        (None, None, 16 * 172, "norm gain or other vector"),
        ("int4:g64", "rtn", 8 * 128 * (86 + 6), "linear weight; short last block: 2 of 64 columns, then one of 44"),
        (None, None, 16 * 172 * 128, "kept by --keep down"),
        (None, None, 8 * 16, "not a floating-point tensor"),
    ]  # fmt: skip
    assert plan.bytes == 96 * 92 + 2 * 172 + 128 * 92 + 2 * 172 * 128 + 16
    assert plan.bpw == pytest.approx(8 * 92 / 172)
    assert len(plan.notes) == 2
    assert plan.notes[0].startswith("2 weights have rows of 172 columns, which the block size does not divide")
    assert plan.notes[1] == "kept in float: h.0.down.weight"


def test_a_row_shorter_than_a_block_says_so() -> None:
    plan = make_plan(TENSORS, Recipe("int4:g256"))
    assert plan.rows[3].reason == "conv1d weight; short last block: the only block has 128 columns"


@pytest.mark.parametrize("pattern", ["lm_head", "lm_head.weight", "wte", "wte.weight", "w?e", "*te*", "*wte.weight"])
def test_patterns_name_a_weight_by_name_alias_or_glob(pattern: str) -> None:
    kept = [name for name, spec in formats_of(format="int8", keep=(pattern,)).items() if spec is None]
    assert kept == ["wte.weight", "h.0.ln.weight", "h.0.mask"]


@pytest.mark.parametrize("pattern", ["up", "0.up", "h.*.up", "h.0.up.weight", "u*"])
def test_patterns_name_inner_modules(pattern: str) -> None:
    assert formats_of(format="int8", keep=(pattern,))["h.0.up.weight"] is None
    assert formats_of(format="int8", keep=(pattern,))["h.0.down.weight"] == "int8:channel"


def test_the_last_rule_wins_and_keep_before_all() -> None:
    rules = (("h.*", "int8"), ("down", "nf4:g64"))
    assert formats_of(format="int4:g64", rules=rules)["h.0.up.weight"] == "int8:channel"
    assert formats_of(format="int4:g64", rules=rules)["h.0.down.weight"] == "nf4:g64"
    assert formats_of(format="int4:g64", rules=rules[::-1])["h.0.down.weight"] == "int8:channel"
    assert formats_of(format="int4:g64", rules=rules, keep=("down",))["h.0.down.weight"] is None


@pytest.mark.parametrize("field", ["keep", "rules"])
def test_a_pattern_that_names_nothing_is_an_error_with_the_near_name(field: str) -> None:
    value = ("h.0.donw",) if field == "keep" else (("h.0.donw", "int8"),)
    with pytest.raises(UsageError, match=r"'h.0.donw'; did you mean h.0.down"):
        formats_of(format="int8", **{field: value})


def test_nothing_left_to_pack_is_an_error() -> None:
    with pytest.raises(UsageError, match="nothing to quantize"):
        formats_of(format="int8", keep=("*",))


def test_a_cast_takes_the_whole_model() -> None:
    plan = make_plan(TENSORS, Recipe("bf16"))
    assert plan.is_cast
    assert plan.bytes == 2 * (96 * 172 + 172 + 2 * 128 * 172) + 16
    assert not make_plan(TENSORS, Recipe("bf16", keep=("up",))).is_cast


def test_the_hash_follows_what_is_done() -> None:
    base = make_plan(TENSORS, Recipe("int4:g64"))
    assert base.hash == make_plan(TENSORS, Recipe("int4:g64")).hash
    others = [Recipe("int4:g32"), Recipe("int4:g64", "rtn:mse"), Recipe("int4:g64", keep=("up",)),
              Recipe("int4:g64", rules=(("up", "int8"),))]  # fmt: skip
    assert len({base.hash, *(make_plan(TENSORS, other).hash for other in others)}) == 5
    assert make_plan(TENSORS, Recipe("int8")).hash == make_plan(TENSORS, Recipe("int8:channel")).hash


@pytest.mark.parametrize(
    "recipe",
    [("int4:g64", ()), ("nf4:g64,dq", ("lm_head",)), ("int3:g32,asym", ()), ("int8:tensor,asym", ("*c_proj",)), ("fp16", ())],
    ids=str,
)
@pytest.mark.parametrize("name", ["gpt2", "llama", "bert"])
def test_plan_bytes_are_the_bytes_of_the_data_in_the_file(
    name: str, recipe: tuple[str, tuple[str, ...]], tiny: Callable[..., Any], tmp_path: Path
) -> None:
    spec, keep = recipe
    keep = tuple(k for k in keep if name == "gpt2" or "c_proj" not in k)
    keep = tuple("*decoder*" if name == "bert" and k == "lm_head" else k for k in keep)
    model = tiny(name)
    plan = make_plan(describe(model), Recipe(spec, keep=keep))
    folder = nybble.quantize(model, spec, keep=keep).save(tmp_path / "m")
    content = (folder / "model.safetensors").read_bytes()
    header = struct.unpack("<Q", content[:8])[0]
    assert len(content) - 8 - header == plan.bytes


def test_the_hash_is_one_and_the_same_everywhere(tiny_folder: Path, tmp_path: Path, nybble_command: Callable[..., Any]) -> None:
    shown = json.loads(nybble_command("plan", tiny_folder, "--to", "int4:g64", "--json").stdout)
    saved = nybble.quantize(tiny_folder, "int4:g64").save(tmp_path / "m")
    assert shown["hash"] == open_native(saved).provenance["plan_hash"] == nybble.load(saved).plan_hash
    assert shown["bytes"] == make_plan(describe(tiny_model(tiny_folder)), Recipe("int4:g64")).bytes
    assert len(shown["rows"]) == 28  # two tables, two blocks of 12, the last norm


def tiny_model(folder: Path) -> Any:
    from nybble.models.loading import load_model

    return load_model(folder)


def test_activations_are_for_weights_inside_the_blocks() -> None:
    plan = make_plan(TENSORS, Recipe("int8:channel", "static", keep=("down",)))
    assert [row.activations for row in plan.rows] == [None, None, "static", None, None]
    assert plan.rows[2].bits == 8 * 128 * (172 + 4) + 32 + 8  # a float32 scale and a zero point of one byte
    assert plan.rows[2].reason == "linear weight; activations static"
    assert "activations static for 1 weights; those of the head stay floats" in plan.notes
    assert plan.hash != make_plan(TENSORS, Recipe("int8:channel", "dynamic", keep=("down",))).hash
    head = TensorInfo("lm_head.weight", (), "linear", (96, 172), "F16", None, "head", "")
    assert [row.activations for row in make_plan((*TENSORS, head), Recipe("int8", "dynamic")).rows][-1] is None


def test_activations_need_integers() -> None:
    with pytest.raises(UsageError, match=r"^method gptq[+]dynamic multiplies integers: nf4:g64 has none; use int8:channel$"):
        make_plan(TENSORS, Recipe("int8", "gptq+dynamic", rules=(("up", "nf4:g64"),)))
    rows = make_plan(TENSORS, Recipe("int8", "dynamic", rules=(("up", "fp16"), ("wte", "nf4:g64")))).rows
    assert [row.activations for row in rows] == [None, None, None, "dynamic", None]
