"""Which token is chosen: by hand, against the distribution that the settings mean, and C++ against numpy."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from numpy.typing import NDArray

from nybble.engine.sampling import Sampling, choose
from nybble.errors import NumericError, UsageError

try:
    from nybble.kernels._native import choose as native_choose
except ImportError:
    native_choose = None

Chooser = Callable[[NDArray[np.float32], Sequence[int], Sampling, float], int]


def choose_natively(logits: NDArray[np.float32], history: Sequence[int], sampling: Sampling, u: float) -> int:
    ids = np.array(history, dtype=np.int64)
    s = sampling
    return int(native_choose(logits, ids, s.temperature, s.top_k, s.top_p, s.min_p, s.repetition_penalty, u))


needs_native = pytest.mark.skipif(native_choose is None, reason="the C++ extension is not built here")
both = pytest.mark.parametrize(
    "chooser", [pytest.param(choose, id="numpy"), pytest.param(choose_natively, id="native", marks=needs_native)]
)
JUST_BELOW_1 = math.nextafter(1.0, 0.0)


def row(*values: float) -> NDArray[np.float32]:
    return np.array(values, dtype=np.float32)


def of(*probabilities: float) -> NDArray[np.float32]:
    """Logits whose softmax these are."""
    return np.log(np.array(probabilities)).astype(np.float32)


def shares(chooser: Chooser, logits: NDArray[np.float32], sampling: Sampling, history: Sequence[int] = ()) -> dict[int, float]:
    """Share of u in [0, 1) that each token gets, over a grid; only tokens with any."""
    steps = 2000
    drawn = [chooser(logits, history, sampling, (i + 0.5) / steps) for i in range(steps)]
    return {token: drawn.count(token) / steps for token in sorted(set(drawn))}


# By hand


@both
def test_greedy_takes_the_lowest_id_of_the_largest(chooser: Chooser) -> None:
    for u in (0.0, 0.5, JUST_BELOW_1):
        assert chooser(row(1, 3, 2, 3), [], Sampling(), u) == 1
    assert chooser(row(-np.inf, -5, -np.inf), [], Sampling(), 0.5) == 1
    assert chooser(row(7), [], Sampling(temperature=1.0), 0.5) == 0


@both
def test_repetition_penalty_divides_positive_and_multiplies_negative_logits(chooser: Chooser) -> None:
    twice = Sampling(repetition_penalty=2.0)
    assert chooser(row(4, 3), [0], twice, 0.0) == 1  # 4 / 2 < 3
    assert chooser(row(4, 1.5), [0, 0, 0], twice, 0.0) == 0  # once, however often it came: 4 / 2 > 1.5
    assert chooser(row(-1, -1.5), [0], twice, 0.0) == 1  # -1 * 2 < -1.5
    assert chooser(row(2, 3), [0], Sampling(repetition_penalty=0.5), 0.0) == 0  # below 1 favours: 2 / 0.5 > 3
    assert chooser(row(-np.inf, -3), [0, 1], twice, 0.0) == 1


@both
def test_tokens_share_the_line_in_order_of_ids(chooser: Chooser) -> None:
    """Probabilities 0.25, 0.5, 0.25 of equal and doubled weights: borders at 0.25 and 0.75."""
    logits = of(0.25, 0.5, 0.25)
    for u, token in ((0.0, 0), (0.24, 0), (0.26, 1), (0.74, 1), (0.76, 2), (JUST_BELOW_1, 2)):
        assert chooser(logits, [], Sampling(temperature=1.0), u) == token
    assert chooser(row(0, 0), [], Sampling(temperature=1.0), 0.5) == 1  # a border belongs to the token after it


@both
def test_temperature_sharpens_and_flattens(chooser: Chooser) -> None:
    logits = of(0.2, 0.8)
    assert shares(chooser, logits, Sampling(temperature=1.0))[0] == pytest.approx(0.2, abs=1e-3)
    assert shares(chooser, logits, Sampling(temperature=0.5))[0] == pytest.approx(0.04 / 0.68, abs=1e-3)
    assert shares(chooser, logits, Sampling(temperature=2.0))[0] == pytest.approx(1 / 3, abs=1e-3)
    assert shares(chooser, logits, Sampling(temperature=1e-300)) == {1: 1.0}


@both
def test_top_k_keeps_exactly_k_the_lower_ids_of_equal_ones(chooser: Chooser) -> None:
    logits = row(1, 2, 1, 0, 1)
    assert list(shares(chooser, logits, Sampling(temperature=1.0, top_k=1))) == [1]
    assert list(shares(chooser, logits, Sampling(temperature=1.0, top_k=2))) == [0, 1]
    assert list(shares(chooser, logits, Sampling(temperature=1.0, top_k=3))) == [0, 1, 2]
    assert list(shares(chooser, logits, Sampling(temperature=1.0, top_k=99))) == [0, 1, 2, 3, 4]


@both
def test_top_p_keeps_the_fewest_that_reach_it(chooser: Chooser) -> None:
    logits = of(0.1, 0.4, 0.3, 0.2)
    assert list(shares(chooser, logits, Sampling(temperature=1.0, top_p=0.39))) == [1]
    assert list(shares(chooser, logits, Sampling(temperature=1.0, top_p=0.41))) == [1, 2]
    assert list(shares(chooser, logits, Sampling(temperature=1.0, top_p=0.71))) == [1, 2, 3]
    assert list(shares(chooser, logits, Sampling(temperature=1.0, top_p=0.91))) == [0, 1, 2, 3]
    assert list(shares(chooser, logits, Sampling(temperature=1.0, top_p=1e-9))) == [1]
    assert shares(chooser, logits, Sampling(temperature=1.0, top_p=0.69))[1] == pytest.approx(4 / 7, abs=1e-3)
    assert list(shares(chooser, row(0, 0, 0, 0), Sampling(temperature=1.0, top_p=0.5))) == [0, 1]


@both
def test_min_p_is_a_share_of_the_likeliest(chooser: Chooser) -> None:
    logits = of(0.05, 0.5, 0.25, 0.2)
    assert list(shares(chooser, logits, Sampling(temperature=1.0, min_p=0.05))) == [0, 1, 2, 3]
    assert list(shares(chooser, logits, Sampling(temperature=1.0, min_p=0.39))) == [1, 2, 3]
    assert list(shares(chooser, logits, Sampling(temperature=1.0, min_p=0.45))) == [1, 2]
    assert list(shares(chooser, logits, Sampling(temperature=1.0, min_p=1.0))) == [1]


@both
def test_the_cuts_work_one_after_another(chooser: Chooser) -> None:
    logits = of(0.1, 0.4, 0.3, 0.2)
    # of the two largest the first has 4 / 7 of the probability, so 0.5 is reached by it alone; of all tokens it is not
    assert list(shares(chooser, logits, Sampling(temperature=1.0, top_k=2, top_p=0.5))) == [1]
    assert list(shares(chooser, logits, Sampling(temperature=1.0, top_p=0.5))) == [1, 2]
    # the temperature comes before top-p: it makes the likeliest token reach 0.5
    assert list(shares(chooser, logits, Sampling(temperature=0.5, top_p=0.5))) == [1]
    # the penalty comes before the temperature and top-k
    assert list(shares(chooser, row(4, 3, 1), Sampling(temperature=1.0, top_k=1, repetition_penalty=2.0), [0])) == [1]


# Against the distribution


@both
def test_draws_are_distributed_as_transformers_settings_say(chooser: Chooser) -> None:
    import torch
    from transformers import LogitsProcessorList
    from transformers.generation import logits_process as warpers

    generator = np.random.default_rng(5)
    logits = generator.normal(0, 3, 60).astype(np.float32)
    history = [3, 3, 17, 40]
    theirs = LogitsProcessorList(
        [
            warpers.RepetitionPenaltyLogitsProcessor(1.3),
            warpers.TemperatureLogitsWarper(0.9),
            warpers.TopKLogitsWarper(20),
            warpers.TopPLogitsWarper(0.95),
            warpers.MinPLogitsWarper(0.02),
        ]
    )
    wanted = torch.softmax(theirs(torch.tensor([history]), torch.tensor(logits[None]).clone()), -1)[0].double().numpy()
    ours = Sampling(temperature=0.9, top_k=20, top_p=0.95, min_p=0.02, repetition_penalty=1.3)
    found = shares(chooser, logits, ours, history)
    assert set(found) == set(np.flatnonzero(wanted))
    assert len(found) < 20
    assert all(found[token] == pytest.approx(wanted[token], abs=2e-3) for token in found)


# C++ against numpy

finite = st.floats(-60, 60, width=32)
few = st.sampled_from([-np.inf, -2.0, -1.0, 0.0, 1.0, 1.5])  # many ties


@needs_native
@given(
    logits=st.lists(finite, min_size=1, max_size=80) | st.lists(few, min_size=1, max_size=80),
    history=st.lists(st.integers(0, 79), max_size=8),
    temperature=st.sampled_from([0.0, 0.3, 1.0, 2.5]),
    top_k=st.integers(0, 90),
    top_p=st.floats(0.001, 1.0),
    min_p=st.floats(0, 1),
    penalty=st.sampled_from([1.0, 0.7, 1.25]),
    u=st.floats(0, 1, exclude_max=True),
)
@settings(deadline=None, max_examples=400)
def test_native_chooses_the_same(
    logits: list[float], history: list[int], temperature: float, top_k: int, top_p: float, min_p: float, penalty: float, u: float
) -> None:
    values = np.array([*logits, 0.25], dtype=np.float32)  # one at least is finite
    seen = [token for token in history if token < values.size]
    check_same(values, seen, Sampling(temperature, top_k, top_p, min_p, penalty), u)


def check_same(values: NDArray[np.float32], seen: Sequence[int], sampling: Sampling, u: float) -> None:
    """The same token, unless u or p lies so near a border that rounding decides: then one of those nearby."""
    ours = choose_natively(values, seen, sampling, u)
    nearby = {
        choose(values, seen, Sampling(sampling.temperature, sampling.top_k, p, m, sampling.repetition_penalty), v)
        for p in around(sampling.top_p, 1.0)
        for m in around(sampling.min_p, 1.0)
        for v in around(u, JUST_BELOW_1)
    }
    assert ours in nearby


def around(value: float, most: float) -> set[float]:
    return {value, max(value - 1e-13, min(value, 1e-9)), min(value + 1e-13, most)}


@needs_native
@pytest.mark.parametrize("spread", [0.0, 0.01, 3.0, 12.0])
def test_native_on_a_whole_vocabulary(spread: float) -> None:
    generator = np.random.default_rng(11)
    logits = generator.normal(0, spread, 50_257).astype(np.float32)
    seen = generator.integers(0, logits.size, 300).tolist()
    for sampling in (
        Sampling(),
        Sampling(repetition_penalty=1.2),
        Sampling(temperature=1.0),
        Sampling(temperature=0.7, top_k=40, repetition_penalty=1.1),
        Sampling(temperature=1.0, top_k=30_000),
        Sampling(temperature=1.0, top_p=0.9),
        Sampling(temperature=2.0, top_p=0.999, min_p=1e-4),
        Sampling(temperature=1.0, top_k=1000, top_p=0.5, min_p=0.1),
    ):
        for u in (0.0, 0.2, 0.77, JUST_BELOW_1):
            check_same(logits, seen, sampling, u)


# Wrong values


@both
@pytest.mark.parametrize("bad", [math.nan, math.inf])
@pytest.mark.parametrize("sampling", [Sampling(), Sampling(temperature=1.0, top_k=2)], ids=["greedy", "sampled"])
def test_logits_that_are_not_finite(chooser: Chooser, bad: float, sampling: Sampling) -> None:
    with pytest.raises((NumericError, ValueError)):
        chooser(row(1, 2, bad), [], sampling, 0.5)
    with pytest.raises((NumericError, ValueError)):
        chooser(row(-math.inf, -math.inf), [], sampling, 0.5)


def test_the_error_says_which_logit() -> None:
    with pytest.raises(NumericError, match=r"2 of 4 logits are not finite, the first is nan of token 1;"):
        choose(row(1, math.nan, 2, math.inf), [], Sampling(), 0.0)


@both
@pytest.mark.parametrize("token", [-1, 3, 1 << 40])
def test_a_seen_token_beyond_the_vocabulary(chooser: Chooser, token: int) -> None:
    with pytest.raises(ValueError):
        chooser(row(1, 2, 3), [0, token], Sampling(repetition_penalty=2.0), 0.0)


@pytest.mark.parametrize("u", [-0.1, 1.0, math.nan])
def test_u_out_of_range(u: float) -> None:
    with pytest.raises(UsageError, match="u is"):
        choose(row(1, 2), [], Sampling(), u)


def test_logits_must_be_one_row() -> None:
    for wrong in (np.zeros((1, 3), np.float32), np.zeros(0, np.float32)):
        with pytest.raises(UsageError, match="logits have shape"):
            choose(wrong, [], Sampling(), 0.0)


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("temperature", -0.1), ("temperature", math.nan), ("temperature", math.inf), ("temperature", 101), ("temperature", "1"),
        ("temperature", True), ("top_k", -1), ("top_k", 2.0), ("top_k", True), ("top_k", 1 << 63), ("top_p", 0.0),
        ("top_p", 1.01),
        ("top_p", math.nan), ("min_p", -0.01), ("min_p", 1.01), ("repetition_penalty", 0.0), ("repetition_penalty", math.inf),
        ("repetition_penalty", None),
    ],
)  # fmt: skip
def test_values_out_of_range_are_named(name: str, value: object) -> None:
    with pytest.raises(UsageError, match=f"^{name} is {value!r}; it must be ") as caught:
        Sampling(**{name: value})  # type: ignore[arg-type]
    assert len(str(caught.value).splitlines()) == 1


def test_values_at_the_ends_are_taken() -> None:
    assert Sampling(0, 0, 1, 0, 1).greedy
    assert not Sampling(100, (1 << 63) - 1, 1e-300, 1, 0.01).greedy
