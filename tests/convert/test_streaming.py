"""Outputs made piece by piece: the bytes of one made at once, whatever the pieces, and after any interruption."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from hashlib import sha256
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from nybble import demo
from nybble.containers import container_names, find_container, open_contents, streaming
from nybble.containers.spilled import Spilled
from nybble.convert import Conversion, convert, made_by
from nybble.converting import Work, describe_contents
from nybble.errors import FileFormatError, NumericError, OutputError, UsageError
from nybble.files import pieces
from nybble.files.job import job_folder
from nybble.files.safetensors import SafetensorsFile, write
from nybble.finished import FinishedBlocks
from nybble.forecast import duration, parse_size, size_text
from nybble.methods import parse_method
from nybble.models.checkpoint import open_checkpoint
from nybble.models.filling import check_filling
from nybble.plan import Recipe, make_plan

STREAMED = [name for name in container_names() if hasattr(find_container(name), "stream")]
JOBS = {
    "nybble": ("int4:g64", "rtn"),
    "gguf": ("q8_0", "rtn"),
    "float": ("fp16", "rtn"),
    "double quantization": ("nf4:g64,dq", "rtn"),
    "searched": ("int3:g32", "rtn:mse"),
    "half-quadratic": ("int4:g64", "hqq"),
    "inputs": ("int8:channel", "dynamic"),
    "pruned": ("fp16", "magnitude:sparsity=0.5"),
    "mix": ("q4_k_m", "rtn"),
}
"""What is asked for, by name; the container is the name where it is one, else nybble."""


def digests(path: Path) -> dict[str, str]:
    files = [path] if path.is_file() else sorted(path.iterdir())
    return {file.name: sha256(file.read_bytes()).hexdigest() for file in files}


def make(name: str, target: Path, source: Path | None = None, **more: Any) -> Path:
    to, method = JOBS[name]
    recipe = Recipe(to, method)
    source = source or demo.model_folder()
    container = name if name in STREAMED else "nybble"
    convert(source, target, container, to, method, provenance=made_by(source, recipe), measures=container == "gguf", **more)
    return target


@pytest.fixture
def small_pieces(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(pieces, "BATCH_BYTES", 1 << 18)


def test_which_containers_are_streamed() -> None:
    assert STREAMED == ["nybble", "float", "gguf"]


@pytest.mark.parametrize("name", JOBS)
def test_in_one_go_or_in_pieces_the_same_bytes(name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """`write` of the same contents, all at once, against pieces of one row and more, in one thread and in three."""
    to, method = JOBS[name]
    source, module = open_contents(demo.model_folder()), find_container(name if name in STREAMED else "nybble")
    plan = make_plan(describe_contents(source), Recipe(to, method))
    work = Work(source, module, plan, parse_method(method), measures=False)
    first = make(name, tmp_path / "first", threads=3)
    provenance = open_contents(first).provenance
    at_once = tmp_path / "at once"
    if module.FOLDER:
        at_once.mkdir()
    module.write(at_once, work.contents(provenance), {})
    expected = digests(at_once) if module.FOLDER else list(digests(at_once).values())
    monkeypatch.setattr("nybble.forecast.ROWS_WEIGHTS", 1 << 14)
    monkeypatch.setattr("nybble.forecast.FEWEST_WEIGHTS", 1 << 10)
    monkeypatch.setattr(pieces, "BATCH_BYTES", 1 << 16)
    second = make(name, tmp_path / "second", threads=1)
    for made in (first, second):
        assert (digests(made) if module.FOLDER else list(digests(made).values())) == expected


@pytest.mark.parametrize("name", ["nybble", "gguf", "half-quadratic"])
def test_stopped_anywhere_it_goes_on(name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, small_pieces: None) -> None:
    whole = digests(make(name, tmp_path / "whole" / "out"))
    work = Work._matrix
    said: list[str] = []
    for after in (1, 3, 5):
        made = 0

        def stops(self: Work, tensor: str, rows: slice | None = None, after: int = after) -> Any:
            nonlocal made
            made += 1
            if made > after + 2:  # the forecast tries some rows
                raise KeyboardInterrupt
            return work(self, tensor, rows)

        monkeypatch.setattr(Work, "_matrix", stops)
        with pytest.raises(KeyboardInterrupt):
            make(name, tmp_path / "out", threads=1, announce=said.append)
        assert not (tmp_path / "out").exists()
    monkeypatch.setattr(Work, "_matrix", work)
    make(name, tmp_path / "out", announce=said.append)
    assert digests(tmp_path / "out") == whole
    assert f"stopped; the same command goes on from {job_folder(tmp_path / 'out')}" in said
    assert f"going on with what is in {job_folder(tmp_path / 'out')}" in said
    assert [path.name for path in tmp_path.iterdir() if path.name != "whole"] == ["out"]


@pytest.fixture
def stopped(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, small_pieces: None) -> Path:
    """A job that was stopped in the middle, from a copy of the model that may be changed."""
    shutil.copytree(demo.model_folder(), tmp_path / "model")
    with monkeypatch.context() as patch:
        patch.setattr(find_container("nybble"), "read", interrupted)
        with pytest.raises(KeyboardInterrupt):
            make("nybble", tmp_path / "out", tmp_path / "model")
    return tmp_path


def interrupted(path: Path) -> Any:
    raise KeyboardInterrupt


CHANGES: dict[str, tuple[Callable[[Path], dict[str, Any]], str]] = {
    "format": (lambda folder: {"to": "int8:channel"}, r"another format \('int4:g64', now 'int8:channel'\)"),
    "method": (lambda folder: {"method": "rtn:mse"}, r"another method \('rtn', now 'rtn:mse'\)"),
    "keep": (lambda folder: {"keep": ["wte"]}, "another choice of weights"),
    "container": (lambda folder: {"container": "float", "to": "fp16"}, "another format"),
    "model": (lambda folder: flip(folder / "model" / "model.safetensors"), "another file model.safetensors"),
    "config": (lambda folder: edit(folder / "model" / "config.json"), "another config"),
    "tokenizer": (lambda folder: edit(folder / "model" / "tokenizer_config.json"), "another file tokenizer_config.json"),
}


def flip(path: Path) -> dict[str, Any]:
    data = bytearray(path.read_bytes())
    data[-1] ^= 1
    path.write_bytes(bytes(data))
    return {}


def edit(path: Path) -> dict[str, Any]:
    path.write_text(json.dumps({**json.loads(path.read_text()), "a_new_key": 1}))
    return {}


@pytest.mark.parametrize("change", CHANGES)
def test_something_else_is_refused_by_its_name(change: str, stopped: Path) -> None:
    how, message = CHANGES[change]
    given = how(stopped)
    recipe = Recipe("int4:g64")
    settings: dict[str, Any] = {"container": "nybble", "to": "int4:g64", "measures": False, **given}
    before = digests(job_folder(stopped / "out") / "out")
    with pytest.raises(UsageError, match=message):
        convert(stopped / "model", stopped / "out", provenance=made_by(stopped / "model", recipe), **settings)
    assert digests(job_folder(stopped / "out") / "out") == before
    convert(stopped / "model", stopped / "out", provenance=made_by(stopped / "model", recipe), restart=True, **settings)
    assert not job_folder(stopped / "out").exists()


def test_flipped_bytes_are_found_and_made_again(stopped: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """1,000 of them, in the journal and in the half-made file: the output has none."""
    whole = digests(make("nybble", stopped / "whole", stopped / "model"))
    part = job_folder(stopped / "out")
    kept = stopped / "kept"
    shutil.copytree(part, kept)
    chance = np.random.default_rng(0)
    for _ in range(10):
        shutil.rmtree(part, ignore_errors=True)
        shutil.rmtree(stopped / "out", ignore_errors=True)
        shutil.copytree(kept, part)
        for file, count in ((part / "out" / "model.safetensors", 90), (part / "journal", 10)):
            data = bytearray(file.read_bytes())
            first = data.index(b"\n") + 1 if file.name == "journal" else 8 + int.from_bytes(data[:8], "little")
            for place in chance.integers(first, len(data), count):
                data[place] ^= 1 << int(place) % 8
            file.write_bytes(bytes(data))
        said: list[str] = []
        make("nybble", stopped / "out", stopped / "model", announce=said.append)
        assert digests(stopped / "out") == whole
        assert any("were not what had been written; they were made again" in line for line in said)


def test_the_digest_of_a_source_is_that_of_its_checkpoint(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("nybble.forecast.ROWS_WEIGHTS", 1 << 14)
    made = make("nybble", tmp_path / "out")
    assert open_contents(made).provenance["source_blake3"] == open_checkpoint(demo.model_folder()).digest()


def test_a_memory_limit_is_kept_or_refused(tmp_path: Path) -> None:
    with pytest.raises(UsageError, match=r"this takes [\d.]+ [MG]B of memory, --memory allows 1 MB; most of it for .*, whose"):
        make("double quantization", tmp_path / "out", memory=10**6)
    assert list(tmp_path.iterdir()) == []
    said: list[str] = []
    make("nybble", tmp_path / "out", memory=10**10, announce=said.append)
    assert said[0].startswith("reads 11.8 MB, writes 3.19 MB (")
    with pytest.raises(UsageError, match="--memory allows 1 MB"):
        convert(demo.model_folder(), tmp_path / "g", "gptq", "int4:g64", keep=["wte", "wpe"], memory=10**6)
    convert(demo.model_folder(), tmp_path / "g", "gptq", "int4:g64", keep=["wte", "wpe"], memory=10**10, announce=said.append)
    assert said[1].startswith("reads 11.8 MB, writes ")


def test_sizes() -> None:
    assert [parse_size(text) for text in ("2GB", "1.5 GiB", "500M", "7", "3k", "10b")] == [
        2 * 10**9, 3 << 29, 500 * 10**6, 7, 3000, 10,
    ]  # fmt: skip
    for text in ("", "GB", "2 GBB", "-1", "1e9", "2X"):
        with pytest.raises(UsageError, match="is no size; give one like 2GB"):
            parse_size(text)
    assert [size_text(n) for n in (0, 999, 1000, 12_345_678, 60 * 10**9)] == ["0 bytes", "999 bytes", "1 kB", "12.3 MB", "60 GB"]
    assert [duration(s) for s in (0.1, 42.4, 600, 36000)] == ["1 s", "42 s", "10 min", "10.0 h"]


def test_a_full_disk_leaves_what_is_finished(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, small_pieces: None) -> None:
    import os

    real, calls = os.pwrite, 0

    def full(file: int, data: Any, at: int) -> int:
        nonlocal calls
        calls += 1
        if calls > 30:
            raise OSError(28, "No space left on device")
        return real(file, data, at)

    monkeypatch.setattr(os, "pwrite", full)
    said: list[str] = []
    with pytest.raises(OutputError, match=r"cannot write .*out.part/out/model.safetensors \(3,1[\d,]+ bytes\): No space left"):
        make("nybble", tmp_path / "out", announce=said.append)
    assert said[-1] == f"stopped; the same command goes on from {job_folder(tmp_path / 'out')}"
    assert not (tmp_path / "out").exists()
    monkeypatch.setattr(os, "pwrite", real)
    assert digests(make("nybble", tmp_path / "out")) == digests(make("nybble", tmp_path / "deep" / "out"))


def change(folder: Path, **tensors: Any) -> Path:
    """A copy of the model that ships with some tensors left out (None) or in another shape."""
    shutil.copytree(demo.model_folder(), folder)
    file = SafetensorsFile(folder / "model.safetensors")
    held = {name: np.array(file.read(name)) for name in file.entries}
    for name, value in tensors.items():
        del held[name]
        if value is not None:
            held[name] = value
    (folder / "model.safetensors").unlink()
    write(folder / "model.safetensors", held, {"format": "pt"})
    return folder


@pytest.mark.parametrize(
    ("tensors", "message"),
    [
        ({"transformer.h.3.attn.c_attn.weight": None}, "1 tensors or blocks missing"),
        ({"transformer.wte.weight": None}, r"1 tensors or blocks missing, 0 of another shape \(transformer.wte.weight\)"),
        ({"transformer.h.5.mlp.c_fc.weight": np.ones((256, 1000), np.float16)}, "of another shape"),
        ({"transformer.wte.weight": np.ones((4000, 256), np.float16)}, r"0 tensors or blocks missing, 1 of another shape"),
    ],
)
def test_tensors_that_are_not_the_models(tensors: dict[str, Any], message: str, tmp_path: Path) -> None:
    with pytest.raises(FileFormatError, match=message):
        make("nybble", tmp_path / "out", change(tmp_path / "model", **tensors))
    assert not job_folder(tmp_path / "out").exists()


def test_every_model_at_hand_fills_itself() -> None:
    contents = open_contents(demo.model_folder())
    check_filling(contents.config, {name: shape for name, (_, shape) in contents.floats.items()}, contents.path)


def test_values_that_are_not_finite_are_named(tmp_path: Path) -> None:
    bad = np.ones(256, np.float16)
    bad[7] = np.inf
    with pytest.raises(NumericError, match=r"transformer.ln_f.weight: 1 of 256 values are not finite, the first is inf at \[7\]"):
        make("nybble", tmp_path / "out", change(tmp_path / "model", **{"transformer.ln_f.weight": bad}))
    assert not job_folder(tmp_path / "out").exists()


def test_pieces_of_a_group() -> None:
    wide = 1 << 17  # two rows are hashed together, and stay together
    group = streaming.Group("w", (9, wide), lambda rows: {}, by_rows=True)
    assert group.parts(5 * wide) == [slice(0, 4), slice(4, 8), slice(8, 9)]
    assert group.parts(1)[:2] == [slice(0, 2), slice(2, 4)]
    assert group.parts(10 * wide) == [None]
    assert [group.key(part) for part in (None, slice(0, 3))] == ["w", "w[0:3]"]
    assert streaming.Group("w", (9, wide), lambda rows: {}).parts(wide) == [None]


@pytest.mark.parametrize(
    ("container", "to", "method"),
    [
        ("gptq", "int4:g64,asym", "rtn"),
        ("bitsandbytes", "int8:channel", "llm_int8"),
        ("compressed-tensors", "int8:channel", "dynamic"),
        ("nybble-sparse", "int4:g64", "magnitude"),
    ],
)
def test_what_is_put_together_in_the_end_goes_on_too(
    container: str, to: str, method: str, tiny: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    model = tmp_path / "model"
    tiny("llama").save_pretrained(model)
    keep = ["model.embed_tokens", "lm_head"] if container != "nybble-sparse" else []
    options = {"checkpoint_format": "gptq_v2"} if container == "gptq" else {}

    def run(out: str, **more: Any) -> Conversion:
        return convert(model, tmp_path / out, container, to, method, keep=keep, options=options, **more)

    whole = run("whole")
    real = FinishedBlocks.keep

    def stops(self: FinishedBlocks, index: int, block: Any) -> None:
        real(self, index, block)
        raise KeyboardInterrupt

    said: list[str] = []
    for _ in range(3):
        with monkeypatch.context() as patch:
            patch.setattr(FinishedBlocks, "keep", stops)
            with pytest.raises(KeyboardInterrupt):
                run("out", announce=said.append)
    damaged = sorted((tmp_path / "out.part" / "blocks").iterdir())[1]
    content = bytearray(damaged.read_bytes())
    content[-1] ^= 1
    damaged.write_bytes(bytes(content))
    again = run("out", announce=said.append, threads=3)
    assert sum("the same command goes on from" in line for line in said) == 3
    assert "1 tensors in" in said[-1]
    assert again.steps == whole.steps
    for file in (tmp_path / "whole").iterdir():
        assert (tmp_path / "out" / file.name).read_bytes() == file.read_bytes(), file.name
    assert not (tmp_path / "out.part").exists()


@pytest.mark.parametrize(("container", "to"), [("gptq", "int4:g64,asym"), ("nybble", "int4:g64")])
def test_what_had_its_name_already_says_what_it_cost(
    container: str, to: str, tiny: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    tiny("llama").save_pretrained(tmp_path / "model")
    keep = ["model.embed_tokens", "lm_head"]
    with monkeypatch.context() as patch:  # killed before the job's folder was taken away
        patch.setattr("nybble.files.job._clear", lambda folder: None)
        whole = convert(tmp_path / "model", tmp_path / "out", container, to, keep=keep)
    assert (tmp_path / "out.part").exists()
    again = convert(tmp_path / "model", tmp_path / "out", container, to, keep=keep, force=True)
    assert not (tmp_path / "out.part").exists()
    assert again.steps == whole.steps
    assert any(step.error > 0 for step in again.steps)


def test_arrays_on_disk_are_what_was_put(tmp_path: Path) -> None:
    arrays = Spilled(tmp_path)
    put = {
        "a": np.arange(5, dtype=np.int32),
        "b": np.zeros((), np.uint8),
        "c": np.ones((2, 3), np.float16).T,
        "d": np.empty((0, 4)),
    }
    for name, array in put.items():
        arrays[name] = "X", array
    arrays["a"] = "Y", put["a"] + 1
    assert [(n, tag) for n, (tag, _) in arrays.items()] == [("a", "Y"), ("b", "X"), ("c", "X"), ("d", "X")]
    for name, array in put.items():
        assert arrays[name][1].dtype == array.dtype
        assert arrays[name][1].shape == array.shape
    assert arrays["a"][1].tolist() == [1, 2, 3, 4, 5]
    assert list(tmp_path.iterdir()) == []
    with pytest.raises(OutputError, match="nowhere"):
        Spilled(tmp_path / "nowhere")


@pytest.mark.parametrize("container", ["float", "compressed-tensors"])
def test_what_is_carried_over_is_looked_at(container: str, tiny: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    import torch

    monkeypatch.setattr("nybble.converting.SLAB_WEIGHTS", 128)  # two rows at a time
    model = tiny("llama")
    with torch.no_grad():
        model.model.embed_tokens.weight[41, 7] = float("inf")
    model.save_pretrained(tmp_path / "model")
    to, keep = ("fp32", []) if container == "float" else ("int4:g32", ["model.embed_tokens", "lm_head"])
    with pytest.raises(NumericError, match=r"model\.embed_tokens\.weight: 1 of .* the first is inf at \[41, 7\]"):
        convert(tmp_path / "model", tmp_path / "out", container, to, keep=keep)
    assert [path.name for path in tmp_path.iterdir()] == ["model"]


def test_formats_are_tried_on_some_rows_at_a_time(tiny: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    tiny("llama").save_pretrained(tmp_path / "model")
    whole = convert(tmp_path / "model", tmp_path / "whole.gguf", to="int4:g32,asym")
    assert {"q5_0"} == {step.after for step in whole.steps if step.name.endswith("mlp.up_proj.weight")}, "what holds its values"
    real, largest = Work._given, list[int]()

    def watched(self: Work, name: str, asked: str, rows: slice | None) -> Any:
        found = real(self, name, asked, rows)
        largest.append(found.codes.size)
        return found

    monkeypatch.setattr("nybble.converting.TRIED_WEIGHTS", 128)
    monkeypatch.setattr(Work, "_given", watched)
    again = convert(tmp_path / "model", tmp_path / "again.gguf", to="int4:g32,asym")
    assert max(largest) <= 128 < len(largest) * max(largest)
    assert again.steps == whole.steps
