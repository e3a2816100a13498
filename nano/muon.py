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
    x = x.mT.contiguous() if flat else x
    x = x / x.flatten(1).float().norm(dim=1).clamp_min(1e-7)[:, None, None].bfloat16()
    for _ in range(ROUNDS):
        gram = x @ x.mT
        x = torch.baddbmm(x, torch.baddbmm(gram, gram, gram, beta=b, alpha=c), x, beta=a)
    return x.mT if flat else x


@dataclass
class _Stack:
    """Matrices of one shape and their places in the flat vector."""

    size: tuple[int, int]
    places: list[slice]


class Muon:
    """Updates `master` in place from `master.grad`.

    sizes: name → shape, in the order of the flat vector.
    """

    def __init__(self, master: torch.nn.Parameter, sizes: dict[str, tuple[int, ...]], weight_decay: float):
        self.master, self.weight_decay, self.momentum = master, weight_decay, 0.95
        self.velocity = torch.zeros_like(master.data)
        self.others: list[slice] = []
        stacks: dict[tuple[int, int], list[slice]] = {}
        start = 0
        for name, size in sizes.items():
            stop = start + torch.Size(size).numel()
            if is_hidden_matrix(name, size):
                rows, columns = size[-2:]
                rows //= 3 if name.endswith(".qkv.weight") else 1
                for first in range(start, stop, rows * columns):
                    stacks.setdefault((rows, columns), []).append(slice(first, first + rows * columns))
            else:
                self.others.append(slice(start, stop))
            start = stop
        self.stacks = [_Stack(size, places) for size, places in stacks.items()]
        # What AdamW updates is gathered in a vector of its own, so that it does not pass over the matrices.
        self.gathered = torch.nn.Parameter(self._others_of(master.data))
        self.adam = torch.optim.AdamW([self.gathered], 1e-3, (0.9, 0.98), 1e-8, weight_decay, fused=True)

    def _others_of(self, vector: Tensor) -> Tensor:
        return torch.cat([vector[place] for place in self.others])

    def step(self, rate: float) -> None:
        """One update with learning rate `rate` from master.grad, float32 [P]."""
        gradient, master = self.master.grad, self.master.data
        self.velocity.lerp_(gradient, 1 - self.momentum)
        self.gathered.data.copy_(self._others_of(master))
        self.gathered.grad = self._others_of(gradient)
        self.adam.param_groups[0]["lr"] = rate
        self.adam.step()
        for place, values in zip(self.others, self._split(self.gathered.data), strict=True):
            master[place] = values
        for stack in self.stacks:
            self._move(stack, gradient, rate)

    def _split(self, vector: Tensor) -> tuple[Tensor, ...]:
        return vector.split([place.stop - place.start for place in self.others])

    def _move(self, stack: _Stack, gradient: Tensor, rate: float) -> None:
        """Weight decay and one orthogonal step for the matrices of one shape."""
        places = stack.places
        ahead = torch.stack([gradient[place] for place in places])
        ahead.lerp_(torch.stack([self.velocity[place] for place in places]), self.momentum)
        update = orthogonal(ahead.view(len(places), *stack.size)).flatten(1).float()
        scale = rate * STEP_SIZE * max(stack.size) ** 0.5
        for place, matrix in zip(places, update, strict=True):
            self.master.data[place].mul_(1 - rate * self.weight_decay).sub_(matrix, alpha=scale)

    def state_dict(self) -> dict:
        return {"velocity": self.velocity, "adam": self.adam.state_dict()}

    def load_state_dict(self, state: dict) -> None:
        self.velocity.copy_(state["velocity"])
        self.adam.load_state_dict(state["adam"])
