"""Settings: what a method does, step by step. A method's file names the settings it starts from; options change them."""

from __future__ import annotations

import ast
import dataclasses
import inspect
import itertools
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any, Literal, get_args, get_type_hints

from nybble.errors import UsageError, unknown_name


@dataclass(frozen=True)
class Settings:
    """Every switch of every step. The defaults are plain rounding to nearest."""

    edit: Literal["none", "awq", "smoothquant"] = "none"
    """Scales per channel that are folded into norms and weights before anything is rounded; the float model computes the same."""
    smooth: float = 0.5
    """Of SmoothQuant: the activations' share of each channel's range, 0 to 1."""
    scales: Literal["range", "search", "hqq"] = "range"
    """Scales from the plain range of a block, searched for the least weighted error, or half-quadratic."""
    importance: bool = False
    """The search weighs columns by their mean square in calibration."""
    feedback: bool = False
    """Round column by column with feedback (GPTQ)."""
    order: Literal["groups", "activation", "natural"] = "groups"
    """Order of the columns in that loop."""
    damp: float = 0.01
    """Share of the mean diagonal added to the Hessian."""
    inputs: Literal["quantized", "float"] = "quantized"
    """Whose activations the statistics are of: of the model whose earlier layers are quantized already, or the float one."""
    target: float = 0.0
    """How far the weight aimed at goes from the float weight (0) to the one whose outputs on the inputs that the quantized
    model really has are nearest to the float layer's (1)."""
    ridge: float = 0.01
    """Pull of that target towards the float weight, as a share of the mean diagonal."""
    fisher: int = 0
    """Draws of the gradient of the true Fisher information that weight every token; 0: all tokens count alike."""
    mask: Literal["none", "magnitude", "activations", "feedback"] = "none"
    """Which weights of linear layers inside the blocks become zero: none; those of the least magnitude; of the least magnitude
    times root mean square of their input; or, when the loop with feedback comes to them, those that cost the least."""
    sparsity: float = 0.5
    """Share of them."""
    pattern: Literal["free", "1of2", "2of4", "4of8"] = "free"
    """Where they may lie: anywhere, or so that every run of columns keeps as many weights, whatever the share."""
    bias: bool = False
    """What rounding takes from the mean of a layer's outputs goes into its bias, and its codes are chosen for the rest."""
    refine: int = 0
    """Rounds of refinement of codes, scales and offsets after rounding."""
    block_tune: int = 0
    """Steps of tuning each block by itself, codes and scales by the sign of the slope, for the least squared error of what it
    gives (SignRound)."""
    tune: int = 0
    """Steps of tuning all layers together against the float model's predictions."""
    norms: bool = False
    """That tuning moves norms and biases too."""
    tune_bits: int = 8
    """Most bits of a format that is tuned, either way."""
    batch: int = 8
    """Windows of each such step."""
    travel: float = 0.006
    """About how far a code's position moves in the first such step, in levels; later ones less and less, to none. 0: codes
    stay."""
    gain: float = 0.0075
    """The same for the outermost levels when their scale changes."""
    seed: int = 0
    """Of the draws and of the order of windows in tuning."""
    activations: Literal["float", "dynamic", "static", "outliers"] = "float"
    """What becomes of the inputs of linear layers inside the blocks when the model runs: nothing; int8 with a scale for each
    token; 8 bits on one calibrated grid; or int8 for each token, large elements apart. Embeddings and the head: nothing."""
    observer: Literal["minmax", "percentile", "mse", "entropy"] = "mse"
    """How a static grid's range is found (see `observe`)."""
    lopsided: bool = True
    """A static grid reaches only as far below zero as the inputs do (or above it)."""
    threshold: float = 6.0
    """Magnitude from which an element stays a float, with `activations=outliers`."""

    def __post_init__(self) -> None:
        if self.target and self.inputs == "float":
            raise UsageError("target makes up for changed inputs, which inputs=float does not look at; use one of the two")
        if not 0 <= self.smooth <= 1:
            raise UsageError(f"smooth is the exponent of the activations' range and lies between 0 and 1, not {self.smooth:g}")

        if self.mask == "feedback" and not self.feedback:
            raise UsageError("mask=feedback is chosen by the loop of feedback: leave that on, or take mask=activations")
        if self.prunes and not 0 < self.sparsity < 1:
            raise UsageError(f"sparsity is the share of weights that become zero, between 0 and 1, not {self.sparsity:g}")

    @property
    def prunes(self) -> bool:
        """Whether weights become zero."""
        return self.mask != "none"

    @property
    def blockwise(self) -> bool:
        """Whether the model has to be walked block by block; else every weight is a matter of its own."""
        return self.hessian or self.bias or self.tune > 0 or self.block_tune > 0 or self.edit != "none"

    @property
    def walks(self) -> bool:
        """Whether calibration is looked at block by block: where it is needed so, and to weigh columns in a search."""
        return self.blockwise or self.scales == "search"

    @property
    def draws(self) -> bool:
        """Whether `seed` changes anything."""
        return self.fisher > 0 or self.tune > 0 or self.block_tune > 0

    @property
    def hessian(self) -> bool:
        """Whether the inputs' second moments are needed."""
        return self.feedback or self.refine > 0 or self.target > 0 or self.mask == "activations"

    @property
    def calibrated(self) -> bool:
        """Whether any step reads calibration text."""
        return self.blockwise or self.importance or self.activations == "static"

    def tunes(self, bits: int) -> bool:
        """Whether codes of so many bits are tuned. A step costs the same at every size, and what it can gain shrinks with the
        error: a fourth with each bit. Pruned weights are not: a zero would move too."""
        return (self.tune > 0 or self.block_tune > 0) and bits <= self.tune_bits and not self.prunes

    def tunes_together(self, bits: Iterable[int]) -> bool:
        """Whether weights of so many bits are tuned all at once."""
        return self.tune > 0 and any(self.tunes(each) for each in bits)

    @property
    def float_stream(self) -> bool:
        """Whether the float model's activations are needed."""
        return self.target > 0 or self.inputs == "float" or self.block_tune > 0


PLAIN = Settings()


def explain() -> dict[str, str]:
    """Every setting and what it is, in order, on one line each: the texts under the fields of `Settings`."""
    body = ast.parse(inspect.getsource(Settings)).body[0]
    assert isinstance(body, ast.ClassDef)
    found: dict[str, str] = {}
    for field, text in itertools.pairwise(body.body):
        if isinstance(field, ast.AnnAssign) and isinstance(text, ast.Expr) and isinstance(text.value, ast.Constant):
            assert isinstance(field.target, ast.Name)
            found[field.target.id] = " ".join(str(text.value.value).split())
    return found


def change(settings: Settings, method: str, option: str, aliases: Iterable[str] = ()) -> Settings:
    """Settings with an option `NAME=VALUE`, `NAME` (on) or `no-NAME` (off) applied. Raises UsageError that names it."""
    hints = get_type_hints(Settings)
    name, equals, text = option.partition("=")
    off = name.startswith("no-") and not equals
    key = name.removeprefix("no-") if off else name
    if key not in hints:
        raise unknown_name(f"option of method {method}", option, [*aliases, *hints])
    return dataclasses.replace(settings, **{key: _value(method, option, hints[key], off, text if equals else None)})


def _value(method: str, option: str, kind: Any, off: bool, text: str | None) -> Any:
    choices = get_args(kind)
    if choices:
        if text not in choices:
            raise UsageError(f"method {method}: option {option!r} must be one of {', '.join(choices)}")
        return text
    if off:
        return kind(0)
    if text is None:
        if kind is bool:
            return True
        raise UsageError(f"method {method}: option {option!r} needs a value, {option}=NUMBER")
    if kind is bool:
        raise UsageError(f"method {method}: option {option!r} is a switch; write {option.partition('=')[0]} or no-...")
    try:
        value = kind(text)
    except ValueError as error:
        raise UsageError(f"method {method}: option {option!r} is not a number") from error
    if not 0 <= value < 1e6:
        raise UsageError(f"method {method}: option {option!r} must lie between 0 and 1000000")
    return value
