"""Large matrices are worked on in slabs of rows: the result must not show where one ends."""

from __future__ import annotations

import numpy as np
import pytest

from nybble.formats import base, codebook, parse_format


@pytest.mark.parametrize("spec", ["int8:tensor", "int4:channel,asym", "int4:g64", "nf4:tensor", "nf4:g64,dq", "fp4:channel"])
def test_codes_do_not_depend_on_slabs(spec: str, monkeypatch: pytest.MonkeyPatch) -> None:
    fmt = parse_format(spec)
    weight = np.random.default_rng(2).standard_normal((50, 100)).astype(np.float32)
    params = fmt.fit(weight)
    whole = fmt.encode(weight, params)
    monkeypatch.setattr(base, "SLAB_WEIGHTS", 700)
    assert len(base.slabs((50, 100))) == 8
    assert codebook.slabs is base.slabs
    assert np.array_equal(fmt.encode(weight, params), whole)


def test_slabs_cover_every_row_once() -> None:
    for shape in ((1, 1), (7, 3), (1, 1 << 23), (5, 1 << 22)):
        assert [row for slab in base.slabs(shape) for row in range(slab.start, slab.stop)] == list(range(shape[0]))
