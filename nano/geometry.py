"""The sizes of vl2-nano: image geometry, configuration files, and the two variants (MHA, and MLA as in Small)."""

from __future__ import annotations

import json
from pathlib import Path

from vl2.image import ImageGeometry
from vl2.nano.tokenizer import VOCAB_SIZE, vocabulary, write_tokenizer

TILE, PATCH = 112, 8
CROPS = ((1, 1), (1, 2), (2, 1), (2, 2), (1, 3), (3, 1))
CANDIDATES = tuple((TILE * wide, TILE * high) for wide, high in CROPS)
GEOMETRY = ImageGeometry(TILE, PATCH, 2, CANDIDATES)
CELLS = GEOMETRY.tokens_per_side  # image tokens a side of one tile
CELL = TILE // CELLS  # pixels a side of one image token

_LANGUAGE = {
    "architectures": ["DeepseekV2ForCausalLM"],
    "bos_token_id": 0,
    "eos_token_id": 1,
    "first_k_dense_replace": 1,
    "hidden_size": 128,
    "intermediate_size": 384,
    "max_position_embeddings": 4096,
    "model_type": "deepseek_v2",
    "moe_intermediate_size": 64,
    "n_group": 1,
    "n_routed_experts": 8,
    "n_shared_experts": 2,
    "num_attention_heads": 4,
    "num_experts_per_tok": 2,
    "num_hidden_layers": 6,
    "num_key_value_heads": 4,
    "topk_group": 1,
    "topk_method": "greedy",
    "torch_dtype": "bfloat16",
    "vocab_size": VOCAB_SIZE,
}
_PLAIN = {"kv_lora_rank": None, "q_lora_rank": None, "qk_nope_head_dim": 0, "qk_rope_head_dim": 0, "use_mla": False,
          "v_head_dim": 0}
_LATENT = {"kv_lora_rank": 64, "q_lora_rank": None, "qk_nope_head_dim": 32, "qk_rope_head_dim": 32, "v_head_dim": 32}


def config_dict(variant: str = "mha") -> dict:
    """config.json of the variant "mha" (Tiny's structure) or "mla" (Small's)."""
    attention = {"mha": _PLAIN, "mla": _LATENT}[variant]
    return {
        "candidate_resolutions": [list(size) for size in CANDIDATES],
        "global_view_pos": "head",
        "language_config": dict(sorted({**_LANGUAGE, **attention}.items())),
        "model_type": "deepseek_vl_v2",
        "projector_config": {"model_type": "mlp_projector", "input_dim": 128, "n_embed": _LANGUAGE["hidden_size"]},
        "tile_tag": "2D",
        "torch_dtype": "bfloat16",
        "vision_config": {"model_type": "vision", "heads": 4, "image_size": TILE, "layers": 6, "mlp_ratio": 4.0,
                          "patch_size": PATCH, "width": 128},
    }


def processor_dict() -> dict:
    """processor_config.json."""
    return {
        "add_special_token": False,
        "candidate_resolutions": [list(size) for size in CANDIDATES],
        "downsample_ratio": 2,
        "ignore_id": -100,
        "image_mean": [0.5, 0.5, 0.5],
        "image_std": [0.5, 0.5, 0.5],
        "image_token": "<image>",
        "mask_prompt": False,
        "normalize": True,
        "pad_token": "<｜▁pad▁｜>",
        "patch_size": PATCH,
        "processor_class": "DeepseekVLV2Processor",
        "sft_format": "deepseek",
    }


def write_description(folder: Path, variant: str = "mha") -> None:
    """Writes everything of a checkpoint folder but the weights and the model card."""
    folder.mkdir(parents=True, exist_ok=True)
    write_tokenizer(folder)
    assert max(vocabulary().values()) < VOCAB_SIZE, "a token has no row in the embedding table"
    for name, content in (("config.json", config_dict(variant)), ("processor_config.json", processor_dict())):
        (folder / name).write_text(json.dumps(content, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")
