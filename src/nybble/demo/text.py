"""Text for the model that ships, made from the standard library of the Python that runs. No text is shipped.

The model learnt from CPython 3.11's standard library, except the modules in HELD_OUT and every tenth pydoc topic. Those
are what it is judged on; other modules serve as calibration text. A document is a file, begun by a line
`# relative/path.py` that the model saw in training too, or a pydoc topic. On CPython 3.11 the held-out text is exactly
the text of the published figures; on another version the modules have changed, so that figures compare only with those
of the same Python.
"""

from __future__ import annotations

import sys
import sysconfig
from importlib import import_module
from pathlib import Path

from nybble.errors import InputError

HELD_OUT = (
    "argparse", "configparser", "contextlib", "heapq", "json", "sched",
    "shutil", "smtplib", "statistics", "tarfile", "textwrap", "zipfile",
)  # fmt: skip
TOPIC_STEP = 10
END_OF_TEXT = "<|endoftext|>"
CALIBRATION_CHARACTERS = 600_000


def held_out_documents() -> list[str]:
    """Held-out modules in sorted order, then every tenth pydoc topic. InputError when this Python has no sources."""
    folder = _library()
    return [_document(folder, path) for path in _held_out_paths(folder)] + _topics()


def _held_out_paths(folder: Path) -> list[Path]:
    paths: list[Path] = []
    for name in HELD_OUT:
        package = folder / name
        if package.is_dir():  # json; zipfile since Python 3.12
            inside = [p for p in package.rglob("*.py") if not {"test", "tests"} & set(p.relative_to(folder).parts)]
            paths += sorted(inside, key=lambda p: p.relative_to(folder).as_posix())
        else:
            paths.append(folder / f"{name}.py")
    return paths


def held_out_text() -> str:
    """The held-out documents for a person to read, or to save to a file: between two of them a line `<|endoftext|>`."""
    return f"\n{END_OF_TEXT}\n".join(held_out_documents())


def evaluation_text() -> str:
    """The held-out documents as the model saw documents in training: nothing but the token `<|endoftext|>` between two.

    This is what quality is measured on. It encodes to the tokens of the published figures; `held_out_text()` has two
    line ends more per document.
    """
    return END_OF_TEXT.join(held_out_documents())


def training_documents() -> list[str]:
    """All that the model that ships learnt from: every module that is not held out, tests among them, and the other pydoc topics.
    Files that are not UTF-8 are left out. InputError when this Python has no sources."""
    folder = _library()
    held = set(_held_out_paths(folder))
    paths = (path for path in folder.rglob("*.py") if not {"site-packages", "dist-packages"} & set(path.parts))
    documents = []
    for path in sorted(set(paths) - held, key=lambda p: p.relative_to(folder).as_posix()):
        try:
            documents.append(_document(folder, path))
        except InputError:
            continue
    if not documents:
        raise InputError(_missing(folder / "abc.py"))
    return documents + _topics(learnt=True)


def calibration_text() -> str:
    """About 600,000 characters of top-level modules that are not held out, spread evenly over the alphabet.

    Documents are joined as in `evaluation_text()`; the last one is cut.
    """
    folder = _library()
    paths = sorted(p for p in folder.glob("*.py") if p.stem in sys.stdlib_module_names and p.stem not in HELD_OUT)
    if not paths:
        raise InputError(_missing(folder / "abc.py"))
    step = max(1, sum(p.stat().st_size for p in paths) // CALIBRATION_CHARACTERS)
    # From every starting point in turn, so that the text is full whichever way the sizes fall.
    text, size = [], 0
    for path in (path for start in range(step) for path in paths[start::step]):
        if size >= CALIBRATION_CHARACTERS:
            break
        text.append(_document(folder, path))
        size += len(text[-1]) + len(END_OF_TEXT)
    return END_OF_TEXT.join(text)[:CALIBRATION_CHARACTERS]


def _library() -> Path:
    return Path(sysconfig.get_path("stdlib"))


def _document(folder: Path, path: Path) -> str:
    try:
        source = path.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise InputError(_missing(path)) from error
    return f"# {path.relative_to(folder).as_posix()}\n{source}"


def _topics(learnt: bool = False) -> list[str]:
    """The pydoc topics that are held out, or those that are not."""
    try:
        topics: dict[str, str] = import_module("pydoc_data.topics").topics
    except (ImportError, AttributeError) as error:
        raise InputError("this Python has no pydoc topics (pydoc_data); give a text with --text FILE") from error
    return [topics[name] for place, name in enumerate(sorted(topics)) if (place % TOPIC_STEP > 0) == learnt]


def _missing(path: Path) -> str:
    return f"this Python has no readable standard library source at {path}; give a text with --text FILE"
