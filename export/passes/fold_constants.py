"""Computes what does not depend on inputs or weights, drops what nothing reads.

Done here once, so that a session needs no constant folding of its own: that would also expand stored weights.
"""

from __future__ import annotations

from collections.abc import Container

import onnx_ir as ir
from onnx_ir.passes import common
from onnxscript.optimizer import fold_constants_ir

_MAX_ELEMENTS = 1 << 16


def fold_constants(model: ir.Model, weights: Container[str]) -> None:
    """Folds in place; a node that reads a weight (by initializer name) is never evaluated."""

    def may_fold(node: ir.Node) -> bool | None:
        reads_weight = any(value is not None and value.name in weights for value in node.inputs)
        return False if reads_weight else None

    fold_constants_ir(
        model,
        onnx_shape_inference=False,
        input_size_limit=_MAX_ELEMENTS,
        output_size_limit=_MAX_ELEMENTS,
        should_fold=may_fold,
    )
    common.IdentityEliminationPass()(model)
    common.CommonSubexpressionEliminationPass()(model)
    common.RemoveUnusedNodesPass()(model)
