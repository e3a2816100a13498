"""Memory of a run at its peak, part by part. On the CPU checked against measured runs (docs/planning.md)."""

from __future__ import annotations

from dataclasses import asdict, dataclass

from vl2.config import LanguageConfig
from vl2.planning.demand import PromptSize
from vl2.planning.models import PlannedModel
from vl2.planning.schemes import CPU, ORT, Storage

# Lowerings whose attention writes its cache and keeps scores of a few positions only.
_IN_PLACE = (CPU, "trt")

_FLOAT = 4
# Measured with vl2-nano: Python, NumPy, Pillow, tokenizers, onnxruntime, both graphs loaded.
PROCESS_BYTES = 87 << 20
# Measured with Tiny's 129,280 entries: 40 MB.
TOKENIZER_BYTES_PER_ENTRY = 330
# Not measured here: CUDA's context, kernels and workspaces; where memory is shared their host side too.
CUDA_BYTES = 600 << 20
_CUDA_SHARED_BYTES = 1000 << 20
# Measured with vl2-nano: the web framework and what it imports, at rest.
SERVER_BYTES = 16 << 20
# Of encoded images, as `vl2 serve` has it without asking (`runtime/options.py`).
IMAGE_CACHE_BYTES = 64 << 20
# Bytes of an element of the cache, by the name that `vl2 export --kv-cache` has for it.
KV_CACHES = {"fp32": 4, "fp16": 2, "int8": 1}
# Patches that one run of the vision graph takes (`vl2.runtime.image_features`).
_PATCHES_PER_RUN = 1024
# onnxruntime's arena grows by doubled regions and gives none back: 1.4 to 1.6 times what is live, measured.
_ARENA_SHARE = 1.5


@dataclass(frozen=True)
class RunMemory:
    """Bytes: weights with every expert touched, cache at the whole context, activations as arenas hold them.

    server: what `vl2 serve` adds to one answer, its kept conversations and images full; 0 without one.
    """

    process: int
    weights: int
    kv_cache: int
    activations: int
    server: int = 0

    @property
    def peak(self) -> int:
        """All of it together."""
        return self.process + self.weights + self.kv_cache + self.activations + self.server

    def to_dict(self) -> dict[str, int]:
        """With the peak, for JSON."""
        return {**asdict(self), "peak": self.peak}


def server_memory(pool_bytes: int | None) -> int:
    """What a server that keeps `pool_bytes` of conversations adds to one answer; None for no server."""
    return 0 if pool_bytes is None else SERVER_BYTES + IMAGE_CACHE_BYTES + pool_bytes


def run_memory(model: PlannedModel, storage: Storage, size: PromptSize, backend: str, shared: bool) -> RunMemory:
    """On one backend of `targets.BACKENDS`; shared: its GPU has no memory of its own. Without images, no tower."""
    element = 2 if backend == "engine" else _FLOAT
    language = model.config.language_config
    live = _decoder_bytes(language, storage.lowering, size, element)
    weights = storage.decoder_bytes
    if size.tiles:
        live += _tile_bytes(model, element)
        weights += storage.vision_bytes
    widened = 0 if backend == "engine" else storage.widened_bytes
    process = PROCESS_BYTES + TOKENIZER_BYTES_PER_ENTRY * language.vocab_size
    if backend != "cpu":
        process = process + _CUDA_SHARED_BYTES if shared else CUDA_BYTES
    cache = size.context * cache_bytes(language, cache_element(storage, backend))
    return RunMemory(process, weights, cache, int(_ARENA_SHARE * live) + widened)


def cache_element(storage: Storage, backend: str) -> int:
    """Bytes of an element of the cache; engines hold float16."""
    return 2 if backend == "engine" else KV_CACHES[storage.kv_cache]


def cache_bytes(config: LanguageConfig, element: int = _FLOAT) -> int:
    """Of one position in all layers: keys and values, or the latent and the rotated key; of INT8 (element 1) with the
    float32 scale of each of these rows."""
    rows = 2 if config.use_mla else 2 * config.kv_heads
    width = config.kv_lora_rank + config.qk_rope_head_dim if config.use_mla else rows * config.head_dim
    return config.num_hidden_layers * (width * element + (rows * _FLOAT if element == 1 else 0))


def _decoder_bytes(config: LanguageConfig, lowering: str, size: PromptSize, element: int) -> int:
    """What one chunk of prefill holds: its new cache entries, states, and the largest of attention, experts, dense.

    Operators of our own write into the cache and keep scores of a few positions only.
    """
    hidden, heads, chunk = config.hidden_size, config.num_attention_heads, size.chunk
    inside = lowering in _IN_PLACE
    scores = 3 * heads * chunk * size.prompt_tokens  # scores, masked, softmax
    if config.use_mla:
        scores += 2 * heads * chunk * (config.kv_lora_rank + config.qk_rope_head_dim)
    # an INT8 matrix is two products, of each plane of four bits
    products = 7 if lowering == ORT else 3
    dense = products * chunk * config.intermediate_size
    routed = 3 * chunk * (config.num_experts_per_tok or 0) * hidden
    states = chunk * 6 * hidden + max(0 if inside else scores, dense, routed)
    return states * element + (0 if inside else chunk * cache_bytes(config, element))


def _tile_bytes(model: PlannedModel, element: int) -> int:
    vision = model.config.vision_config
    patches = vision.grid**2
    tiles = max(1, _PATCHES_PER_RUN // patches)
    scores = 3 * vision.heads * patches**2
    mlp = 3 * patches * vision.mlp_hidden
    widened = vision.mlp_hidden * vision.width
    return (tiles * (6 * patches * vision.width + max(scores, mlp)) + widened) * element
