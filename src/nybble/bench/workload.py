"""The one work load that every racer gets: token ids and counts, fitted to the model's vocabulary and context.

decode    50 new tokens after a prompt of 5, greedy; an end-of-text token does not end it
prefill   one pass over 512 tokens, logits of the last position only; each run another text, so no cache can help
batch     the decode of 1, 4, 8 and 16 different prompts at once
"""

from __future__ import annotations

import random
from dataclasses import dataclass
from typing import Any

from nybble.errors import InputError

PROMPT, NEW, PREFILL = 5, 50, 512
BATCHES = (1, 4, 8, 16)
WHAT = ("decode", "prefill", "batch")


@dataclass(frozen=True)
class Workload:
    """Counts of one race; ids follow from them. All ids are below `vocabulary`."""

    vocabulary: int
    prompt_tokens: int
    new_tokens: int
    prefill_tokens: int
    notes: tuple[str, ...]
    """What had to be smaller than usual, and why."""

    def prompts(self, rows: int) -> list[list[int]]:
        """`rows` different prompts of `prompt_tokens` ids; the first is always the same."""
        return [self._ids(f"prompt {row}", self.prompt_tokens) for row in range(rows)]

    def text(self, number: int) -> list[int]:
        """The prefill text of this number, `prefill_tokens` ids."""
        return self._ids(f"text {number}", self.prefill_tokens)

    def as_job(self, repeats: int) -> dict[str, Any]:
        """Everything a worker needs, as JSON: the prompts of each batch and a fresh text for each timed prefill."""
        return {
            "new_tokens": self.new_tokens,
            "prompts": {str(rows): self.prompts(rows) for rows in BATCHES},
            "texts": [self.text(number) for number in range(repeats + 1)],
        }

    def _ids(self, name: str, count: int) -> list[int]:
        draw = random.Random(name)
        return [draw.randrange(self.vocabulary) for _ in range(count)]


def plan_workload(vocabulary: int, context: int) -> Workload:
    """The work load for a model that knows `vocabulary` ids and holds `context` tokens.

    Raises InputError for a model that cannot even continue one token.
    """
    if vocabulary < 1 or context < 2:
        raise InputError(f"vocabulary of {vocabulary} and context of {context}: a race needs at least 1 id and 2 positions")
    prompt = min(PROMPT, context - 1)
    new = min(NEW, context - prompt)
    prefill = min(PREFILL, context)
    notes = []
    if new < NEW:
        notes.append(f"context of {context} tokens: {new} new ones after a prompt of {prompt} instead of {NEW} after {PROMPT}")
    if prefill < PREFILL:
        notes.append(f"context of {context} tokens: prefill of {prefill} instead of {PREFILL}")
    return Workload(vocabulary, prompt, new, prefill, tuple(notes))
