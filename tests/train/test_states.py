"""Maps of optimizer states: levels, codes and bounds, and that they are those of formats."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from nybble import kernels
from nybble.formats import codebook
from nybble.formats.codebook import Codebook, dynamic_levels
from nybble.train.states import MAPS, BlockMap

ALL = [how for pair in MAPS.values() for how in pair]
names = pytest.mark.parametrize("how", ALL, ids=lambda how: how.name)


def drawn(*shape: int, seed: int = 0, scale: float = 1.0) -> torch.Tensor:
    """float32 of many magnitudes."""
    generator = torch.Generator().manual_seed(seed)
    return scale * torch.randn(shape, generator=generator) * torch.rand(shape, generator=generator) ** 3


def kept(how: BlockMap, values: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """(codes, absmax, stored values) of float32 [n]."""
    codes, absmax = how.zeros(values.numel(), values.device)
    how.store(values, codes, absmax)
    return codes, absmax, how.load(codes, absmax, values.numel())


@names
def test_the_bounds_are_what_the_maps_say(how: BlockMap) -> None:
    widest = {"signed8": 0.9 / 64, "unsigned8": 0.9 / 128, "signed4": 0.225, "linear4": 1 / 8}  # 1/8: zero is stored as 1/16
    assert how.max_error == pytest.approx(widest[how.name] / 2, rel=1e-4)
    levels = how.levels
    assert levels.size == 2**how.bits
    assert levels[-1] == 1
    assert (np.diff(levels) > 0).all()
    assert (levels == 0).any() == (how.name != "linear4")


def test_maps_are_those_of_the_formats() -> None:
    assert MAPS[8][0].levels is dynamic_levels()
    four = MAPS[4][0].levels
    np.testing.assert_allclose(four[8:], [0.0055, 0.0325, 0.0775, 0.2125, 0.4375, 0.6625, 0.8875, 1], rtol=1e-6)
    functional = pytest.importorskip("bitsandbytes.functional")
    unsigned = functional.create_dynamic_map(signed=False).numpy()
    np.testing.assert_allclose(MAPS[8][1].levels, unsigned, rtol=3e-7, atol=0)


@names
def test_codes_and_values_are_those_of_formats(how: BlockMap, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(codebook.LEVELS, how.name, tuple(how.levels.tolist()))
    twin = Codebook(how.name, how.block, wide=True, bits=how.bits)  # float32 scales
    values = drawn(70_001, seed=5)
    values[how.block : 2 * how.block] = 0
    if how.levels[0] >= 0:
        values = values.square()
    codes, absmax, stored = kept(how, values)
    params = twin.fit(values.numpy()[None])
    np.testing.assert_array_equal(params["scale"][0], absmax.numpy())
    wanted = twin.encode(values.numpy()[None], params)
    ratio = (values / absmax.repeat_interleave(how.block)[: len(values)]).nan_to_num().numpy()
    if how.levels[0] == 0:  # what formats round to zero
        small = (ratio > 0) & (wanted[0] == 0)
        assert small.any()
        assert ratio[small].max() < 1.7e-7
        wanted[0, small] = 1
    np.testing.assert_array_equal(codes.numpy(), kernels.pack(wanted, how.bits)[0])
    np.testing.assert_array_equal(stored.numpy(), twin.decode(wanted, params)[0])
    monkeypatch.undo()
    codebook._sorted.cache_clear()


@names
def test_every_ratio_gets_the_nearest_level(how: BlockMap) -> None:
    """Levels, boundaries and their float32 neighbours: the table of upper halves is a binary search."""
    levels = how.levels
    middles = (levels[1:] + levels[:-1]) * np.float32(0.5)
    if levels[0] == 0:
        middles[0] = 0
    near = [np.nextafter(middles, np.float32(side)) for side in (-2, 2)]
    ratios = np.concatenate([levels, middles, *near, [0, 1]]).astype(np.float32)
    ratios = ratios[(ratios >= min(levels[0], 0)) & (ratios <= 1)]
    values = np.stack([ratios, np.ones_like(ratios)], axis=1).ravel()  # every block has a 1
    *_, stored = kept(how, torch.from_numpy(values))
    np.testing.assert_array_equal(stored.numpy()[::2], levels[np.searchsorted(middles, ratios)])


@settings(deadline=None)
@given(
    st.lists(st.floats(-(2.0**100), 2.0**100, width=32), min_size=1, max_size=300),
    st.sampled_from(ALL),
    st.sampled_from([1.0, 1e-20, 1e-35]),
)
def test_stored_values_keep_order_zero_and_the_largest(numbers: list[float], how: BlockMap, scale: float) -> None:
    values = torch.tensor(numbers, dtype=torch.float32) * scale
    if how.levels[0] >= 0:
        values = values.abs()
    _, absmax, stored = kept(how, values)
    for i, (block, found) in enumerate(zip(values.split(how.block), stored.split(how.block), strict=True)):
        peak = block.abs().max()
        assert absmax[i] == peak
        order = block.argsort()
        assert (found[order].diff() >= 0).all()
        assert (found[block == peak] == peak).all()
        assert ((found - block).abs() <= how.max_error * peak + 1e-44).all()
        if how.name != "linear4":
            assert (found[block == 0] == 0).all()
        if how.levels[0] >= 0 and peak > 1e-35:
            assert (found[block > peak * 1e-9] > 0).all()
