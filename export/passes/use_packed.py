"""Lets the readers of a quantized matrix read its parts: by DequantizeLinear, Cast and Mul, or MatMulNBits.

Each dequantization reads its codes or scales behind what the weight meets (see `widen_weights`), so that it runs then
and not before: otherwise a session holds every matrix in float32, or fuses it into a kernel that rounds activations.
"""

from __future__ import annotations

import numpy as np
import onnx_ir as ir

from vl2.export.packed_storage import Packing
from vl2.export.passes.widen_weights import Widening, make_node

MICROSOFT = "com.microsoft"
# Activations stay float32; onnxruntime's default for fused graphs, 4, rounds them to 8 bits.
_ACCURACY_LEVEL = 1
_PLANE_BASE = 16.0


class PackedUses:
    """Rewrites one model. widening: shared with the float16 weights of the same model."""

    def __init__(self, graph: ir.Graph, widening: Widening):
        self._graph, self._widening = graph, widening

    def dequantize(self, weight: ir.Value, parts: list[ir.Value], packing: Packing, axis: int) -> None:
        """codes, scales → DequantizeLinear. axis: where the weight's inputs lie; one scale a row of a plain matrix is
        written per axis, everything else in blocks."""
        codes, scales = parts
        per_axis = packing.groups == 1 and len(weight.shape) == 2
        for use in list(weight.uses()):
            met, name = _met(use, weight), use.node.name
            kept = self._widening.behind(met, scales, 1 if per_axis else len(scales.shape), f"{name}.kept")
            before = [kept, *_wide(kept.outputs[0], f"{name}.scales", scales.dtype)]
            place = {"axis": 0} if per_axis else {"axis": axis, "block_size": packing.group_size}
            made = make_node("DequantizeLinear", [codes, before[-1].outputs[0]], f"{name}.dequantized", **place)
            _insert(use, weight, [*before, made])

    def multiply(self, weight: ir.Value, parts: list[ir.Value], packing: Packing) -> None:
        """codes, scales → Cast(codes) · scales: several times as fast as DequantizeLinear on a CPU. For [N, K]."""
        codes, scales = parts
        size, columns = (int(side) for side in weight.shape)
        for use in list(weight.uses()):
            met, name = _met(use, weight), use.node.name
            kept = self._widening.behind(met, codes, 2, f"{name}.kept")
            floats = make_node("Cast", [kept.outputs[0]], f"{name}.codes", to=ir.DataType.FLOAT)
            wide = _wide(scales, f"{name}.scales")
            factor = wide[0].outputs[0] if wide else scales
            if packing.groups == 1:
                made = [make_node("Mul", [floats.outputs[0], factor], f"{name}.wide")]
            else:
                grouped = (size, packing.groups, packing.group_size)
                made = self._grouped_product(name, (floats.outputs[0], factor), grouped)
            _insert(use, weight, [kept, floats, *wide, *made])

    def multiply_packed(self, weight: ir.Value, parts: list[ir.Value], packing: Packing) -> None:
        """Gemm(x, weight, bias?) → MatMulNBits, for INT8 one of each plane."""
        *blobs, scales = parts
        for use in list(weight.uses()):
            gemm = use.node
            assert (gemm.op_type, use.idx) == ("Gemm", 1), f"{gemm.name} ({gemm.op_type}) reads {weight.name}"
            x, bias = gemm.inputs[0], (*gemm.inputs, None)[2]
            wide = _wide(scales, f"{gemm.name}.scales")
            factor = wide[0].outputs[0] if wide else scales
            sizes = {"K": packing.columns, "N": int(weight.shape[0]), "bits": 4, "block_size": packing.block,
                     "accuracy_level": _ACCURACY_LEVEL}  # fmt: skip
            if len(blobs) == 1:
                inputs = [x, blobs[0], factor, *([] if bias is None else [None, None, bias])]
                nodes = [make_node("MatMulNBits", inputs, f"{gemm.name}.packed", MICROSOFT, **sizes)]
            else:
                nodes = self._planes(gemm.name, (x, bias, factor), blobs, sizes)
            gemm.graph.insert_before(gemm, [*wide, *nodes])
            _move_into(gemm.graph, parts)
            _replace(gemm, nodes[-1].outputs[0])

    def _planes(self, name: str, inputs: tuple, blobs: list[ir.Value], sizes: dict[str, int]) -> list[ir.Node]:
        """x · Wᵀ = 16 · x · (high − 8)ᵀ + x · lowᵀ, each plane times the same scales."""
        x, bias, factor = inputs
        high, low = blobs
        zeros = self._zeros(sizes["N"], -(-int(low.shape[1]) // 2))
        upper = make_node("MatMulNBits", [x, high, factor], f"{name}.high", MICROSOFT, **sizes)
        raised = make_node("Mul", [upper.outputs[0], self._base()], f"{name}.raised")
        inputs = [x, low, factor, zeros, *([] if bias is None else [None, bias])]
        lower = make_node("MatMulNBits", inputs, f"{name}.low", MICROSOFT, **sizes)
        total = make_node("Add", [raised.outputs[0], lower.outputs[0]], f"{name}.packed")
        return [upper, raised, lower, total]

    def _grouped_product(self, name: str, factors: tuple, grouped: tuple[int, int, int]) -> list[ir.Node]:
        """factors: codes [N, K] and scales [N, G]; each scale times its group of columns."""
        codes, scales = factors
        size, groups, group = grouped
        shapes = [make_node("Constant", [], f"{name}.shape{i}", value=ir.tensor(np.array(shape, np.int64)))
                  for i, shape in enumerate((grouped, (size, groups, 1), (size, groups * group)))]  # fmt: skip
        apart = make_node("Reshape", [codes, shapes[0].outputs[0]], f"{name}.apart")
        each = make_node("Reshape", [scales, shapes[1].outputs[0]], f"{name}.each")
        product = make_node("Mul", [apart.outputs[0], each.outputs[0]], f"{name}.product")
        return [*shapes, apart, each, product,
                make_node("Reshape", [product.outputs[0], shapes[2].outputs[0]], f"{name}.wide")]  # fmt: skip

    def _zeros(self, *shape: int) -> ir.Value:
        """Zero points of 0 for the low planes, shared by all of one shape."""
        return self._initializer(f"zero_points.{shape[0]}x{shape[1]}", np.zeros(shape, np.uint8))

    def _base(self) -> ir.Value:
        return self._initializer("plane_base", np.array(_PLANE_BASE, np.float32))

    def _initializer(self, name: str, array: np.ndarray) -> ir.Value:
        if name not in self._graph.initializers:
            tensor = ir.tensor(array, name=name)
            value = ir.Value(name=name, type=ir.TensorType(tensor.dtype), shape=tensor.shape, const_value=tensor)
            self._graph.initializers.add(value)
        return self._graph.initializers[name]


def _met(use, weight: ir.Value) -> ir.Value:
    met = use.node.inputs[0]
    assert use.idx == 1 and met is not None, f"{use.node.name} does not take {weight.name} second"
    return met


def _wide(scales: ir.Value, name: str, dtype: ir.DataType | None = None) -> list[ir.Node]:
    """The Cast of narrow scales to float32; nothing where they are that already."""
    if (dtype or scales.dtype) == ir.DataType.FLOAT:
        return []
    return [make_node("Cast", [scales], name, to=ir.DataType.FLOAT)]


def _insert(use, weight: ir.Value, nodes: list[ir.Node]) -> None:
    made = nodes[-1].outputs[0]
    made.type, made.shape = ir.TensorType(ir.DataType.FLOAT), weight.shape
    use.node.graph.insert_before(use.node, nodes)
    use.node.replace_input_with(1, made)


def _move_into(graph: ir.Graph, initializers: list[ir.Value]) -> None:
    """Makes initializers of one reader the reader's graph's own.

    onnxruntime packs no initializer that a branch takes from the graphs around it, and reads it unpacked: an expert of
    Tiny in 42 ms instead of 1.
    """
    for value in initializers:
        del value.graph.initializers[value.name]
        graph.initializers.add(value)


def _replace(node: ir.Node, value: ir.Value) -> None:
    """Puts `value` in the place of the node's output, under its name, and removes the node."""
    old = node.outputs[0]
    value.name, old.name = old.name, f"{old.name}.replaced"
    value.type, value.shape = old.type or ir.TensorType(ir.DataType.FLOAT), old.shape
    old.replace_all_uses_with(value, replace_graph_outputs=True)
    node.graph.remove(node, safe=True)
