"""The training loop: it learns, in every precision; it stops anywhere and goes on as if it had not; what cannot be is said."""

from __future__ import annotations

import json
import math
import re
import shutil
from collections.abc import Callable
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from nybble.errors import FileFormatError, InputError, NumericError, UsageError
from nybble.train import checkpoints, precision
from nybble.train.data import Text, hold_back, read_text_tree
from nybble.train.loop import CHECKPOINTS, Trainer, read_log
from nybble.train.settings import OPTIMIZERS, Settings

Make = Callable[..., Trainer]


def weights(trainer: Trainer) -> dict[str, torch.Tensor]:
    return {name: tensor.clone() for name, tensor in trainer.model.state_dict().items()}


def same(one: dict[str, torch.Tensor], other: dict[str, torch.Tensor]) -> bool:
    return one.keys() == other.keys() and all(torch.equal(one[name], other[name]) for name in one)


def losses(trainer: Trainer) -> list[tuple[int, float, float | None]]:
    return [(step.step, step.loss, step.held_out) for step in read_log(trainer.folder)]


# ---- learning ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("family", ["gpt2", "llama", "qwen3"])
def test_it_learns(family: str, trainer: Make) -> None:
    run = trainer(family, steps=60, warmup=5, learning_rate=1e-2, evaluate_every=0, save_every=0)
    before = run.evaluate()
    run.run()
    assert run.evaluate() < 0.6 * before
    log = read_log(run.folder)
    assert [step.step for step in log] == list(range(1, 61))
    assert log[-1].held_out == run.evaluate()
    assert all(step.seconds > 0 and step.gradient > 0 and step.scale is None for step in log)


@pytest.mark.parametrize("precision", ["bf16", "fp16"])
def test_half_precision_learns_as_well(precision: str, trainer: Make) -> None:
    settings = {"steps": 60, "warmup": 5, "learning_rate": 3e-3, "evaluate_every": 0, "save_every": 0}
    full, half = trainer(folder="full", **settings), trainer(folder="half", precision=precision, **settings)
    full.run()
    half.run()
    assert half.evaluate() == pytest.approx(full.evaluate(), rel=0.05)
    assert losses(half) != losses(full), "nothing was computed in another precision"
    assert all(p.dtype is torch.float32 for p in half.model.parameters())


@pytest.mark.parametrize("optimizer", OPTIMIZERS)
def test_every_optimizer(optimizer: str, trainer: Make) -> None:
    run = trainer(steps=60, warmup=5, learning_rate=1e-2, optimizer=optimizer, evaluate_every=0, save_every=0)
    before = run.evaluate()
    run.run()
    assert run.evaluate() < 0.7 * before


def test_passes_add_up_to_a_batch(trainer: Make) -> None:
    whole, parts = trainer("llama", "whole", batch=8, micro=8), trainer("llama", "parts", batch=8, micro=2)
    whole.run()
    parts.run()
    for one, other in zip(read_log(whole.folder), read_log(parts.folder), strict=True):
        assert one.loss == pytest.approx(other.loss, rel=1e-5)
        assert one.gradient == pytest.approx(other.gradient, rel=1e-4)


def test_gradient_checkpointing_changes_nothing(trainer: Make) -> None:
    plain, saving = trainer(folder="plain"), trainer(folder="saving", gradient_checkpointing=True)
    plain.run()
    saving.run()
    assert same(weights(plain), weights(saving))


def test_learning_rate() -> None:
    settings = Settings(steps=100, warmup=10, learning_rate=2.0, final=0.1)
    rates = [settings.learning_rate_at(step) for step in range(100)]
    assert rates[0] == pytest.approx(0.2)
    assert rates[9] == rates[10] == 2.0
    assert rates[55] == pytest.approx((2.0 + 0.2) / 2)
    assert 0.2 < rates[99] < 0.21
    assert all(a >= b for a, b in pairwise(rates[10:]))


# ---- fp16's scale -------------------------------------------------------------------------------------------------------


def test_an_overflow_skips_the_step_and_halves_the_scale(trainer: Make) -> None:
    run = trainer(precision="fp16", steps=6, save_every=0, evaluate_every=0)
    calls = iter(range(100))
    plain = run.loss
    run.loss = lambda model, ids: plain(model, ids) * (math.inf if next(calls) == 3 else 1.0)
    seen: list[dict[str, torch.Tensor]] = []
    run.run(lambda step: seen.append(weights(run)))
    log = read_log(run.folder)
    assert [step.skipped for step in log] == [False, False, False, True, False, False]
    assert [step.scale for step in log] == [65536.0] * 4 + [32768.0] * 2
    assert same(seen[2], seen[3])
    assert not same(seen[3], seen[4])


def test_overflows_without_end(trainer: Make) -> None:
    run = trainer(precision="fp16", steps=100, save_every=0)
    plain = run.loss
    run.loss = lambda model, ids: plain(model, ids) * math.inf
    with pytest.raises(NumericError, match="31 steps of fp16 in a row; train in bf16 or fp32"):
        run.run()


def test_a_run_that_diverges(trainer: Make) -> None:
    run = trainer(steps=12)
    plain, calls = run.loss, iter(range(100))
    run.loss = lambda model, ids: plain(model, ids) * (math.nan if next(calls) == 6 else 1.0)
    with pytest.raises(NumericError, match=r"step 7: loss nan, gradient norm nan; the run has diverged: lower the learning rate"):
        run.run()
    assert checkpoints.newest(run.folder / CHECKPOINTS) == run.folder / CHECKPOINTS / "step-000004"


# ---- going on -----------------------------------------------------------------------------------------------------------


class Killed(Exception):
    pass


@pytest.mark.parametrize("settings", [{}, {"optimizer": "adamw8bit"}, {"precision": "fp16"}, {"batch": 4, "micro": 2}])
@pytest.mark.parametrize("at", [1, 4, 7, 12])
def test_a_killed_run_goes_on_to_the_same_weights(at: int, settings: dict[str, Any], trainer: Make) -> None:
    whole = trainer(folder="whole", **settings)
    whole.run()

    def kill(step: Any) -> None:
        if step.step == at:
            raise Killed

    killed = trainer(folder="killed", **settings)
    with pytest.raises(Killed):
        killed.run(kill)
    again = trainer(folder="killed", **settings)
    done = again.go_on()
    assert done == at // 4 * 4 - (4 if at % 4 == 0 else 0), "the checkpoint comes after the step is told"
    again.run()
    assert losses(again) == losses(whole)
    assert same(weights(again), weights(whole))


def test_an_interrupted_run_keeps_its_last_step(trainer: Make) -> None:
    def interrupt(step: Any) -> None:
        if step.step == 6:
            raise KeyboardInterrupt

    run = trainer()
    with pytest.raises(KeyboardInterrupt):
        run.run(interrupt)
    assert trainer().go_on() == 6


def test_dropout_goes_on_too(trainer: Make, tiny: Callable[..., Any]) -> None:
    def model() -> Any:
        made = tiny("gpt2")
        for module in made.modules():
            if isinstance(module, torch.nn.Dropout):
                module.p = 0.2
        return made

    def fresh(folder: str) -> Trainer:
        torch.manual_seed(0)
        return trainer(folder=folder, model=model())

    whole = fresh("whole")
    whole.run()
    half = fresh("half")
    with pytest.raises(Killed):
        half.run(lambda step: (_ for _ in ()).throw(Killed) if step.step == 6 else None)
    torch.manual_seed(99)
    again = trainer(folder="half", model=model())
    again.go_on()
    again.run()
    assert losses(again) == losses(whole)


def test_two_checkpoints_stay(trainer: Make) -> None:
    run = trainer()
    run.run()
    assert sorted(path.name for path in (run.folder / CHECKPOINTS).iterdir()) == ["step-000008", "step-000012"]


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"learning_rate": 1e-3}, "another learning rate (0.003, now 0.001)"),
        ({"seed": 7}, "another seed (0, now 7)"),
        ({"optimizer": "adamw8bit"}, "another optimizer ('adamw', now 'adamw8bit')"),
        ({"window": 8}, "another held out text|another text|another window"),
    ],
)
def test_another_run_is_refused(changes: dict[str, Any], message: str, trainer: Make) -> None:
    trainer().run()
    pattern = message if "|" in message else re.escape(message)
    with pytest.raises(UsageError, match=pattern) as caught:
        trainer(**changes).go_on()
    assert str(caught.value).endswith("give the same again, another folder, or --restart")


def test_broken_checkpoints(trainer: Make, tmp_path: Path) -> None:
    run = trainer()
    run.run()
    path = checkpoints.newest(run.folder / CHECKPOINTS)
    assert path is not None
    draw = np.random.default_rng(0)
    for name in (checkpoints.TENSORS, checkpoints.FACTS):
        content = (path / name).read_bytes()
        for place in draw.integers(0, len(content), 20):
            broken = bytearray(content)
            broken[place] ^= 1 << int(draw.integers(0, 8))
            (path / name).write_bytes(broken)
            if name == checkpoints.FACTS and json_or_none(bytes(broken)) == json_or_none(content):
                continue
            with pytest.raises((FileFormatError, UsageError, InputError)):
                trainer().go_on()
        (path / name).write_bytes(content)
    assert trainer().go_on() == 12
    (path / checkpoints.TENSORS).unlink()
    with pytest.raises(InputError, match=re.escape(checkpoints.TENSORS)):
        trainer().go_on()
    shutil.rmtree(path)
    assert trainer().go_on() == 8


def json_or_none(content: bytes) -> Any:
    try:
        return json.loads(content)
    except ValueError:
        return None


# ---- text ---------------------------------------------------------------------------------------------------------------


def test_windows_of_an_epoch_are_all_of_the_text_once() -> None:
    text = Text(np.arange(1003, dtype=np.int32), 10, seed=1)
    assert text.windows == 99
    first = text.batch(0, 99)
    assert first.shape == (99, 10)
    assert len(np.unique(first)) == 990
    assert (np.diff(first, axis=1) == 1).all()
    second = text.batch(1, 99)
    assert not np.array_equal(first, second)
    assert len(np.unique(second)) == 990
    np.testing.assert_array_equal(text.batch(5, 20), np.concatenate([text.batch(10, 10), text.batch(11, 10)]))
    np.testing.assert_array_equal(Text(np.arange(1003, dtype=np.int32), 10, seed=1).batch(0, 99), first)
    assert not np.array_equal(Text(np.arange(1003, dtype=np.int32), 10, seed=2).batch(0, 99), first)


def test_a_text_of_one_window() -> None:
    text = Text(np.arange(12, dtype=np.int32), 10, seed=0)
    assert text.windows == 1
    assert text.batch(3, 2).shape == (2, 10)
    with pytest.raises(InputError, match="the text has 12 tokens, less than one window of 13"):
        Text(np.arange(12, dtype=np.int32), 13, seed=0)


def test_what_is_held_back() -> None:
    kept, held = hold_back([str(i) for i in range(40)])
    assert held == ["19", "39"]
    assert len(kept) == 38
    lines = "".join(f"line {i}\n" for i in range(100))
    kept, held = hold_back([lines])
    assert kept[0] + held[0] == lines
    assert 0.03 < len(held[0]) / len(lines) < 0.08


def test_text_of_a_folder(tmp_path: Path) -> None:
    (tmp_path / "sub").mkdir()
    (tmp_path / ".hidden").write_text("no")
    (tmp_path / "b.txt").write_text("two")
    (tmp_path / "sub" / "a.py").write_text("three")
    (tmp_path / "a.bin").write_bytes(b"\xff\xfe\x00")
    (tmp_path / "empty.txt").write_text("")
    assert read_text_tree(tmp_path) == ["two", "three"]
    (tmp_path / "none").mkdir()
    with pytest.raises(InputError, match="holds no text: no file of it is UTF-8"):
        read_text_tree(tmp_path / "none")


# ---- what cannot be -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"steps": 0}, "steps 0 must be a whole number from 1 on"),
        ({"window": 1}, "window 1 must be a whole number from 2 on"),
        ({"learning_rate": math.nan}, "learning rate nan must lie between 0 and 100"),
        ({"warmup": 13}, "warmup of 13 steps is longer than the run of 12"),
        ({"precision": "fp8"}, "unknown precision 'fp8'; did you mean fp"),
        ({"optimizer": "adam"}, "unknown optimizer 'adam'; did you mean adamw"),
        ({"batch": 6, "micro": 4}, "6 windows of a process are no multiple of micro 4"),
        ({"beta1": 1.0}, "beta1 1.0 must lie between 0 and 1"),
    ],
)
def test_settings_that_cannot_be(changes: dict[str, Any], message: str, trainer: Make) -> None:
    with pytest.raises(UsageError, match=re.escape(message)):
        trainer(**changes)


def test_a_batch_that_processes_cannot_share() -> None:
    with pytest.raises(UsageError, match="batch of 8 windows cannot be shared by 3 processes"):
        Settings(steps=1).passes(3)


# ---- products of float16 ------------------------------------------------------------------------------------------------


def test_products_of_float16_are_summed_wide_and_rounded_once() -> None:
    torch.manual_seed(0)
    a, b = (torch.randn(64, 96).half().requires_grad_(), torch.randn(96, 32).half().requires_grad_())
    with precision._WideProducts():
        c = a @ b
        c.float().square().sum().backward()
    wanted = (a.float() @ b.float()).half()
    assert c.dtype is torch.float16
    assert torch.equal(c, wanted)
    slope = (2 * wanted.float()).half()
    assert torch.equal(a.grad, (slope.float() @ b.detach().float().T).half())  # type: ignore[arg-type]
    assert torch.equal(b.grad, (a.detach().float().T @ slope.float()).half())  # type: ignore[arg-type]


@pytest.mark.parametrize("native", [False, True])
def test_only_where_the_processor_has_none(native: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.ops.mkldnn, "_is_mkldnn_fp16_supported", lambda: native)
    found = {name: precision.multiplying(name, torch.device("cpu")) for name in ("fp32", "bf16", "fp16")}
    wide = {name for name, context in found.items() if isinstance(context, precision._WideProducts)}
    assert wide == (set() if native else {"fp16"})
    assert not isinstance(precision.multiplying("fp16", torch.device("cuda")), precision._WideProducts)
