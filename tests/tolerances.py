"""Every numeric bound of the suite and the reason for it. Compare as |got − want| ≤ atol + rtol · |want|."""

from __future__ import annotations

from typing import NamedTuple

import numpy as np


class Bound(NamedTuple):
    atol: float
    rtol: float


# Against the goldens (tests/goldens/README.md): the same float32 computation in another order. The recorded run differs
# from its own graph in float64 by up to 1.5e-5 in logits; the bounds leave a factor of about ten.
FEATURES = Bound(1e-4, 1e-4)  # vision, projector, embeddings, hidden states, caches
LOGITS = Bound(2e-4, 1e-4)  # logits have a standard deviation of about 2
ROUTER_WEIGHTS = Bound(1e-5, 1e-4)  # weights and scores, all below 2.5
UNIT = Bound(2e-5, 1e-4)  # one module on a small input: attention, moe, projector, norms, activations
# cos and sin of position · frequency: float32 holds an angle of p radians to p · 6e-8.
ROPE_NEAR = Bound(5e-5, 0.0)  # positions up to 600
ROPE_FAR = Bound(5e-4, 0.0)  # positions up to 4095
# Router choices are compared as sets; below this gap between the last chosen and the first rejected expert, rounding
# may decide. Every real token of the goldens has more than 3e-6.
ROUTER_MARGIN = 1e-6
# bfloat16 keeps 8 bits: one unit in the last place is 2⁻⁷ of the value at most, and rounding order may move one.
BFLOAT16_STEP = Bound(1e-6, 2**-7)

# onnxruntime's float32 kernels sum in yet another order (tests/goldens/README.md).
ONNX_RUNTIME = Bound(5e-4, 5e-4)

# Between two forms of the same float32 computation (absorbed and naive, chunked and whole, batch and single): both are
# within 1.5e-5 of float64, logits have a standard deviation of about 2.
SAME_LOGITS = Bound(5e-5, 1e-5)

# Cosine of the logits of a run in bfloat16 or float16 with the recorded float32 ones. Rounding alone costs 1e-4
# (measured); a token close to a router's threshold may take another expert, which costs up to 6e-3.
HALF_PRECISION_COSINE = 0.99

# Planned peak memory of a run on a CPU against measured RSS, as a share: issue 6 asks for it. Measured so far: within
# 5 % (docs/planning.md); Python, NumPy and onnxruntime of other versions move nano's 0.1 GB by a few MB.
PLANNED_MEMORY = 0.10

# Errors of a quantized layer, streamed against whole models: noise of 1e-4 of the signal (INT8) is a difference of
# float32 numbers that were summed in another order, whose rounding of 1e-6 moves it by 1e-3 at most.
LAYER_ERROR = 3e-3
LAYER_COSINE = 1e-6

# Mean KLD of two forms of one float32 computation: logits agree to SAME_LOGITS, and a KLD of d has a derivative of at
# most about √(2d) by them; near 0 it is their square.
SAME_KLD = Bound(1e-8, 2e-3)

# Attention against its eager reference: float32 sums of up to 576 products and 1,500 tokens in another order, outputs
# of about 1; scores of up to 12 turn their rounding (√576 · 2^-24 · 12) into 2e-5 of a weight (measured: 7e-6).
ATTENTION = Bound(3e-5, 1e-5)
# A narrow cache against float32, outputs of about 1 at most 4: rounding by 2^-11 moves a score of up to 10 by 5e-3 at
# most and the weights by as much of themselves, of which sums keep a part (measured: 1e-3).
CACHE_FLOAT16 = Bound(5e-3, 0.0)
# INT8: half a step of max / 127 with a max of 3 is 1.2 % a value; scores move by that times √D · scale (measured:
# 2.2e-2).
CACHE_INT8 = Bound(1e-1, 0.0)

# The operator library, max |Δ| over the RMS of the output. Exact: float32 sums of up to 12,288 products in another
# order than float64's, √K · 2^-24 = 7e-6 times the 3 to 4 standard deviations of the largest of 10^4 differences.
OPERATOR_EXACT = 3e-5
# Fast, RMS over RMS: INT8 steps of max / 127 for 32 activations, whose max is about 2.2 times their RMS, put an error
# of step / √12 = 0.5 % into each product; the bound is three times that.
OPERATOR_ROUNDED = 1.5e-2
# Two rounded products and a SwiGLU between them, which multiplies errors of gate and up.
OPERATOR_ROUNDED_EXPERTS = 3e-2

# CUDA kernels with float32 sums, max |Δ| beyond the rounding of a float16 output (2^-11 of it), over the RMS of the
# output: as OPERATOR_EXACT, for float32 activations and sums of up to 12,288 products (measured: 3e-7).
CUDA_PRODUCT = 3e-5
# On tensor cores code · scale, the gated product and each expert's output are rounded to float16 as well: each by 2^-12
# of the RMS in the mean, five times that for the largest of 10^4 (measured: 2.4e-3).
CUDA_TENSOR_PRODUCT = 4e-3

# Attention kernels with float16 in- and outputs, results of about 1 at most 4: rounding a rotated query by 2^-12 moves
# a score of up to 10 by 2e-3, weights and result are rounded by 2^-11 of up to 4 (measured: 1.1e-3).
CUDA_ATTENTION = 4e-3

# Logprobs and penalties against the formulas: a sum of some hundred float64 exponentials in another order, and a
# float32 logit of about 5 from which float32 penalties are taken.
LOGPROB = 1e-12
PENALISED_LOGIT = 1e-5


def max_difference(got: object, want: object) -> float:
    """The largest |got − want|, for messages and for the figures of docs/results.md."""
    got, want = np.asarray(got, dtype=np.float64), np.asarray(want, dtype=np.float64)
    assert got.shape == want.shape, f"shape {got.shape}, expected {want.shape}"
    return float(np.abs(got - want).max(initial=0.0))


def assert_close(got: object, want: object, bound: Bound, what: str = "") -> None:
    """Fails, naming the largest difference, unless every element is finite and within the bound."""
    worst = max_difference(got, want)
    got, want = np.asarray(got, dtype=np.float64), np.asarray(want, dtype=np.float64)
    inside = np.abs(got - want) <= bound.atol + bound.rtol * np.abs(want)
    assert inside.all(), f"{what}: {np.count_nonzero(~inside)} of {inside.size} outside {bound}, at most {worst:.3g}"
