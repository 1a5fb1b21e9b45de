"""GPTQ folders of others: what is read, to the bit, and what is refused in one line."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hf_contents import DOWN, QUERY, Tagged, arrays_of, assert_same, changed, gptq_values, model, rounded, written
from numpy.typing import NDArray

from nybble.containers import find_container, open_contents
from nybble.errors import FileFormatError
from nybble.files.safetensors import write

GPTQ = find_container("gptq")
STEM = QUERY.removesuffix("weight")


def good(folder: Path) -> Path:
    return written("gptq", model({QUERY: rounded("int4:g64,asym", (64, 128))}), folder / "out")


def test_columns_may_be_assigned_to_groups_in_another_order(tmp_path: Path) -> None:
    """As long as neighbours stay together: then it is the groups' scales that are in another order."""

    def swap(arrays: dict[str, Tagged], _: dict[str, Any]) -> None:
        arrays[f"{STEM}g_idx"] = "I32", np.repeat(np.array([1, 0], np.int32), 64)

    folder = changed(good(tmp_path), swap)
    found = GPTQ.read(folder).read_packed(QUERY)
    assert found.decode().tobytes() == gptq_values(arrays_of(folder), STEM[:-1], 4, True).tobytes()
    before = rounded("int4:g64,asym", (64, 128))
    assert np.array_equal(found.params["scale"], before.params["scale"][:, ::-1])


def test_without_g_idx_groups_are_runs(tmp_path: Path) -> None:
    folder = changed(good(tmp_path), lambda arrays, _: arrays.pop(f"{STEM}g_idx") and None)
    assert_same(GPTQ.read(folder).read_packed(QUERY), rounded("int4:g64,asym", (64, 128)))


def test_groups_that_are_multiples_of_ours_and_whole_rows(tmp_path: Path) -> None:
    folder = written("gptq", model({QUERY: rounded("int4:g256", (64, 1024))}), tmp_path / "out")

    def wide(arrays: dict[str, Tagged], given: dict[str, Any]) -> None:
        given["group_size"] = 512
        for part in ("qzeros", "scales"):
            arrays[f"{STEM}{part}"] = arrays[f"{STEM}{part}"][0], arrays[f"{STEM}{part}"][1][::2].copy()
        arrays[f"{STEM}g_idx"] = "I32", np.arange(1024, dtype=np.int32) // 512

    contents = GPTQ.read(changed(folder, wide))
    assert contents.packed[QUERY] == ("int4:g256", (64, 1024))
    assert contents.read_packed(QUERY).decode().tobytes() == gptq_values(arrays_of(folder), STEM[:-1], 4, True).tobytes()

    def whole(arrays: dict[str, Tagged], given: dict[str, Any]) -> None:
        given["group_size"] = 1024
        for part in ("qzeros", "scales"):
            arrays[f"{STEM}{part}"] = arrays[f"{STEM}{part}"][0], arrays[f"{STEM}{part}"][1][:1].copy()
        arrays[f"{STEM}g_idx"] = "I32", np.zeros(1024, np.int32)

    assert GPTQ.read(changed(folder, whole)).packed[QUERY][0] == "int4:channel"


def test_exceptions_to_the_settings_are_read_off_the_tensors(tmp_path: Path) -> None:
    """`dynamic` gives some layers other bits and groups; its patterns are not run."""
    four = written("gptq", model({QUERY: rounded("int4:g64", (64, 128))}), tmp_path / "four")
    eight = written("gptq", model({DOWN: rounded("int8:g32", (64, 256))}), tmp_path / "eight")

    def join(arrays: dict[str, Tagged], given: dict[str, Any]) -> None:
        arrays.update(arrays_of(eight))
        given["dynamic"] = {r"+:(a+)+$": {"bits": 8, "group_size": 32}}

    contents = GPTQ.read(changed(four, join))
    assert contents.packed == {QUERY: ("int4:g64", (64, 128)), DOWN: ("int8:g32", (64, 256))}
    assert_same(contents.read_packed(DOWN), rounded("int8:g32", (64, 256)))


def test_scales_of_other_types(tmp_path: Path) -> None:
    """float32 and bfloat16 scales that are float16 too are read as such; others stay float32."""

    def wide(arrays: dict[str, Tagged], _: dict[str, Any]) -> None:
        arrays[f"{STEM}scales"] = "F32", arrays[f"{STEM}scales"][1].astype(np.float32)

    folder = changed(good(tmp_path), wide)
    assert_same(GPTQ.read(folder).read_packed(QUERY), rounded("int4:g64,asym", (64, 128)))

    def finer(arrays: dict[str, Tagged], _: dict[str, Any]) -> None:
        arrays[f"{STEM}scales"][1][1, 2] = np.float32(0.1)

    contents = GPTQ.read(changed(folder, finer))
    assert contents.packed[QUERY] == ("int4:g64,asym,f32", (64, 128))
    found = contents.read_packed(QUERY)
    assert found.params["scale"][2, 1] == np.float32(0.1)
    assert found.decode().tobytes() == gptq_values(arrays_of(folder), STEM[:-1], 4, True).tobytes()
    assert_same(GPTQ.settle(rounded("int4:g64,asym", (64, 128))), rounded("int4:g64,asym", (64, 128)))


def put(part: str, tag: str, array: NDArray[Any]) -> Any:
    def change(arrays: dict[str, Tagged], _: dict[str, Any]) -> None:
        arrays[f"{STEM}{part}"] = tag, array

    return change


def drop(part: str) -> Any:
    return lambda arrays, _: arrays.pop(f"{STEM}{part}")


def setting(**values: Any) -> Any:
    return lambda _, given: given.update(values)


HOSTILE: dict[str, tuple[Any, str]] = {
    "no qzeros": (drop("qzeros"), "q_proj.qzeros' is missing"),
    "no scales": (drop("scales"), "q_proj.scales' is missing"),
    "qweight of bytes": (put("qweight", "U8", np.zeros((16, 64), np.uint8)), "q_proj.qweight' is U8, it must be I32"),
    "qweight of three dimensions": (put("qweight", "I32", np.zeros((16, 8, 8), np.int32)), r"it must be \[any, any\]"),
    "qweight of no rows": (put("qweight", "I32", np.zeros((0, 64), np.int32)), r"\[0, 64\], it must be \[any, any\]"),
    "qweight too short": (put("qweight", "I32", np.zeros((15, 64), np.int32)), "has 15 rows, it must have 16: 128 columns"),
    "qzeros too narrow": (put("qzeros", "I32", np.zeros((2, 7), np.int32)), r"\[2, 7\], it must be \[2, 8\]"),
    "scales of another width": (put("scales", "F16", np.zeros((2, 63), np.float16)), r"\[2, 63\], it must be \[any, 64\]"),
    "too few groups": (put("scales", "F16", np.ones((1, 64), np.float16)), "has 1 groups, it must have 2"),
    "scales of integers": (put("scales", "I32", np.zeros((2, 64), np.int32)), "is I32, it must be F16 or BF16 or F32"),
    "g_idx of int64": (put("g_idx", "I64", np.zeros(128, np.int64)), "is I64, it must be I32"),
    "g_idx beyond the groups": (put("g_idx", "I32", np.full(128, 2, np.int32)), "names group 2; there are 2"),
    "g_idx below 0": (put("g_idx", "I32", np.full(128, -1, np.int32)), "names group -1; there are 2"),
    "g_idx far too large": (put("g_idx", "I32", np.full(128, 2**31 - 1, np.int32)), "names group 2147483647"),
    "columns out of order": (put("g_idx", "I32", np.arange(128, dtype=np.int32) % 2), "ordered by activation .desc_act true."),
    "desc_act without g_idx": (
        lambda arrays, given: (arrays.pop(f"{STEM}g_idx"), given.update(desc_act=True)),
        "g_idx' is missing, and desc_act says",
    ),
    "a float weight beside": (put("weight", "F32", np.zeros((64, 128), np.float32)), "stands beside a packed weight"),
    "5 bits": (setting(bits=5), "bits of quantization_config is 5; nybble reads 2, 3, 4, 8"),
    "true bits": (setting(bits=True), "bits of quantization_config is True"),
    "bits as text": (setting(bits="4"), "bits of quantization_config is '4'"),
    "3 bits": (setting(bits=3), "has 16 rows, it must have 12"),
    "no bits": (lambda _, given: given.pop("bits"), "bits of quantization_config is None"),
    "groups of 48": (setting(group_size=48), "has 2 groups, it must have 3"),
    "groups of 0": (setting(group_size=0), "group_size of quantization_config is 0"),
    "a huge group": (setting(group_size=2**40), "group_size of quantization_config is 1099511627776"),
    "an unknown checkpoint format": (setting(checkpoint_format="marlin"), "checkpoint_format of quantization_config is 'marlin'"),
    "dynamic as a list": (setting(dynamic=["+:x"]), "not a map of patterns"),
    "another method": (setting(quant_method="awq"), "quant_method is 'awq', not 'gptq'"),
}


@pytest.mark.parametrize("name", HOSTILE)
def test_broken_folders(name: str, tmp_path: Path) -> None:
    change, message = HOSTILE[name]
    folder = changed(good(tmp_path), change)
    with pytest.raises(FileFormatError, match=message) as caught:
        GPTQ.read(folder)
    assert "\n" not in str(caught.value)
    assert str(folder) in str(caught.value)


def test_scales_that_are_not_finite(tmp_path: Path) -> None:
    scales = np.ones((2, 64), np.float16)
    scales[1, 5] = np.inf
    contents = GPTQ.read(changed(good(tmp_path), put("scales", "F16", scales)))
    with pytest.raises(FileFormatError, match=r"q_proj.scales' holds 1 values that are not finite, the first at \(1, 5\)"):
        contents.read_packed(QUERY)


def test_recognizes(tmp_path: Path) -> None:
    folder = good(tmp_path)
    assert GPTQ.recognizes(folder)
    assert not find_container("awq").recognizes(folder)
    assert open_contents(folder).container == "gptq"
    for text in ("{", "[]", "{}", '{"quantization_config": 3}', "[" * 50_000):
        (folder / "config.json").write_text(text)
        assert not GPTQ.recognizes(folder)
    assert not GPTQ.recognizes(folder / "nothing")


def test_shards(tmp_path: Path) -> None:
    """Tensors of one module may lie in different files."""
    folder = good(tmp_path)
    arrays = arrays_of(folder)
    (folder / "model.safetensors").unlink()
    places = {name: f"model-0000{i % 2 + 1}-of-00002.safetensors" for i, name in enumerate(arrays)}
    for shard in sorted(set(places.values())):
        part = {name: arrays[name][1] for name, place in places.items() if place == shard}
        write(folder / shard, part, {"format": "pt"}, {name: arrays[name][0] for name in part})
    (folder / "model.safetensors.index.json").write_text(json.dumps({"weight_map": places}))
    assert_same(GPTQ.read(folder).read_packed(QUERY), rounded("int4:g64,asym", (64, 128)))


@pytest.mark.parametrize(("bits", "places"), [(2, 16), (4, 8), (8, 4)])
def test_v1_zero_points_that_wrap_are_read_as_gptqmodel_reads_them(bits: int, places: int, tmp_path: Path) -> None:
    """It adds 1 to every field of a word at once, so that the one that wraps carries into the next."""
    folder = written("gptq", model({QUERY: rounded(f"int{bits}:g128", (64, 128))}), tmp_path / "out")
    top, ones = 2**bits - 1, sum(1 << bits * i for i in range(places))

    def wrap(arrays: dict[str, Tagged], _: dict[str, Any]) -> None:
        words = arrays[f"{STEM}qzeros"][1].view(np.uint32)
        words[0, 0] = words[0, 0] | np.uint32(top)

    stored = int(arrays_of(changed(folder, wrap))[f"{STEM}qzeros"][1].view(np.uint32)[0, 0])
    wanted = [(stored + ones >> bits * i) & top for i in range(places)]
    tensor = GPTQ.read(folder).read_packed(QUERY)
    zero = tensor.format.grid(tensor.params)[1]
    assert zero is not None
    assert zero[:places, 0].tolist() == wanted
    assert wanted[:2] == [0, 2 ** (bits - 1) + 1]


def test_v1_zero_points_of_3_bits_wrap_alone(tmp_path: Path) -> None:
    folder = written("gptq", model({QUERY: rounded("int3:g128", (64, 128))}), tmp_path / "out")

    def wrap(arrays: dict[str, Tagged], _: dict[str, Any]) -> None:
        arrays[f"{STEM}qzeros"][1].view(np.uint32)[0, 0] |= np.uint32(7)

    tensor = GPTQ.read(changed(folder, wrap)).read_packed(QUERY)
    zero = tensor.format.grid(tensor.params)[1]
    assert zero is not None
    assert zero[:3, 0].tolist() == [0, 4, 4]
