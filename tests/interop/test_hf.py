"""transformers opens the folders that we write of real models: weights to the bit, logits as our own loader's.

bitsandbytes, compressed-tensors and GPTQModel decode in their own code. Where GPTQModel is not installed, the GPTQ and AWQ
folders are decoded by a few lines (decoders.py) that follow the formats' descriptions and none of our code. tests/containers
tries the same on small shapes of every kind.
"""

from __future__ import annotations

import importlib.util
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from decoders import decoded
from numpy.typing import NDArray
from readers import reader

import nybble
from nybble.containers import open_contents
from nybble.convert import convert
from nybble.demo import text
from nybble.engine.text import TextCodec

transformers: Any = reader("transformers")
reader("accelerate")
GPT2, LLAMA, QWEN2, QWEN3 = "stdlib-gpt2-6m", "stories260k-llama", "tiny-qwen2", "tiny-qwen3"
CASES = [
    ("bitsandbytes", "nf4:g64", GPT2),
    ("bitsandbytes", "fp4:g64,dq", GPT2),
    ("bitsandbytes", "int8:channel", GPT2),
    ("bitsandbytes", "int8:channel", LLAMA),
    ("bitsandbytes", "nf4:g64,dq", QWEN3),
    ("bitsandbytes", "int8:channel", QWEN2),
    ("compressed-tensors", "int8:channel", LLAMA),
    ("compressed-tensors", "int4:g128", QWEN2),
    ("compressed-tensors", "int4:g64,asym", QWEN3),
    ("compressed-tensors", "int8:channel", QWEN3),
    ("gptq", "int4:g64,asym", QWEN2),
    ("gptq", "int8:g32", QWEN3),
    ("awq", "int4:g128,asym", QWEN2),
    ("awq", "int4:g64", QWEN3),
]
"""Not here, because transformers does not open them, whoever wrote them: GPTQ of GPT-2 (its own code looks for a weight that
GPTQModel's layers have not), and 4-bit layers of bitsandbytes whose rows are no multiple of 32 (on a CPU they do not run)."""
UNPACKED = ("compressed-tensors", "int4:g64,asym")
"""transformers opens packed zero points only where it is told to unpack all: so it is with folders made by the library itself."""
LOGITS = {"bitsandbytes": 0.03, "compressed-tensors": 0.0001, "gptq": 0.03, "awq": 0.03}
"""Largest distance of a logit, as a share of the largest: kernels compute in bfloat16, but those of compressed-tensors."""
INT8 = 0.06
"""The same where inputs are rounded to 8 bits too: what is rounded up here may be rounded down there. 0.040 was measured."""
ULP = 3
"""bitsandbytes multiplies by 1/127 what we divide: units in the last place between weights of int8."""


def case_of(container: str, spec: str, model: str, source: Callable[[str], Path], folder: Path) -> Path:
    options = {"checkpoint_format": "gptq_v2"} if container == "gptq" and spec.endswith("asym") else {}
    convert(source(model), folder / "packed", container, spec, options=options)
    return folder / "packed"


def weight_of(module: Any) -> NDArray[np.float32] | None:
    """The float32 weight [out, in] of a loaded layer; None where it was put in another order for a kernel."""
    kind = type(module).__name__
    if kind in ("Linear4bit", "Linear8bitLt"):
        from transformers.integrations.bitsandbytes import dequantize_bnb_weight

        found: NDArray[np.float32] = dequantize_bnb_weight(module.weight, getattr(module, "state", None)).float().numpy()
        return found
    return module.weight.detach().float().numpy() if kind == "Linear" else None


@pytest.mark.parametrize(("container", "spec", "model"), CASES)
def test_transformers(container: str, spec: str, model: str, source: Callable[[str], Path], tmp_path: Path) -> None:
    for name in {"gptq": ("gptqmodel", "optimum"), "awq": ("gptqmodel",)}.get(container, (container.replace("-", "_"),)):
        if importlib.util.find_spec(name) is None:
            pytest.skip(f"{name} is not installed")
    folder = case_of(container, spec, model, source, tmp_path)
    contents = open_contents(folder)
    assert {entry for entry, _ in contents.packed.values()} == {spec}
    how = {"quantization_config": transformers.CompressedTensorsConfig(dequantize=True)} if (container, spec) == UNPACKED else {}
    theirs = transformers.AutoModelForCausalLM.from_pretrained(folder, dtype="auto", **how).eval()
    if container == "compressed-tensors":
        theirs(input_ids=torch.tensor([[5]]))  # it decompresses before the first token
    decoded = 0
    for name in contents.packed:
        weight = weight_of(theirs.get_submodule(name.removesuffix(".weight")))
        if weight is not None:
            decoded += 1
            ours = contents.read_packed(name).decode()
            if contents.float_tag == "F16" and spec != "int8:channel":  # bitsandbytes' layers decode to the type of the model
                ours = ours.astype(np.float16).astype(np.float32)
            np.testing.assert_array_max_ulp(weight, ours, ULP if spec == "int8:channel" else 0)
    assert decoded == len(contents.packed) or container in ("gptq", "awq")
    ids = torch.tensor([TextCodec.load(folder).encode(text.held_out_documents()[0][:400])[:96]])
    with torch.inference_mode():
        found, expected = theirs(input_ids=ids).logits.float(), nybble.load(folder).model()(input_ids=ids).logits.float()
    bound = INT8 if (container, spec) == ("bitsandbytes", "int8:channel") else LOGITS[container]
    assert float((found - expected).abs().max()) <= bound * float(expected.abs().max())


@pytest.mark.parametrize(
    ("container", "spec", "model"),
    [
        *(case for case in CASES if case[0] in ("gptq", "awq")),
        ("gptq", "int4:g128", GPT2),
        ("gptq", "int2:g32", QWEN3),
        ("gptq", "int8:channel", QWEN2),
    ],
)
def test_by_the_description(container: str, spec: str, model: str, source: Callable[[str], Path], tmp_path: Path) -> None:
    folder = case_of(container, spec, model, source, tmp_path)
    contents, found = open_contents(folder), decoded(folder)
    assert contents.packed
    assert found.keys() == contents.packed.keys()
    for name in contents.packed:
        np.testing.assert_array_equal(found[name], contents.read_packed(name).decode())
