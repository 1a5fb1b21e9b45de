"""A packed weight inside a torch model, and the layers that use it.

`PackedWeight` takes the place of a layer's float `weight`: a module with the stored arrays of one QTensor as buffers, and
nothing else; no float copy is kept. Its state-dict keys are the names of the native container (`X.weight.codes`, ...).

The layers are made by changing the class of an existing one, so that a subclass with a forward of its own (OPT's
positions, Gemma's scaled embedding) keeps it and everything it holds; only what reads the weight is replaced. On the CPU
in float32, up to MATVEC_TOKENS rows go through the fused kernel; otherwise the weight is decoded for the call and dropped.
"""

from __future__ import annotations

from functools import cached_property
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn
from torch.nn import functional as F
from transformers.pytorch_utils import Conv1D

from nybble import kernels
from nybble.formats import Format, QTensor, parse_format

MATVEC_TOKENS = 16
"""Rows of activations up to which the fused kernel, which re-reads packed weights per call, beats decode and multiply."""

SHARED_PRODUCT = 1 << 20
"""Multiplications from which a product is worth a second thread: below, it is done (in some 50 us) before one wakes up, and
torch's own threads still spin on the cores."""


class PackedWeight(nn.Module):
    """The stored arrays of a QTensor [N, K] as buffers.

    Stands where a Parameter stood, so it answers `shape`, `dtype` and `device` as that would; `dtype` is float32.
    """

    _is_hf_initialized = True  # transformers must not fill it with random numbers
    requires_grad = False
    compute_dtype = torch.float32
    """Of the float weight that a caller sees who reads this as a tensor."""

    def __init__(self, spec: str | Format, shape: tuple[int, int]) -> None:
        super().__init__()
        self.format = parse_format(spec)
        self.shape = torch.Size(shape)
        for suffix, (dtype, size) in self.format.storage(shape).items():
            self.register_buffer(suffix, torch.empty(size, dtype=self._torch_dtype(dtype)))

    def _torch_dtype(self, name: str) -> torch.dtype:
        return torch.bfloat16 if str(self.format) == "bf16" else getattr(torch, name)

    @classmethod
    def from_qtensor(cls, tensor: QTensor) -> PackedWeight:
        """Packed on the CPU from codes and params."""
        packed = cls(tensor.format, tensor.shape)
        for suffix, array in tensor.stored().items():
            array = np.ascontiguousarray(array)
            if str(tensor.format) == "bf16":
                array = array.view(np.int16)
            values = torch.from_numpy(array if array.flags.writeable else array.copy())
            packed._buffers[suffix] = values.view(torch.bfloat16) if str(tensor.format) == "bf16" else values
        return packed

    def to_qtensor(self) -> QTensor:
        """Codes and params again, equal to those it was made from."""
        return QTensor.from_stored(self.format, self._arrays(), (self.shape[0], self.shape[1]))

    @property
    def dtype(self) -> torch.dtype:
        return torch.float32

    @property
    def device(self) -> torch.device:
        return next(self.buffers()).device

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

    def _arrays(self) -> dict[str, NDArray[Any]]:
        arrays = {}
        for suffix, values in self.named_buffers(recurse=False):
            values = values.detach().cpu()
            arrays[suffix] = values.view(torch.uint16).numpy() if values.dtype == torch.bfloat16 else values.numpy()
        return arrays

    def _checked(self) -> kernels.Packed:
        """This weight as the kernels take it. What is a view of the buffers is checked once and kept while they stay where
        they are; scales and offsets that have to be decoded are so at every call: kept, they would be memory that the
        format's bits do not count."""
        key = tuple(values.data_ptr() for values in self._buffers.values() if values is not None)
        kept = self.__dict__.get("_kept")
        if kept is None or kept[0] != key:
            arrays = self._arrays()
            columns = self.shape[1]
            block, (scale, offset) = self.format.block(columns), self._grid(arrays)
            weight = kernels.check_weight(arrays["codes"], columns, self.format.bits, self._levels, block, scale, offset)
            if self._has_plain_scale:
                self.__dict__["_kept"] = (key, weight, None)
                return weight
            params = {name: array for name, array in arrays.items() if name != "codes"}
            self.__dict__["_kept"] = kept = (key, weight._replace(scale=scale[:0], offset=None), params)
        _, weight, params = kept
        if params is None:
            return weight
        scale, offset = self.format.grid(params)
        return weight._replace(scale=scale, offset=offset)

    @cached_property
    def _has_plain_scale(self) -> bool:
        """Whether the stored scale is all that the kernels need: no offsets, no second level of quantization."""
        return set(self._buffers) == {"codes", "scale"}

    def __getstate__(self) -> dict[str, Any]:
        return {name: value for name, value in self.__dict__.items() if name != "_kept"}

    def _grid(self, arrays: dict[str, NDArray[Any]]) -> tuple[NDArray[Any], NDArray[Any] | None]:
        if self._has_plain_scale:  # hand it on without widening it
            return arrays["scale"], None
        return self.format.grid({name: array for name, array in arrays.items() if name != "codes"})

    @cached_property
    def _levels(self) -> NDArray[np.float32]:
        return np.ascontiguousarray(self.format.levels)

    def decode(self, dtype: torch.dtype = torch.float32) -> Tensor:
        """The float weight [N, K] in the given dtype, made anew at each call."""
        if self.format.is_cast:
            return self.get_buffer("values").to(dtype)
        if self.device.type == "cpu":
            decoded = kernels.decode(*self._checked(), threads=torch.get_num_threads())
            return torch.from_numpy(decoded).to(dtype)
        return self._decode_on_device(torch.arange(self.shape[0], device=self.device)).to(dtype)

    def _decode_on_device(self, rows: Tensor) -> Tensor:
        """float32 [len(rows), K] with torch operations alone: for devices that the CPU kernels cannot reach."""
        columns, bits = self.shape[1], self.format.bits
        position = torch.arange(columns, device=rows.device) * bits
        packed = F.pad(self.get_buffer("codes")[rows].to(torch.int32), (0, 1))  # a code may span two bytes
        pair = packed[:, position // 8] | (packed[:, position // 8 + 1] << 8)
        codes = (pair >> (position % 8)) & (2**bits - 1)
        values = torch.from_numpy(self._levels).to(rows.device)[codes]
        scale, offset = self._grid(self._arrays())  # small: done on the CPU by the reference
        block_of = torch.arange(columns, device=rows.device) // self.format.block(columns)
        if scale.shape[1] == 1:
            block_of = torch.zeros_like(block_of)
        row_of = rows if scale.shape[0] > 1 else torch.zeros_like(rows)
        spread = [
            torch.from_numpy(np.array(values, dtype=np.float32)).to(rows.device)[row_of][:, block_of]
            for values in (scale, offset)
            if values is not None
        ]
        return (values - spread[1] if offset is not None else values) * spread[0]

    def linear(self, x: Tensor, bias: Tensor | None) -> Tensor:
        """x [..., K] times the transposed weight, plus bias: [..., N], in the dtype of x."""
        tokens = x.numel() // max(1, self.shape[1])
        fused = (
            x.dtype == torch.float32
            and x.device.type == "cpu"
            and not self.format.is_cast
            and 0 < tokens <= MATVEC_TOKENS
            and not (x.requires_grad and torch.is_grad_enabled())
        )
        if not fused:
            return F.linear(x, self.decode(x.dtype), bias)
        flat = np.ascontiguousarray(x.detach().reshape(tokens, self.shape[1]).numpy())
        threads = torch.get_num_threads() if tokens * self.shape.numel() >= SHARED_PRODUCT else 1
        y = torch.from_numpy(kernels.matmul_checked(flat, self._checked(), threads))
        y = y.reshape(*x.shape[:-1], self.shape[0])
        return y if bias is None else y + bias

    def embedding(self, ids: Tensor) -> Tensor:
        """Rows of the weight for ids [...]: [..., K], in `dtype`."""
        flat = ids.reshape(-1)
        if self.format.is_cast:
            rows = self.get_buffer("values")[flat].to(self.dtype)
        elif ids.device.type == "cpu" and self.device.type == "cpu":
            wanted = np.ascontiguousarray(flat.numpy().astype(np.int64, copy=False))
            rows = torch.from_numpy(self._gather(wanted))
        else:
            rows = self._decode_on_device(flat)
        return rows.reshape(*ids.shape, self.shape[1])

    def _gather(self, rows: NDArray[np.int64]) -> NDArray[np.float32]:
        """float32 [T, K]: some rows, without decoding the scales of all the others."""
        if self._has_plain_scale:
            return kernels.gather(rows, *self._checked())
        if rows.size and not 0 <= rows.min() <= rows.max() < self.shape[0]:
            raise IndexError(f"ids reach from {rows.min()} to {rows.max()}; the table has {self.shape[0]} rows")
        arrays = self._arrays()
        codes = arrays.pop("codes")[rows]
        scale, offset = self.format.grid_of_rows(arrays, rows)
        columns = self.shape[1]
        return kernels.decode(codes, columns, self.format.bits, self._levels, self.format.block(columns), scale, offset)

    def extra_repr(self) -> str:
        return f"{self.format}, {tuple(self.shape)}"


class PackedLinear(nn.Linear):
    """nn.Linear whose `weight` is a PackedWeight [out, in]."""

    weight: PackedWeight  # type: ignore[assignment]  # nn.Linear's is a tensor; that is what this class is for

    def forward(self, input: Tensor) -> Tensor:
        return self.weight.linear(input, self.bias)


class PackedConv1D(Conv1D):
    """transformers' Conv1D whose `weight` is a PackedWeight [out, in], not transposed."""

    weight: PackedWeight

    def forward(self, x: Tensor) -> Tensor:
        return self.weight.linear(x, self.bias)


class PackedEmbedding(nn.Embedding):
    """nn.Embedding whose `weight` is a PackedWeight [entries, width]."""

    weight: PackedWeight  # type: ignore[assignment]  # as in PackedLinear
    compute_dtype: torch.dtype | None = None

    def forward(self, input: Tensor) -> Tensor:
        return self.weight.embedding(input).to(self.compute_dtype or torch.float32)


_PACKED = {nn.Linear: PackedLinear, Conv1D: PackedConv1D, nn.Embedding: PackedEmbedding}


def replaceable(module: nn.Module) -> type[nn.Module] | None:
    """The layer class (Linear, Conv1D or Embedding) whose weight can be packed in this module; None when there is none."""
    for base in _PACKED:
        if isinstance(module, base):
            return base
    return None


_MIXED: dict[type[nn.Module], type[nn.Module]] = {}


def _packed_class(cls: type[nn.Module], base: type[nn.Module]) -> type[nn.Module]:
    """`cls` with the packed layer between it and `base`: its own forward still runs, and `super()` finds ours."""
    packed = _PACKED[base]
    if cls is base:
        return packed
    if cls not in _MIXED:
        _MIXED[cls] = type(f"Packed{cls.__name__}", (cls, packed), {"__module__": cls.__module__})
    return _MIXED[cls]


def put_packed(module: nn.Module, weight: PackedWeight, owner: bool, compute_dtype: torch.dtype) -> None:
    """Turn a float layer into a packed one, in place. The owner of a tied weight registers it; the others only refer to
    it, so that the state dict has it once."""
    base = replaceable(module)
    assert base is not None, f"{type(module).__name__} has no weight to replace"
    del module._parameters["weight"]
    weight.compute_dtype = compute_dtype
    if owner:
        module._modules["weight"] = weight
    else:
        module.__dict__["weight"] = weight
    module.__class__ = _packed_class(type(module), base)
    # transformers may skip it after loading, unless it has a buffer that no file holds (Gemma's scale of the embedding)
    module._is_hf_initialized = not module._non_persistent_buffers_set  # type: ignore[assignment]
    if base is nn.Embedding:
        module.compute_dtype = compute_dtype  # type: ignore[assignment]
