"""Plain rounding of blocks as ggml does it: every instruction set to the bit of the reference, and what the rules say."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from nybble import kernels
from nybble.kernels import reference_round
from nybble.kernels.arguments import Floats

Walk = Callable[[], Iterator[str]]
RULES = [("range", 4), ("range", 5), ("ends", 4), ("ends", 5), ("away", 8), ("away", 4), ("ends", 2), ("range", 8)]
many = settings(max_examples=40, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])


def by_reference(weight: Floats, bits: int, block: int, rule: str) -> tuple[Any, Floats, Floats]:
    each = (weight.shape[0], weight.shape[1] // block)
    codes, scale, shift = np.empty(weight.shape, np.uint8), np.empty(each, np.float32), np.empty(each, np.float32)
    reference_round.round_blocks(weight, bits, block, rule, codes, scale, shift)
    return codes, scale, shift


def same(got: Any, wanted: Any, about: str) -> None:
    for mine, its in zip(got, wanted, strict=True):
        assert mine.tobytes() == its.tobytes(), about


@pytest.mark.parametrize(("rule", "bits"), RULES)
@many
@given(rows=st.integers(1, 9), blocks=st.integers(1, 9), block=st.sampled_from([32, 16, 5]), seed=st.integers(0, 2**32 - 1))
def test_every_instruction_set_to_the_bit(
    rule: str, bits: int, rows: int, blocks: int, block: int, seed: int, each_set: Walk
) -> None:
    random = np.random.default_rng(seed)
    weight = random.normal(size=(rows, blocks * block)) * 2.0 ** random.integers(-149, 120, (rows, 1))
    kind = random.integers(0, 5, rows)
    weight[kind == 0] = 0.0 * random.choice([-1, 1], weight[kind == 0].shape)
    weight[kind == 1] = random.integers(-15, 16, weight[kind == 1].shape) / 2
    weight = weight.astype(np.float32)
    wanted = by_reference(weight, bits, block, rule)
    for isa in each_set():
        for threads in (1, 3):
            same(kernels.round_blocks(weight, bits, block, rule, threads), wanted, isa)


def test_many_blocks_on_several_threads(each_set: Walk) -> None:
    weight = np.random.default_rng(0).standard_normal((300, 32 * 33)).astype(np.float32)
    wanted = by_reference(weight, 4, 32, "ends")
    for isa in each_set():
        for threads in (1, 2, 5):
            same(kernels.round_blocks(weight, 4, 32, "ends", threads), wanted, isa)


def test_rules_by_hand(each_set: Walk) -> None:
    row = np.array([[4, -4, 0.5, -0.5, 1.5, 3.9, 0.1, -1.49]], np.float32)
    for _ in each_set():
        codes, scale, shift = kernels.round_blocks(row, 4, 8, "ends")
        assert (scale.item(), shift.item()) == (-0.5, 0)
        assert codes.tolist() == [[0, 15, 7, 9, 5, 0, 8, 11]]
        codes, scale, shift = kernels.round_blocks(row * 2 - 7, 4, 8, "range")
        assert (scale.item(), shift.item()) == (np.float32(16) / np.float32(15), -15)
        assert codes.tolist() == [[15, 0, 8, 7, 10, 15, 8, 5]]
        codes, scale, shift = kernels.round_blocks(row * np.float32(1.75), 4, 8, "away")
        assert (scale.item(), shift.item()) == (1, 0)
        assert codes.tolist() == [[15, 1, 9, 7, 11, 15, 8, 5]]


def test_halves_and_what_lies_just_below_them(each_set: Walk) -> None:
    """A sum rounded first would take them up."""
    below = np.nextafter(np.float32(0.5), np.float32(0))
    row = np.array([[127, 0.5, below, -below, 1.5, 2.5, -2.5, np.nextafter(np.float32(2.5), np.float32(0))]], np.float32)
    for _ in each_set():
        codes, _, _ = kernels.round_blocks(row, 8, 8, "away")
        assert (codes.astype(int) - 128).tolist() == [[127, 1, 0, 0, 2, 3, -3, 2]]


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"bits": 1}, "bits must be a whole number from 2 to 8, got 1"),
        ({"block": 257}, "block must be a whole number from 1 to 256, got 257"),
        ({"block": 7}, "weight must have rows of whole blocks of 7 columns, got 64"),
        ({"rule": "down"}, "rule must be range, ends, away, got 'down'"),
        ({"threads": 0}, "threads must be a whole number from 1"),
        ({"weight": np.zeros((2, 64))}, "weight must be float32, got float64"),
    ],
)
def test_arguments_that_make_no_sense(change: dict[str, Any], message: str) -> None:
    good = {"weight": np.zeros((2, 64), np.float32), "bits": 4, "block": 32, "rule": "ends"}
    assert kernels.round_blocks(**good)[0].tolist() == [[8] * 64] * 2
    with pytest.raises(ValueError, match=message):
        kernels.round_blocks(**{**good, **change})


def test_the_extension_itself_refuses_arrays_of_the_wrong_size(native: Any) -> None:
    weight, each = np.zeros((2, 64), np.float32), np.zeros((2, 2), np.float32)
    with pytest.raises(ValueError, match="an output has the wrong shape"):
        native.round_blocks(weight, 4, 32, "ends", np.zeros((2, 63), np.uint8), each, each, 1)
    with pytest.raises(ValueError, match="blocks must divide a row"):
        native.round_blocks(weight, 4, 30, "ends", np.zeros((2, 64), np.uint8), each, each, 1)
