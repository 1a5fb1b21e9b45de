"""The models that every reader is given."""

from __future__ import annotations

import sys
import tempfile
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

HERE = Path(__file__).parent
sys.path.insert(0, str(HERE))
sys.path.insert(1, str(HERE.parent / "formats"))  # ggml's library and its layouts

from readers import data, make_qwen  # noqa: E402  # found beside this file

from nybble import demo  # noqa: E402
from nybble.convert import convert  # noqa: E402


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Other people's code warns of what is none of ours."""
    for item in items:
        if HERE in item.path.parents:
            item.add_marker(pytest.mark.filterwarnings("ignore"))


@pytest.fixture(scope="session")
def source(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Path]:
    """A float model's folder by its name in MODELS."""
    root, made = tmp_path_factory.mktemp("interop"), {}

    def get(name: str) -> Path:
        if name == "stdlib-gpt2-6m":
            return demo.model_folder()
        if name == "stories260k-llama":
            return data("models", name)
        if name not in made:
            made[name] = make_qwen(name, root / name)
        return made[name]

    return get


@pytest.fixture(scope="session")
def written(source: Callable[[str], Path]) -> Iterator[Callable[[str, str], Path]]:
    """The GGUF file of a model by its name and a format or mix, written once."""
    with tempfile.TemporaryDirectory(prefix="nybble-interop-") as root:

        def get(model: str, spec: str) -> Path:
            path = Path(root) / f"{model}-{spec.replace(':', '-')}.gguf"
            if not path.exists():
                convert(source(model), path, to=spec)
            return path

        yield get
