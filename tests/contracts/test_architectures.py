"""The contract of an architecture: any transformers model, with a table of its own or without, quantized, saved, and loaded
in another process, computes what it computed in memory, and holds its weights packed and once."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import nn
from transformers.pytorch_utils import Conv1D

import nybble
from nybble.formats import parse_format
from nybble.models.arch import tables
from nybble.models.describe import describe, sites
from nybble.models.packed import PackedWeight
from nybble.quantized import tensor_bytes

SPECS = ("int8:channel", "int4:g32,asym", "nf4:g64,dq")
NAMES = (
    "gpt2", "gpt2-untied", "gpt_neo", "llama", "llama-tied", "mistral", "qwen2", "qwen3", "phi", "gemma", "gemma2", "gemma3",
    "opt", "gpt_neox", "bloom", "falcon", "bert",
)  # fmt: skip
CASES = [(name, spec) for name in NAMES for spec in SPECS]

LOADER = """
import json, sys
import numpy as np, torch
import nybble
from transformers import AutoModelForCausalLM, AutoModelForMaskedLM
torch.set_num_threads(1)
ids = torch.tensor(json.loads(sys.argv[1]))
for folder in sys.argv[2:]:
    auto = AutoModelForMaskedLM if folder.split("/")[-1].startswith("bert") else AutoModelForCausalLM
    by_auto, info = auto.from_pretrained(folder, output_loading_info=True, local_files_only=True)
    by_nybble = nybble.load(folder)
    facts = {key: sorted(map(str, info[key])) for key in ("missing_keys", "unexpected_keys", "mismatched_keys")}
    with torch.inference_mode():
        np.save(folder + "/auto.npy", by_auto(input_ids=ids).logits.float().numpy())
        np.save(folder + "/nybble.npy", by_nybble.model()(input_ids=ids).logits.numpy())
    facts["bytes"] = [by_nybble.weight_bytes, sum(t.numel() * t.element_size()
        for t in {id(t): t for t in [*by_auto.parameters(), *by_auto.buffers()]}.values())]
    json.dump(facts, open(folder + "/facts.json", "w"))
"""


pytestmark = pytest.mark.usefixtures("one_thread")


@pytest.fixture(scope="module")
def saved(
    tmp_path_factory: pytest.TempPathFactory,
    tiny: Callable[..., Any],
    ids: torch.Tensor,
    logits: Callable[..., torch.Tensor],
    python_script: Callable[..., str],
) -> dict[tuple[str, str], tuple[Any, Path, torch.Tensor]]:
    """Every case quantized and saved, and all of them loaded by one new process."""
    root = tmp_path_factory.mktemp("saved")
    made = {}
    for name, spec in CASES:
        quantized = nybble.quantize(tiny(name), spec)
        folder = quantized.save(root / f"{name}-{spec.replace(':', '_').replace(',', '_')}")
        made[name, spec] = (quantized, folder, logits(quantized.model(), ids))
    python_script(LOADER, json.dumps(ids.tolist()), *(folder for _, folder, _ in made.values()))
    return made


@pytest.mark.parametrize(("name", "spec"), CASES)
def test_loads_in_another_process_with_equal_logits(saved: Any, name: str, spec: str) -> None:
    quantized, folder, expected = saved[name, spec]
    facts = json.loads((folder / "facts.json").read_text())
    assert facts["missing_keys"] == facts["unexpected_keys"] == facts["mismatched_keys"] == []
    np.testing.assert_array_equal(np.load(folder / "nybble.npy"), expected.numpy())
    np.testing.assert_array_equal(np.load(folder / "auto.npy"), expected.numpy())
    assert facts["bytes"][0] == quantized.weight_bytes


@pytest.mark.parametrize(("name", "spec"), CASES)
def test_logits_are_those_of_the_decoded_weights(
    saved: Any, name: str, spec: str, tiny: Callable[..., Any], ids: torch.Tensor, logits: Callable[..., torch.Tensor]
) -> None:
    """The oracle: the float model with every weight replaced by what the QTensor decodes to. A square matrix that was
    transposed on the way (GPT-2's c_proj) shows here."""
    quantized, _, got = saved[name, spec]
    model = tiny(name)
    float_logits = logits(model, ids)
    for weight_name, site in sites(model).items():
        decoded = torch.from_numpy(quantized.tensors[weight_name].decode())
        module = site.modules[0]
        module.weight.data.copy_(decoded.T if isinstance(module, Conv1D) else decoded)
    torch.testing.assert_close(got, logits(model, ids), rtol=1e-4, atol=2e-5)
    error = (got - float_logits).norm() / float_logits.norm()
    assert 1e-5 < error < (0.1 if spec.startswith("int8") else 0.8), f"{error:.2g}: nothing was quantized, or all was lost"


@pytest.mark.parametrize(("name", "spec"), CASES)
def test_weights_are_packed_and_there_once(saved: Any, name: str, spec: str, tiny: Callable[..., Any]) -> None:
    quantized, _, _ = saved[name, spec]
    model = quantized.model()
    packed = [module for module in model.modules() if isinstance(module, PackedWeight)]
    stated = sum(parse_format(spec).stored_bits((p.shape[0], p.shape[1])) // 8 for p in packed)
    kept = sum(t.weights * 4 for t in describe(tiny(name)) if t.kind == "float")
    held = {t.untyped_storage().data_ptr(): t.untyped_storage().nbytes() for t in [*model.parameters(), *model.buffers()]}
    computed = sum(  # tables made at start: rotary frequencies, masks
        buffer.untyped_storage().nbytes()
        for module in model.modules()
        for key, buffer in module._buffers.items()
        if key in module._non_persistent_buffers_set and buffer is not None
    )
    assert tensor_bytes(model) == stated + kept
    assert sum(held.values()) <= stated + kept + computed
    assert len(packed) == len(sites(tiny(name))) > 8
    assert not any(p.ndim == 2 and p.dtype == torch.float32 and p.numel() > 2000 for p in model.parameters())


@pytest.mark.parametrize("name", [name for name in NAMES if name != "bert"])
def test_generates(saved: Any, name: str, ids: torch.Tensor) -> None:
    for spec in SPECS:
        quantized, _, expected = saved[name, spec]
        out = quantized.generate(
            ids, attention_mask=torch.ones_like(ids), max_new_tokens=6, min_new_tokens=6, do_sample=False, pad_token_id=0
        )
        assert out.shape == (1, ids.shape[1] + 6)
        allowed = expected[0, -1].clone()
        allowed[2] = -torch.inf  # min_new_tokens forbids the end of the text
        assert int(out[0, ids.shape[1]]) == int(allowed.argmax())


@pytest.mark.parametrize(("name", "tied"), [("gpt2", True), ("llama-tied", True), ("qwen3", True), ("gemma", True),
                                            ("gpt2-untied", False), ("llama", False), ("mistral", False)])  # fmt: skip
def test_tied_head_and_table_are_one_packed_weight(saved: Any, name: str, tied: bool) -> None:
    model = saved[name, "int8:channel"][0].model()
    assert (model.get_output_embeddings().weight is model.get_input_embeddings().weight) is tied
    assert isinstance(model.get_output_embeddings().weight, PackedWeight)


@pytest.mark.parametrize("name", NAMES)
def test_the_table_agrees_with_the_modules(name: str, tiny: Callable[..., Any]) -> None:
    model = tiny(name)
    table = tables().get(model.config.model_type)
    if table is None:
        assert name in ("gpt_neo", "gemma3", "gpt_neox", "bloom", "falcon", "bert"), "its table was not found"
        return
    modules = dict(model.named_modules())
    for inner, role in table.linears.items():
        assert role
        for block in range(2):
            module = modules[f"{table.block.format(i=block)}.{inner}"]
            assert isinstance(module, Conv1D) is (inner in table.transposed)
            assert isinstance(module, Conv1D | nn.Linear)
    for outer in table.others:
        assert isinstance(modules[outer], nn.Embedding | nn.Linear)
    assert table.tied is not None
    head, embedding = table.tied
    assert (modules[head].weight is modules[embedding].weight) is bool(model.config.tie_word_embeddings)
    for tensor in describe(model):
        if tensor.kind != "float":
            assert tensor.role, f"{tensor.name} has no role"
            assert (tensor.block is None) is (".0." not in tensor.name and ".1." not in tensor.name)


def test_every_table_is_tried() -> None:
    tried = {"gpt2", "llama", "mistral", "qwen2", "qwen3", "gemma", "gemma2", "opt", "phi"}
    assert set(tables()) <= tried, "add the new family to FAMILIES in conftest.py"
