"""Spec strings: defaults, and what each wrong one is told."""

from __future__ import annotations

import pytest

from nybble.errors import UsageError
from nybble.formats import format_names, parse_format


@pytest.mark.parametrize(
    ("short", "full"),
    [
        ("int8", "int8:channel"),
        ("int4,asym", "int4:channel,asym"),
        ("nf4", "nf4:g64"),
        ("fp4,dq", "fp4:g64,dq"),
        ("fp16", "fp16"),
    ],
)
def test_defaults(short: str, full: str) -> None:
    assert str(parse_format(short)) == full
    assert parse_format(short) == parse_format(full)


@pytest.mark.parametrize(
    ("spec", "message"),
    [
        ("", "unknown format ''"),
        ("int9", "unknown format 'int9'; did you mean"),
        ("Int4", "did you mean int4"),
        ("int4:g63", "'g63' is not a block; use tensor, channel, g32, g64, g128, g256"),
        ("int4:", "'' is not a block"),
        ("int4:g", "'g' is not a block"),
        ("int4:g-64", "'g-64' is not a block"),
        ("int4:g²", "'g²' is not a block"),
        ("int4:g64,", "unknown option ''"),
        ("int4:g64,asym,asym", "an option is given twice"),
        ("int4:g64,dq", "unknown option 'dq'; it has asym"),
        ("nf4:g64,asym", "unknown option 'asym'; it has dq"),
        ("nf4:channel,dq", "dq compresses the scales of groups"),
        ("nf4:g64,dq,f32", "dq compresses the scales that f32 keeps whole; use one of them"),
        ("int4:channel,f32", "f32 widens the scales of groups; those of rows are float32 already"),
        ("int8,f32", "f32 widens the scales of groups"),
        ("fp16:g64", "has no blocks; write 'fp16' alone"),
        ("bf16,dq", "unknown option 'dq'; it has none"),
    ],
)
def test_wrong_specs(spec: str, message: str) -> None:
    with pytest.raises(UsageError) as caught:
        parse_format(spec)
    assert message in str(caught.value)
    assert "\n" not in str(caught.value)


def test_names_are_sorted_and_each_parses() -> None:
    names = format_names()
    assert names == sorted(set(names))
    assert [parse_format(name).name for name in names] == names
