"""Adam8bit: AdamW where its moments are float32, near it where they are 8 or 4 bits, and exact where it promises to be."""

from __future__ import annotations

import io
import json
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch

from nybble.errors import NumericError, NybbleError, UsageError
from nybble.formats.codebook import dynamic_levels
from nybble.train import adam
from nybble.train.adam import Adam8bit, groups_of, state_bytes
from nybble.train.states import MAPS

HUGE = 1 << 40
SHAPES = [(), (1,), (255,), (256,), (257,), (3, 5, 129), (64, 100)]
widths = pytest.mark.parametrize("bits", [8, 4])

pytestmark = pytest.mark.usefixtures("one_thread")


def drawn(*shape: int, seed: int = 0, scale: float = 1.0) -> torch.Tensor:
    """float32 of many magnitudes."""
    generator = torch.Generator().manual_seed(seed)
    return scale * torch.randn(shape, generator=generator) * torch.rand(shape, generator=generator) ** 3


def parameters(seed: int = 0, dtype: torch.dtype = torch.float32) -> list[torch.nn.Parameter]:
    return [torch.nn.Parameter(drawn(*shape, seed=seed + i).to(dtype)) for i, shape in enumerate(SHAPES)]


def give_gradients(some: list[torch.nn.Parameter], seed: int) -> None:
    for i, parameter in enumerate(some):
        parameter.grad = drawn(*parameter.shape, seed=1000 * seed + i, scale=1e-2).to(parameter.dtype)


def saved(optimizer: torch.optim.Optimizer) -> dict[str, Any]:
    """The optimizer's state, through a file."""
    file = io.BytesIO()
    torch.save(optimizer.state_dict(), file)
    file.seek(0)
    return torch.load(file, weights_only=True)


def moment(state: dict[str, Any], which: int, bits: int, count: int) -> tuple[torch.Tensor, torch.Tensor]:
    """(values float32 [count], absmax of each element's block) of a quantized moment."""
    how, name = MAPS[bits][which], adam.MOMENTS[which]
    absmax = state[f"{name}_absmax"]
    return how.load(state[f"{name}_codes"], absmax, count), absmax.repeat_interleave(how.block)[:count]


def test_float_moments_give_adamw() -> None:
    mine, theirs = parameters(), parameters()
    groups = [[{"params": some[:3], "weight_decay": 0.3}, {"params": some[3:], "lr": 3e-3}] for some in (mine, theirs)]
    ours = Adam8bit(groups[0], 1e-2, (0.9, 0.95), eps=1e-7, least=HUGE)
    other = torch.optim.AdamW(groups[1], 1e-2, (0.9, 0.95), eps=1e-7)
    schedules = [torch.optim.lr_scheduler.OneCycleLR(o, [1e-2, 3e-3], total_steps=51) for o in (ours, other)]
    for step in range(50):
        give_gradients(mine, step)
        give_gradients(theirs, step)
        for optimizer, schedule in zip((ours, other), schedules, strict=True):
            optimizer.step()
            schedule.step()
    for one, two in zip(mine, theirs, strict=True):
        torch.testing.assert_close(one, two, rtol=3e-6, atol=1e-7)
    assert state_bytes(ours) == state_bytes(other) == sum(8 * p.numel() + 4 for p in mine)


@widths
def test_stored_moments_are_within_the_bound_of_their_map(bits: int) -> None:
    count = 5000
    parameter = torch.nn.Parameter(drawn(count))
    optimizer = Adam8bit([parameter], 1e-3, (0.9, 0.99), bits=bits)
    before = [torch.zeros(count), torch.zeros(count)]
    for step in range(5):
        parameter.grad = drawn(count, seed=step)
        optimizer.step()
        exact = [before[0].lerp(parameter.grad, 0.1), before[1] * 0.99 + 0.01 * parameter.grad**2]
        for which in (0, 1):
            values, absmax = moment(optimizer.state[parameter], which, bits, count)
            error = ((values - exact[which]).abs() / absmax).max().item()
            bound = MAPS[bits][which].max_error
            assert bound / 3 < error <= bound, (step, which)
            before[which] = values


@widths
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_a_run_that_was_saved_goes_on_bit_by_bit(bits: int, dtype: torch.dtype) -> None:
    some = parameters(dtype=dtype)
    optimizer = Adam8bit(some, 1e-2, bits=bits, least=200)
    for step in range(4):
        give_gradients(some, step)
        optimizer.step()
    state = saved(optimizer)
    groups = json.loads(json.dumps(state["param_groups"]))  # plain numbers
    others = [torch.nn.Parameter(p.detach().clone()) for p in some]
    resumed = Adam8bit(others, 5.0, bits=12 - bits, least=HUGE)  # the saved settings count
    resumed.load_state_dict({"state": state["state"], "param_groups": groups})
    for step in range(4, 8):
        for each, its in ((some, optimizer), (others, resumed)):
            give_gradients(each, step)
            its.step()
    for one, two in zip(some, others, strict=True):
        assert torch.equal(one, two)
        for name, value in optimizer.state[one].items():
            assert torch.equal(value, resumed.state[two][name])
            assert value.dtype in (torch.float32, torch.uint8), "never the parameter's type"
    assert optimizer.state[some[2]].keys() == {
        "step", "exp_avg_codes", "exp_avg_absmax", "exp_avg_sq_codes", "exp_avg_sq_absmax",
    }  # fmt: skip
    assert optimizer.state[some[1]].keys() == {"step", "exp_avg", "exp_avg_sq"}


def test_states_of_adamw_are_taken() -> None:
    mine, theirs = ([*parameters(), torch.nn.Parameter(drawn(9, 31).T)] for _ in range(2))  # one is not contiguous
    other = torch.optim.AdamW(theirs, 1e-2)
    give_gradients(theirs, 0)
    other.step()
    for one, two in zip(mine, theirs, strict=True):
        one.data.copy_(two.data)
    ours = Adam8bit(mine, 1.0, least=0)
    ours.load_state_dict(saved(other))
    for some, optimizer in ((mine, ours), (theirs, other)):
        give_gradients(some, 1)
        optimizer.step()
    for one, two in zip(mine, theirs, strict=True):
        torch.testing.assert_close(one, two, rtol=3e-6, atol=1e-7)
    assert state_bytes(ours) == state_bytes(other)


@widths
def test_pieces_and_strides_change_nothing(bits: int, monkeypatch: pytest.MonkeyPatch) -> None:
    start = drawn(77, 131, 2)

    def run(parameter: torch.nn.Parameter) -> tuple[torch.Tensor, dict[str, Any]]:
        optimizer = Adam8bit([parameter], 1e-2, bits=bits)
        for step in range(3):
            gradient = drawn(77, 131, 2, seed=step)
            parameter.grad = gradient if parameter.is_contiguous() else gradient.transpose(0, 1).contiguous().transpose(0, 1)
            optimizer.step()
        return parameter.detach(), optimizer.state[parameter]

    whole, states = run(torch.nn.Parameter(start.clone()))
    turned = torch.nn.Parameter(start.transpose(0, 1).contiguous().transpose(0, 1))
    assert not turned.is_contiguous()
    monkeypatch.setattr(adam, "PIECE", 1024)
    for other, other_states in (run(torch.nn.Parameter(start.clone())), run(turned)):
        # float sums of vectors of other lengths may be rounded otherwise where a processor fuses products
        torch.testing.assert_close(other, whole, rtol=1e-6, atol=1e-7)
        assert {name: value.shape for name, value in other_states.items()} == {n: v.shape for n, v in states.items()}


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_parameters_of_16_bits_are_updated_in_float32_and_rounded(dtype: torch.dtype) -> None:
    narrow = torch.nn.Parameter(drawn(5000).to(dtype))
    full = torch.nn.Parameter(narrow.detach().float())
    for parameter in (narrow, full):
        parameter.grad = drawn(5000, seed=1).to(dtype).to(parameter.dtype)
        Adam8bit([parameter], 1e-2).step()
    assert torch.equal(narrow, full.to(dtype))


def squares(make: Callable[[list[torch.nn.Parameter]], torch.optim.Optimizer]) -> float:
    """Loss of a least-squares problem after 300 steps, over that at the start."""
    x, target = drawn(400, 128, seed=1), drawn(128, 40, seed=2)
    weight = torch.nn.Parameter(torch.zeros(128, 40))
    optimizer = make([weight])
    losses = []
    for step in range(300):
        for group in optimizer.param_groups:
            group["lr"] = 0.03 * (1 - step / 300)

        def closure() -> float:
            optimizer.zero_grad()
            loss = (x @ (weight - target)).square().mean()
            loss.backward()
            return loss.item()

        losses.append(optimizer.step(closure))
    return losses[-1] / losses[0]


@pytest.mark.parametrize(("bits", "limit"), [(8, 1e-4), (4, 1e-2)])
def test_least_squares_converge(bits: int, limit: float) -> None:
    assert squares(lambda some: torch.optim.AdamW(some, weight_decay=0)) < 1e-4
    assert squares(lambda some: Adam8bit(some, weight_decay=0, bits=bits)) < limit


def test_a_tiny_gpt2_learns_as_with_adamw(tiny: Callable[..., Any]) -> None:
    ids = (torch.arange(8 * 33).view(8, 33) * 7 % 31 + 3) % 29  # a pattern to learn

    def learn(make: Callable[[Any], torch.optim.Optimizer]) -> float:
        model = tiny("gpt2")
        optimizer = make(model)
        for _ in range(60):
            optimizer.zero_grad()
            loss = torch.nn.functional.cross_entropy(model(input_ids=ids[:, :-1]).logits.flatten(0, 1), ids[:, 1:].flatten())
            loss.backward()
            optimizer.step()
        return loss.item()

    plain = learn(lambda model: torch.optim.AdamW(groups_of(model, 0.1), 3e-3))
    assert plain < 0.5
    for bits, wide, limit in ((8, True, 0.003), (8, False, 0.003), (4, True, 0.03), (4, False, 0.05)):
        found = learn(lambda model, b=bits, w=wide: Adam8bit(groups_of(model, 0.1, wide=w), 3e-3, bits=b))  # type: ignore[misc]
        assert abs(found - plain) < limit, (bits, wide, found, plain)


@widths
def test_an_element_whose_gradient_fades_takes_no_leap(bits: int) -> None:
    """The zero point: a second moment stored as zero beside a first that is not would give a step of m / eps."""
    parameter = torch.nn.Parameter(torch.zeros(4096))
    optimizer = Adam8bit([parameter], 1e-3, weight_decay=0, bits=bits)
    gradient = torch.ones(4096)
    gradient[1::2] = 1e-4 if bits == 8 else 2e-2
    for _ in range(5):
        parameter.grad = gradient.clone()
        optimizer.step()
        if gradient[1]:
            assert (moment(optimizer.state[parameter], 0, bits, 4096)[0] > 0).all()
        gradient[1::2] = 0
    assert parameter.detach().abs().max() < 5 * 1.01e-3


@pytest.mark.parametrize("value", [float("nan"), float("inf"), -float("inf"), 1e20])
def test_gradients_that_are_not_finite_are_refused(value: float) -> None:
    some = parameters()
    optimizer = Adam8bit(some, 1e-2, least=0)
    give_gradients(some, 0)
    optimizer.step()
    weights, states = [p.detach().clone() for p in some], saved(optimizer)
    give_gradients(some, 1)
    assert some[4].grad is not None
    some[4].grad[200] = value
    with pytest.raises(NumericError, match=r"gradient of parameter 4 \[257\] is .*; nothing was changed") as caught:
        optimizer.step()
    assert "\n" not in str(caught.value)
    assert all(torch.equal(p, w) for p, w in zip(some, weights, strict=True))
    for number, state in saved(optimizer)["state"].items():
        assert all(torch.equal(value, states["state"][number][name]) for name, value in state.items())


def test_sparse_gradients_are_refused() -> None:
    layer = torch.nn.Embedding(300, 20, sparse=True)
    optimizer = Adam8bit(layer.parameters())
    layer(torch.tensor([3, 5])).sum().backward()
    with pytest.raises(UsageError, match="dense gradients, that of parameter 0 is sparse"):
        optimizer.step()


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"lr": -1.0}, "lr must be a finite number from 0, got -1.0"),
        ({"eps": float("nan")}, "eps must be"),
        ({"weight_decay": float("inf")}, "weight_decay must be"),
        ({"betas": (0.9, 1.0)}, "betas must be two numbers from 0, below 1"),
        ({"bits": 5}, "bits must be 4 or 8, got 5"),
        ({"least": -1}, "least must be"),
    ],
)
def test_wrong_settings_are_refused(settings: dict[str, Any], message: str) -> None:
    with pytest.raises(UsageError, match=message):
        Adam8bit(parameters(), **settings)
    optimizer = Adam8bit(parameters())
    with pytest.raises(UsageError, match=message):
        optimizer.add_param_group({"params": parameters(9), **settings})
    assert len(optimizer.param_groups) == 1


def test_other_types_and_states_are_refused() -> None:
    with pytest.raises(UsageError, match=r"got torch\.float64"):
        Adam8bit([torch.nn.Parameter(torch.zeros(3, dtype=torch.float64))])
    some = parameters()
    optimizer = Adam8bit(some, least=0)
    give_gradients(some, 0)
    optimizer.step()
    state = saved(optimizer)
    state["state"][4]["exp_avg_absmax"] = torch.zeros(7)
    other = Adam8bit(parameters(), 0.5)
    with pytest.raises(NybbleError, match="state of parameter 4 is of another model"):
        other.load_state_dict(state)
    assert other.param_groups[0]["lr"] == 0.5
    assert not other.state
    with pytest.raises(UsageError, match=r"groups of \[7\] parameters, this one of \[6\]"):
        Adam8bit(parameters()[1:]).load_state_dict(saved(optimizer))


def test_groups_and_bytes(tiny: Callable[..., Any]) -> None:
    model = tiny("gpt2")  # its head is tied to the embedding
    model.transformer.h[0].mlp.c_fc.bias.requires_grad_(False)
    matrices, vectors, embeddings = groups_of(model, 0.1)
    assert [(g["weight_decay"], g["wide"]) for g in (matrices, vectors, embeddings)] == [(0.1, False), (0.0, False), (0.1, True)]
    assert [id(p) for p in embeddings["params"]] == [id(model.transformer.wte.weight), id(model.transformer.wpe.weight)]
    assert model.lm_head.weight is model.transformer.wte.weight
    grouped = [p for group in (matrices, vectors, embeddings) for p in group["params"]]
    assert len({id(p) for p in grouped}) == len(grouped) == sum(p.requires_grad for p in model.parameters())
    assert all(p.ndim == 1 for p in vectors["params"])
    assert len(groups_of(model, 0.1, wide=False)) == 2
    untied = groups_of(tiny("gpt2-untied"), 0.1)
    assert sum(p.numel() for p in untied[0]["params"]) == sum(p.numel() for p in matrices["params"]) + 97 * 64

    for p in grouped:
        p.grad = torch.zeros_like(p)
    optimizer = Adam8bit(groups_of(model, 0.1))
    assert state_bytes(optimizer) == 0
    optimizer.step()
    expected = 0
    for p in grouped:
        narrow = p.numel() >= 4096 and not any(p is e for e in embeddings["params"])
        expected += 4 + (2 * p.numel() + 8 * -(-p.numel() // 256) if narrow else 8 * p.numel())
    assert state_bytes(optimizer) == expected
    assert all((p == p.detach()).all() for p in grouped)


def test_nearer_to_adamw_than_bitsandbytes() -> None:
    """The same maps and blocks; theirs stores small second moments as zero, and finds codes near zero by a coarse table."""
    bnb = pytest.importorskip("bitsandbytes")
    exact, mine, theirs = some = [torch.nn.Parameter(drawn(8192)) for _ in range(3)]
    plain, ours = torch.optim.AdamW([exact], 1e-3), Adam8bit([mine], 1e-3)
    other = bnb.optim.AdamW8bit([theirs], 1e-3, weight_decay=1e-2)
    for step in range(100):
        for parameter in some:
            parameter.grad = drawn(8192, seed=step)
        plain.step()
        ours.step()
        try:
            other.step()
        except (RuntimeError, NotImplementedError, AttributeError) as error:
            pytest.skip(f"bitsandbytes {bnb.__version__} has no 8-bit AdamW for this processor: {error}")
        if step == 0:
            torch.testing.assert_close(mine, theirs, rtol=1e-5, atol=1e-7)
            state = other.state[theirs]
            np.testing.assert_allclose(ours.state[mine]["exp_avg_absmax"], state["absmax1"], rtol=1e-6)
            codes = ours.state[mine]["exp_avg_codes"]
            large = np.abs(dynamic_levels()[codes.numpy()]) > 0.01  # its table for processors is coarse near zero
            assert (codes == state["state1"])[large].float().mean() > 0.99
    far = [(parameter - exact).square().mean().sqrt().item() for parameter in (mine, theirs)]
    assert 0 < far[0] < far[1] < 1e-3
