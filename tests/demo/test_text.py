"""The text that the shipped model is judged on, against the text of the published figures where that is at hand."""

from __future__ import annotations

import sys
import sysconfig
from pathlib import Path

import numpy as np
import pytest

from nybble.demo import model_folder, text
from nybble.errors import InputError

PUBLISHED = Path(__file__).parents[2].parent / "shared" / "data" / "text" / "stdlib"

same_python = pytest.mark.skipif(
    sys.version_info[:2] != (3, 11) or not PUBLISHED.is_dir(),
    reason="needs CPython 3.11 and the published text beside this checkout",
)


@same_python
def test_held_out_text_is_the_published_text() -> None:
    assert text.held_out_text() == (PUBLISHED / "held.txt").read_text(encoding="utf-8")


@same_python
def test_evaluation_text_encodes_to_the_published_tokens() -> None:
    from transformers import AutoTokenizer

    from nybble.calibrate.windows import encode

    ids, bos = encode(AutoTokenizer.from_pretrained(model_folder()), text.evaluation_text())
    assert bos is None
    assert np.array_equal(ids, np.fromfile(PUBLISHED / "held.bin", dtype="<u2"))


def test_documents_are_the_held_out_modules_and_every_tenth_topic() -> None:
    from pydoc_data.topics import topics

    documents = text.held_out_documents()
    heads = [document.split("\n", 1)[0] for document in documents]
    modules = [head[2:].removesuffix(".py") for head in heads if head.startswith("# ") and head.endswith(".py")]
    assert modules == sorted(modules)
    assert {module.split("/")[0] for module in modules} == set(text.HELD_OUT)
    assert "json/decoder" in modules
    assert documents[len(modules) :] == [topics[name] for name in sorted(topics)[::10]]
    source = Path(sysconfig.get_path("stdlib"), "argparse.py").read_text(encoding="utf-8")
    assert documents[0] == "# argparse.py\n" + source


def test_packages_are_taken_whole_without_their_tests(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for name in text.HELD_OUT:
        (tmp_path / f"{name}.py").write_text(f"# {name}\n")
    for inner in ("__init__.py", "_path/glob.py", "test/test_a.py"):  # zipfile is a package since Python 3.12
        path = tmp_path / "zipfile" / inner
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text("x = 1\n")
    monkeypatch.setattr(sysconfig, "get_path", lambda name: str(tmp_path))
    heads = [document.split("\n", 1)[0] for document in text.held_out_documents()]
    assert heads[11:13] == ["# zipfile/__init__.py", "# zipfile/_path/glob.py"]
    assert not any("test_a" in head for head in heads)


def test_calibration_text_is_full_and_not_held_out() -> None:
    found = text.calibration_text()
    assert len(found) == text.CALIBRATION_CHARACTERS
    heads = [document.split("\n", 1)[0] for document in found.split(text.END_OF_TEXT + "# ")]
    names = {head.removeprefix("# ").removesuffix(".py") for head in heads}
    assert len(names) > 5
    assert names <= sys.stdlib_module_names
    assert not names & set(text.HELD_OUT)


@pytest.mark.parametrize("make", [text.held_out_text, text.evaluation_text, text.calibration_text])
def test_a_python_without_sources(make: object, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sysconfig, "get_path", lambda name: str(tmp_path / "python3.zip"))
    with pytest.raises(InputError, match=r"no readable standard library source at .*; give a text with --text FILE$"):
        make()  # type: ignore[operator]


def test_a_python_without_pydoc_topics(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "pydoc_data.topics", None)
    with pytest.raises(InputError, match="has no pydoc topics"):
        text.held_out_documents()
