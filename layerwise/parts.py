"""A part of both models, a tower block or an attention, run three times over the same inputs.

The reference on its own input; the quantized part on the reference's input, which shows what this part alone loses; and
the quantized part on what the quantized model really gives it. The last two are one run until the first difference.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from vl2.calib.weights import load_part
from vl2.layerwise.checkpoints import Pair
from vl2.layerwise.ledger import Ledger
from vl2.layerwise.sums import WeightSums
from vl2.layerwise.unfold import Unfolded
from vl2.model.moe import Router
from vl2.quantization import WEIGHT


@dataclass
class States:
    """What both models hold at a place, [n, …, K] each: the same object while nothing differs. modality: uint8 [n], 0
    text, 1 image."""

    reference: Tensor
    quantized: Tensor
    modality: Tensor

    @property
    def same(self) -> bool:
        return self.quantized is self.reference

    def part(self) -> None:
        """Gives the quantized model states of its own."""
        if self.same:
            self.quantized = self.reference.clone()


@dataclass(frozen=True)
class ModulePair:
    """One part of the model from both checkpoints. same: all their tensors are equal; errors: name in the checkpoint →
    Ŵ − W of the Linears and the router of `reference` that differ, by the module's name in it."""

    reference: nn.Module
    quantized: nn.Module
    same: bool
    errors: Mapping[str, tuple[str, Tensor]]


# Takes the reference's and the quantized part's tensors by their names in the checkpoint.
Unfold = Callable[[Mapping[str, Tensor], Mapping[str, Tensor]], Unfolded]


def load_pair(pair: Pair, build: Callable[[], nn.Module], prefix: str, ledger: Ledger, unfold: Unfold | None = None
              ) -> ModulePair:
    """What `build` makes, filled from both; its tensors are compared into `ledger`. prefix: as in `load_part`."""
    parts = [load_part(weights, build, prefix) for weights in (pair.reference, pair.quantized)]
    names = {name: pair.reference.sources[prefix + name][0] for name in parts[0].state_dict()}
    reference, stored = ({names[name]: tensor for name, tensor in part.state_dict().items()} for part in parts)
    same = all(torch.equal(tensor, stored[name]) for name, tensor in reference.items())
    plain = unfold(reference, stored) if unfold is not None else Unfolded(stored)
    errors = compare_tensors(pair, reference, plain, ledger)
    matrices = {name: names[name + WEIGHT] for name, module in parts[0].named_modules()
                if isinstance(module, (nn.Linear, Router))}
    return ModulePair(*parts, same, {name: (tensor, errors[tensor]) for name, tensor in matrices.items()
                                     if tensor in errors})


def compare_tensors(pair: Pair, reference: Mapping[str, Tensor], plain: Unfolded, ledger: Ledger) -> dict[str, Tensor]:
    """Puts every tensor into the ledger; gives Ŵ − W of those that differ or are packed."""
    errors = {}
    for name in reference.keys() - plain.norms:
        mine, theirs = reference[name], plain.tensors[name]
        if pair.quantized.form_of(name) is None and torch.equal(mine, theirs):
            ledger.unchanged.add(name)
            continue
        sums = WeightSums()
        sums.add(mine, theirs)
        ledger.weights[name], errors[name] = sums.figure(), theirs - mine
    return errors


@contextmanager
def recording(module: nn.Module, errors: Mapping[str, tuple[str, Tensor]], modality: Tensor, ledger: Ledger
              ) -> Iterator[None]:
    """While open, each call of a Linear of `module` adds to the ledger what its quantized matrix would have given."""
    def record(name: str, error: Tensor, linear: nn.Module, inputs: tuple[Tensor, ...], output: Tensor) -> None:
        y = output if linear.bias is None else output - linear.bias
        kinds = modality.repeat_interleave(y[..., 0].numel() // len(modality))
        ledger.sums("outputs", name).add(y, F.linear(inputs[0], error), kinds)

    hooks = [module.get_submodule(place).register_forward_hook(partial(record, name, error))
             for place, (name, error) in errors.items()]
    try:
        yield
    finally:
        for hook in hooks:
            hook.remove()


def run_part(parts: ModulePair, states: States, slices: Iterable[slice], block: tuple[str, bool], ledger: Ledger
             ) -> States:
    """The states behind a part whose output may have another shape than its input; slices: rows that it takes at once.

    block: its name, and whether it adds to what enters it; then the sum is what flows, the addend what it is measured
    by.
    """
    (name, adds), reference, quantized = block, None, None
    for rows in slices:
        x, modality = states.reference[rows], states.modality[rows]
        with recording(parts.reference, parts.errors, modality, ledger):
            y = parts.reference(x)
        own = y if parts.same else parts.quantized(x)
        z = own if states.same else parts.quantized(states.quantized[rows])
        positions = modality.repeat_interleave(y[..., 0].numel() // len(modality))
        ledger.sums("own", name).add(y - x if adds else y, own - y, positions)
        ledger.sums("stream", name).add(y, z - y, positions)
        if reference is None:
            reference = y.new_empty(len(states.reference), *y.shape[1:])
        reference[rows] = y
        if z is not y:
            if quantized is None:
                quantized = reference.clone()
            quantized[rows] = z
    return States(reference, reference if quantized is None else quantized, states.modality)
