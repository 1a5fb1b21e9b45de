"""A quantized model: packed tensors, the torch model that computes with them, and the folder they are saved to and read from."""

from __future__ import annotations

import tempfile
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import nn
from transformers import PreTrainedModel

from nybble.containers import Contents, find_container, open_contents
from nybble.containers.contents import read_extras
from nybble.edits import Edit
from nybble.errors import UsageError
from nybble.files import safetensors
from nybble.files.job import new_folder
from nybble.files.native import config_entry
from nybble.formats import QTensor, parse_format
from nybble.methods.steps.choose import Account
from nybble.models.describe import TAGS, describe, sites
from nybble.models.float_weights import float_weight
from nybble.models.loading import DTYPES, load_model, load_state
from nybble.models.loading import load_tokenizer as folder_tokenizer
from nybble.models.packed import PackedWeight


class Quantized:
    """A quantized model: its packed tensors by Hugging Face parameter name, and the torch model that uses them."""

    def __init__(
        self, model: PreTrainedModel, plan_hash: str, cast: str | None, provenance: Mapping[str, Any], source: Path | None
    ) -> None:
        self._model = model
        self._source = source
        self._cast = cast
        self.plan_hash = plan_hash
        self.provenance = dict(provenance)
        self._tensors: dict[str, QTensor] | None = None
        self.accounts: dict[str, Account] = {}
        """What a calibrated method did to each weight, by name; empty for the others and for what was loaded."""
        self.edits: list[Edit] = []
        """What was folded into norms and weights before anything was rounded, and what was left alone; see edits.py."""
        self.changed: frozenset[str] = frozenset()
        """Names of float parameters that are not what the source holds: folded into, or moved."""

    @property
    def tensors(self) -> dict[str, QTensor]:
        """Parameter name -> QTensor; `QTensor.decode()` is the float32 weight [out, in]. Tied weights stand once."""
        if self._tensors is None:
            if self._cast:
                self._tensors = {name: _cast_tensor(weight, self._cast) for name, weight in float_weights(self._model)}
            else:
                named = self._model.named_modules()
                self._tensors = {name: module.to_qtensor() for name, module in named if isinstance(module, PackedWeight)}
        return self._tensors

    def model(self) -> PreTrainedModel:
        """The torch model, computing with packed weights: a forward pass and `generate` as of any transformers model."""
        return self._model

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        return self._model(*args, **kwargs)

    def generate(self, *args: Any, **kwargs: Any) -> Any:
        """`model().generate(...)`."""
        return self._model.generate(*args, **kwargs)

    @property
    def weight_bytes(self) -> int:
        """All tensors that the model holds: packed ones as packed, float ones as they are, tied ones once."""
        return tensor_bytes(self._model)

    def save(self, path: str | Path, force: bool = False) -> Path:
        """Write a folder that `nybble.load` and, after `import nybble`, `from_pretrained` open.

        It appears complete or not at all. Raises OutputError when it exists (unless `force`) or cannot be written.
        """
        path = Path(path)
        contents = self.contents()
        with new_folder(path, force, marker="config.json") as work:
            find_container(contents.container).write(work, contents, {})
        return path

    def contents(self) -> Contents:
        """What every container writes: packed tensors, floats, config, and the files that go along."""
        config = self._model.config.to_dict()
        config.pop("quantization_config", None)
        config["architectures"] = [type(self._model).__name__]
        config["dtype"] = str(next(self._model.parameters()).dtype).removeprefix("torch.")  # of activations
        tensors = {} if self._cast else self.tensors
        arrays, tags = _tagged(self._plain_state() if self._cast else self._float_state())
        return Contents(
            container="float" if self._cast else "nybble",
            path=self._source or Path(str(config["architectures"][0])),
            config=config,
            packed={name: (str(tensor.format), tensor.shape) for name, tensor in tensors.items()},
            floats={name: (tags[name], array.shape) for name, array in arrays.items()},
            read_packed=tensors.__getitem__,
            read_float=arrays.__getitem__,
            schemes={name: tensor.activations for name, tensor in tensors.items() if tensor.activations is not None},
            extras=self._extras(),
            provenance=self.provenance,
        )

    def _plain_state(self) -> dict[str, torch.Tensor]:
        return {info.name: stored_tensor(self._model, info.name) for info in describe(self._model)}

    def _float_state(self) -> dict[str, torch.Tensor]:
        """What stays in float, in the type that the source stored it in: it was read from that, so nothing is lost. Not what
        was edited: that is float32, since a scale in a norm and its inverse in a matrix must cancel."""
        packed = tuple(f"{name}." for name in self.tensors)
        tag = open_contents(self._source).float_tag if self._source else None
        dtype = next((d for d, t in TAGS.items() if t == tag), None)
        return {
            name: tensor.to(dtype) if dtype and tensor.dtype in TAGS and name not in self.changed else tensor
            for name, tensor in self._plain_state().items()
            if not name.startswith(packed)
        }

    def _extras(self) -> dict[str, bytes]:
        if self._source is not None:
            return dict(open_contents(self._source).extras) if self._source.is_file() else read_extras(self._source)
        if getattr(self._model, "generation_config", None) is None:
            return {}
        with tempfile.TemporaryDirectory() as folder:
            self._model.generation_config.save_pretrained(folder)
            return read_extras(Path(folder))


def load(path: str | Path, dtype: str = "fp32") -> Quantized:
    """A model that any container holds: a folder of nybble's or of another tool, quantized or float, or a GGUF file. `dtype` is
    that of activations and float tensors.

    Raises InputError and FileFormatError as `open_contents` does, UsageError for an unknown dtype.
    """
    if dtype not in DTYPES:
        raise UsageError(f"dtype {dtype!r} is not one of {', '.join(DTYPES)}")
    path = Path(path)
    contents = open_contents(path)
    plan_hash = str(contents.provenance.get("plan_hash", ""))
    if contents.container == "float":
        cast = {"F16": "fp16", "BF16": "bf16"}.get(contents.float_tag, "fp32")
        return Quantized(load_model(path, DTYPES[cast]), plan_hash, cast, contents.provenance, path)
    if contents.container == "nybble":
        return Quantized(load_model(path, DTYPES[dtype]), plan_hash, None, contents.provenance, path)
    return Quantized(model_of(contents, DTYPES[dtype]), plan_hash, None, contents.provenance, path)


def model_of(contents: Contents, dtype: torch.dtype = torch.float32) -> PreTrainedModel:
    """The torch model of a container that transformers does not open by itself; it computes with packed weights."""
    state: dict[str, torch.Tensor] = {}
    schemes = {}
    for name in contents.packed:
        tensor = contents.read_packed(name)
        if tensor.activations:
            schemes[name] = tensor.activations
        inputs = tensor.activations.stored() if tensor.activations else {}
        for suffix, array in (*tensor.stored().items(), *inputs.items()):
            state[f"{name}.{suffix}"] = _torch(array, "BF16" if str(tensor.format) == "bf16" else "")
    for name, (tag, _) in contents.floats.items():
        state[name] = _torch(contents.read_float(name), tag)
    config = dict(contents.config)
    if contents.packed:
        config["quantization_config"] = config_entry(contents.packed, schemes)
    return load_state(config, state, dtype, contents.path)


def _torch(array: NDArray[Any], tag: str) -> torch.Tensor:
    values = torch.from_numpy(np.array(array))
    return values.view(torch.bfloat16) if tag == "BF16" else values


def load_tokenizer(path: str | Path) -> Any:
    """The tokenizer of a model folder, or of a file that holds one. Raises InputError when transformers cannot load it."""
    if not Path(path).is_file():
        return folder_tokenizer(path)
    with tempfile.TemporaryDirectory() as folder:
        for name, content in open_contents(path).extras.items():
            (Path(folder) / name).write_bytes(content)
        return folder_tokenizer(folder)


def float_weights(model: nn.Module) -> list[tuple[str, NDArray[np.float32]]]:
    """(name, float32 [out, in]) of every weight that could be packed, in order; tied ones once."""
    return [(name, float_weight(site.modules[0])) for name, site in sites(model).items()]


def tensor_bytes(model: nn.Module) -> int:
    """Bytes of all parameters and persistent buffers of a model, each storage once."""
    seen: dict[int, int] = {}
    for module in model.modules():
        for name, tensor in (*module._parameters.items(), *module._buffers.items()):
            if tensor is not None and name not in module._non_persistent_buffers_set:
                seen[id(tensor)] = tensor.numel() * tensor.element_size()
    return sum(seen.values())


def _cast_tensor(weight: NDArray[np.float32], spec: str) -> QTensor:
    fmt = parse_format(spec)
    return QTensor(fmt, fmt.encode(weight, {}), {})


def stored_tensor(model: nn.Module, name: str) -> torch.Tensor:
    """A parameter or buffer by its full name."""
    path, _, leaf = name.rpartition(".")
    tensor = getattr(model.get_submodule(path), leaf)
    assert isinstance(tensor, torch.Tensor)
    return tensor


def _tagged(state: Mapping[str, torch.Tensor]) -> tuple[dict[str, NDArray[Any]], dict[str, str]]:
    """Tensors as numpy arrays and their safetensors dtype tags where numpy's type does not say."""
    arrays, tags = {}, {}
    for name, tensor in state.items():
        values = tensor.detach().cpu().contiguous()
        arrays[name] = values.view(torch.uint16).numpy() if values.dtype == torch.bfloat16 else values.numpy()
        tags[name] = TAGS.get(tensor.dtype) or safetensors.NAMES[arrays[name].dtype.name]
    return arrays, tags
