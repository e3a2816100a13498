"""Memory where a bundle is made: export, quantization and the build of an engine."""

from __future__ import annotations

from dataclasses import dataclass

from vl2.planning.backends import on_engines
from vl2.planning.models import PlannedModel
from vl2.planning.schemes import EXPERT_FORMS, FLOAT_BYTES, Choice, Storage, form_of_choice, storage_of

# As `vl2 export --dry-run` has it (measured 0.57 GB with the full-size Tiny).
EXPORT_BYTES = 700 << 20
# Measured with TensorRT-RTX (benchmarks/engine_build.py): decoders of 27 layers 0.54 GB, whose weights are inputs; the
# tower, whose 0.84 GB are constants, 3.13 GB, and 1.89 GB where they are 0.43 GB of INT8. The rest is for a GPU's
# context, not measured.
_BUILDER_BYTES = 1 << 30
_BUILDER_COPIES = 3.4
# As `vl2.quant.demands` and `vl2.calib.demands` count: process, Hessians, copies of a matrix and of some of its rows.
_QUANTIZE_PROCESS_BYTES = 450 << 20
_HESSIANS, _COPIES, _CHUNK_COPIES, _CHUNK = 6, 5, 10, 9 << 20
_CALIBRATION_TOKENS = 32768


@dataclass(frozen=True)
class WorkstationMemory:
    """Peak bytes; quantize: calibrated on 32,768 tokens, None where the scheme has floats; build: of an engine."""

    export: int
    quantize: int | None
    build: int | None


def workstation_memory(model: PlannedModel, choice: Choice | None, engine: bool) -> WorkstationMemory:
    """choice: None for a model that is stored already; engine: whether the target takes one."""
    quantized = choice is not None and choice.scheme in EXPERT_FORMS
    quantize = _quantize_bytes(model) if quantized else None
    if not engine:
        return WorkstationMemory(EXPORT_BYTES, quantize, None)
    storage = model.storage or storage_of(model.tensors, form_of_choice(choice, model.config), FLOAT_BYTES["fp16"])
    return WorkstationMemory(EXPORT_BYTES, quantize, build_bytes(model, storage))


def build_bytes(model: PlannedModel, storage: Storage) -> int:
    """Peak of building engines of a model that is stored so."""
    return int(_BUILDER_BYTES + _BUILDER_COPIES * on_engines(model, storage).vision_bytes)


def _quantize_bytes(model: PlannedModel) -> int:
    """The dense layer with its INT8 codes, and what its widest matrix needs: no layer of experts takes as much."""
    language = model.config.language_config
    inner, hidden = language.intermediate_size, language.hidden_size
    matrix = inner * hidden
    working = _HESSIANS * inner**2 + _COPIES * matrix + _CHUNK_COPIES * min(matrix, _CHUNK)
    states = _CALIBRATION_TOKENS * hidden
    return _QUANTIZE_PROCESS_BYTES + 2 * 3 * matrix + 4 * (working + states)
