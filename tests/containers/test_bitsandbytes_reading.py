"""bitsandbytes folders of others: what is read, and what is refused in one line."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hf_contents import QUERY, Tagged, arrays_of, changed, model, rounded, written
from numpy.typing import NDArray

from nybble.containers import find_container
from nybble.errors import FileFormatError

BNB = find_container("bitsandbytes")
STEM = QUERY.removesuffix("weight")
STATE = f"{QUERY}.quant_state.bitsandbytes__nf4"


def put(name: str, tag: str, array: NDArray[Any]) -> Any:
    def change(arrays: dict[str, Tagged], _: dict[str, Any]) -> None:
        arrays[name] = tag, array

    return change


def setting(**values: Any) -> Any:
    return lambda _, given: given.update(values)


def state(**values: Any) -> Any:
    def change(arrays: dict[str, Tagged], _: dict[str, Any]) -> None:
        found = {**json.loads(bytes(arrays[STATE][1])), **values}
        arrays[STATE] = "U8", np.frombuffer(json.dumps(found).encode(), np.uint8)

    return change


def text(content: bytes) -> Any:
    return put(STATE, "U8", np.frombuffer(content, np.uint8))


ZEROS = np.zeros(16, np.float32)
HOSTILE: dict[str, tuple[Any, str]] = {
    "no absmax": (lambda arrays, _: arrays.pop(f"{QUERY}.absmax"), "absmax' is missing"),
    "no table": (lambda arrays, _: arrays.pop(f"{QUERY}.quant_map"), "quant_map' is missing"),
    "no weight": (lambda arrays, _: arrays.pop(QUERY), "q_proj.weight' is missing"),
    "another table": (put(f"{QUERY}.quant_map", "F32", ZEROS), "quant_map' is another table than that of bitsandbytes"),
    "a longer table": (put(f"{QUERY}.quant_map", "F32", np.zeros(17, np.float32)), r"has shape \[17\], it must be \[16\]"),
    "another nested table": (put(f"{QUERY}.nested_quant_map", "F32", np.zeros(256, np.float32)), "is another table"),
    "too few scales": (put(f"{QUERY}.absmax", "U8", np.zeros(127, np.uint8)), r"has shape \[127\], it must be \[128\]"),
    "scales of another type": (put(f"{QUERY}.absmax", "F32", np.zeros(128, np.float32)), "is F32, it must be U8"),
    "too few nested scales": (put(f"{QUERY}.nested_absmax", "F32", np.zeros(2, np.float32)), r"\[2\], it must be \[1\]"),
    "a short weight": (put(QUERY, "U8", np.zeros((4095, 1), np.uint8)), r"\[4095, 1\], it must be \[4096, 1\]"),
    "a weight of integers": (put(QUERY, "I32", np.zeros((1024, 1), np.int32)), "is I32, it must be U8 or BF16"),
    "a state that is no JSON": (text(b"{"), "is not JSON"),
    "a state that is a list": (text(b"[]"), "holds a list, not an object"),
    "a state with a key twice": (text(b'{"blocksize": 64, "blocksize": 32}'), "'blocksize' stands twice"),
    "a huge state": (text(b" " * 5000), "has 5000 bytes, the limit is 4096"),
    "a state of another type": (state(quant_type="fp4"), "quant_type of its quant_state is 'fp4', it must be 'nf4'"),
    "two states": (
        lambda arrays, _: arrays.update({STATE.replace("nf4", "fp4"): arrays[STATE]}),
        "q_proj.weight' has two quant_states",
    ),
    "blocks of 0": (state(blocksize=0), "blocksize of its quant_state is 0, not a number from 1 to 4096"),
    "blocks as text": (state(blocksize="64"), "blocksize of its quant_state is '64'"),
    "blocks of 48": (state(blocksize=48), "its rows of 128 are no multiple of the block of 48"),
    "blocks of 16": (state(blocksize=16), "its block is 16; nybble has 32, 64, 128, 256"),
    "a shape of one": (state(shape=[8192]), r"shape of its quant_state is \[8192\], not two numbers"),
    "a shape below 0": (state(shape=[-64, -128]), r"\[-64, -128\], not two numbers"),
    "a huge shape": (state(shape=[2**40, 2**40]), "not two numbers"),
    "another shape": (state(shape=[128, 128]), r"\[4096, 1\], it must be \[8192, 1\]"),
    "an unknown dtype": (state(dtype="float64"), "dtype of its quant_state is 'float64', not one of float32, float16, bfloat16"),
    "another nested block": (state(nested_blocksize=128), "nested_blocksize of its quant_state is 128, it must be 256"),
    "no offset": (state(nested_offset=None), "nested_offset of its quant_state is None, not a number"),
    "a huge offset": (state(nested_offset=1e300), "nested_offset of its quant_state is 1e.300, not a number"),
    "4 and 8 bits": (setting(load_in_8bit=True), "has load_in_4bit True and load_in_8bit True; one of them is true"),
    "neither": (setting(load_in_4bit=False), "has load_in_4bit False and load_in_8bit False"),
    "4 bits as text": (setting(load_in_4bit="yes"), "load_in_4bit of quantization_config is 'yes'; nybble reads True, False"),
}


@pytest.mark.parametrize("name", HOSTILE)
def test_broken_4_bit_folders(name: str, tmp_path: Path) -> None:
    change, message = HOSTILE[name]
    contents = model({QUERY: rounded("nf4:g64,dq", (64, 128))})
    folder = changed(written("bitsandbytes", contents, tmp_path / "out"), change)
    with pytest.raises(FileFormatError, match=message) as caught:
        BNB.read(folder)
    assert "\n" not in str(caught.value)
    assert str(folder) in str(caught.value)


HOSTILE_8: dict[str, tuple[Any, str]] = {
    "a float weight": (put(QUERY, "F32", np.zeros((64, 128), np.float32)), "q_proj.weight' is F32, it must be I8"),
    "no weight": (lambda arrays, _: arrays.pop(QUERY), "q_proj.weight' is missing"),
    "scales of another length": (put(f"{STEM}SCB", "F32", np.zeros(63, np.float32)), r"\[63\], it must be \[64\]"),
    "half scales": (put(f"{STEM}SCB", "F16", np.zeros(64, np.float16)), "is F16, it must be F32"),
    "tiles": (put(f"{STEM}weight_format", "U8", np.array(2, np.uint8)), "weight_format' is 2; only 0, codes in rows, is read"),
    "a threshold below 0": (setting(llm_int8_threshold=-1.0), "llm_int8_threshold of quantization_config is -1.0"),
    "a threshold as text": (setting(llm_int8_threshold="6"), "llm_int8_threshold of quantization_config is '6'"),
}


@pytest.mark.parametrize("name", HOSTILE_8)
def test_broken_8_bit_folders(name: str, tmp_path: Path) -> None:
    change, message = HOSTILE_8[name]
    folder = changed(
        written("bitsandbytes", model({QUERY: BNB.settle(rounded("int8:channel", (64, 128)))}), tmp_path / "out"), change
    )
    with pytest.raises(FileFormatError, match=message):
        BNB.read(folder)


@pytest.mark.parametrize(("value", "message"), [(np.inf, "holds 64 values that are not finite"), (3.4e38, "beyond the largest")])
def test_int8_scales_that_give_no_values(value: float, message: str, tmp_path: Path) -> None:
    contents = model({QUERY: BNB.settle(rounded("int8:channel", (64, 128)))})
    folder = written("bitsandbytes", contents, tmp_path / "out")
    found = BNB.read(changed(folder, put(f"{STEM}SCB", "F32", np.full(64, value, np.float32))))
    with pytest.raises(FileFormatError, match=message):
        found.read_packed(QUERY)


def test_nested_scales_that_give_no_values(tmp_path: Path) -> None:
    folder = written("bitsandbytes", model({QUERY: rounded("nf4:g64,dq", (64, 128))}), tmp_path / "out")
    changed(folder, put(f"{QUERY}.nested_absmax", "F32", np.full(1, 3.4e38, np.float32)))
    with pytest.raises(FileFormatError, match="gives values beyond the largest float32"):
        BNB.read(changed(folder, state(nested_offset=3.4e38))).read_packed(QUERY)


def test_scales_that_are_no_float16(tmp_path: Path) -> None:
    """As a float32 model has them: kept as float32, and written again as they were."""
    folder = written("bitsandbytes", model({QUERY: rounded("nf4:g64", (64, 128))}), tmp_path / "out")

    def finer(arrays: dict[str, Tagged], _: dict[str, Any]) -> None:
        arrays[f"{QUERY}.absmax"][1][3] = np.float32(0.1)

    contents = BNB.read(changed(folder, finer))
    assert contents.packed[QUERY] == ("nf4:g64,f32", (64, 128))
    found = contents.read_packed(QUERY)
    assert found.params["scale"][1, 1] == np.float32(0.1)
    assert np.array_equal(found.codes, rounded("nf4:g64", (64, 128)).codes)
    again = arrays_of(written("bitsandbytes", contents, tmp_path / "again"))
    assert again[f"{QUERY}.absmax"][1].tobytes() == arrays_of(folder)[f"{QUERY}.absmax"][1].tobytes()


def test_larger_blocks_and_other_storage(tmp_path: Path) -> None:
    """Blocks of 512 are two of 256; codes may be dressed up as bfloat16 (bnb_4bit_quant_storage)."""
    contents = model({QUERY: rounded("nf4:g256", (4, 1024))})
    folder = written("bitsandbytes", contents, tmp_path / "out")

    def other(arrays: dict[str, Tagged], _: dict[str, Any]) -> None:
        state(blocksize=512)(arrays, _)
        arrays[f"{QUERY}.absmax"] = "F32", arrays[f"{QUERY}.absmax"][1][::2].copy()
        arrays[QUERY] = "BF16", arrays[QUERY][1].reshape(-1, 2).view(np.uint16)

    found = BNB.read(changed(folder, other)).read_packed(QUERY)
    assert str(found.format) == "nf4:g256"
    before = contents.read_packed(QUERY)
    assert np.array_equal(found.codes, before.codes)
    assert np.array_equal(found.params["scale"], np.repeat(before.params["scale"][:, ::2], 2, axis=1))
