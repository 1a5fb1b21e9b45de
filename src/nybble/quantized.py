"""A quantized model: packed tensors, the torch model that computes with them, and the folder they are saved to and read from."""

from __future__ import annotations

import json
import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import nn
from transformers import PreTrainedModel

from nybble.edits import Edit
from nybble.errors import UsageError
from nybble.files import safetensors
from nybble.files.folder import new_folder
from nybble.files.native import WEIGHTS, config_entry, open_native, write_native
from nybble.formats import QTensor, parse_format
from nybble.methods.steps.choose import Account
from nybble.models.checkpoint import EXTRAS, open_checkpoint
from nybble.models.describe import TAGS, describe, sites
from nybble.models.float_weights import float_weight
from nybble.models.loading import DTYPES, load_model
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
        with new_folder(path, force, marker="config.json") as work:
            config = self._model.config.to_dict()
            config.pop("quantization_config", None)
            config["architectures"] = [type(self._model).__name__]
            config["dtype"] = str(next(self._model.parameters()).dtype).removeprefix("torch.")  # of activations
            if self._cast:
                arrays, tags = _tagged(self._plain_state())
                safetensors.write(
                    work / WEIGHTS, arrays, {"format": "pt", "nybble": json.dumps(self.provenance, sort_keys=True)}, tags
                )
            else:
                config["quantization_config"] = config_entry(self.tensors)
                arrays, tags = _tagged(self._float_state())
                write_native(work, self.tensors, [(n, (tags[n], a)) for n, a in arrays.items()], self.provenance)
            (work / "config.json").write_text(json.dumps(config, indent=2, sort_keys=True) + "\n", encoding="utf-8")
            self._copy_extras(work)
        return path

    def _plain_state(self) -> dict[str, torch.Tensor]:
        return {info.name: stored_tensor(self._model, info.name) for info in describe(self._model)}

    def _float_state(self) -> dict[str, torch.Tensor]:
        """What stays in float, in the type that the source stored it in: it was read from that, so nothing is lost. Not what
        was edited: that is float32, since a scale in a norm and its inverse in a matrix must cancel."""
        packed = tuple(f"{name}." for name in self.tensors)
        tag = open_checkpoint(self._source).float_tag if self._source else None
        dtype = next((d for d, t in TAGS.items() if t == tag), None)
        return {
            name: tensor.to(dtype) if dtype and tensor.dtype in TAGS and name not in self.changed else tensor
            for name, tensor in self._plain_state().items()
            if not name.startswith(packed)
        }

    def _copy_extras(self, work: Path) -> None:
        if self._source is not None:
            for name in EXTRAS:
                if (self._source / name).is_file():
                    shutil.copyfile(self._source / name, work / name)
        elif getattr(self._model, "generation_config", None) is not None:
            self._model.generation_config.save_pretrained(work)


def load(path: str | Path, dtype: str = "fp32") -> Quantized:
    """A folder that nybble wrote (or any float model folder, as it is). `dtype` is that of activations and float tensors.

    Raises InputError and FileFormatError as `open_checkpoint` does, UsageError for an unknown dtype.
    """
    if dtype not in DTYPES:
        raise UsageError(f"dtype {dtype!r} is not one of {', '.join(DTYPES)}")
    checkpoint = open_checkpoint(path)
    if "quantization_config" not in checkpoint.config:
        stored = str(checkpoint.config.get("dtype") or checkpoint.config.get("torch_dtype") or "float32")
        cast = {"float32": "fp32", "float16": "fp16", "bfloat16": "bf16"}.get(stored, "fp32")
        provenance = json.loads(safetensors.SafetensorsFile(checkpoint.files[0]).metadata.get("nybble", "{}"))
        model = load_model(path, DTYPES[cast])
        return Quantized(model, str(provenance.get("plan_hash", "")), cast, provenance, checkpoint.folder)
    native = open_native(path)
    model = load_model(path, DTYPES[dtype])
    return Quantized(model, str(native.provenance.get("plan_hash", "")), None, native.provenance, checkpoint.folder)


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
