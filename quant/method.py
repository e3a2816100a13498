"""The methods by name, as the ablation compares them: which folds, and which candidates a matrix may take."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from vl2.errors import VL2Error
from vl2.quant.affine import Quantized
from vl2.quant.choice import Choice, choose, join_rows
from vl2.quant.gptq import Factor, factorize, gptq_codes
from vl2.quant.imatrix import imatrix
from vl2.quant.rtn import rtn
from vl2.quant.scheme import Scheme
from vl2.quant.statistics import Statistics

# Of a weight at once: an lm_head of 129,280 rows would need ten copies of 0.7 GB. More than 32 MiB as float32, as glibc
# maps such blocks by themselves and gives them back; smaller ones leave holes between what is kept.
CHUNK_ELEMENTS = 9 << 20


@dataclass(frozen=True)
class Method:
    """`folds`: scale inputs first (AWQ). `candidates`: tried beside rounding; "gptq+search" needs "search" with it."""

    folds: bool
    candidates: tuple[str, ...]

    @property
    def needs_statistics(self) -> bool:
        return self.folds or any(name.startswith("gptq") for name in self.candidates)


METHODS = {
    "rtn": Method(False, ()),
    "search": Method(False, ("search",)),
    "awq": Method(True, ()),
    "awq+search": Method(True, ("search",)),
    "gptq": Method(False, ("gptq",)),
    "gptq+search": Method(False, ("search", "gptq", "gptq+search")),
    "awq+gptq": Method(True, ("search", "gptq", "gptq+search")),
}
# The candidate whose scales each form of GPTQ takes.
_GPTQ_SCALES = {"gptq": "rtn", "gptq+search": "search"}
DEFAULT_METHOD = "awq+gptq"


def method_named(name: str) -> Method:
    """Raises VL2Error listing the methods when there is none of this name."""
    if name not in METHODS:
        raise VL2Error(f"there is no method `{name}`, expected one of {', '.join(METHODS)}")
    return METHODS[name]


def quantize_weight(weight: Tensor, statistics: Statistics | None, scheme: Scheme, method: Method) -> Choice:
    """The method's candidate with the least output error on the statistics' Hessian, rounding among them.

    weight: [N, K] float32, rows of all Linears that share the site and the scheme (one factorisation serves them).
    Raises VL2Error when the method needs statistics and there are none.
    """
    if method.needs_statistics and statistics is None:
        raise VL2Error("this method needs calibration statistics", "calibrate first, or use the method `search`")
    # where no damping gives a factor, rounding with searched scales is what remains
    factor = factorize(statistics.hessian) if set(_GPTQ_SCALES) & set(method.candidates) else None
    chunks = weight.split(max(1, CHUNK_ELEMENTS // weight.shape[1]))
    return join_rows((_quantize_rows(rows, statistics, scheme, (method, factor)) for rows in chunks), len(weight))


def _quantize_rows(
    weight: Tensor, statistics: Statistics | None, scheme: Scheme, how: tuple[Method, Factor | None]
) -> Choice:
    method, factor = how
    candidates = {"rtn": rtn(weight, statistics, scheme)}
    if "search" in method.candidates:
        candidates["search"] = imatrix(weight, statistics, scheme)
    names = [name for name in _GPTQ_SCALES if name in method.candidates] if factor is not None else []
    if names:
        scales = [candidates[_GPTQ_SCALES[name]].scales for name in names]
        # one loop for all, as rows do not meet: half of a column's time is spent outside of arithmetic
        codes = gptq_codes(weight.repeat(len(names), 1), torch.cat(scales), scheme.bits, factor).split(len(weight))
        candidates |= {name: Quantized(*made, scheme.bits) for name, *made in zip(names, codes, scales, strict=True)}
    return choose(weight, candidates, None if statistics is None else statistics.hessian)
