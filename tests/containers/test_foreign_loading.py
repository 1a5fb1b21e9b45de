"""What transformers makes of the folders that we write, where it has the libraries for them: every packed weight is ours to the
bit, every float as it was, and logits are those of a float model with our decoded weights."""

from __future__ import annotations

import importlib.util
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from nybble.containers import Contents, open_contents
from nybble.containers.float import is_transposed
from nybble.convert import convert

pytestmark = [
    pytest.mark.filterwarnings("ignore"),  # of libraries that are not ours
    pytest.mark.usefixtures("one_thread"),
]

CASES = [
    ("bitsandbytes", "nf4:g32", "qwen2"),
    ("bitsandbytes", "nf4:g32,dq", "qwen2"),
    ("bitsandbytes", "fp4:g64", "gpt2"),
    ("compressed-tensors", "int4:g32", "qwen2"),
    ("compressed-tensors", "int8:channel", "llama-tied"),
    ("compressed-tensors", "int2:channel", "qwen3"),
    ("gptq", "int4:g32", "qwen2"),
    ("gptq", "int4:g64", "llama"),
    ("awq", "int4:g32,asym", "qwen2"),
]
NEEDED = {
    "bitsandbytes": ("bitsandbytes", "accelerate"),
    "compressed-tensors": ("compressed_tensors",),
    "gptq": ("gptqmodel", "optimum"),
    "awq": ("gptqmodel", "accelerate"),
}
LOGITS = {"compressed-tensors": 0.0, "bitsandbytes": 0.03, "gptq": 0.03, "awq": 0.03}
"""Largest distance, as a share of the largest logit: their kernels for the CPU compute in bfloat16, but for those of
compressed-tensors, which are torch's own in float32."""


@pytest.fixture(params=CASES, ids=lambda case: "-".join(case))
def folder(request: pytest.FixtureRequest, tiny: Callable[..., Any], tmp_path: Path) -> Path:
    """A folder of a container, made from a model of two layers with random weights."""
    container, spec, family = request.param
    for name in NEEDED[container]:
        if importlib.util.find_spec(name) is None:
            pytest.skip(f"{name} is not installed")
    tiny(family).save_pretrained(tmp_path / "float")
    convert(tmp_path / "float", tmp_path / "packed", container, spec)
    return tmp_path / "packed"


def reference(contents: Contents) -> Any:
    """A float model with the decoded weights of a folder."""
    import torch
    import transformers

    config = transformers.AutoConfig.for_model(**contents.config)
    made = transformers.AutoModelForCausalLM.from_config(config, dtype=torch.float32).eval()
    state = made.state_dict()
    for name in contents.packed:
        values = contents.read_packed(name).decode()
        state[name].copy_(torch.from_numpy(np.array(values.T if is_transposed(contents.config, name) else values)))
    for name in contents.floats:
        state[name].copy_(torch.from_numpy(contents.float32(name).copy()))
    made.tie_weights()
    return made


def weight_of(module: Any) -> Any:
    """The float32 weight that a loaded layer stands for, [out, in]; None where its kernel has put it in another order."""
    kind = type(module).__name__
    if kind in ("Linear4bit", "Linear8bitLt"):
        from transformers.integrations.bitsandbytes import dequantize_bnb_weight

        return dequantize_bnb_weight(module.weight, getattr(module, "state", None)).float().numpy()
    return module.weight.detach().float().numpy() if kind == "Linear" else None


def test_transformers_loads_what_we_write(folder: Path, ids: Any, logits: Callable[[Any, Any], Any]) -> None:
    import transformers

    contents = open_contents(folder)
    model = transformers.AutoModelForCausalLM.from_pretrained(folder, dtype="auto").eval()
    if contents.container == "compressed-tensors":
        logits(model, ids)  # it decompresses before the first token
    for name in contents.packed:
        found = weight_of(model.get_submodule(name.removesuffix(".weight")))
        if found is not None:
            assert np.array_equal(found, contents.read_packed(name).decode()), name
    state = model.state_dict()
    for name in contents.floats:
        if name in state and contents.container not in ("gptq", "awq"):  # these have biases of float16
            assert np.array_equal(state[name].float().numpy(), contents.float32(name)), name
    if contents.container == "bitsandbytes" and any(rows % 32 for _, (rows, _) in contents.packed.values()):
        return  # its kernel for CPUs with AVX512-BF16 computes rows in blocks of 32 only
    wanted = logits(reference(contents), ids)
    apart = float((logits(model, ids).float() - wanted).abs().max()) / float(wanted.abs().max())
    assert apart <= LOGITS[contents.container]


def test_int8_of_bitsandbytes(tiny: Callable[..., Any], tmp_path: Path) -> None:
    """Values within 3 units in the last place, since it multiplies by 1/127 what we divide."""
    for name in NEEDED["bitsandbytes"]:
        if importlib.util.find_spec(name) is None:
            pytest.skip(f"{name} is not installed")
    import transformers

    tiny("gpt2").save_pretrained(tmp_path / "float")
    convert(tmp_path / "float", tmp_path / "packed", "bitsandbytes", "int8:channel")
    contents = open_contents(tmp_path / "packed")
    model = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "packed", dtype="auto").eval()
    assert len(contents.packed) == 8
    for name in contents.packed:
        found = weight_of(model.get_submodule(name.removesuffix(".weight")))
        np.testing.assert_array_max_ulp(found, contents.read_packed(name).decode(), 3)
