"""Learning from a teacher: what is measured, what cannot be, and that zeros of a pruned model stay."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

import nybble
from nybble.convert import convert
from nybble.errors import InputError, UsageError
from nybble.plan import Recipe
from nybble.train.distill import check_teacher, distillation_loss, fewer_layers, hidden_distance, language_loss
from nybble.train.fake import prepared, scale_parameters
from nybble.train.loop import Trainer
from nybble.train.qat import Beginning, prepare_from

Make = Callable[..., Trainer]
IDS = torch.from_numpy(np.random.default_rng(1).integers(3, 97, (3, 12)))


def test_a_model_is_its_own_best_student(tiny: Callable[..., Any]) -> None:
    model = tiny("gpt2").eval()
    loss = distillation_loss(tiny("gpt2"), hidden=1.0)
    assert float(loss(model, IDS).detach()) == pytest.approx(0, abs=1e-5)
    assert float(distillation_loss(tiny("llama"))(model, IDS).detach()) > 0.001


def test_what_the_loss_is_made_of(tiny: Callable[..., Any]) -> None:
    """Against the formulas, with a teacher that has other weights."""
    student, teacher = tiny("gpt2").eval(), fewer_layers(tiny("gpt2"), 1).eval()
    with torch.no_grad():
        ours, theirs = (model(input_ids=IDS, output_hidden_states=True) for model in (student, teacher))
        p, q = torch.softmax(theirs.logits / 2, -1), torch.log_softmax(ours.logits / 2, -1)
        divergence = float((p * (p.log() - q)).sum(-1).mean() * 4)
        truth = float(language_loss(student, IDS))
        pairs = zip(ours.hidden_states[1:], (theirs.hidden_states[round((i + 1) / 2)] for i in range(2)), strict=True)
        apart = float(np.mean([float((1 - torch.cosine_similarity(a, b, dim=-1)).mean()) for a, b in pairs]))
        got = float(distillation_loss(teacher, share=0.7, temperature=2, hidden=3)(student, IDS))
        alone = float(distillation_loss(teacher, hidden=3, temperature=2)(student, IDS))
    assert apart > 0.001
    assert got == pytest.approx(0.7 * divergence + 0.3 * truth + 3 * apart, rel=1e-4)
    assert alone == pytest.approx(divergence + 3 * apart, rel=1e-4)


def test_hidden_states_are_learnt(tiny: Callable[..., Any], trainer: Make) -> None:
    teacher = tiny("gpt2")
    student = fewer_layers(tiny("gpt2"), 1)
    run = trainer(model=student, steps=30, learning_rate=1e-2)
    with torch.no_grad():
        theirs = teacher.eval()(input_ids=IDS % 64 + 3, output_hidden_states=True).hidden_states

        def apart() -> float:
            return float(hidden_distance(student.eval()(input_ids=IDS % 64 + 3, output_hidden_states=True).hidden_states, theirs))

        before = apart()
    run.loss = distillation_loss(teacher, hidden=10.0)
    run.run()
    with torch.no_grad():
        assert apart() < 0.8 * before


def test_teachers_that_cannot_be(tiny: Callable[..., Any]) -> None:
    wide = tiny("gpt2")
    wide.config.n_embd = 2 * wide.config.n_embd
    with pytest.raises(InputError, match=r"hidden states of the teacher have \d+ columns"):
        check_teacher(wide, tiny("gpt2"), hidden=True)
    with pytest.raises(UsageError, match="hidden -1"):
        distillation_loss(tiny("gpt2"), hidden=-1)


@pytest.mark.parametrize("optimizer", ["adamw", "adamw8bit", "adamw4bit"])
def test_zeros_stay(optimizer: str, tiny: Callable[..., Any], trainer: Make) -> None:
    model = tiny("gpt2")
    matrices = {name: p for name, p in model.named_parameters() if p.dim() == 2 and ".h." in name}
    with torch.no_grad():
        for p in matrices.values():
            p[p.abs() < p.abs().median()] = 0
    zeros = {name: (p == 0).clone() for name, p in matrices.items()}
    run = trainer(model=model, steps=6, learning_rate=1e-2, optimizer=optimizer, keep_zeros=True)
    before = {name: p.detach().clone() for name, p in matrices.items()}
    run.run()
    for name, p in matrices.items():
        assert torch.equal(p == 0, zeros[name]), name
        assert not torch.equal(p, before[name])


def test_without_zeros_there_is_nothing_to_keep(tiny: Callable[..., Any], trainer: Make) -> None:
    with pytest.raises(InputError, match="no weight of this model is zero"):
        trainer(keep_zeros=True).run()


def test_zeros_of_a_method_stay_in_qat(tiny: Callable[..., Any], trainer: Make) -> None:
    """Pruned and rounded by SparseGPT, then trained: two of four are still zero."""
    windows = np.random.default_rng(0).integers(3, 97, (8, 40))
    model = tiny("gpt2")
    prepare_from(model, Beginning(Recipe("int4:g32", "sparsegpt:pattern=2of4"), "learned", windows))
    trainer(model=model, steps=6, learning_rate=1e-2, keep_zeros=True).run()
    assert all(float(move.detach().abs().max()) > 0 for move in scale_parameters(model)), "a scale was held at its start"
    for name, (module, fake) in prepared(model).items():
        rows = module.weight.detach().T if fake.layer_is_turned else module.weight.detach()
        if ".h." in name:
            assert bool(((rows == 0).reshape(len(rows), -1, 4).sum(2) >= 2).all()), name


def test_a_pruned_folder_is_trained_on(tiny: Callable[..., Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from nybble.train import start

    windows = np.random.default_rng(0).integers(3, 97, (8, 40))
    pruned = nybble.quantize(tiny("llama"), "fp32", "wanda:pattern=2of4", windows)
    convert(pruned.contents(), tmp_path / "sparse", "nybble-sparse")
    monkeypatch.setattr(start, "load_tokenizer", lambda folder: type("Tokenizer", (), {"eos_token_id": 2})())
    model = start.load(tmp_path / "sparse").model
    assert type(model).__name__ == "LlamaForCausalLM"
    for name, tensor in pruned.tensors.items():
        np.testing.assert_array_equal(model.get_parameter(name).detach().numpy(), tensor.decode())
