"""The small model that ships with nybble, so that the first command works offline.

`text` makes the text that it is judged on.
"""

from __future__ import annotations

from pathlib import Path


def model_folder() -> Path:
    """Folder of the model that ships: GPT-2, 5.9 million parameters, float16, in the Hugging Face layout."""
    return Path(__file__).resolve().parent / "model"


NAME = "stdlib-gpt2-6m (ships with nybble)"
