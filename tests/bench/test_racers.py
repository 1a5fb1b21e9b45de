"""Who takes part: what `--formats`, `--against` and `--peer-python` mean."""

from __future__ import annotations

import pytest

from nybble.bench.adapters import FILES, adapter_of
from nybble.bench.racers import DEFAULT_FORMATS, check_pythons, parse_against, parse_formats
from nybble.errors import UsageError
from nybble.evaluate.variants import parse_variant


def test_formats_keep_the_words_and_know_their_meaning() -> None:
    racers = parse_formats("f32, fp16,int8,int4:g32,nf4:g64,dq,int4:g64,asym,bf16")
    assert [racer.label for racer in racers] == ["f32", "fp16", "int8", "int4:g32", "nf4:g64,dq", "int4:g64,asym", "bf16"]
    assert [racer.format for racer in racers] == [
        "fp32",
        "fp16",
        "int8:channel",
        "int4:g32",
        "nf4:g64,dq",
        "int4:g64,asym",
        "bf16",
    ]
    assert {racer.runtime for racer in racers} == {"nybble"}
    assert [str(racer) for racer in racers][:2] == ["nybble f32", "nybble fp16"]


def test_a_format_means_what_compare_means_by_it() -> None:
    for racer in parse_formats("int8,int4,nf4,fp16"):
        assert racer.format == parse_variant(racer.label).format


def test_each_format_races_once() -> None:
    assert [racer.label for racer in parse_formats("int8,int4:g32,int8:channel,int8")] == ["int8", "int4:g32"]


def test_the_adapter_and_the_default_name_the_same_formats() -> None:
    assert tuple(racer.format for racer in parse_formats(DEFAULT_FORMATS)) == adapter_of("nybble").formats


@pytest.mark.parametrize(
    ("spec", "words"),
    [
        ("", "no formats"),
        (" , ", "no formats"),
        ("intt4", "did you mean int4"),
        ("int8,banana", "unknown format 'banana'"),
        ("dq", "'dq'"),
    ],
)
def test_wrong_formats(spec: str, words: str) -> None:
    with pytest.raises(UsageError, match=words):
        parse_formats(spec)


def test_a_peer_races_in_all_of_its_formats_or_in_one() -> None:
    assert parse_against("") == []
    assert [str(racer) for racer in parse_against("torch,llama.cpp:q4_0")] == ["torch fp32", "torch bf16", "llama.cpp Q4_0"]
    assert [str(racer) for racer in parse_against("openvino:int4,openvino")] == ["openvino int4", "openvino int8"]


def test_torch_takes_the_packed_modules_in_any_format() -> None:
    racers = parse_against("torch:int4:g32,torch:nf4:g64,dq,torch:f32")
    assert [(racer.label, racer.format) for racer in racers] == [
        ("int4:g32", "int4:g32"),
        ("nf4:g64,dq", "nf4:g64,dq"),
        ("fp32", "fp32"),
    ]


@pytest.mark.parametrize(
    ("spec", "words"),
    [
        ("lama.cpp", "unknown peer 'lama.cpp'; did you mean llama.cpp"),
        ("nybble", "unknown peer 'nybble'"),
        ("llama.cpp:Q9_0", "unknown format of llama.cpp 'Q9_0'"),
        ("torch:int9", "unknown format 'int9'"),
    ],
)
def test_wrong_peers(spec: str, words: str) -> None:
    with pytest.raises(UsageError, match=words):
        parse_against(spec)


def test_a_python_is_for_a_peer_that_races() -> None:
    peers = parse_against("llama.cpp,torch")
    assert check_pythons([("torch", "env/bin/python")], peers) == {"torch": "env/bin/python"}
    with pytest.raises(UsageError, match=r"is for 'openvino', but --against names llama\.cpp, torch"):
        check_pythons([("openvino", "python")], peers)
    with pytest.raises(UsageError, match="names no peer"):
        check_pythons([("torch", "python")], [])
    with pytest.raises(UsageError, match="runs nybble's modules"):
        check_pythons([("torch", "python")], parse_against("torch:int4:g32"))


@pytest.mark.parametrize("runtime", FILES)
def test_every_adapter_says_what_it_needs(runtime: str) -> None:
    adapter = adapter_of(runtime)
    assert adapter.formats
    assert adapter.install
    absent = adapter.missing()
    assert absent is None or set(absent.split(", ")) <= set(adapter.modules)


def test_missing_modules_are_named(monkeypatch: pytest.MonkeyPatch) -> None:
    adapter = adapter_of("llama.cpp")
    monkeypatch.setattr(type(adapter), "modules", ("json", "no_such_module", "no_such_package.part"))
    assert adapter.missing() == "no_such_module, no_such_package.part"


def test_files_are_made_only_where_the_float_folder_does_not_do() -> None:
    engine, torch = adapter_of("nybble"), adapter_of("torch")
    assert engine.file_for("fp16", "F16") is None
    assert engine.file_for("fp32", "F16") == "nybble-fp32"
    assert engine.file_for("nf4:g64,dq", "F16") == "nybble-nf4-g64-dq"
    assert torch.file_for("fp32", "F16") is None
    assert torch.file_for("int4:g32", "F32") == engine.file_for("int4:g32", "F32")
    assert adapter_of("bitsandbytes").file_for("nf4", "F32") is None
