"""The work load: the usual counts, and what a short context or a small vocabulary makes of them."""

from __future__ import annotations

import json

import pytest

from nybble.bench.race import workload_of
from nybble.bench.workload import BATCHES, plan_workload
from nybble.errors import InputError


def test_the_usual_counts_need_no_note() -> None:
    work = plan_workload(50257, 1024)
    assert (work.prompt_tokens, work.new_tokens, work.prefill_tokens, work.notes) == (5, 50, 512, ())


@pytest.mark.parametrize(
    ("context", "counts", "notes"),
    [
        (512, (5, 50, 512), 0),
        (511, (5, 50, 511), 1),
        (55, (5, 50, 55), 1),
        (54, (5, 49, 54), 2),
        (4, (3, 1, 4), 2),
        (2, (1, 1, 2), 2),
    ],
)
def test_a_short_context_clips_and_says_so(context: int, counts: tuple[int, int, int], notes: int) -> None:
    work = plan_workload(97, context)
    assert (work.prompt_tokens, work.new_tokens, work.prefill_tokens) == counts
    assert work.prompt_tokens + work.new_tokens <= context
    assert len(work.notes) == notes
    assert all(f"context of {context} tokens" in note for note in work.notes)


@pytest.mark.parametrize(("vocabulary", "context"), [(97, 1), (97, 0), (0, 64)])
def test_a_model_without_room_is_refused(vocabulary: int, context: int) -> None:
    with pytest.raises(InputError, match=f"vocabulary of {vocabulary} and context of {context}"):
        plan_workload(vocabulary, context)


def test_ids_fit_the_vocabulary_and_differ_where_they_should() -> None:
    work = plan_workload(97, 1024)
    job = json.loads(json.dumps(work.as_job(repeats=3)))
    rows = [row for batch in job["prompts"].values() for row in batch]
    assert {int(rows) for rows in job["prompts"]} == set(BATCHES)
    assert all(len(batch) == int(rows) for rows, batch in job["prompts"].items())
    assert all(len(row) == 5 for row in rows)
    assert all(len(text) == 512 for text in job["texts"])
    assert all(0 <= token < 97 for ids in (*rows, *job["texts"]) for token in ids)
    assert len(job["texts"]) == 4
    assert len(set(map(tuple, job["texts"]))) == 4, "a repeated text could come from a cache"
    assert len(set(map(tuple, job["prompts"]["16"]))) == 16
    assert job["prompts"]["16"][:8] == job["prompts"]["8"]
    assert work == plan_workload(97, 1024)
    assert work.as_job(3) == job, "the same race has the same ids"


def test_the_config_says_how_much_room_there_is() -> None:
    assert workload_of({"vocab_size": 97, "n_positions": 64}).prefill_tokens == 64
    assert workload_of({"vocab_size": 97, "max_position_embeddings": 4096}).prefill_tokens == 512
    with pytest.raises(InputError, match="bloom states no vocab_size or no max_position_embeddings"):
        workload_of({"model_type": "bloom", "vocab_size": 97})
