"""The tensors of a model by module, with how many of them a decode step reads; from the configuration alone.

The truth is `vl2.model.checkpoint.expected_tensors`, which needs torch; a test compares them. The vision tower's
unused pooling head is left out, as no bundle holds it.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass
from functools import cached_property

from vl2.config import LanguageConfig, ModelConfig, ProjectorConfig, VisionConfig
from vl2.modules import module_of

Shape = tuple[int, ...]


@dataclass(frozen=True)
class Tensor:
    """`copies` tensors of one shape, `name` being the first of them in the checkpoint; of experts, all of a layer.

    share: of the copies, how much a decode step reads (experts: chosen / all; image part and token table: 0).
    """

    name: str
    shape: Shape
    copies: int = 1
    share: float = 1.0

    @cached_property
    def module(self) -> str:
        """As `vl2.modules` names it."""
        return module_of(self.name)

    @property
    def parameters(self) -> int:
        """Numbers in all copies."""
        return self.copies * math.prod(self.shape)

    @property
    def is_matrix(self) -> bool:
        """Whether quantization decides on it: a Linear or the token table."""
        return self.name.endswith(".weight") and len(self.shape) == 2


def model_tensors(config: ModelConfig) -> list[Tensor]:
    """Every tensor that a bundle of this model holds."""
    return [*_vision(config.vision_config), *_projector(config.projector_config), *_language(config.language_config)]


def _vision(config: VisionConfig) -> Iterator[Tensor]:
    width, inner, patch = config.width, config.mlp_hidden, config.patch_size
    linears = {"attn.qkv": (3 * width, width), "attn.proj": (width, width), "mlp.fc1": (inner, width),
               "mlp.fc2": (width, inner)}
    yield Tensor("vision.pos_embed", (1, config.grid**2, width), share=0)
    yield Tensor("vision.patch_embed.proj.weight", (width, 3, patch, patch), share=0)
    yield Tensor("vision.patch_embed.proj.bias", (width,), share=0)
    yield from _norm("vision.norm", width)
    for l in range(config.layers):
        for name in ("norm1", "norm2"):
            yield from _norm(f"vision.blocks.{l}.{name}", width)
        for name, shape in linears.items():
            yield from _linear(f"vision.blocks.{l}.{name}", shape)


def _norm(name: str, width: int) -> Iterator[Tensor]:
    yield Tensor(f"{name}.weight", (width,), share=0)
    yield Tensor(f"{name}.bias", (width,), share=0)


def _linear(name: str, shape: Shape) -> Iterator[Tensor]:
    yield Tensor(f"{name}.weight", shape, share=0)
    yield Tensor(f"{name}.bias", (shape[0],), share=0)


def _projector(config: ProjectorConfig) -> Iterator[Tensor]:
    size = config.n_embed
    first = config.input_dim * config.downsample_ratio**2
    # depth - 1 hidden layers, GELUs between them, as layers.0, .2, .4
    shapes = [(size * config.mlp_ratio, first), *[(size * config.mlp_ratio,) * 2] * (config.depth - 2),
              (size, size * config.mlp_ratio)]
    for index, shape in enumerate(shapes):
        yield from _linear(f"projector.layers.{2 * index}", shape)
    yield Tensor("image_newline", (size,), share=0)
    yield Tensor("view_seperator", (size,), share=0)


def _language(config: LanguageConfig) -> Iterator[Tensor]:
    hidden = config.hidden_size
    yield Tensor("language.model.embed_tokens.weight", (config.vocab_size, hidden), share=0)
    for l in range(config.num_hidden_layers):
        layer = f"language.model.layers.{l}"
        yield Tensor(f"{layer}.input_layernorm.weight", (hidden,))
        yield Tensor(f"{layer}.post_attention_layernorm.weight", (hidden,))
        for name, shape in _attention(config).items():
            yield Tensor(f"{layer}.self_attn.{name}", shape)
        yield from _experts(config, f"{layer}.mlp") if config.is_moe(l) else _mlp(
            f"{layer}.mlp", hidden, config.intermediate_size)
    yield Tensor("language.model.norm.weight", (hidden,))
    yield Tensor("language.lm_head.weight", (config.vocab_size, hidden))


def _attention(config: LanguageConfig) -> dict[str, Shape]:
    """Tensors of one layer's attention by name (specification, sections 8.2 and 8.3)."""
    hidden, heads, bias = config.hidden_size, config.num_attention_heads, config.attention_bias
    if not config.use_mla:
        out, kv = heads * config.head_dim, config.kv_heads * config.head_dim
        shapes: dict[str, Shape] = {"q_proj.weight": (out, hidden), "k_proj.weight": (kv, hidden),
                                    "v_proj.weight": (kv, hidden), "o_proj.weight": (hidden, out)}
        biased = ("q_proj", "k_proj", "v_proj", "o_proj")
    else:
        rank, queries = config.kv_lora_rank, heads * config.head_dim
        shapes = {"kv_a_proj_with_mqa.weight": (rank + config.qk_rope_head_dim, hidden),
                  "kv_a_layernorm.weight": (rank,),
                  "kv_b_proj.weight": (heads * (config.qk_nope_head_dim + config.v_head_dim), rank),
                  "o_proj.weight": (hidden, heads * config.v_head_dim)}
        if config.q_lora_rank is None:
            shapes["q_proj.weight"] = (queries, hidden)
        else:
            shapes |= {"q_a_proj.weight": (config.q_lora_rank, hidden), "q_a_layernorm.weight": (config.q_lora_rank,),
                       "q_b_proj.weight": (queries, config.q_lora_rank)}
        biased = ("q_a_proj", "kv_a_proj_with_mqa", "o_proj")
    added = {f"{name}.bias": (shapes[f"{name}.weight"][0],) for name in biased if bias and f"{name}.weight" in shapes}
    return shapes | added


def _mlp(name: str, hidden: int, inner: int, copies: int = 1, share: float = 1.0) -> Iterator[Tensor]:
    yield Tensor(f"{name}.gate_proj.weight", (inner, hidden), copies, share)
    yield Tensor(f"{name}.up_proj.weight", (inner, hidden), copies, share)
    yield Tensor(f"{name}.down_proj.weight", (hidden, inner), copies, share)


def _experts(config: LanguageConfig, name: str) -> Iterator[Tensor]:
    hidden, experts, inner = config.hidden_size, config.n_routed_experts, config.moe_intermediate_size
    yield Tensor(f"{name}.gate.weight", (experts, hidden))
    if config.topk_method == "noaux_tc":
        yield Tensor(f"{name}.gate.e_score_correction_bias", (experts,))
    yield from _mlp(f"{name}.experts.0", hidden, inner, experts, config.num_experts_per_tok / experts)
    if config.n_shared_experts is not None:
        yield from _mlp(f"{name}.shared_experts", hidden, inner * config.n_shared_experts)
