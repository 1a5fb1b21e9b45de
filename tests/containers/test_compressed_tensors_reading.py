"""compressed-tensors folders of others: what is read, and what is refused in one line."""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hf_contents import DOWN, QUERY, Tagged, assert_same, changed, model, rounded, written
from numpy.typing import NDArray

from nybble.containers import find_container
from nybble.errors import FileFormatError
from nybble.formats import QTensor
from nybble.formats.activations import Activations

CT = find_container("compressed-tensors")
STEM = QUERY.removesuffix("weight")
SCHEMES = (Activations("dynamic"), Activations("static", scale=0.037, zero=113))


def with_inputs(tensor: QTensor, scheme: Activations) -> QTensor:
    return dataclasses.replace(tensor, activations=scheme)


def put(part: str, tag: str, array: NDArray[Any]) -> Any:
    def change(arrays: dict[str, Tagged], _: dict[str, Any]) -> None:
        arrays[f"{STEM}{part}"] = tag, array

    return change


def setting(**values: Any) -> Any:
    return lambda _, given: given.update(values)


def of_group(part: str, **values: Any) -> Any:
    def change(_: dict[str, Tagged], given: dict[str, Any]) -> None:
        group = given["config_groups"]["group_0"]
        group[part] = {**(group[part] or {}), **values}

    return change


HOSTILE: dict[str, tuple[Any, str]] = {
    "no scale": (lambda arrays, _: arrays.pop(f"{STEM}weight_scale"), "q_proj.weight_scale' is missing"),
    "no shape": (lambda arrays, _: arrays.pop(f"{STEM}weight_shape"), "q_proj.weight_shape' is missing"),
    "no zero points": (lambda arrays, _: arrays.pop(f"{STEM}weight_zero_point"), "no config group fits 16 words"),
    "packed in bytes": (put("weight_packed", "U8", np.zeros((64, 16), np.uint8)), "is U8, it must be I32"),
    "shape of three": (put("weight_shape", "I64", np.array([64, 128, 1])), r"\[3\], it must be \[2\]"),
    "shape below 0": (put("weight_shape", "I64", np.array([64, -128])), r"weight_shape' is \[64, -128\], not two sizes"),
    "a huge shape": (put("weight_shape", "I64", np.array([64, 2**62])), "not two sizes"),
    "other rows": (put("weight_shape", "I64", np.array([65, 128])), r"has shape \[64, 16\], it must be \[65, any\]"),
    "other columns": (put("weight_shape", "I64", np.array([64, 136])), "no config group fits 16 words in a row of 136"),
    "scales of another shape": (put("weight_scale", "F32", np.ones((64, 3), np.float32)), r"no config group fits .* \[64, 3\]"),
    "scales of bytes": (put("weight_scale", "U8", np.ones((64, 2), np.uint8)), "is U8, it must be F32 or F16 or BF16"),
    "a float weight beside": (put("weight", "F32", np.zeros((64, 128), np.float32)), "stands beside a packed weight"),
    "no groups": (setting(config_groups={}), "config_groups of quantization_config is {}, not 1 to 64 groups"),
    "groups as a list": (setting(config_groups=[1]), r"config_groups of quantization_config is \[1\]"),
    "no weights": (setting(config_groups={"a": {"targets": ["Linear"]}}), "config group 'a' has no settings of weights"),
    "a preset": (setting(config_groups={"W8A8": ["Linear"]}), "config group 'W8A8' has no settings of weights"),
    "3 bits": (of_group("weights", num_bits=3), "has num_bits 3; nybble reads 2, 4, 8"),
    "bits as text": (of_group("weights", num_bits="4"), "has num_bits '4'"),
    "floats": (of_group("weights", type="float"), "has type 'float'; nybble reads int"),
    "blocks": (of_group("weights", strategy="block"), "has strategy 'block'; nybble reads tensor, channel and group"),
    "groups of nothing": (of_group("weights", group_size=None, strategy="group"), "has group_size None"),
    "groups of 48": (of_group("weights", group_size=48), "no config group fits"),
    "symmetric as text": (of_group("weights", symmetric="yes"), "has symmetric 'yes'"),
    "dynamic weights": (of_group("weights", dynamic=True), "has dynamic True"),
    "rounded outputs": (of_group("output_activations", num_bits=8), "has output_activations"),
    "float inputs": (of_group("input_activations", num_bits=8, type="float"), "has input_activations .* nybble reads 8-bit int"),
    "another format": (lambda _, given: given["config_groups"]["group_0"].update(format="marlin-24"), "has format 'marlin-24'"),
    "a rounded cache": (setting(kv_cache_scheme={"num_bits": 8}), "has a kv_cache_scheme, which nybble does not compute"),
    "rotations": (setting(transform_config={"config_groups": {"R1": {}}}), "has a transform_config"),
    "sparse": (setting(sparsity_config={"format": "sparse-24"}), "has a sparsity_config"),
    "not compressed": (setting(quantization_status="frozen"), "quantization_status of quantization_config is 'frozen'"),
}


@pytest.mark.parametrize("name", HOSTILE)
def test_broken_folders(name: str, tmp_path: Path) -> None:
    change, message = HOSTILE[name]
    contents = model({QUERY: rounded("int4:g64,asym", (64, 128))})
    folder = changed(written("compressed-tensors", contents, tmp_path / "out"), change)
    with pytest.raises(FileFormatError, match=message) as caught:
        CT.read(folder)
    assert "\n" not in str(caught.value)
    assert str(folder) in str(caught.value)


@pytest.mark.parametrize(
    ("part", "tag", "array", "message"),
    [
        ("weight", "F8_E4M3", np.zeros((20, 64), np.uint8), "is F8_E4M3, it must be I8"),
        ("input_scale", "F32", np.zeros(1, np.float32), "input_scale': scale 0.0 of activations is not a number above 0"),
        ("input_scale", "F32", np.ones(2, np.float32), r"has shape \[2\], it must be \[1\]"),
        ("input_zero_point", "I32", np.zeros(1, np.int32), "is I32, it must be I8"),
    ],
)
def test_broken_int_quantized_folders(part: str, tag: str, array: NDArray[Any], message: str, tmp_path: Path) -> None:
    contents = model({QUERY: with_inputs(rounded("int8:channel", (20, 64)), SCHEMES[1])})
    folder = changed(written("compressed-tensors", contents, tmp_path / "out"), put(part, tag, array))
    with pytest.raises(FileFormatError, match=message):
        CT.read(folder)


def test_values_beyond_their_bits(tmp_path: Path) -> None:
    """Codes of 4 bits in bytes of their own, as naive-quantized has them."""
    contents = model({QUERY: with_inputs(rounded("int8:channel", (20, 64)), SCHEMES[0])})
    folder = changed(written("compressed-tensors", contents, tmp_path / "out"), of_group("weights", num_bits=4))
    with pytest.raises(FileFormatError, match="holds values beyond -8 to 7"):
        CT.read(folder).read_packed(QUERY)


@pytest.mark.parametrize(("value", "message"), [(np.nan, "holds 1 values that are not finite"), (3e38, "beyond the largest")])
def test_scales_that_give_no_values(value: float, message: str, tmp_path: Path) -> None:
    folder = written("compressed-tensors", model({QUERY: rounded("int8:channel", (20, 64))}), tmp_path / "out")
    scale = np.full((20, 1), 0.5, np.float32)
    scale[7] = value
    changed(folder, put("weight_scale", "F32", scale))
    with pytest.raises(FileFormatError, match=message):
        CT.read(folder).read_packed(QUERY)


def test_one_scale_for_the_matrix(tmp_path: Path) -> None:
    """Strategy tensor, with a scale of shape [1]: read, and written as one for each row."""
    contents = model({QUERY: with_inputs(rounded("int8:channel", (20, 64)), SCHEMES[0])})
    folder = written("compressed-tensors", contents, tmp_path / "out")
    changed(folder, put("weight_scale", "F32", np.array([0.25], np.float32)))
    found = CT.read(changed(folder, of_group("weights", strategy="tensor"))).read_packed(QUERY)
    assert str(found.format) == "int8:tensor"
    assert np.array_equal(found.decode(), (found.codes.astype(np.float32) - 128) * np.float32(0.25))


def test_columns_in_groups(tmp_path: Path) -> None:
    """weight_g_idx, which files had until 2026: read where neighbours stay together, refused where they do not."""
    tensor = rounded("int4:g64", (64, 128))
    folder = written("compressed-tensors", model({QUERY: tensor}), tmp_path / "out")
    changed(folder, put("weight_g_idx", "I32", np.full(128, -1, np.int32)))
    assert_same(CT.read(folder).read_packed(QUERY), tensor)
    changed(folder, put("weight_g_idx", "I32", np.repeat(np.array([1, 0], np.int32), 64)))
    swapped = CT.read(folder).read_packed(QUERY)
    assert np.array_equal(swapped.params["scale"], tensor.params["scale"][:, ::-1])
    changed(folder, put("weight_g_idx", "I32", np.arange(128, dtype=np.int32) % 2))
    with pytest.raises(FileFormatError, match=r"columns into groups out of order \(actorder group\)"):
        CT.read(folder).read_packed(QUERY)


def test_patterns_of_the_settings_are_not_run(tmp_path: Path) -> None:
    """Which scheme a layer has is read off its tensors; a pattern could take for ever."""
    tensors = {QUERY: rounded("int4:g64", (64, 128)), DOWN: rounded("int8:channel", (64, 256))}
    folder = written("compressed-tensors", model(tensors), tmp_path / "out")

    def patterns(_: dict[str, Tagged], given: dict[str, Any]) -> None:
        for group in given["config_groups"].values():
            group["targets"] = [r"re:(([a-z.0-9_]+)+)+!$"]

    contents = CT.read(changed(folder, patterns))
    for name, tensor in tensors.items():
        assert_same(contents.read_packed(name), tensor)

    def same(_: dict[str, Tagged], given: dict[str, Any]) -> None:
        given["config_groups"]["group_2"] = {"weights": {"num_bits": 4, "group_size": 64, "symmetric": False}}

    assert_same(CT.read(changed(folder, same)).read_packed(QUERY), tensors[QUERY])  # it has no zero points, so it is not that
