"""Float and packed models through transformers, with errors in one line and nothing random left in them."""

from __future__ import annotations

import logging
import math
import tempfile
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
import transformers
from transformers import AutoConfig, AutoModel, AutoTokenizer, PreTrainedModel
from transformers.pytorch_utils import Conv1D

from nybble.errors import FileFormatError, InputError, NumericError, UsageError
from nybble.models import hf_quantizer as _registers_itself  # noqa: F401
from nybble.models.checkpoint import check_tokenizer, open_checkpoint

DTYPES = {"fp32": torch.float32, "fp16": torch.float16, "bf16": torch.bfloat16}


def load_model(folder: str | Path, dtype: torch.dtype = torch.float32) -> PreTrainedModel:
    """The model of a folder, float or packed by nybble, in eval mode on the CPU. `dtype` is that of its float tensors.

    Raises InputError or FileFormatError when the folder is missing, broken, incomplete, or of an unknown architecture,
    NumericError when a tensor holds NaN or infinity.
    """
    checkpoint = open_checkpoint(folder)
    return _load(checkpoint.config, checkpoint.folder, dtype, checkpoint.folder)


def load_state(
    config: dict[str, Any], state: dict[str, torch.Tensor], dtype: torch.dtype, path: Path, check: bool = True
) -> PreTrainedModel:
    """The model of a config.json and the tensors of its state, packed ones as nybble's own folders have them. `path` is what
    errors name; they are those of `load_model`, without `check` but for values that are not finite."""
    kind = str(config.get("model_type"))
    try:
        built = AutoConfig.for_model(**config)
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise InputError(f"transformers has no model of {path}, model_type {kind!r}: {_first_line(error)}") from error
    return _load(config, None, dtype, path, check, config=built, state_dict=state)


def _load(
    facts: dict[str, Any], folder: Path | None, dtype: torch.dtype, path: Path, check: bool = True, **arguments: Any
) -> PreTrainedModel:
    cls = _model_class(facts)
    with quiet():
        try:
            model, info = cls.from_pretrained(
                folder,
                dtype=dtype,
                local_files_only=True,
                use_safetensors=True,
                output_loading_info=True,
                ignore_mismatched_sizes=True,  # they are named below
                **arguments,
            )
        except (OSError, ValueError, RuntimeError, KeyError, TypeError, AttributeError, ImportError) as error:
            raise InputError(f"transformers cannot load {path}: {_first_line(error)}") from error
    missing = sorted(info.get("missing_keys", ()))
    mismatched = sorted(str(m[0]) for m in info.get("mismatched_keys", ()))
    if missing or mismatched:
        names = ", ".join((missing + mismatched)[:3])
        raise FileFormatError(
            f"{path} does not fill its model: {len(missing)} tensors missing, {len(mismatched)} of another "
            f"shape ({names}{', ...' if len(missing + mismatched) > 3 else ''}); is config.json of another model?"
        )
    if check:
        check_finite(model)
    if dtype in (torch.float16, torch.bfloat16):
        lay_out_for_half(model)
    return model.eval()


def check_finite(model: PreTrainedModel) -> None:
    """Raise NumericError, naming tensor, count and place, when a saved float tensor holds NaN or infinity.

    Reads every float once and makes no copy: a few milliseconds for 100 MB.
    """
    for name, tensor in model.state_dict().items():
        if isinstance(tensor, torch.Tensor) and tensor.is_floating_point() and not tensor.is_meta:
            check_values(name, tensor)


def check_values(name: str, tensor: torch.Tensor) -> None:
    """Raise NumericError, naming the tensor, how many and where, when it holds NaN or infinity."""
    # NaN comes through minimum and maximum alike, infinity through one of them
    if not tensor.numel() or all(math.isfinite(end) for end in map(float, torch.aminmax(tensor))):
        return
    places = (~torch.isfinite(tensor)).nonzero()
    first = tuple(int(i) for i in places[0])
    raise NumericError(
        f"{name}: {len(places)} of {tensor.numel()} values are not finite, the first is {float(tensor[first])} at "
        f"{list(first)}; repair the checkpoint or get it again"
    )


def lay_out_for_half(model: PreTrainedModel) -> None:
    """Hold GPT-2's Conv1D weights [in, out] as views of [out, in] memory: torch's half-precision products on a CPU take
    ten times as long in the other order (measured: 2048 x 256 x 1024 in fp16, 590 ms against 56).

    All other tensors are copied too: views of the mapped file would keep all of it resident beside the new weights.
    """
    transposed = {id(module.weight) for module in model.modules() if isinstance(module, Conv1D)}
    if transposed:
        for tensor in [*model.parameters(), *model.buffers()]:
            tensor.data = tensor.data.T.contiguous().T if id(tensor) in transposed else tensor.data.clone()


def empty_model(folder: str | Path) -> PreTrainedModel:
    """The model of a folder without its weights, on the meta device: for plans. Same errors as `load_model`."""
    checkpoint = open_checkpoint(folder)
    cls = _model_class(checkpoint.config)
    with quiet(), torch.device("meta"):
        try:
            config = AutoConfig.from_pretrained(checkpoint.folder, local_files_only=True)
            return cls._from_config(config, dtype=torch.float32).eval()
        except (OSError, ValueError, RuntimeError, KeyError, TypeError, AttributeError) as error:
            raise InputError(f"transformers cannot build {checkpoint.folder}: {_first_line(error)}") from error


def warm_up(config: dict[str, Any]) -> None:
    """Import and start all that loading and running a model of this config needs, by loading a tiny one of another kind:
    what is then measured is the model alone (6 MB of code and thread pools would count as its memory otherwise)."""
    _model_class(config)
    AutoConfig.for_model(str(config["model_type"]))
    tiny = transformers.GPT2Config(n_layer=1, n_embd=32, n_head=1, vocab_size=16, n_positions=8, bos_token_id=0, eos_token_id=0)
    with tempfile.TemporaryDirectory() as folder, quiet(), torch.inference_mode():
        transformers.GPT2LMHeadModel(tiny).save_pretrained(folder)
        load_model(folder)(torch.zeros(1, 2, dtype=torch.int64))


def load_tokenizer(folder: str | Path) -> Any:
    """The tokenizer of a folder. Raises InputError when it has none that transformers can load."""
    check_tokenizer(folder)
    with quiet():
        try:
            return AutoTokenizer.from_pretrained(str(folder), local_files_only=True)
        except Exception as error:  # the tokenizers' Rust side raises bare Exception
            raise InputError(f"transformers cannot load the tokenizer of {folder}: {_first_line(error)}") from error


def context_length(model: PreTrainedModel) -> int:
    """Positions the model can take. Raises InputError when its config does not say."""
    config = model.config.get_text_config()
    for key in ("n_positions", "max_position_embeddings", "n_ctx", "max_seq_len", "seq_length"):
        value = getattr(config, key, None)
        if isinstance(value, int) and value > 0:
            return value
    raise InputError(f"the config of {type(model).__name__} states no context length; set max_position_embeddings in it")


def window_length(model: PreTrainedModel, window: int | None) -> int:
    """Tokens of a scored window: as asked, or the context but at most 1024. Raises UsageError beyond the context."""
    context = context_length(model)
    if window is not None and window > context:
        raise UsageError(f"window of {window} tokens is longer than the model's context of {context}; choose --window smaller")
    return window or min(context, 1024)


def _model_class(config: dict[str, Any]) -> Any:
    """The class named by config.json's `architectures`, if transformers has it; the bare model otherwise."""
    architectures = config.get("architectures") or []
    if not architectures:
        return AutoModel
    cls = getattr(transformers, str(architectures[0]), None)
    if not (isinstance(cls, type) and issubclass(cls, PreTrainedModel)):
        raise InputError(
            f"architecture {architectures[0]!r} (model_type {config.get('model_type')!r}) is not part of "
            f"transformers {transformers.__version__}"
        )
    return cls


def _first_line(error: BaseException) -> str:
    text = str(error).strip() or type(error).__name__
    return text.splitlines()[0][:300]


@contextmanager
def quiet() -> Iterator[None]:
    """Keep transformers' progress bars, notes and warnings off a person's terminal; errors still come as exceptions."""
    logger = transformers.utils.logging
    verbosity, bars = logger.get_verbosity(), logger.is_progress_bar_enabled()
    logger.set_verbosity(logging.CRITICAL)
    logger.disable_progress_bar()
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            yield
    finally:
        logger.set_verbosity(verbosity)
        if bars:
            logger.enable_progress_bar()


@contextmanager
def evaluating(model: torch.nn.Module) -> Iterator[None]:
    """Within it no part of a model is in training mode: nothing drops out. What was, is again after."""
    training = [module for module in model.modules() if module.training]
    model.eval()
    try:
        yield
    finally:
        for module in training:
            module.training = True


__all__ = [
    "DTYPES",
    "check_finite",
    "check_values",
    "context_length",
    "empty_model",
    "evaluating",
    "lay_out_for_half",
    "load_model",
    "load_state",
    "load_tokenizer",
    "quiet",
    "warm_up",
    "window_length",
]
