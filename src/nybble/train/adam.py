"""AdamW with its two moments in 8 or 4 bits: a quarter or an eighth of the memory of float32 states.

The step is that of torch.optim.AdamW, decoupled weight decay and bias correction included (Loshchilov and Hutter, arXiv
1711.05101), computed in float32 from moments that are decoded, used and stored again in pieces. `states` says how moments are
stored, and from which papers. Parameters under `least` elements keep float32 moments, and so do groups marked `wide`: the
stable embedding rule (arXiv 2110.02861, section 2.3), since rows of an embedding get gradients of very different size. In a
small model, whose embedding is a fifth of all, that rule alone takes more memory than all 8-bit moments.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from typing import Any, overload

import torch
from torch.nn.utils.parametrize import is_parametrized
from torch.optim.optimizer import ParamsT

from nybble.errors import NumericError, UsageError
from nybble.train.states import MAPS, BlockMap

PIECE = 1 << 17
"""Elements worked on at once, whole blocks: a dozen temporaries of half a megabyte, which stay in a cache."""
LEAST = 4096
LARGEST = float(torch.finfo(torch.float32).max) ** 0.5
"""The square of a gradient beyond this is no float32."""
TYPES = (torch.float32, torch.bfloat16, torch.float16)
MOMENTS = ("exp_avg", "exp_avg_sq")
"""Names of the moments in a state, as torch.optim.AdamW has them; `_codes` and `_absmax` follow where they are quantized."""

State = dict[str, Any]


class Adam8bit(torch.optim.Optimizer):
    """AdamW whose moments are stored in `bits` (8 or 4) a value.

    Parameters are float32, bfloat16 or float16 of any shape and device; those of 16 bits are updated in float32 and rounded.
    `weight_decay`, `lr`, `betas`, `eps`, `bits`, `least` (parameters of fewer elements keep float32 moments) and `wide` (all of
    the group do) can be set for each parameter group.

    A step refuses, with parameters and states as they were: a gradient that is not finite or whose square overflows
    (NumericError; a GradScaler leaves such steps out), and a sparse one (UsageError). Wrong settings raise UsageError.
    `state_dict` holds tensors and plain numbers; a run that loads it goes on bit by bit as the one that saved it. States saved
    by torch.optim.AdamW are taken as they are, and stay float32.
    """

    def __init__(
        self,
        params: ParamsT,
        lr: float = 1e-3,
        betas: tuple[float, float] = (0.9, 0.999),
        eps: float = 1e-8,
        weight_decay: float = 1e-2,
        *,
        bits: int = 8,
        least: int = LEAST,
    ) -> None:
        adamw = {"lr": lr, "betas": betas, "eps": eps, "weight_decay": weight_decay}
        super().__init__(params, {**adamw, "bits": bits, "least": least, "wide": False})

    def add_param_group(self, param_group: dict[str, Any]) -> None:
        super().add_param_group(param_group)
        try:
            _check_group(self.param_groups[-1])
        except UsageError:
            self.param_groups.pop()
            raise

    @overload
    def step(self, closure: None = None) -> None: ...
    @overload
    def step(self, closure: Callable[[], float]) -> float: ...
    @torch.no_grad()
    def step(self, closure: Callable[[], float] | None = None) -> float | None:
        """Update every parameter that has a gradient; the loss that `closure` returns, which is called first."""
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        work = [(i, p, group) for i, (p, group) in enumerate(self._parameters()) if p.grad is not None and p.numel()]
        _check_gradients([(i, p) for i, p, _ in work])
        for _, parameter, group in work:
            state = self.state[parameter]
            if not state:
                state.update(_empty_state(parameter, group))
            _update(parameter, state, group)
        return loss

    def _parameters(self) -> Iterator[tuple[torch.Tensor, dict[str, Any]]]:
        return ((parameter, group) for group in self.param_groups for parameter in group["params"])

    def __setstate__(self, state: dict[str, Any]) -> None:
        super().__setstate__(state)
        for group in self.param_groups:  # those that another optimizer saved
            for name, value in self.defaults.items():
                group.setdefault(name, value)

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Take what `state_dict` of an optimizer with the same groups gave, copied and moved to the parameters' devices. Raises
        UsageError where groups or shapes differ, with nothing changed."""
        saved, groups = state_dict["state"], state_dict["param_groups"]
        sizes, mine = ([len(group["params"]) for group in some] for some in (groups, self.param_groups))
        if sizes != mine:
            raise UsageError(
                f"the saved optimizer has groups of {sizes} parameters, this one of {mine}; make it as it was made then"
            )
        numbered = [(number, group) for group in groups for number in group["params"]]
        pairs = list(zip(numbered, self._parameters(), strict=True))
        for (number, group), (parameter, _) in pairs:
            if saved.get(number):
                _check_state(number, saved[number], parameter, group.get("bits", self.defaults["bits"]))
        # torch would turn codes and moments into numbers of the parameter's type: it gets the groups only.
        super().load_state_dict({**state_dict, "state": {}})
        for (number, _), (parameter, _) in pairs:
            if saved.get(number):
                self.state[parameter] = {name: _copied(name, value, parameter) for name, value in saved[number].items()}


def groups_of(model: torch.nn.Module, weight_decay: float, wide: bool = True) -> list[dict[str, Any]]:
    """Parameter groups of a model: matrices decay, vectors (biases, norms) do not, and embeddings, which decay as the matrices
    that they are, keep float32 moments where `wide`. A head tied to an embedding is that embedding. Frozen parameters and empty
    groups are left out. Any torch optimizer takes these groups."""
    tables = (torch.nn.Embedding, torch.nn.EmbeddingBag)
    embeddings = {id(_weight_of(module)) for module in model.modules() if isinstance(module, tables)}
    groups: dict[tuple[bool, bool], list[torch.nn.Parameter]] = {(True, False): [], (False, False): [], (True, True): []}
    for parameter in model.parameters():
        if parameter.requires_grad:
            matrix = parameter.ndim >= 2
            groups[matrix, matrix and wide and id(parameter) in embeddings].append(parameter)
    return [
        {"params": members, "weight_decay": weight_decay if decays else 0.0, "wide": is_wide}
        for (decays, is_wide), members in groups.items()
        if members
    ]


def _weight_of(module: torch.nn.Module) -> Any:
    """The parameter behind a weight, also where each use of it computes another tensor (quantization-aware training)."""
    return module.parametrizations["weight"].original if is_parametrized(module, "weight") else module.weight  # type: ignore[index, union-attr]


def state_bytes(optimizer: torch.optim.Optimizer) -> int:
    """Bytes of all tensors in an optimizer's state, of Adam8bit or any other; 0 before the first step."""
    tensors = (value for state in optimizer.state.values() for value in state.values() if isinstance(value, torch.Tensor))
    return sum(tensor.numel() * tensor.element_size() for tensor in tensors)


def _check_group(group: dict[str, Any]) -> None:
    for name in ("lr", "eps", "weight_decay", "least"):
        if not 0 <= group[name] < float("inf"):
            raise UsageError(f"{name} must be a finite number from 0, got {group[name]}")
    if len(group["betas"]) != 2 or not all(0 <= beta < 1 for beta in group["betas"]):
        raise UsageError(f"betas must be two numbers from 0, below 1, got {group['betas']}")
    if group["bits"] not in MAPS:
        raise UsageError(f"bits must be {' or '.join(map(str, sorted(MAPS)))}, got {group['bits']}")
    for parameter in group["params"]:
        if parameter.dtype not in TYPES:
            raise UsageError(f"Adam8bit takes float32, bfloat16 and float16 parameters, got {parameter.dtype}; use adamw for it")


def _check_gradients(work: list[tuple[int, torch.Tensor]]) -> None:
    """Raise UsageError or NumericError for the first gradient that a step refuses."""
    peaks = []
    for index, parameter in work:
        gradient = parameter.grad
        assert gradient is not None
        if gradient.layout != torch.strided:
            raise UsageError(f"Adam8bit takes dense gradients, that of parameter {index} is sparse; give its layer sparse=False")
        low, high = gradient.aminmax()  # NaN where there is one
        peaks.append(torch.maximum(-low, high).float().to(work[0][1].device))
    if not peaks:
        return
    for (index, parameter), peak in zip(work, torch.stack(peaks).tolist(), strict=True):  # one wait for the device
        if not peak <= LARGEST:
            kind = f"as large as {peak:.3g}, whose square overflows float32" if math.isfinite(peak) else "not finite"
            raise NumericError(
                f"the gradient of parameter {index} {list(parameter.shape)} is {kind}; nothing was changed: "
                "lower the learning rate or the loss scale, clip gradients, or leave this step out"
            )


def _empty_state(parameter: torch.Tensor, group: dict[str, Any]) -> State:
    """The state before the first step. `step` is a float32 on the CPU, as torch.optim.AdamW has it."""
    state: State = {"step": torch.tensor(0.0)}
    narrow = not group["wide"] and parameter.numel() >= group["least"]
    for name, how in zip(MOMENTS, MAPS[group["bits"]], strict=True):
        if narrow:
            state[f"{name}_codes"], state[f"{name}_absmax"] = how.zeros(parameter.numel(), parameter.device)
        else:
            state[name] = torch.zeros_like(parameter, dtype=torch.float32, memory_format=torch.contiguous_format)
    return state


def _update(parameter: torch.Tensor, state: State, group: dict[str, Any]) -> None:
    """One step of one parameter. Its operations and their order are torch.optim.AdamW's, so that float32 moments agree with it.
    Temporaries have the size of a piece, except for a parameter or gradient that is not contiguous."""
    assert parameter.grad is not None
    (beta1, beta2), lr = group["betas"], float(group["lr"])
    state["step"] += 1
    step = state["step"].item()
    step_size, root = lr / (1 - beta1**step), (1 - beta2**step) ** 0.5
    flat, gradients = parameter.reshape(-1), parameter.grad.reshape(-1)
    for start in range(0, flat.numel(), PIECE):
        part = flat[start : start + PIECE]
        weight, gradient = part.float(), gradients[start : start + PIECE].float()  # float32 ones are not copied
        moments = [_Moment(state, name, how, start, part.numel()) for name, how in zip(MOMENTS, MAPS[group["bits"]], strict=True)]
        first, second = (moment.values for moment in moments)
        weight.mul_(1 - lr * group["weight_decay"])
        first.lerp_(gradient, 1 - beta1)
        second.mul_(beta2).addcmul_(gradient, gradient, value=1 - beta2)
        weight.addcdiv_(first, second.sqrt().div_(root).add_(group["eps"]), value=-step_size)
        for moment in moments:
            moment.store()
        if part.dtype != torch.float32:
            part.copy_(weight)
    if not parameter.is_contiguous():  # flat was a copy
        parameter.copy_(flat.view(parameter.shape))


class _Moment:
    """A piece of one moment as float32, `values`, which `store` writes back."""

    def __init__(self, state: State, name: str, how: BlockMap, start: int, count: int) -> None:
        self.how = how
        self.codes: torch.Tensor | None = None
        if name in state:
            self.values: torch.Tensor = state[name].view(-1)[start : start + count]
            return
        (codes, blocks), (first_code, first_block) = how.sizes(count), how.sizes(start)
        self.codes = state[f"{name}_codes"][first_code : first_code + codes]
        self.absmax: torch.Tensor = state[f"{name}_absmax"][first_block : first_block + blocks]
        self.values = how.load(self.codes, self.absmax, count)

    def store(self) -> None:
        if self.codes is not None:
            self.how.store(self.values, self.codes, self.absmax)


def _check_state(number: int, state: State, parameter: torch.Tensor, bits: int) -> None:
    """Raise UsageError for a saved state that is none of this parameter."""
    count = parameter.numel()
    expected: dict[str, tuple[torch.dtype, tuple[int, ...]]] = {}
    for name, how in zip(MOMENTS, MAPS.get(bits, MAPS[8]), strict=True):
        if name in state:
            expected[name] = state[name].dtype, tuple(parameter.shape)
        else:
            codes, blocks = how.sizes(count)
            expected |= {f"{name}_codes": (torch.uint8, (codes,)), f"{name}_absmax": (torch.float32, (blocks,))}
    found = {name: (value.dtype, tuple(value.shape)) for name, value in state.items() if name != "step"}
    if bits not in MAPS or "step" not in state or found != expected:
        raise UsageError(f"the state of parameter {number} is of another model or optimizer: it has {found}, expected {expected}")


def _copied(name: str, value: Any, parameter: torch.Tensor) -> Any:
    if name == "step":  # an AdamW that is fused or capturable keeps it on the device
        return torch.as_tensor(value, dtype=torch.float32).cpu().clone()
    if name in MOMENTS:
        return value.to(device=parameter.device, dtype=torch.float32, copy=True).contiguous()
    return value.to(device=parameter.device, copy=True)
