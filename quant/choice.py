"""Accept-if-better: of several quantizations of a matrix the one with the least output error, rounding among them."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from vl2.quant.affine import Quantized
from vl2.quant.objective import output_energies, output_errors, ratio, total


@dataclass(frozen=True)
class Choice:
    """The accepted quantization, its method's name and the error of each output [N]; rounding's error in all, and the
    energy of each output [N]."""

    quantized: Quantized
    method: str
    errors: Tensor
    rtn_error: float
    energies: Tensor

    @property
    def over_rtn(self) -> float:
        return total(self.errors) / self.rtn_error if self.rtn_error > 0 else 1.0

    def relative_errors(self, rows: Sequence[int]) -> list[float]:
        """Error over energy of so many consecutive rows each."""
        return [ratio(*parts) for parts in zip(self.errors.split(list(rows)), self.energies.split(list(rows)),
                                               strict=True)]


def choose(weight: Tensor, candidates: Mapping[str, Quantized], hessian: Tensor | None) -> Choice:
    """The candidate with the least tr(D H Dᵀ); the first of equals.

    weight: [N, K] float32; candidates: by method, "rtn" among them, so that the result is never worse than rounding on
    this Hessian.
    """
    errors = {name: output_errors(weight, made.dequantize(), hessian) for name, made in candidates.items()}
    totals = {name: total(found) for name, found in errors.items()}
    best = min(totals, key=totals.__getitem__)
    return Choice(candidates[best], best, errors[best], totals["rtn"], output_energies(weight, hessian))


def join_rows(choices: Sequence[Choice]) -> Choice:
    """The choices of a matrix's rows as one; its method is the one that most of them took."""
    if len(choices) == 1:
        return choices[0]
    parts = [choice.quantized for choice in choices]
    codes, scales = torch.cat([part.codes for part in parts]), torch.cat([part.scales for part in parts])
    (method, _), = Counter(choice.method for choice in choices).most_common(1)
    errors, energies = (torch.cat([getattr(choice, name) for choice in choices]) for name in ("errors", "energies"))
    rtn_error = sum(choice.rtn_error for choice in choices)
    return Choice(Quantized(codes, scales, parts[0].bits), method, errors, rtn_error, energies)
