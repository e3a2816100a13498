"""Checkpoints: which file tensor feeds which parameter, and strict loading one tensor at a time."""

from __future__ import annotations

import re
from collections.abc import Iterator
from pathlib import Path

import torch
from torch import Tensor

from vl2.config import ModelConfig, load_config
from vl2.errors import VL2Error
from vl2.model.vl2 import DeepseekVL2
from vl2.safetensors_file import TensorEntry, checkpoint_entries

# Rules from the start of a parameter's name to the checkpoint's; a name that none matches is kept.
NAME_MAP: tuple[tuple[str, str], ...] = (
    ("language.lm_head.", "language.lm_head."),
    ("language.", "language.model."),
)
# Stacked parameters: row e is the matrix of expert e.
STACKED = re.compile(r"(.*\.mlp\.experts)\.(gate_proj|up_proj|down_proj)")

DTYPES = {"F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16}

# Selection scores are compared in float32; rounding the bias would change which experts are chosen.
KEPT_FLOAT32 = ".e_score_correction_bias"

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


def check_checkpoint(folder: Path | str, config: ModelConfig) -> dict[str, TensorEntry]:
    """The tensors of a folder, checked from headers alone: names, shapes, dtypes.

    Raises VL2Error naming tensor and file on a missing, left-over, misshapen or wrongly typed one. Whether the numbers
    are finite is checked when they are read.
    """
    entries = checkpoint_entries(folder)
    expected = expected_tensors(config)
    missing = [name for name in expected if name not in entries]
    if missing:
        raise VL2Error(
            f"{folder} lacks {len(missing)} tensors that its config.json asks for, first `{missing[0]}`", _SAME_MODEL
        )
    for name, entry in entries.items():
        if name not in expected:
            raise VL2Error(
                f"tensor `{name}` in {entry.path} is not part of the model that config.json describes", _SAME_MODEL
            )
        if entry.shape != expected[name]:
            raise VL2Error(
                f"tensor `{name}` in {entry.path} has the shape {list(entry.shape)}, expected {list(expected[name])}"
            )
        if entry.dtype not in DTYPES:
            expected_dtypes = ", ".join(DTYPES)
            raise VL2Error(f"tensor `{name}` in {entry.path} has the dtype {entry.dtype}, expected {expected_dtypes}")
    return entries


def read_tensor(entry: TensorEntry) -> Tensor:
    """One tensor in the dtype of the file, read into memory of its own.

    A plain read, not a memory map: pages of a map count as resident until the file is closed. Raises VL2Error naming
    tensor and file on a short read and on a NaN or infinity.
    """
    data = bytearray(entry.size_bytes)
    with entry.path.open("rb", buffering=0) as file:
        file.seek(entry.offset)
        view, done = memoryview(data), 0
        while done < len(data) and (count := file.readinto(view[done:])):
            done += count
    if done != len(data):
        raise VL2Error(f"tensor `{entry.name}` in {entry.path} is cut off after {done} of {len(data)} bytes")
    tensor = torch.frombuffer(data, dtype=DTYPES[entry.dtype]).view(entry.shape)
    if not all_finite(tensor):
        raise VL2Error(
            f"tensor `{entry.name}` in {entry.path} holds NaN or infinity",
            "the file is damaged, or its training diverged: fetch it again",
        )
    return tensor


def all_finite(tensor: Tensor) -> bool:
    """Whether no element is NaN or infinite, without a mask as large as the tensor (aminmax passes NaN on)."""
    low, high = tensor.aminmax()
    return bool(low.isfinite() & high.isfinite())


def iter_tensors(folder: Path | str) -> Iterator[tuple[str, Tensor]]:
    """Name and data of every parameter's tensors in file order, one in memory at a time; strict as `load_model`."""
    config = load_config(folder)
    entries = check_checkpoint(folder, config)
    unused = unused_tensors(config)
    for name, entry in entries.items():
        if name not in unused:
            yield name, read_tensor(entry)


def load_model(folder: Path | str, dtype: torch.dtype = torch.float32) -> DeepseekVL2:
    """The model of a checkpoint folder, in eval mode, its parameters in `dtype`.

    Built on the meta device and filled tensor by tensor, so the weights are in memory once. Raises VL2Error as
    `load_config` and `check_checkpoint` do, and on numbers that are not finite or that `dtype` cannot hold.
    """
    config = load_config(folder)
    entries = check_checkpoint(folder, config)
    with torch.device("meta"):
        model = DeepseekVL2(config)
    state = {}
    for name, parameter in model.state_dict().items():
        sources = _sources(name, tuple(parameter.shape))
        state[name] = _read_parameter([entries[source] for source in sources], parameter, dtype)
    model.load_state_dict(state, strict=True, assign=True)
    return model.eval()


def _read_parameter(entries: list[TensorEntry], parameter: Tensor, dtype: torch.dtype) -> Tensor:
    dtype = torch.float32 if entries[0].name.endswith(KEPT_FLOAT32) else dtype
    if tuple(parameter.shape) == entries[0].shape:
        return _cast(read_tensor(entries[0]), dtype, entries[0])
    stacked = torch.empty(parameter.shape, dtype=dtype)
    for row, entry in zip(stacked, entries, strict=True):
        row.copy_(_cast(read_tensor(entry), dtype, entry))
    return stacked


def _cast(tensor: Tensor, dtype: torch.dtype, entry: TensorEntry) -> Tensor:
    cast = tensor.to(dtype)
    if cast is not tensor and not all_finite(cast):
        raise VL2Error(
            f"tensor `{entry.name}` in {entry.path} holds {tensor.abs().max():g}, which {str(dtype)[6:]} cannot hold",
            "load it as bfloat16 or float32",
        )
    return cast
