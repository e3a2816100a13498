"""Muon for the matrices inside the blocks, AdamW for everything else, on one flat vector.

Muon orthogonalizes the momentum of every matrix before it is applied (K. Jordan, "Muon: an optimizer for hidden
layers", 2024), scaled so that a step is as large as AdamW's (J. Liu et al., arXiv:2502.16982, section 2.2).
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

COEFFICIENTS = (3.4445, -4.7750, 2.0315)  # of the quintic iteration; five rounds bring singular values near one
ROUNDS = 5
STEP_SIZE = 0.2  # root mean square of an AdamW update


def is_hidden_matrix(name: str, size: tuple[int, ...]) -> bool:
    """Matrices (or stacks of them, the experts) of the blocks; not embeddings, heads, norms or biases."""
    inside = ".blocks." in name or ".layers." in name
    return inside and len(size) in (2, 3) and name.endswith(".weight")


def orthogonal(matrices: Tensor) -> Tensor:
    """Replaces the singular values of [N, a, b] by about one, in bfloat16 (Newton-Schulz)."""
    a, b, c = COEFFICIENTS
    x = matrices.bfloat16()
    flat = x.shape[-2] > x.shape[-1]
    x = x.mT if flat else x
    x = x / x.flatten(1).float().norm(dim=1).clamp_min(1e-7)[:, None, None].bfloat16()
    for _ in range(ROUNDS):
        gram = x @ x.mT
        x = a * x + (b * gram + c * gram @ gram) @ x
    return x.mT if flat else x


@dataclass
class _Stack:
    """Matrices of one shape: their views of the master vector, of the gradient's momentum, and their places."""

    size: tuple[int, int]
    places: list[slice]


class Muon:
    """Updates `master` in place; `rates` are set through `rate` before every `step`.

    sizes: name → shape, in the order of the flat vector.
    """

    def __init__(self, master: torch.nn.Parameter, sizes: dict[str, tuple[int, ...]], weight_decay: float):
        self.master, self.weight_decay, self.momentum = master, weight_decay, 0.95
        self.velocity = torch.zeros_like(master.data)
        self.hidden = torch.zeros_like(master.data, dtype=torch.bool)
        stacks: dict[tuple[int, int], list[slice]] = {}
        start = 0
        for name, size in sizes.items():
            stop = start + torch.Size(size).numel()
            if is_hidden_matrix(name, size):
                self.hidden[start:stop] = True
                rows, columns = size[-2:]
                rows //= 3 if name.endswith(".qkv.weight") else 1
                for first in range(start, stop, rows * columns):
                    stacks.setdefault((rows, columns), []).append(slice(first, first + rows * columns))
            start = stop
        self.stacks = [_Stack(size, places) for size, places in stacks.items()]
        self.adam = torch.optim.AdamW([master], 1e-3, (0.9, 0.98), 1e-8, weight_decay, fused=True)

    def step(self, rate: float) -> None:
        """One update with learning rate `rate` from master.grad, float32 [P]."""
        gradient = self.master.grad
        self.velocity.lerp_(gradient, 1 - self.momentum)
        direction = torch.lerp(gradient, self.velocity, self.momentum)
        before = self.master.data.clone()
        self.master.grad = gradient.masked_fill(self.hidden, 0.0)
        self.adam.param_groups[0]["lr"] = rate
        self.adam.step()
        self.master.data.copy_(torch.where(self.hidden, before * (1 - rate * self.weight_decay), self.master.data))
        for stack in self.stacks:
            update = orthogonal(torch.stack([direction[place].view(stack.size) for place in stack.places]))
            scale = rate * STEP_SIZE * max(stack.size) ** 0.5
            for place, matrix in zip(stack.places, update, strict=True):
                self.master.data[place].sub_(matrix.flatten().float(), alpha=scale)

    def state_dict(self) -> dict:
        return {"velocity": self.velocity, "adam": self.adam.state_dict()}

    def load_state_dict(self, state: dict) -> None:
        """Also takes the state of a plain AdamW, whose first moment becomes the velocity."""
        if "adam" in state:
            self.velocity.copy_(state["velocity"])
            self.adam.load_state_dict(state["adam"])
        else:
            self.adam.load_state_dict(state)
            self.velocity.copy_(state["state"][0]["exp_avg"])
