"""Puts modules in the place of others while a model is traced, so that one operator stands for each."""

from __future__ import annotations

from collections.abc import Mapping

from torch import nn

Substitutes = Mapping[type[nn.Module], type[nn.Module]]


def substitute(model: nn.Module, substitutes: Substitutes) -> nn.Module:
    """Puts `substitutes[type(child)](child)` in the place of every such child of the model, which is returned."""
    for module in list(model.modules()):
        for name, child in list(module.named_children()):
            if type(child) in substitutes:
                setattr(module, name, substitutes[type(child)](child))
    return model
