"""A small model and a text that it can learn, for every test of training."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from nybble.train.data import Text
from nybble.train.loop import Trainer
from nybble.train.settings import Settings
from nybble.train.world import World

ALONE = World(0, 1, torch.device("cpu"))
SETTINGS = Settings(steps=12, batch=4, micro=4, window=16, learning_rate=3e-3, warmup=2, evaluate_every=4, save_every=4)


@pytest.fixture(autouse=True)
def one_torch_thread() -> Any:
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


def text(window: int = 16, seed: int = 0) -> Text:
    """Runs of numbers that go up by one, from random starts."""
    starts = np.random.default_rng(5).integers(3, 60, 200)
    return Text(np.concatenate([np.arange(s, s + 12) for s in starts]).astype(np.int32), window, seed)


@pytest.fixture
def trainer(tiny: Callable[..., Any], tmp_path: Path) -> Callable[..., Trainer]:
    """Makes a trainer of a tiny model: `trainer(folder="a", steps=5, ...)`."""

    def make(family: str = "gpt2", folder: str = "run", world: World = ALONE, model: Any = None, **changes: Any) -> Trainer:
        settings = replace(SETTINGS, **changes)
        words = text(settings.window, settings.seed)
        held_out = words.batch(1000, 6)
        return Trainer(model or tiny(family), words, held_out, settings, tmp_path / folder, world)

    return make
