"""`vl2::Linear` in standard operators."""

from __future__ import annotations

import numpy as np
import onnx_ir as ir

from vl2.export.lowering.nodes import Scope


class LinearLowering:
    """Gemm over flattened rows: it takes the weight as checkpoints store it, [N, K], so nothing is transposed."""

    def __init__(self) -> None:
        self._shapes: dict[tuple, ir.Value] = {}

    def __call__(self, scope: Scope, node: ir.Node) -> ir.Value:
        """The value that replaces the node's output; new nodes are added to `scope`."""
        x, weight, bias = (*node.inputs, None)[:3]
        operands = [weight] if bias is None else [weight, bias]
        rank = len(x.shape)
        if rank == 2:
            return scope.op("Gemm", [x, *operands], transB=1)
        rows = scope.op("Flatten", [x], axis=rank - 1)
        y = scope.op("Gemm", [rows, *operands], transB=1)
        return scope.op("Reshape", [y, self._output_shape(scope, x, weight.shape[0])])

    def _output_shape(self, scope: Scope, x: ir.Value, size: int) -> ir.Value:
        """[leading sides of x, size] as a value, computed once for every x with the same leading sides."""
        leading = tuple(str(side) for side in x.shape[:-1])
        assert "None" not in leading, f"{x.name} has a nameless side in {x.shape}"
        if (leading, size) not in self._shapes:
            sides = scope.op("Shape", [x], start=0, end=len(leading))
            last = scope.constant(np.array([size], np.int64))
            self._shapes[leading, size] = scope.op("Concat", [sides, last], axis=0)
        return self._shapes[leading, size]
