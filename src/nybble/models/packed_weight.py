"""A packed weight inside a torch model: codes once in memory, as stored or as the kernels want them.

`PackedWeight` takes the place of a layer's float `weight`: a module with the stored arrays of one QTensor as buffers, whose
state-dict keys are the names of the native container (`X.weight.codes`, ...). No float copy is kept.

At the first product on the CPU the codes (and the scale, where it is stored as the kernels take it) move to the kernel
layout. Meta tensors of their shape then stand in the buffers: they count as what they stand for, hold nothing, and cannot be
read by mistake. Whoever asks for the stored form gets it back to the bit: `state_dict`, copies, pickles and `to_qtensor` as
a copy, while reading an attribute (`weight.codes`), loading a state dict or moving to a device ends the kernel layout.
"""

from __future__ import annotations

import threading
from collections.abc import Callable
from functools import cached_property
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn
from torch.nn import functional as F

from nybble import kernels
from nybble.formats import Format, QTensor, parse_format
from nybble.formats.activations import Activations
from nybble.models import custom_op
from nybble.models.inputs import InputRounding
from nybble.models.mapped import give_back

SHARED_PRODUCT = 1 << 23
"""Multiplications from which a product is worth a second thread. Torch's own threads spin on the cores for a while after each
of its operations; a thread of ours that they keep waiting costs more than it brings to a small product (docs/log.md)."""
FLOATS = (torch.float32, torch.float16, torch.bfloat16)
"""Activations that the kernels compute with, in float32. All others are multiplied with the decoded weight by torch."""

_changing = threading.RLock()
"""Held while any weight changes its form, so that no thread sees half of it. Not a field: it could not be pickled."""


class PackedWeight(nn.Module):
    """The arrays of a QTensor [N, K].

    Stands where a Parameter stood, so it answers `shape`, `dtype` and `device` as that would; `dtype` is float32.
    """

    _is_hf_initialized = True  # transformers must not fill it with random numbers
    requires_grad = False
    compute_dtype = torch.float32
    """Of the float weight that a caller sees who reads this as a tensor."""
    exact = True
    """Products with float activations; False: with activations rounded to int8 (`set_activations`). A scheme comes first."""

    def __init__(self, spec: str | Format, shape: tuple[int, int], activations: Activations | None = None) -> None:
        super().__init__()
        self._laid: kernels.Laid | None = None
        self._scale_dtype: np.dtype[Any] | None = (
            None  # of what the kernel layout gives back as scales and offsets; None: neither
        )
        self._offset_dtype: np.dtype[Any] | None = None
        self.format = parse_format(spec)
        self.shape = torch.Size(shape)
        for suffix, (dtype, size) in self.format.storage(shape).items():
            self.register_buffer(suffix, torch.empty(size, dtype=self._torch_dtype(dtype)))
        self.inputs: InputRounding | None = None
        self.round_inputs(activations)
        self.number = custom_op.register(self)

    def round_inputs(self, activations: Activations | None) -> None:
        """From now on multiply inputs as a scheme says; None: as they come."""
        self.inputs = None if activations is None else InputRounding(activations)

    def _torch_dtype(self, name: str) -> torch.dtype:
        return torch.bfloat16 if str(self.format) == "bf16" else getattr(torch, name)

    @classmethod
    def from_qtensor(cls, tensor: QTensor) -> PackedWeight:
        """Packed on the CPU from codes, params and scheme."""
        packed = cls(tensor.format, tensor.shape, tensor.activations)
        for suffix, array in tensor.stored().items():
            array = np.ascontiguousarray(array)
            if str(tensor.format) == "bf16":
                array = array.view(np.int16)
            values = torch.from_numpy(array if array.flags.writeable else array.copy())
            packed._buffers[suffix] = values.view(torch.bfloat16) if str(tensor.format) == "bf16" else values
        return packed

    def to_qtensor(self) -> QTensor:
        """Codes, params and scheme again, equal to those it was made from."""
        scheme = None if self.inputs is None else self.inputs.activations()
        return QTensor.from_stored(self.format, self._arrays(), (self.shape[0], self.shape[1]), scheme)

    @property
    def dtype(self) -> torch.dtype:
        return torch.float32

    @property
    def device(self) -> torch.device:
        return torch.device("cpu") if self._laid is not None else next(self.buffers()).device

    @property
    def is_laid(self) -> bool:
        """Whether the codes are in the kernel layout now."""
        return self._laid is not None

    @property
    def T(self) -> Tensor:
        """The decoded weight transposed, [K, N]: for a layer whose forward multiplies by itself (Falcon's)."""
        return self.decode(self.compute_dtype).T

    @classmethod
    def __torch_function__(cls, function: Any, _: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None) -> Any:
        """Any torch function that is given this in the place of a tensor works on the decoded weight."""

        def dense(value: Any) -> Any:
            return value.decode(value.compute_dtype) if isinstance(value, PackedWeight) else value

        return function(*map(dense, args), **{name: dense(value) for name, value in (kwargs or {}).items()})

    # The stored form and the kernel layout

    def stored(self) -> dict[str, Tensor]:
        """Suffix -> tensor as stored: the buffers themselves, or copies of what is in the kernel layout."""
        with _changing, torch.inference_mode(False):  # tensors made under it could not be written to later
            tensors = {name: value for name, value in self._buffers.items() if value is not None}
            if self._laid is None:
                return tensors
            again = {name: torch.empty(value.shape, dtype=value.dtype) for name, value in tensors.items() if value.is_meta}
            scale = None if self._scale_dtype is None else np.empty(self._grid_shape, dtype=self._scale_dtype)
            if "scale" in again:
                scale = again["scale"].numpy()
            offset = None if self._offset_dtype is None else np.empty(self._grid_shape, dtype=self._offset_dtype)
            self._laid.restore(again["codes"].numpy(), scale, offset, torch.get_num_threads())
            return {**tensors, **again}

    def restore(self) -> None:
        """Go back to the stored form, in the buffers."""
        with _changing:
            if self._laid is not None:
                stored = self.stored()
                self._laid = None
                self._buffers.update(stored)

    def _lay(self) -> kernels.Laid:
        """The kernel layout, made if need be; what it holds is then given up in the stored form."""
        with _changing:
            if self._laid is None:
                arrays = self._arrays()
                codes, columns = arrays.pop("codes"), self.shape[1]
                scale, offset = self.format.kernel_parameters(arrays)
                codes = np.require(codes, requirements=("C", "A"))
                block, threads = self.format.block(columns), torch.get_num_threads()
                laid = kernels.lay(
                    codes,
                    columns,
                    self.format.bits,
                    self._levels,
                    block,
                    scale,
                    offset,
                    threads=threads,
                    shifted=self.format.shifted,
                )
                assert laid.holds_codes, f"the kernels have no layout for {self.format}"
                as_stored = not isinstance(scale, kernels.Nested) and scale is arrays.get("scale")
                given_up = {name: self.get_buffer(name) for name in ("codes", "scale")[: 2 if as_stored else 1]}
                self._scale_dtype = None if isinstance(scale, kernels.Nested) else scale.dtype
                self._offset_dtype = None if offset is None or isinstance(offset, kernels.Nested) else offset.dtype
                self._buffers.update({name: torch.empty_like(value, device="meta") for name, value in given_up.items()})
                self._laid = laid
                if kernels.native_available():  # the reference keeps the arrays themselves
                    for value in given_up.values():
                        give_back(value.numpy())
            return self._laid

    @property
    def _grid_shape(self) -> tuple[int, int]:
        """Shape of scales and offsets."""
        return self.format.blocks((self.shape[0], self.shape[1]))

    def _arrays(self) -> dict[str, NDArray[Any]]:
        arrays = {}
        for suffix, values in self.stored().items():
            values = values.detach().cpu()
            arrays[suffix] = values.view(torch.uint16).numpy() if values.dtype == torch.bfloat16 else values.numpy()
        return arrays

    # What torch does with a module

    def __getattr__(self, name: str) -> Any:
        """A buffer by its name, as stored, so that what is written to it counts."""
        if name in self.__dict__.get("_buffers", ()):
            self.restore()
        return super().__getattr__(name)

    def __setattr__(self, name: str, value: Any) -> None:
        if name in self.__dict__.get("_buffers", ()):
            self.restore()
        super().__setattr__(name, value)

    def __getstate__(self) -> dict[str, Any]:
        """For copies and pickles, which begin in the stored form."""
        state = {name: value for name, value in self.__dict__.items() if name != "number"}
        return {**state, "_laid": None, "_buffers": self.stored()}

    def __setstate__(self, state: dict[str, Any]) -> None:
        super().__setstate__(state)
        self.number = custom_op.register(self)

    def _save_to_state_dict(self, destination: Any, prefix: str, keep_vars: bool) -> None:
        super()._save_to_state_dict(destination, prefix, keep_vars)
        if self._laid is not None:
            destination.update({prefix + name: value for name, value in self.stored().items()})

    def _load_from_state_dict(self, *args: Any, **kwargs: Any) -> None:
        self.restore()
        super()._load_from_state_dict(*args, **kwargs)

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> PackedWeight:
        """Moves to devices. Types stay as stored: `model.half()` is about activations, and codes have no other meaning."""
        self.restore()
        for name, value in self._buffers.items():
            if value is not None:
                moved = fn(value)
                self._buffers[name] = moved if moved.dtype == value.dtype else value.to(moved.device)
        if self.inputs is not None:
            self.inputs._apply(fn)
        return self

    # What it computes

    @cached_property
    def _levels(self) -> NDArray[np.float32]:
        return np.ascontiguousarray(self.format.levels)

    def decode(self, dtype: torch.dtype = torch.float32) -> Tensor:
        """The float weight [N, K] in the given dtype, made anew at each call."""
        if self.format.is_cast:
            return self.get_buffer("values").to(dtype)
        if self.device.type != "cpu":
            return self._decode_on_device(torch.arange(self.shape[0], device=self.device)).to(dtype)
        arrays, columns = self._arrays(), self.shape[1]
        codes, (scale, offset) = arrays.pop("codes"), self.format.kernel_grid(arrays)
        block, threads = self.format.block(columns), torch.get_num_threads()
        decoded = kernels.decode(
            codes, columns, self.format.bits, self._levels, block, scale, offset, self.format.shifted, threads
        )
        return torch.from_numpy(decoded).to(dtype)

    def _decode_on_device(self, rows: Tensor) -> Tensor:
        """float32 [len(rows), K] with torch operations alone: for devices that the CPU kernels cannot reach."""
        columns, bits = self.shape[1], self.format.bits
        position = torch.arange(columns, device=rows.device) * bits
        packed = F.pad(self.get_buffer("codes")[rows].to(torch.int32), (0, 1))  # a code may span two bytes
        pair = packed[:, position // 8] | (packed[:, position // 8 + 1] << 8)
        codes = (pair >> (position % 8)) & (2**bits - 1)
        values = torch.from_numpy(self._levels).to(rows.device)[codes]
        params = {name: array for name, array in self._arrays().items() if name != "codes"}
        scale, offset = self.format.grid(params)  # small: done on the CPU by the reference
        block_of = torch.arange(columns, device=rows.device) // self.format.block(columns)
        if scale.shape[1] == 1:
            block_of = torch.zeros_like(block_of)
        row_of = rows if scale.shape[0] > 1 else torch.zeros_like(rows)
        spread = [
            torch.from_numpy(np.array(values, dtype=np.float32)).to(rows.device)[row_of][:, block_of]
            for values in (scale, offset)
            if values is not None
        ]
        if offset is None:
            return values * spread[0]
        return values * spread[0] + spread[1] if self.format.shifted else (values - spread[1]) * spread[0]

    def linear(self, x: Tensor, bias: Tensor | None) -> Tensor:
        """x [..., K] times the transposed weight, plus bias: [..., N], in the dtype of x."""
        if self.format.is_cast:
            return F.linear(x, self.decode(x.dtype), bias)
        y: Tensor = custom_op.linear(x, self.number, self.shape[0], self.exact)
        return y if bias is None else y + bias

    def product(self, x: Tensor, exact: bool) -> Tensor:
        """x [..., K] times the transposed weight: [..., N], in the dtype of x; `exact` as in `kernels.product`.

        On the CPU the kernels do it, for any number of rows; elsewhere torch does, with the decoded weight. (Measured on a
        busy Zen 4, int4:g32 [3072, 768], exact, ms for 1, 32, 128, 512 rows: 0.3, 1.3, 2.8, 28; decoding and multiplying
        0.5, 1.8, 6.6, 56. Decoding won only where one row on two threads waited for the other, busy core: 0.32 against 0.18
        for [2304, 768], which one thread did in 0.11.)
        """
        columns = self.shape[1]
        if x.shape[-1] != columns:
            raise ValueError(f"activations have {x.shape[-1]} columns, the weight is {tuple(self.shape)}")
        if self.inputs is not None:
            return self.inputs.product(x, lambda values: self._multiply(values, True))
        return self._multiply(x, exact)

    def _multiply(self, x: Tensor, exact: bool) -> Tensor:
        """`product` of x as it is."""
        rows, columns = self.shape
        if not (x.dtype in FLOATS and x.device.type == "cpu" and self.device.type == "cpu" and x.numel() and rows):
            return F.linear(x, self.decode(x.dtype))
        laid = self._laid or self._lay()
        flat = x.detach().to(torch.float32).reshape(-1, columns).contiguous()
        y = torch.empty(*x.shape[:-1], rows)
        threads = torch.get_num_threads() if flat.shape[0] * self.shape.numel() >= SHARED_PRODUCT else 1
        laid.product(flat.numpy(), y.view(-1, rows).numpy(), exact, threads)
        return y.to(x.dtype)

    def input_gradient(self, gradient: Tensor) -> Tensor:
        """gradient [..., N] times the decoded weight: [..., K]. It passes through the rounding of inputs unchanged."""
        return gradient @ self.decode(gradient.dtype)

    def embedding(self, ids: Tensor) -> Tensor:
        """Rows of the weight for ids [...]: [..., K], in `dtype`."""
        if self.format.is_cast:
            return self.get_buffer("values")[ids].to(self.dtype)
        rows: Tensor = custom_op.embedding(ids, self.number, self.shape[1])
        return rows

    def look_up(self, ids: Tensor) -> Tensor:
        """Rows of the weight for ids [...]: float32 [..., K], on the device of ids. IndexError for an id out of range."""
        flat = ids.reshape(-1)
        if ids.device.type == "cpu" and self.device.type == "cpu":
            rows = torch.from_numpy(self._rows(np.ascontiguousarray(flat.numpy().astype(np.int64, copy=False))))
        else:
            rows = self._decode_on_device(flat)
        return rows.reshape(*ids.shape, self.shape[1])

    def _rows(self, ids: NDArray[np.int64]) -> NDArray[np.float32]:
        """float32 [T, K]: some rows. As stored, only their scales are decoded: a table that is never multiplied by stays so."""
        laid = self._laid
        if laid is not None:
            return kernels.rows_of(laid, ids)
        if ids.size and not 0 <= ids.min() <= ids.max() < self.shape[0]:
            raise IndexError(f"ids reach from {ids.min()} to {ids.max()}; the table has {self.shape[0]} rows")
        arrays, columns = self._arrays(), self.shape[1]
        codes = arrays.pop("codes")[ids]
        scale, offset = self.format.grid_of_rows(arrays, ids)
        block = self.format.block(columns)
        return kernels.decode(codes, columns, self.format.bits, self._levels, block, scale, offset, shifted=self.format.shifted)

    def extra_repr(self) -> str:
        return f"{self.format}, {tuple(self.shape)}"
