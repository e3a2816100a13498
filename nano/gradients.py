"""Parts of the training forward with gradients by hand: less time and memory than through autograd."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

ROWS = 128  # of an expert's tokens are run together


class _RMSNorm(torch.autograd.Function):
    """RMSNorm with its gradient by hand: a tenth of a training step less than through autograd, in x's own dtype."""

    @staticmethod
    def forward(ctx, x: Tensor, weight: Tensor) -> Tensor:
        size = x.shape[-1]
        wide = torch.promote_types(x.dtype, torch.float32)
        norm = torch.linalg.vector_norm(x, dim=-1, keepdim=True, dtype=wide)
        scale = (norm.square() / size + 1e-6).rsqrt().to(x.dtype)
        unit = x * scale
        ctx.save_for_backward(unit, scale, weight)
        return unit * weight

    @staticmethod
    def backward(ctx, grad: Tensor) -> tuple[Tensor, Tensor]:
        unit, scale, weight = ctx.saved_tensors
        weight_grad = (grad * unit).flatten(0, -2).sum(0)
        grad = grad * weight
        along = torch.linalg.vecdot(grad, unit).unsqueeze(-1) / unit.shape[-1]
        return (grad - unit * along) * scale, weight_grad


def rms_norm(weight: Tensor, x: Tensor) -> Tensor:
    return _RMSNorm.apply(x, weight)


class _Gelu(torch.autograd.Function):
    """GELU in its tanh form; in bfloat16 its gradient is that of the erf form, which oneDNN has, in half the time.

    The two derivatives differ by 1e-3 at most, a quarter of the distance of two bfloat16 numbers near one.
    """

    @staticmethod
    def forward(ctx, x: Tensor) -> Tensor:
        ctx.save_for_backward(x)
        return F.gelu(x, approximate="tanh")

    @staticmethod
    def backward(ctx, grad: Tensor) -> Tensor:
        x, = ctx.saved_tensors
        form = "none" if x.dtype == torch.bfloat16 else "tanh"
        return torch.ops.aten.gelu_backward(grad, x, approximate=form)


def gelu(x: Tensor) -> Tensor:
    return _Gelu.apply(x)


def _by_expert(expert: Tensor, experts: int) -> tuple[Tensor, list[int]]:
    """expert [N, k] → the place of each flat entry in an order by expert, int64 [N·k], and the rows of each expert.

    Rows are multiples of ROWS: oneDNN compiles a product for every new shape, which costs more than the padding.
    """
    flat = expert.flatten()
    counts = flat.bincount(minlength=experts)
    rows = (counts + ROWS - 1) // ROWS * ROWS
    order = flat.argsort()
    gaps = (rows.cumsum(0) - rows) - (counts.cumsum(0) - counts)
    place = torch.empty_like(order)
    place[order] = torch.arange(len(order)) + gaps[flat[order]]
    return place, rows.tolist()


def _gathered(rows: Tensor, place: Tensor, top_k: int) -> Tensor:
    """Rows sorted by expert [N·k, H] → the sum of each token's k rows, [N, H]."""
    parts = rows.index_select(0, place).view(-1, top_k, rows.shape[1]).unbind(1)
    return sum(parts[1:], parts[0])


class _Routed(torch.autograd.Function):
    """SwiGLU experts on the tokens that chose them only, with the gradient by hand.

    x [N, H], weight and expert [N, k], into [E, 2·I, H] (gate above up), down [E, H, I] → the weighted sum [N, H].
    """

    @staticmethod
    def forward(ctx, x: Tensor, weight: Tensor, expert: Tensor, *matrices: Tensor) -> Tensor:
        into, down = matrices
        place, counts = _by_expert(expert, len(into))
        token = place.new_zeros(sum(counts)).index_copy_(0, place, torch.arange(len(place)) // expert.shape[1])
        shares = weight.new_zeros(len(token)).index_copy_(0, place, weight.flatten()).unsqueeze(1)
        rows = x.index_select(0, token)
        both = torch.cat([part @ matrix.mT for part, matrix in zip(rows.split(counts), into, strict=True)])
        gate, up = both.chunk(2, 1)
        hidden = F.silu(gate).mul_(up)
        weighted = hidden * shares
        out = torch.cat([part @ matrix.mT for part, matrix in zip(weighted.split(counts), down, strict=True)])
        ctx.counts = counts
        ctx.save_for_backward(rows, shares, both, hidden, weighted, into, down, token, place)
        return _gathered(out, place, expert.shape[1])

    @staticmethod
    def backward(ctx, grad: Tensor) -> tuple[Tensor | None, ...]:
        rows, shares, both, hidden, weighted, into, down, token, place = ctx.saved_tensors
        gate, up = both.chunk(2, 1)
        grads = grad.index_select(0, token)
        parts = grads.split(ctx.counts)
        down_grad = torch.stack([part.mT @ h for part, h in zip(parts, weighted.split(ctx.counts), strict=True)])
        to_hidden = torch.cat([part @ matrix for part, matrix in zip(parts, down, strict=True)])
        share_grad = torch.linalg.vecdot(to_hidden, hidden).index_select(0, place).view(len(grad), -1)
        to_hidden *= shares
        to_gate = torch.ops.aten.silu_backward(to_hidden * up, gate)
        to_both = torch.cat([to_gate, to_hidden * F.silu(gate)], 1).split(ctx.counts)
        into_grad = torch.stack([part.mT @ row for part, row in zip(to_both, rows.split(ctx.counts), strict=True)])
        to_rows = torch.cat([part @ matrix for part, matrix in zip(to_both, into, strict=True)])
        return _gathered(to_rows, place, share_grad.shape[1]), share_grad, None, into_grad, down_grad


def routed_experts(x: Tensor, weight: Tensor, expert: Tensor, matrices: tuple[Tensor, Tensor]) -> Tensor:
    """The weighted sum over the k experts of each of N tokens; arguments as `_Routed` has them, [N, H] as well."""
    return _Routed.apply(x, weight, expert, *matrices)
