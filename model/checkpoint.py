"""Checkpoints: which file tensor feeds which parameter, and strict loading one tensor at a time."""

from __future__ import annotations

import itertools
import re
from collections.abc import Iterator
from pathlib import Path

import torch
from torch import Tensor

from vl2.config import ModelConfig, load_config
from vl2.errors import VL2Error
from vl2.model.packed import read_dequantized
from vl2.model.tensors import DTYPES, all_finite, read_tensor
from vl2.model.vl2 import DeepseekVL2
from vl2.quantization import PACKED, SCALE, SHAPE, WEIGHT, Form
from vl2.safetensors_file import TensorEntry, checkpoint_entries

# Rules from the start of a parameter's name to the checkpoint's; a name that none matches is kept.
NAME_MAP: tuple[tuple[str, str], ...] = (
    ("language.lm_head.", "language.lm_head."),
    ("language.", "language.model."),
)
# Stacked parameters: row e is the matrix of expert e.
STACKED = re.compile(r"(.*\.mlp\.experts)\.(gate_proj|up_proj|down_proj)")

# Selection scores are compared in float32; rounding the bias would change which experts are chosen.
KEPT_FLOAT32 = ".e_score_correction_bias"

_UNREAD_SUFFIXES = ("_zero_point", "_g_idx")
_UNREAD = "asymmetric grids (weight_zero_point) and reordered groups (weight_g_idx) are not read"
_SAME_MODEL = "config.json and the weights must come from the same model"


def unused_tensors(config: ModelConfig) -> dict[str, tuple[int, ...]]:
    """Tensors of the file that the model does not read, with their shapes.

    The tower's attention-pooling head: the original builds it (global_pool "map") and skips it (ignore_head).
    """
    vision = config.vision_config
    if vision.global_pool != "map":
        return {}
    width, inner = vision.width, vision.mlp_hidden
    linears = {"q": (width, width), "kv": (2 * width, width), "proj": (width, width)}
    linears |= {"mlp.fc1": (inner, width), "mlp.fc2": (width, inner)}
    shapes: dict[str, tuple[int, ...]] = {"latent": (1, 1, width), "norm.weight": (width,), "norm.bias": (width,)}
    for name, (out, size) in linears.items():
        shapes |= {f"{name}.weight": (out, size), f"{name}.bias": (out,)}
    return {f"vision.attn_pool.{name}": shape for name, shape in shapes.items()}


def parameter_shapes(config: ModelConfig) -> dict[str, tuple[int, ...]]:
    """Every parameter of the model and its shape, without allocating one."""
    with torch.device("meta"):
        model = DeepseekVL2(config)
    return {name: tuple(parameter.shape) for name, parameter in model.state_dict().items()}


def parameter_sources(config: ModelConfig) -> dict[str, tuple[str, ...]]:
    """For every parameter the checkpoint tensors it is made of: one, or its experts' in order."""
    return {name: _sources(name, shape) for name, shape in parameter_shapes(config).items()}


def _sources(name: str, shape: tuple[int, ...]) -> tuple[str, ...]:
    for start, target in NAME_MAP:
        if name.startswith(start):
            name = target + name.removeprefix(start)
            break
    stacked = STACKED.fullmatch(name)
    if stacked is None:
        return (name,)
    return tuple(f"{stacked[1]}.{e}.{stacked[2]}.weight" for e in range(shape[0]))


def expected_tensors(config: ModelConfig) -> dict[str, tuple[int, ...]]:
    """Name and shape of every tensor a checkpoint of this configuration must hold, used or known as unused."""
    expected = {}
    for name, shape in parameter_shapes(config).items():
        expected |= dict.fromkeys(_sources(name, shape), shape[1:] if STACKED.fullmatch(name) else shape)
    return expected | unused_tensors(config)


def packed_forms(config: ModelConfig) -> dict[str, Form]:
    """The matrices that lie packed in a quantized checkpoint, by module; none in any other."""
    if config.quantization_config is None:
        return {}
    unused = unused_tensors(config)
    matrices = (name.removesuffix(WEIGHT) for name, shape in expected_tensors(config).items()
                if name.endswith(WEIGHT) and len(shape) == 2 and name not in unused)  # fmt: skip
    forms = {module: config.quantization_config.form_of(module) for module in matrices}
    return {module: form for module, form in forms.items() if form is not None}


def stored_tensors(config: ModelConfig) -> dict[str, tuple[tuple[int, ...], tuple[str, ...]]]:
    """As `expected_tensors`, as they lie in the file: shape and allowed dtypes, packed ones in their three parts."""
    forms, stored = packed_forms(config), {}
    for name, shape in expected_tensors(config).items():
        module = name.removesuffix(WEIGHT)
        form = forms.get(module) if name.endswith(WEIGHT) else None
        if form is None:
            stored[name] = (shape, tuple(DTYPES))
            continue
        rows, columns = shape
        if form.group_size is not None and columns % form.group_size:
            raise VL2Error(f"`quantization_config` gives `{module}` groups of {form.group_size} columns, which do not "
                           f"divide its {columns}")  # fmt: skip
        stored[module + PACKED] = ((rows, form.word_columns(columns)), ("I32",))
        stored[module + SCALE] = ((rows, form.scale_columns(columns)), tuple(DTYPES))
        stored[module + SHAPE] = ((2,), ("I64",))
    return stored


def check_checkpoint(folder: Path | str, config: ModelConfig) -> dict[str, TensorEntry]:
    """The tensors of a folder, checked from headers alone: names, shapes, dtypes.

    Raises VL2Error naming tensor and file on a missing, left-over, misshapen or wrongly typed one. Whether the numbers
    are finite is checked when they are read.
    """
    entries = checkpoint_entries(folder)
    expected = stored_tensors(config)
    missing = [name for name in expected if name not in entries]
    if missing:
        raise VL2Error(
            f"{folder} lacks {len(missing)} tensors that its config.json asks for, first `{missing[0]}`", _SAME_MODEL
        )
    for name, entry in entries.items():
        if name not in expected:
            raise VL2Error(
                f"tensor `{name}` in {entry.path} is not part of the model that config.json describes",
                _UNREAD if name.endswith(_UNREAD_SUFFIXES) else _SAME_MODEL,
            )
        shape, dtypes = expected[name]
        if entry.shape != shape:
            raise VL2Error(f"tensor `{name}` in {entry.path} has the shape {list(entry.shape)}, expected {list(shape)}")
        if entry.dtype not in dtypes:
            raise VL2Error(
                f"tensor `{name}` in {entry.path} has the dtype {entry.dtype}, expected {', '.join(dtypes)}"
            )
    return entries


def check_unquantized(folder: Path | str, config: ModelConfig) -> None:
    """Raises VL2Error for a quantized checkpoint, where the original numbers are needed."""
    if config.quantization_config is not None:
        raise VL2Error(f"{folder} is quantized already", "give the checkpoint that it was made from")


def iter_tensors(folder: Path | str) -> Iterator[tuple[str, Tensor]]:
    """Name and data of every parameter's tensors in file order, one in memory at a time; strict as `load_model`.

    Packed ones come dequantized, in float32.
    """
    config = load_config(folder)
    entries, forms = check_checkpoint(folder, config), packed_forms(config)
    unused = unused_tensors(config)
    for name, entry in entries.items():
        module = name.removesuffix(PACKED)
        if name.endswith(PACKED):
            yield module + WEIGHT, read_dequantized(entries, module, forms[module])
        elif name not in unused and not name.endswith((SCALE, SHAPE)):
            yield name, read_tensor(entry)


def load_model(folder: Path | str, dtype: torch.dtype = torch.float32) -> DeepseekVL2:
    """The model of a checkpoint folder, in eval mode, its parameters in `dtype`.

    Built on the meta device and filled tensor by tensor, so the weights are in memory once; packed ones come
    dequantized. Raises VL2Error as `load_config` and `check_checkpoint` do, and on numbers that are not finite or that
    `dtype` cannot hold.
    """
    config = load_config(folder)
    entries, forms = check_checkpoint(folder, config), packed_forms(config)
    with torch.device("meta"):
        model = DeepseekVL2(config)
    state = {}
    for name, parameter in model.state_dict().items():
        kept = torch.float32 if name.endswith(KEPT_FLOAT32) else dtype
        tensors = (_read(source, entries, forms, kept) for source in _sources(name, tuple(parameter.shape)))
        state[name] = _stacked(tensors, parameter, kept)
    model.load_state_dict(state, strict=True, assign=True)
    return model.eval()


def _read(source: str, entries: dict[str, TensorEntry], forms: dict[str, Form], dtype: torch.dtype) -> Tensor:
    module = source.removesuffix(WEIGHT)
    if module + PACKED in entries:
        return _cast(read_dequantized(entries, module, forms[module]), dtype, entries[module + PACKED])
    return _cast(read_tensor(entries[source]), dtype, entries[source])


def _stacked(tensors: Iterator[Tensor], parameter: Tensor, dtype: torch.dtype) -> Tensor:
    first = next(tensors)
    if first.shape == parameter.shape:
        return first
    stacked = torch.empty(parameter.shape, dtype=dtype)
    for row, tensor in zip(stacked, itertools.chain((first,), tensors), strict=True):
        row.copy_(tensor)
    return stacked


def _cast(tensor: Tensor, dtype: torch.dtype, entry: TensorEntry) -> Tensor:
    cast = tensor.to(dtype)
    if cast is not tensor and not all_finite(cast):
        raise VL2Error(
            f"tensor `{entry.name}` in {entry.path} holds {tensor.abs().max():g}, which {str(dtype)[6:]} cannot hold",
            "load it as bfloat16 or float32",
        )
    return cast
