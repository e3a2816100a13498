"""`vl2::Experts` in standard operators: one `If` an expert, so that only experts with tokens are computed.

Every expert's matrices are initializers of their own (consecutive rows of the stacked parameter in the data file), read
in place: no gathered copy. `plugins/experts/README.md` has the measurements behind this form.
"""

from __future__ import annotations

import numpy as np
import onnx_ir as ir

from vl2.export.lowering.nodes import Scope


class ExpertsLowering:
    """Choices sorted by expert, each expert's rows computed in its own branch, then put back and weighted."""

    def __init__(self, split) -> None:
        """split: takes a stacked weight's value, gives one value an expert."""
        self._split = split

    def __call__(self, scope: Scope, node: ir.Node) -> ir.Value:
        """The value that replaces the node's output; new nodes are added to `scope`."""
        x, idx, weights, *stacked = node.inputs
        matrices = list(zip(*(self._split(value) for value in stacked), strict=True))
        size = x.shape[-1]
        # The outer If keeps each layer's branches in a scope of their own: session start is quadratic in the
        # names a branch can see. It also answers for zero tokens.
        count = scope.op("Size", [idx])
        some = scope.op("Greater", [count, scope.constant(np.array(0, np.int64))])
        routed = Scope(f"{scope.prefix}routed.")
        y = _routed(routed, (x, idx, weights), matrices)
        none = Scope(f"{scope.prefix}none.")
        nothing = none.op("Identity", [x])
        for value in (y, nothing):
            value.type, value.shape = ir.TensorType(ir.DataType.FLOAT), ir.Shape([None, size])
        branches = {"then_branch": routed.graph([y], "routed"), "else_branch": none.graph([nothing], "none")}
        return scope.op("If", [some], **branches)


def _routed(scope: Scope, routing: tuple[ir.Value, ...], matrices: list[tuple[ir.Value, ...]]) -> ir.Value:
    x, idx, weights = routing
    top_k, size, experts = idx.shape[-1], x.shape[-1], len(matrices)
    flat = scope.op("Reshape", [idx, scope.constant(np.array([-1], np.int64))])
    slots = scope.op("Shape", [flat])
    never = scope.op("ConstantOfShape", [scope.constant(np.array([experts], np.int64))], value=_filled(False))
    chosen = scope.op("ConstantOfShape", [slots], value=_filled(True))
    active = scope.op("ScatterElements", [never, flat, chosen], axis=0)
    switches = scope.op_multi("Split", [active], experts, axis=0, num_outputs=experts)
    parts = [_expert(scope, e, (switches[e], x, flat, top_k), matrices[e]) for e in range(experts)]
    rows = scope.op("Concat", [rows for rows, _ in parts], axis=0)
    order = scope.op("Concat", [slot for _, slot in parts], axis=0)
    # order is a permutation of the slots; scattering 0, 1, … along it gives its inverse
    zero, one = (scope.constant(np.array(n, np.int64)) for n in (0, 1))
    positions = scope.op("Range", [zero, scope.op("Squeeze", [slots]), one])
    inverse = scope.op("ScatterElements", [order, order, positions], axis=0)
    by_slot = scope.op("Gather", [rows, inverse], axis=0)
    by_token = scope.op("Reshape", [by_slot, scope.constant(np.array([-1, top_k, size], np.int64))])
    last = scope.constant(np.array([-1], np.int64))
    weighted = scope.op("Mul", [by_token, scope.op("Unsqueeze", [weights, last])])
    return scope.op("ReduceSum", [weighted, scope.constant(np.array([1], np.int64))], keepdims=0)


def _expert(scope: Scope, e: int, inputs: tuple, matrices: tuple[ir.Value, ...]) -> tuple[ir.Value, ir.Value]:
    """FFN rows [n, H] of the slots of expert e, and these slots [n]; a slot is token · k + choice."""
    switch, x, flat, top_k = inputs
    busy = Scope(f"{scope.prefix}{e}.")
    is_here = busy.op("Equal", [flat, busy.constant(np.array(e, np.int64))])
    slot = busy.op("Squeeze", [busy.op("NonZero", [is_here]), busy.constant(np.array([0], np.int64))])
    token = busy.op("Div", [slot, busy.constant(np.array(top_k, np.int64))])
    rows = _feed_forward(busy, busy.op("Gather", [x, token], axis=0), matrices)
    idle = Scope(f"{scope.prefix}{e}.idle.")
    no_rows = idle.constant(np.zeros((0, x.shape[-1]), np.float32))
    no_slot = idle.constant(np.zeros((0,), np.int64))
    for value in (rows, no_rows):
        value.type, value.shape = ir.TensorType(ir.DataType.FLOAT), ir.Shape([None, x.shape[-1]])
    for value in (slot, no_slot):
        value.type, value.shape = ir.TensorType(ir.DataType.INT64), ir.Shape([None])
    branches = {"then_branch": busy.graph([rows, slot], "busy"), "else_branch": idle.graph([no_rows, no_slot], "idle")}
    return tuple(scope.op_multi("If", [switch], 2, **branches))


def _feed_forward(scope: Scope, x: ir.Value, matrices: tuple[ir.Value, ...]) -> ir.Value:
    gate, up, down = matrices
    gated = scope.op("Gemm", [x, gate], transB=1)
    silu = scope.op("Mul", [gated, scope.op("Sigmoid", [gated])])
    hidden = scope.op("Mul", [silu, scope.op("Gemm", [x, up], transB=1)])
    return scope.op("Gemm", [hidden, down], transB=1)


def _filled(value: bool) -> ir.TensorProtocol:
    return ir.tensor(np.array([value]))
