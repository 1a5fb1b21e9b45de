"""Methods: the contract by name, and what rtn is in plain numpy."""

from __future__ import annotations

import numpy as np
import pytest
from numpy.typing import NDArray

from nybble.errors import NumericError, UsageError
from nybble.formats import parse_format
from nybble.methods import method_names, parse_method

SPECS = ("int8:channel", "int4:g64", "int4:g64,asym", "int3:g64", "int2:g64", "nf4:g64", "nf4:g64,dq", "fp4:g64", "fp16")


def heavy(seed: int = 0) -> NDArray[np.float32]:
    return (np.random.default_rng(seed).standard_t(3, (16, 256)) * 0.02).astype(np.float32)


def loss(weight: NDArray[np.float32], spec: str, method: str, importance: NDArray[np.float32] | None = None) -> float:
    tensor = parse_method(method).quantize(weight, parse_format(spec), importance)
    error = tensor.decode().astype(np.float64) - weight
    return float((error**2 * (1 if importance is None else importance)).sum())


def test_names_and_specs() -> None:
    assert "rtn" in method_names()
    for name in method_names():
        assert str(parse_method(name)) == name
        assert parse_method(name) == parse_method(str(parse_method(name)))
    assert str(parse_method(" rtn:mse ")) == "rtn:mse"
    assert parse_method("rtn:mse").options == ("mse",)
    assert str(parse_method("gptq:no-feedback:damp=0.1")) == "gptq:damp=0.1:no-feedback"
    both = parse_method("imatrix+gptq").settings
    assert (both.feedback, both.scales, both.importance) == (True, "search", True)


@pytest.mark.parametrize(
    ("spec", "message"),
    [
        ("rnt", "unknown method 'rnt'; did you mean rtn? (known: "),
        ("", "unknown method ''"),
        ("rtn:msr", "unknown option of method rtn 'msr'; did you mean mse"),
        ("rtn:", "unknown option of method rtn ''"),
        ("gptq:damp", "option 'damp' needs a value, damp=NUMBER"),
        ("gptq:damp=much", "option 'damp=much' is not a number"),
        ("gptq:damp=-1", "must lie between 0 and 1000000"),
        ("gptq:damp=nan", "must lie between 0 and 1000000"),
        ("gptq:order=backwards", "must be one of groups, activation, natural"),
        ("gptq:feedback=1", "is a switch"),
        ("gptq:damp=1:damp=1", "an option is given twice"),
        ("qep:inputs=float", "target makes up for changed inputs, which inputs=float does not look at"),
        ("gptq+", "unknown method ''"),
        ("__init__", "unknown method '__init__'"),
        ("../rtn", "unknown method '../rtn'"),
    ],
)
def test_wrong_names(spec: str, message: str) -> None:
    with pytest.raises(UsageError) as caught:
        parse_method(spec)
    assert message in str(caught.value)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("name", method_names())
@pytest.mark.parametrize("spec", SPECS)
def test_every_method_with_every_format(name: str, spec: str) -> None:
    weight = heavy()
    before = weight.copy()
    tensor = parse_method(name).quantize(weight, parse_format(spec), np.ones(256, dtype=np.float32))
    assert str(tensor.format) == spec
    assert tensor.shape == weight.shape
    assert np.array_equal(weight, before)
    assert np.abs(tensor.decode() - weight).mean() < np.abs(weight).mean()


def test_rtn_is_plain_rounding() -> None:
    weight = heavy()
    scale = np.abs(weight).max(axis=1, keepdims=True).astype(np.float64) / 127
    tensor = parse_method("rtn").quantize(weight, parse_format("int8:channel"), None)
    assert np.array_equal(tensor.codes.astype(int) - 128, np.rint(weight / scale).astype(int))
    np.testing.assert_allclose(tensor.decode(), np.rint(weight / scale) * scale, rtol=2e-7)


def test_rtn_of_groups_is_plain_rounding() -> None:
    weight = heavy()
    groups = weight.reshape(16, 4, 64).astype(np.float64)
    scale = np.abs(groups).max(axis=2, keepdims=True) / 7
    tensor = parse_method("rtn").quantize(weight, parse_format("int4:g64"), None)
    np.testing.assert_allclose(tensor.params["scale"], scale[..., 0], rtol=2.0**-10)
    assert (tensor.params["scale"] >= scale[..., 0]).all()
    stored = tensor.params["scale"].astype(np.float64)[..., None]
    assert np.array_equal(tensor.codes.reshape(groups.shape).astype(int) - 8, np.rint(groups / stored).astype(int))


def test_rtn_ignores_importance() -> None:
    method, fmt = parse_method("rtn"), parse_format("int4:g64")
    assert not method.uses_calibration
    assert parse_method("rtn:mse").uses_calibration
    weighted = method.quantize(heavy(), fmt, np.arange(256, dtype=np.float32))
    assert np.array_equal(weighted.codes, method.quantize(heavy(), fmt, None).codes)


@pytest.mark.parametrize("spec", [spec for spec in SPECS if spec != "fp16"])
def test_searched_ranges_lower_the_loss(spec: str) -> None:
    importance = np.random.default_rng(9).gamma(0.3, 1, 256).astype(np.float32)
    for seed in range(3):
        weight = heavy(seed)
        assert loss(weight, spec, "rtn:mse") < loss(weight, spec, "rtn")
        unweighted = parse_method("rtn:mse").quantize(weight, parse_format(spec), None)
        ignoring = float(((unweighted.decode().astype(np.float64) - weight) ** 2 * importance).sum())
        assert loss(weight, spec, "rtn:mse", importance) < ignoring


def test_search_pays_most_at_few_bits() -> None:
    assert loss(heavy(), "int2:g64", "rtn:mse") < 0.5 * loss(heavy(), "int2:g64", "rtn")
    assert loss(heavy(), "int4:g64", "rtn:mse") < 0.95 * loss(heavy(), "int4:g64", "rtn")


def test_casts_have_nothing_to_search() -> None:
    assert loss(heavy(), "fp16", "rtn:mse") == loss(heavy(), "fp16", "rtn")


@pytest.mark.parametrize("method", ["rtn", "rtn:mse"])
@pytest.mark.parametrize("spec", SPECS)
def test_weights_that_are_not_finite(method: str, spec: str) -> None:
    weight = heavy()
    weight[3, 5] = np.nan
    with pytest.raises(NumericError, match="1 of 4096 weights are not finite, the first is nan at row 3, column 5"):
        parse_method(method).quantize(weight, parse_format(spec), None)


def test_activations_add_up_with_other_methods() -> None:
    settings = parse_method("gptq+static:observer=minmax:damp=0.1").settings
    assert (settings.feedback, settings.activations, settings.observer, settings.damp) == (True, "static", "minmax", 0.1)
    assert parse_method("dynamic+gptq").settings == parse_method("gptq+dynamic").settings
    assert parse_method("llm_int8:threshold=4").settings.threshold == 4
    assert parse_method("static").uses_calibration
    assert parse_method("static").settings.calibrated
    assert not parse_method("dynamic").uses_calibration
    assert not parse_method("llm_int8").settings.blockwise
    with pytest.raises(UsageError, match="dynamic and outliers activations exclude each other"):
        parse_method("dynamic+llm_int8")
