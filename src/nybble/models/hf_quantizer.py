"""transformers learns to load nybble's folders: `AutoModelForCausalLM.from_pretrained(DIR)` after `import nybble`.

Importing this module registers the quantizer."""

from __future__ import annotations

from typing import Any

import torch
from transformers.quantizers.auto import (
    AUTO_QUANTIZATION_CONFIG_MAPPING,
    register_quantization_config,
    register_quantizer,
)
from transformers.quantizers.base import HfQuantizer
from transformers.utils.quantization_config import QuantizationConfigMixin

from nybble.errors import UsageError
from nybble.files.native import read_entry, read_schemes
from nybble.models.replace import replace_weights, tie_parameters

METHOD = "nybble"
SPARSE = "nybble-sparse"


class NybbleConfig(QuantizationConfigMixin):
    """`quantization_config` of a folder: which tensors are packed, in which format and shape."""

    def __init__(self, tensors: dict[str, Any] | None = None, container: int = 0, **_: Any) -> None:
        self.quant_method = METHOD
        self.container = container
        self.tensors = tensors  # what is missing or wrong is said by `read_entry`, which checks all of it


class NybbleQuantizer(HfQuantizer):
    """Puts packed layers in the empty model before transformers fills it from the file."""

    requires_calibration = True  # a float model is quantized by nybble.quantize, not while it is loaded

    def validate_environment(self, *_: Any, **__: Any) -> None:
        if not self.pre_quantized:
            raise UsageError("from_pretrained only loads folders that nybble wrote; make one with nybble quantize")

    def update_dtype(self, dtype: torch.dtype | None) -> torch.dtype:
        return dtype or torch.float32

    def _process_model_before_weight_loading(self, model: Any, **_: Any) -> None:
        entry = self.quantization_config.to_dict()
        packed, schemes = read_entry(entry), read_schemes(entry)
        tie_parameters(model)  # transformers ties after loading, with what it then no longer finds
        dtype = getattr(model, "dtype", torch.float32)
        with torch.device("meta"):
            replace_weights(model, dict(packed), dtype if dtype.is_floating_point else torch.float32, schemes)

    def is_serializable(self) -> bool:
        return True

    @property
    def is_trainable(self) -> bool:
        return False

    def _dequantize(self, model: Any, dtype: torch.dtype | None = None) -> Any:
        raise UsageError("to get the float weights back, use nybble.load(folder).tensors[name].decode()")


class SparseConfig(NybbleConfig):
    """`quantization_config` of a sparse folder (containers/nybble_sparse.py)."""

    def __init__(self, **entry: Any) -> None:
        super().__init__(**entry)
        self.quant_method = SPARSE


class SparseQuantizer(NybbleQuantizer):
    """Refuses sparse folders: without it transformers would warn and hand out random weights."""

    def validate_environment(self, *_: Any, **__: Any) -> None:
        raise UsageError(
            "a nybble-sparse folder is not laid out for transformers: nybble convert IN OUT --file nybble (or float), or "
            "nybble.load"
        )


if METHOD not in AUTO_QUANTIZATION_CONFIG_MAPPING:
    register_quantization_config(METHOD)(NybbleConfig)
    register_quantizer(METHOD)(NybbleQuantizer)
    register_quantization_config(SPARSE)(SparseConfig)
    register_quantizer(SPARSE)(SparseQuantizer)
