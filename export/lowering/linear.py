"""`vl2::Linear` in standard operators."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
import onnx_ir as ir

from vl2.export.lowering.nodes import Scope

# Weights are widened at use when they are stored narrower; blocks bound that copy (64 MB).
MAX_ELEMENTS = 16 << 20


class LinearLowering:
    """Gemm over flattened rows: it takes the weight as checkpoints store it, [N, K], so nothing is transposed."""

    def __init__(self, split_rows: Callable[[ir.Value, int], list[ir.Value]]) -> None:
        """split_rows: takes a weight's value and a number of rows, gives values of at most so many rows each."""
        self._split_rows = split_rows
        self._shapes: dict[tuple, ir.Value] = {}

    def __call__(self, scope: Scope, node: ir.Node) -> ir.Value:
        """The value that replaces the node's output; new nodes are added to `scope`."""
        x, weight, bias = (*node.inputs, None)[:3]
        rank = len(x.shape)
        if rank == 2:
            return self._gemm(scope, x, weight, bias)
        rows = scope.op("Flatten", [x], axis=rank - 1)
        y = self._gemm(scope, rows, weight, bias)
        return scope.op("Reshape", [y, self._output_shape(scope, x, weight.shape[0])])

    def _gemm(self, scope: Scope, x: ir.Value, weight: ir.Value, bias: ir.Value | None) -> ir.Value:
        size, inner = weight.shape
        if size * inner <= MAX_ELEMENTS or bias is not None:
            return scope.op("Gemm", [x, weight, *([] if bias is None else [bias])], transB=1)
        # a power of two, so that the blocks' sizes are whole pages and the file holds the matrix without gaps
        rows = 1 << (MAX_ELEMENTS // inner).bit_length() - 1
        blocks = self._split_rows(weight, rows)
        return scope.op("Concat", [scope.op("Gemm", [x, block], transB=1) for block in blocks], axis=1)

    def _output_shape(self, scope: Scope, x: ir.Value, size: int) -> ir.Value:
        """[leading sides of x, size] as a value, computed once for every x with the same leading sides."""
        leading = tuple(str(side) for side in x.shape[:-1])
        assert "None" not in leading, f"{x.name} has a nameless side in {x.shape}"
        if (leading, size) not in self._shapes:
            sides = scope.op("Shape", [x], start=0, end=len(leading))
            last = scope.constant(np.array([size], np.int64))
            self._shapes[leading, size] = scope.op("Concat", [sides, last], axis=0)
        return self._shapes[leading, size]
