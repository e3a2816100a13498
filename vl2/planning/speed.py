"""Estimated speed from bytes, bandwidth and rates. Upper bounds times a share; each share says where it is from."""

from __future__ import annotations

from dataclasses import dataclass

from vl2.config import ModelConfig
from vl2.planning.demand import PromptSize
from vl2.planning.memory import cache_bytes, cache_element
from vl2.planning.models import PlannedModel
from vl2.planning.schemes import CPU, Storage
from vl2.planning.targets import Target

# Of a GPU's bandwidth: Edge-LLM 0.9 reaches 50 % on AGX Orin and 55 % on Thor with an INT4 mixture of experts
# (shared/guide/tensorrt.md, section 4). vl2 has measured no GPU.
GPU_SHARE = 0.5
# Of the tensor cores' dense rate in prefill; assumed.
GPU_MATRIX_SHARE = 0.3
CPU_BANDWIDTH_SHARE = 0.8
# GB of weights a second in decode, by bytes of a stored number, and shares of the matrix rate, as the full-size Tiny
# ran on one thread of a Xeon of 120 GFLOP/s (docs/results.md: 0.25, 0.72, 0.5 s a token; 472 tokens in 8 to 10 s).
_CPU_REFERENCE_GFLOPS = 120.0
_CPU_DECODE_GB_S = {1: 1.9, 2: 1.6, 4: 4.6}
CPU_MATRIX_SHARE, CPU_VISION_SHARE = 0.4, 0.6
# The operator library beside onnxruntime's operators in the same runs, INT4 (docs/results.md).
_LIBRARY_DECODE, _LIBRARY_PREFILL = 3.3, 1.6


@dataclass(frozen=True)
class Speed:
    """Seconds, and tokens/s at half the context. limit_tokens_per_second: at the whole bandwidth."""

    image_seconds: float
    prefill_seconds: float
    tokens_per_second: float
    limit_tokens_per_second: float
    read_bytes_per_token: int


def estimate_speed(model: PlannedModel, storage: Storage, size: PromptSize, target: Target, backend: str) -> Speed:
    """On one backend of the target."""
    position = cache_bytes(model.config.language_config, cache_element(storage, backend))
    cache = (size.prompt_tokens + size.context) // 2 * position
    bandwidth, read = target.bandwidth_gb_s * 1e9, storage.read_bytes + cache
    if backend == "cpu":
        library = storage.lowering == CPU and storage.quantized
        rate = target.cpu_gflops * 1e9
        shares = (CPU_MATRIX_SHARE * (_LIBRARY_PREFILL if library else 1), CPU_VISION_SHARE)
        scale = target.cpu_gflops / _CPU_REFERENCE_GFLOPS * 1e9
        weights = _CPU_DECODE_GB_S[1 if storage.quantized else storage.float_bytes] * scale
        computing = storage.read_bytes / weights + cache / (_CPU_DECODE_GB_S[4] * scale)
        seconds = max(read / (CPU_BANDWIDTH_SHARE * bandwidth), computing / (_LIBRARY_DECODE if library else 1))
    else:
        rate, shares = target.fp16_tflops * 1e12, (GPU_MATRIX_SHARE, GPU_MATRIX_SHARE)
        seconds = read / (GPU_SHARE * bandwidth)
    # the whole decoder is read once by a long prompt
    prefill = max(prefill_operations(model, size.prompt_tokens) / (rate * shares[0]), storage.decoder_bytes / bandwidth)
    return Speed(size.tiles * tile_operations(model.config) / (rate * shares[1]), prefill, 1 / seconds,
                 bandwidth / read, int(read))


def prefill_operations(model: PlannedModel, tokens: int) -> float:
    """Floating-point operations of the decoder's layers over a prompt; the head runs once."""
    language = model.config.language_config
    weights = sum(tensor.parameters * tensor.share for tensor in model.tensors if tensor.module != "lm_head")
    widths = language.head_dim + (language.v_head_dim if language.use_mla else language.head_dim)
    attention = language.num_hidden_layers * language.num_attention_heads * widths * tokens**2
    return 2 * weights * tokens + attention  # the causal half of two products


def tile_operations(config: ModelConfig) -> float:
    """Floating-point operations of the vision tower for one tile."""
    vision = config.vision_config
    patches, width = vision.grid**2, vision.width
    layer = 4 * width**2 + 2 * width * vision.mlp_hidden
    return 2.0 * vision.layers * patches * (layer + 2 * patches * width)
