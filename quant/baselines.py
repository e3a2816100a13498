"""bitsandbytes' NF4 and INT8 as yardsticks: what its users would get of the matrices that a recipe quantizes.

For comparison only, nothing is stored in these forms. transformers with bitsandbytes leaves fused experts in float
without a word; here every expert's matrix is replaced by itself, and they are counted.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from types import ModuleType

import torch
from torch import Tensor

from vl2.errors import VL2Error
from vl2.model.checkpoint import parameter_sources
from vl2.model.vl2 import DeepseekVL2
from vl2.quant.linears import WEIGHT
from vl2.quant.scheme import Scheme

NF4_BLOCK = 64  # weights to an absmax, bitsandbytes' default
_LARGEST_FLOAT16 = torch.finfo(torch.float16).max


@dataclass(frozen=True)
class Rounded:
    """weight: what is computed with, float32 [N, K]; size_bytes: its codes and absmax values as bitsandbytes keeps
    them, without its constant tables."""

    weight: Tensor
    size_bytes: int


Quantize = Callable[[Tensor], Rounded]


@dataclass(frozen=True)
class Baseline:
    """recipe: the built-in one whose matrices are replaced; by_bits: by what, by the bits which that recipe gives."""

    recipe: str
    by_bits: Mapping[int, Quantize]


def nf4(weight: Tensor) -> Rounded:
    """NF4 (QLoRA, arXiv 2305.14314) with a float32 absmax for every 64 weights, rows run together; weight: [N, K].

    Raises VL2Error where bitsandbytes is not installed.
    """
    functional = _functional()
    codes, state = functional.quantize_4bit(weight.float().contiguous(), blocksize=NF4_BLOCK, quant_type="nf4")
    return Rounded(functional.dequantize_4bit(codes, state), codes.nbytes + state.absmax.nbytes)


def bnb_int8(weight: Tensor) -> Rounded:
    """The weights of LLM.int8() (arXiv 2208.07339): float16, then INT8 with a float32 absmax a row; weight: [N, K].

    Its rounding of activations is left out. Raises VL2Error where bitsandbytes is not installed, and on numbers that
    float16 cannot hold.
    """
    functional = _functional()
    largest = float(weight.abs().max())
    if not largest <= _LARGEST_FLOAT16:
        raise VL2Error(f"a weight of magnitude {largest:g} does not fit into float16, which bnb-int8 starts from")
    codes, absmax, _ = functional.int8_vectorwise_quant(weight.half().contiguous())
    return Rounded(functional.int8_vectorwise_dequant(codes, absmax), codes.nbytes + absmax.nbytes)


BASELINES = {
    "nf4": Baseline("int4", {4: nf4, 8: nf4}),
    "nf4+bnb-int8": Baseline("int4", {4: nf4, 8: bnb_int8}),
    "bnb-int8": Baseline("int8", {8: bnb_int8}),
}


@torch.no_grad()
def replace_matrices(
    model: DeepseekVL2, schemes: Mapping[str, Scheme | None], by_bits: Mapping[int, Quantize]
) -> dict[str, int]:
    """Replaces every matrix that has a scheme (`assign_schemes`) in place; returns module → bytes.

    Raises VL2Error unless exactly the matrices asked for were found, each expert's by itself.
    """
    parameters, sizes = dict(model.named_parameters()), {}
    for name, sources in parameter_sources(model.config).items():
        for index, source in enumerate(sources):
            module = source.removesuffix(WEIGHT)
            scheme = schemes.get(module) if source.endswith(WEIGHT) else None
            if scheme is None:
                continue
            matrix = parameters[name] if len(sources) == 1 else parameters[name][index]
            rounded = by_bits[scheme.bits](matrix)
            matrix.copy_(rounded.weight)
            sizes[module] = rounded.size_bytes
    asked = {module for module, scheme in schemes.items() if scheme is not None}
    if sizes.keys() != asked:
        raise VL2Error(f"{len(sizes)} matrices were replaced and {len(asked)} asked for; the first left out is "
                       f"`{min(asked - sizes.keys())}`")  # fmt: skip
    return sizes


def _functional() -> ModuleType:
    try:
        import bitsandbytes.functional
    except ImportError as error:
        raise VL2Error("nf4 and bnb-int8 are computed by bitsandbytes, which cannot be imported here",
                       "pip install '.[baselines]' in vl2's folder") from error  # fmt: skip
    return bitsandbytes.functional
