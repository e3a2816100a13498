"""Accept-if-better: of several quantizations of a matrix the one with the least output error, rounding among them."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
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


def join_rows(choices: Iterable[Choice], rows: int) -> Choice:
    """The choices of a matrix's consecutive rows, `rows` in all, as one; its method is the one that most of them took.

    Codes are copied as they come: kept apart, they would lie between what the next rows need and make the heap grow.
    """
    codes, begin, rtn_error, methods, parts = None, 0, 0.0, Counter(), []
    for choice in choices:
        made = choice.quantized
        if codes is None:
            codes = made.codes.new_empty(rows, made.codes.shape[1])
        codes[begin : begin + len(made.codes)] = made.codes
        begin += len(made.codes)
        rtn_error += choice.rtn_error
        methods[choice.method] += 1
        parts.append((made.scales, choice.errors, choice.energies))
    assert begin == rows, f"choices of {begin} rows, expected {rows}"
    scales, errors, energies = (torch.cat(values) for values in zip(*parts, strict=True))
    (method, _), = methods.most_common(1)
    return Choice(Quantized(codes, scales, made.bits), method, errors, rtn_error, energies)
