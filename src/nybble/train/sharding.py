"""Weights, gradients and the optimizer's states in parts, one with each process: models that one device would not hold.

PyTorch's fully sharded data parallelism (FSDP2; ZeRO stage 3, Rajbhandari et al. 2020): every block of the model is put together
when a pass comes to it and taken apart after. Checkpoints hold all of it as one process would have it, so a run can go on with
other processes' parts, or without any.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import nn
from torch.distributed.checkpoint import state_dict as states
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import DTensor

from nybble.train.blocks import blocks_of
from nybble.train.world import World

WHOLE = states.StateDictOptions(full_state_dict=True, cpu_offload=True)


def shard(model: nn.Module, world: World) -> None:
    """Take a model apart, in place: block by block, and the rest."""
    mesh = init_device_mesh(world.device.type, (world.size,))
    for block in blocks_of(model):
        fully_shard(block, mesh=mesh)
    fully_shard(model, mesh=mesh)


def whole_weights(model: nn.Module) -> dict[str, torch.Tensor]:
    """The state dict of the whole model, on the CPU: in the first process, nothing in others. All processes call it."""
    found: dict[str, Any] = states.get_model_state_dict(model, options=WHOLE)
    return found


def whole_states(model: nn.Module, optimizer: torch.optim.Optimizer) -> dict[str, Any]:
    """The optimizer's state dict as of a model in one piece, parameters by number: in the first process, nothing in others. All
    processes call it."""
    found: Any = states.get_optimizer_state_dict(model, optimizer, options=WHOLE)
    if not found:
        return {}
    numbers = {name: number for number, name in enumerate(_names(model, optimizer))}
    groups = [{**group, "params": [numbers[name] for name in group["params"]]} for group in found["param_groups"]]
    return {"state": {numbers[name]: values for name, values in found["state"].items()}, "param_groups": groups}


def put_back(model: nn.Module, optimizer: torch.optim.Optimizer, weights: dict[str, Any], moments: dict[str, Any]) -> None:
    """Give each process its parts of what `whole_weights` and `whole_states` gave. All processes call it."""
    options = states.StateDictOptions(full_state_dict=True)
    states.set_model_state_dict(model, weights, options=options)
    names = _names(model, optimizer)
    groups = [{**group, "params": [names[number] for number in group["params"]]} for group in moments["param_groups"]]
    known: Any = {"state": {names[number]: values for number, values in moments["state"].items()}, "param_groups": groups}
    states.set_optimizer_state_dict(model, optimizer, known, options=options)


def full(value: torch.Tensor) -> float:
    """A number that may be spread over processes. All of them call it."""
    return float(value.full_tensor() if isinstance(value, DTensor) else value)


def _names(model: nn.Module, optimizer: torch.optim.Optimizer) -> list[str]:
    """Names of the parameters by number, as `Optimizer.state_dict` counts."""
    known = {id(parameter): name for name, parameter in model.named_parameters()}
    return [known[id(parameter)] for group in optimizer.param_groups for parameter in group["params"]]
