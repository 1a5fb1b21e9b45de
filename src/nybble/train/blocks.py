"""The list of equal blocks that a transformer is made of."""

from __future__ import annotations

from torch import nn

from nybble.errors import InputError


def blocks_of(model: nn.Module) -> nn.ModuleList:
    """The longest list of modules by parameters. Raises InputError where there is none."""
    found = [module for module in model.modules() if isinstance(module, nn.ModuleList) and len(module) > 0]
    if not found:
        raise InputError(f"{type(model).__name__} has no list of blocks")
    return max(found, key=lambda module: sum(p.numel() for p in module.parameters()))
