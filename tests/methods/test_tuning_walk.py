"""A whole walk with tuning: the same codes on one thread and on two."""

from __future__ import annotations

import numpy as np
import torch
from transformers import GPT2Config, GPT2LMHeadModel

from nybble.calibrate.workers import Workers
from nybble.formats import parse_format
from nybble.methods import parse_method
from nybble.walk import Walk


def walk(threads: int, method: str) -> Walk:
    torch.manual_seed(0)
    config = GPT2Config(
        vocab_size=97, n_positions=32, n_embd=64, n_layer=2, n_head=2, bos_token_id=0, eos_token_id=0, attn_implementation="eager"
    )
    model = GPT2LMHeadModel(config).eval()
    layers = {f"{name}.weight": m for name, m in model.named_modules() if name.endswith(("c_attn", "c_proj", "c_fc"))}
    with torch.no_grad():
        for layer in layers.values():
            layer.weight.mul_(8)  # predictions that depend on the blocks
    fmt = parse_format("int2:g32")
    windows = np.random.default_rng(0).integers(0, 97, (24, 32))
    with Workers(threads) as workers:
        made = Walk(model, layers, dict.fromkeys(layers, fmt), parse_method(method).settings, windows, {}, workers)
        made.run()
    return made


def test_threads_do_not_change_what_tuning_gives() -> None:
    one, two = (walk(threads, "best:tune=10:travel=0.02") for threads in (1, 2))
    assert one.history == two.history
    assert len({loss for _, loss in one.history}) > 1  # it did move
    for name, tensor in one.tensors.items():
        np.testing.assert_array_equal(tensor.codes, two.tensors[name].codes)
        np.testing.assert_array_equal(tensor.decode(), two.tensors[name].decode())
