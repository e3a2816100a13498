"""GPTQ-format checkpoints, checked strictly and read matrix by matrix with their codes kept.

A quantized Linear X of K inputs and N outputs has, with codes of b bits and groups of g inputs:

    X.qweight  int32 [K·b/32, N]   word r of column n holds inputs r·32/b …, the first at the low end; W = s · (u − z)
    X.qzeros   int32 [⌈K/g⌉, N·b/32]   z, less 1 in the format "gptq", as it is in "gptq_v2"
    X.scales   float [⌈K/g⌉, N]
    X.g_idx    int32 [K]   the group of each input; may be missing

Symmetric means z = 2^(b−1): the transposed words are then compressed-tensors' own. Three things that compressed-tensors
cannot say are rewritten without changing a weight. A last group that is not full: all groups are split into ones
that divide K. A negative scale (AutoRound has them): scale and codes change sign, and where a code −8 becomes 8 the
matrix is stored with 8 bits. A scale of 0: scale 1, codes 0.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from vl2.config import ModelConfig
from vl2.errors import VL2Error
from vl2.json_file import read_json
from vl2.model.checkpoint import expected_tensors
from vl2.model.packed import read_integers
from vl2.model.tensors import DTYPES, read_tensor
from vl2.quant.affine import Quantized
from vl2.quant.gptq_config import CONFIG_NAME, GptqConfig, read_gptq_config
from vl2.quant.linears import WEIGHT, expert_layer, is_router, matrices
from vl2.quant.packing import unpack
from vl2.quant.quantization_config import Form
from vl2.quant.scheme import SMALLEST_GROUP
from vl2.safetensors_file import TensorEntry, checkpoint_entries

QWEIGHT, QZEROS, SCALES, G_IDX, BIAS = ".qweight", ".qzeros", ".scales", ".g_idx", ".bias"
_PARTS = (QWEIGHT, QZEROS, SCALES, G_IDX)


@dataclass(frozen=True)
class _Stored:
    """How a matrix lies in the file, `group` None for one group; split: the group it is written with."""

    bits: int
    group: int | None
    split: int | None


class GptqCheckpoint:
    """A folder in GPTQ's format, its names and shapes checked from headers, its zero points and groups from data.

    config: the model's; forms: how each matrix is written (None: as it is); entries: the file's tensors; zero_biases:
    those that older writers add to Linears that have none. Raises VL2Error naming the first tensor or key that is
    missing, left over, misshapen or asks for what is not converted.
    """

    def __init__(self, folder: Path):
        self.folder = Path(folder)
        self.gptq: GptqConfig = read_gptq_config(self.folder)
        values = {key: value for key, value in read_json(self.folder / CONFIG_NAME).items()
                  if key != "quantization_config"}  # fmt: skip
        self.config = ModelConfig.from_dict(values)
        self.entries = checkpoint_entries(self.folder)
        shapes = matrices(self.config)
        quantized = {module: shape for module, shape in shapes.items() if module + QWEIGHT in self.entries}
        if not quantized:
            raise VL2Error(f"{self.folder} has no packed matrix (`.qweight`) of a DeepSeek-VL2 model",
                           "give a checkpoint that was saved in GPTQ's format")
        self.zero_biases = _check_names(self, set(quantized))
        self._stored = {module: self._shape_of(module, shape) for module, shape in quantized.items()}
        self._check_experts(shapes)
        self.forms: dict[str, Form | None] = dict.fromkeys(shapes)
        widened = self._widened()
        for module, stored in self._stored.items():
            self.forms[module] = Form(8 if module in widened else stored.bits, stored.split)

    def tensor_names(self) -> list[str]:
        """The tensors of the unquantized checkpoint, in the file's order."""
        left_out = {module + part for module in self._stored for part in _PARTS[1:]} | set(self.zero_biases)
        return [name.removesuffix(QWEIGHT) + WEIGHT if name.removesuffix(QWEIGHT) in self._stored else name
                for name in self.entries if name not in left_out]  # fmt: skip

    def changed(self) -> dict[str, list[str]]:
        """Modules whose groups were split, and those stored with more bits than the file has."""
        return {
            "split_groups": [m for m, stored in self._stored.items() if stored.split != stored.group],
            "widened": [m for m, stored in self._stored.items() if self.forms[m].bits != stored.bits],
        }

    def quantized(self, module: str) -> Quantized:
        """Codes and scales of a matrix, all scales > 0; the weight is bit for bit the file's s · (u − z)."""
        codes, scales = self._codes(module), self._scales(module)
        flat = scales.repeat_interleave(codes.shape[1] // scales.shape[1], dim=1)
        codes = torch.where(flat == 0, 0, torch.where(flat < 0, -codes.short(), codes.short()))
        scales = torch.where(scales == 0, torch.ones_like(scales), scales.abs())
        return Quantized(codes.to(torch.int8), scales, self.forms[module].bits)

    def _codes(self, module: str) -> Tensor:
        words, bits = read_integers(self.entries[module + QWEIGHT]), self._stored[module].bits
        return unpack(words.T.contiguous(), bits, words.shape[0] * 32 // bits)

    def _scales(self, module: str) -> Tensor:
        """[N, K / split]: the file's, transposed, each repeated where its group was split."""
        scales, stored = read_tensor(self.entries[module + SCALES]).T, self._stored[module]
        if stored.split == stored.group:
            return scales.contiguous()
        columns = matrices(self.config)[module][1]
        group = stored.group or columns
        split = stored.split or columns
        return scales.repeat_interleave(group // split, dim=1)[:, : columns // split].contiguous()

    def _shape_of(self, module: str, shape: tuple[int, int]) -> _Stored:
        rows, columns = shape
        words, groups = self.entries[module + QWEIGHT].shape[0], self.entries[module + SCALES].shape[0]
        for bits, group in self.gptq.shapes:
            if words * 32 == columns * bits and groups == -(-columns // (group or columns)):
                self._check_data(module, (rows, columns), bits, group)
                return _Stored(bits, group, group)
        said = " or ".join(f"{bits} bits, group_size {group or -1}" for bits, group in self.gptq.shapes)
        raise VL2Error(
            f"`{module}{QWEIGHT}` has {words} rows and `{module}{SCALES}` {groups} for {columns} inputs, which is not "
            f"{said}", "config.json and the weights must come from the same quantization",
        )  # fmt: skip

    def _check_data(self, module: str, shape: tuple[int, int], bits: int, group: int | None) -> None:
        rows, columns = shape
        groups = -(-columns // (group or columns))
        for part, want in ((QWEIGHT, (columns * bits // 32, rows)), (QZEROS, (groups, rows * bits // 32)),
                           (SCALES, (groups, rows)), (G_IDX, (columns,))):  # fmt: skip
            entry = self.entries.get(module + part)
            if entry is not None and entry.shape != want:
                raise VL2Error(f"tensor `{entry.name}` in {entry.path} has the shape {list(entry.shape)}, expected "
                               f"{list(want)}")  # fmt: skip
        zeros = read_integers(self.entries[module + QZEROS]).contiguous().view(torch.uint8)
        zeros = zeros if bits == 8 else torch.stack((zeros & 0xF, zeros >> 4))
        middle, found = 1 << (bits - 1), {int(z) + self.gptq.zero_offset for z in zeros.aminmax()}
        if found != {middle}:
            other = "gptq" if self.gptq.zero_offset == 0 else "gptq_v2"
            raise VL2Error(f"`{module}{QZEROS}` has zero points {sorted(found)}, expected {middle}: the grid is not "
                           "symmetric", f"quantize with sym=True; if it was, the file may be in the format `{other}`")
        self._check_order(module, columns, group)

    def _check_order(self, module: str, columns: int, group: int | None) -> None:
        entry = self.entries.get(module + G_IDX)
        hint = "quantize with desc_act=False (static or group-aware order keeps most of its gain)"
        if entry is None and self.gptq.desc_act:
            raise VL2Error(f"`{module}{G_IDX}` is missing, and `desc_act` is true: the inputs' order is unknown", hint)
        want = torch.arange(columns) // (group or columns)
        if entry is not None and not torch.equal(read_integers(entry).long(), want):
            raise VL2Error(f"`{module}{G_IDX}` spreads groups over reordered inputs (desc_act), which is not converted",
                           hint)  # fmt: skip

    def _check_experts(self, shapes: dict[str, tuple[int, int]]) -> None:
        """Settles the groups that are written; experts of a layer must have one form, as every consumer wants."""
        layers: dict[int | str, list[str]] = {}
        for module in shapes:
            layer = expert_layer(module)
            layers.setdefault(module if layer is None else layer, []).append(module)
        for layer, modules in layers.items():
            found = {(s.bits, s.group) if (s := self._stored.get(module)) else None for module in modules}
            if len(found) > 1:
                raise VL2Error(f"the experts of layer {layer} are quantized in {len(found)} different ways",
                               "no consumer takes that: quantize all of a layer's experts alike")
            if found != {None}:
                self._split(modules, [shapes[module][1] for module in modules])

    def _split(self, modules: list[str], inputs: list[int]) -> None:
        bits, group = self._stored[modules[0]].bits, self._stored[modules[0]].group
        split = group
        if group is not None and any(columns % group for columns in inputs):
            split = math.gcd(group, *inputs)
            if split < SMALLEST_GROUP:
                raise VL2Error(f"`{modules[0]}` has groups of {group} for {inputs[0]} inputs, whose common divisor "
                               f"{split} is below {SMALLEST_GROUP}", "quantize the original with vl2 quantize")
        for module in modules:
            self._stored[module] = _Stored(bits, group, split)

    def _widened(self) -> set[str]:
        """4-bit matrices in which a code −8 meets a negative scale, with all experts of their layers."""
        found = {module for module in self._stored if self._overflows(module)}
        layers = {expert_layer(module) for module in found} - {None}
        return found | {module for module in self._stored if expert_layer(module) in layers}

    def _overflows(self, module: str) -> bool:
        scales = self._scales(module)
        if not bool((scales < 0).any()):
            return False
        codes, bits = self._codes(module), self._stored[module].bits
        smallest = codes == -(1 << (bits - 1))
        found = bool((smallest & (scales < 0).repeat_interleave(codes.shape[1] // scales.shape[1], dim=1)).any())
        if found and bits == 8:
            raise VL2Error(f"`{module}{SCALES}` has a negative scale over a code -128, which no form holds",
                           "quantize the original with vl2 quantize")
        return found


def _check_names(checkpoint: GptqCheckpoint, quantized: set[str]) -> list[str]:
    """Names, dtypes and the shapes of what is not packed; returns the biases that are left out, all zero."""
    expected = _expected(checkpoint.config, quantized)
    for name in expected:
        if name not in checkpoint.entries and not name.endswith(G_IDX):
            raise VL2Error(f"{checkpoint.folder} lacks the tensor `{name}`", "config.json and the weights must come "
                           "from the same model, in DeepSeek-VL2's own tensor names")
    left_out = []
    for name, entry in checkpoint.entries.items():
        if name not in expected and name.removesuffix(BIAS) in quantized and _is_zero(entry):
            left_out.append(name)
            continue
        if name not in expected:
            raise VL2Error(f"tensor `{name}` in {entry.path} is not part of the model that config.json describes",
                           "config.json and the weights must come from the same model")
        shape, dtypes = expected[name]
        if (shape is not None and entry.shape != shape) or len(entry.shape) < 1 or entry.dtype not in dtypes:
            want = ", ".join(dtypes) + (f" {list(shape)}" if shape is not None else "")
            raise VL2Error(f"tensor `{name}` in {entry.path} is {entry.dtype} {list(entry.shape)}, expected {want}")
    return left_out


def _expected(
    config: ModelConfig, quantized: set[str]
) -> dict[str, tuple[tuple[int, ...] | None, tuple[str, ...]]]:
    """Name → shape (None: checked with the matrix) and dtypes."""
    floats, expected = tuple(DTYPES), {}
    for name, shape in expected_tensors(config).items():
        module = name.removesuffix(WEIGHT)
        if not name.endswith(WEIGHT) or module not in quantized:
            expected[name] = (shape, floats)
            continue
        if is_router(module):
            raise VL2Error(f"the router `{module}` is quantized", "rounding it changes which experts run: quantize "
                           "the original without it")
        expected |= {module + part: (None, ("I32",)) for part in (QWEIGHT, QZEROS, G_IDX)}
        expected[module + SCALES] = (None, floats)
    return expected


def _is_zero(entry: TensorEntry) -> bool:
    return entry.dtype in DTYPES and not bool(read_tensor(entry).any())
