"""A GGUF file of a checkpoint's language model (plain attention: Tiny), so that llama.cpp runs the same weights.

    python benchmarks/gguf_file.py CHECKPOINT OUT.gguf --type Q4_0|Q8_0|F16
    python benchmarks/gguf_file.py Q8_0.gguf OUT.gguf --type Q4_K_M

llama.cpp's architecture `deepseek` is the family's without latent attention. It rotates neighbouring pairs where the
checkpoint rotates halves, so that rows of queries and keys are reordered. Needs the package `gguf`; the k-quants, which
it does not write, llama.cpp makes itself of another file (`llama-cpp-python`).
"""

from __future__ import annotations

import argparse
import json
import re
from collections.abc import Iterator
from contextlib import ExitStack
from pathlib import Path

import gguf
import numpy as np
import torch
from safetensors import safe_open

from vl2.config import LanguageConfig, load_config

TYPES = {"Q4_0": gguf.GGMLQuantizationType.Q4_0, "Q8_0": gguf.GGMLQuantizationType.Q8_0,
         "F16": gguf.GGMLQuantizationType.F16}
_PREFIX = "language."
_BLOCK = {"input_layernorm": "attn_norm", "post_attention_layernorm": "ffn_norm", "self_attn.q_proj": "attn_q",
          "self_attn.k_proj": "attn_k", "self_attn.v_proj": "attn_v", "self_attn.o_proj": "attn_output",
          "mlp.gate_proj": "ffn_gate", "mlp.up_proj": "ffn_up", "mlp.down_proj": "ffn_down", "mlp.gate": "ffn_gate_inp",
          "mlp.shared_experts.gate_proj": "ffn_gate_shexp", "mlp.shared_experts.up_proj": "ffn_up_shexp",
          "mlp.shared_experts.down_proj": "ffn_down_shexp"}
_EXPERTS = {"gate_proj": "ffn_gate_exps", "up_proj": "ffn_up_exps", "down_proj": "ffn_down_exps"}
_OUTSIDE = {"model.embed_tokens": "token_embd", "model.norm": "output_norm", "lm_head": "output"}
_FLOAT32 = ("norm", "ffn_gate_inp")


def gguf_name(name: str) -> str:
    """llama.cpp's name of a tensor (not of a routed expert)."""
    stem = name.removeprefix(_PREFIX).removesuffix(".weight")
    if stem in _OUTSIDE:
        return _OUTSIDE[stem] + ".weight"
    layer, rest = re.fullmatch(r"model\.layers\.(\d+)\.(.*)", stem).groups()
    return f"blk.{layer}.{_BLOCK[rest]}.weight"


def in_pairs(weight: torch.Tensor, heads: int) -> torch.Tensor:
    """Rows [heads · D, H] from halves to neighbouring pairs."""
    return weight.view(heads, 2, -1, weight.shape[1]).transpose(1, 2).reshape(weight.shape)


def language_tensors(folder: Path, config: LanguageConfig) -> Iterator[tuple[str, torch.Tensor]]:
    """(llama.cpp's name, float32) of every tensor, the experts of a layer stacked."""
    index = json.loads((folder / "model.safetensors.index.json").read_text())["weight_map"]
    with ExitStack() as stack:
        shards = {name: stack.enter_context(safe_open(folder / name, "pt")) for name in set(index.values())}

        def read(name: str) -> torch.Tensor:
            return shards[index[name]].get_tensor(name).float()

        for name in index:
            if not name.startswith(_PREFIX) or ".mlp.experts." in name:
                continue
            tensor = read(name)
            if re.search(r"\.[qk]_proj\.", name):
                tensor = in_pairs(tensor, config.num_attention_heads)
            yield gguf_name(name), tensor
        for layer in range(config.first_k_dense_replace, config.num_hidden_layers):
            for part, other in _EXPERTS.items():
                names = [f"{_PREFIX}model.layers.{layer}.mlp.experts.{expert}.{part}.weight"
                         for expert in range(config.n_routed_experts)]
                yield f"blk.{layer}.{other}.weight", torch.stack([read(name) for name in names])


def write_gguf(folder: Path, out: Path, kind: str) -> None:
    """Writes `out`; norms and routers stay float32, everything else becomes `kind`, one of TYPES."""
    config = load_config(folder).language_config
    assert not config.use_mla and config.topk_method == "greedy", "llama.cpp's `deepseek` is Tiny's structure"
    writer = gguf.GGUFWriter(out, "deepseek", use_temp_file=True)
    _describe(writer, config)
    for name, tensor in language_tensors(folder, config):
        if any(part in name for part in _FLOAT32):
            writer.add_tensor(name, tensor.numpy())
        else:
            data = gguf.quants.quantize(tensor.numpy(), TYPES[kind])
            writer.add_tensor(name, data, raw_dtype=TYPES[kind])
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()


def requantize(source: Path, out: Path) -> None:
    """llama.cpp's own mixture Q4_K_M; columns that 256 does not divide become other kinds there."""
    import llama_cpp as lib

    settings = lib.llama_model_quantize_default_params()
    settings.ftype, settings.allow_requantize = lib.LLAMA_FTYPE_MOSTLY_Q4_K_M, True
    refused = lib.llama_model_quantize(str(source).encode(), str(out).encode(), settings)
    assert not refused, f"llama.cpp does not quantize {source}: {refused}"


def _describe(writer: gguf.GGUFWriter, config: LanguageConfig) -> None:
    writer.add_block_count(config.num_hidden_layers)
    writer.add_context_length(config.max_position_embeddings)
    writer.add_embedding_length(config.hidden_size)
    writer.add_feed_forward_length(config.intermediate_size)
    writer.add_head_count(config.num_attention_heads)
    writer.add_head_count_kv(config.kv_heads)
    writer.add_layer_norm_rms_eps(config.rms_norm_eps)
    writer.add_rope_freq_base(config.rope_theta)
    writer.add_rope_dimension_count(config.head_dim)
    writer.add_vocab_size(config.vocab_size)
    writer.add_leading_dense_block_count(config.first_k_dense_replace)
    writer.add_expert_count(config.n_routed_experts)
    writer.add_expert_used_count(config.num_experts_per_tok)
    writer.add_expert_feed_forward_length(config.moe_intermediate_size)
    writer.add_expert_shared_count(config.n_shared_experts)
    writer.add_expert_weights_scale(config.routed_scaling_factor)
    writer.add_tokenizer_model("no_vocab")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("source", type=Path, help="a checkpoint; for Q4_K_M a GGUF file")
    parser.add_argument("out", type=Path)
    parser.add_argument("--type", dest="kind", choices=(*TYPES, "Q4_K_M"), default="Q4_0")
    options = parser.parse_args()
    if options.kind in TYPES:
        write_gguf(options.source, options.out, options.kind)
    else:
        requantize(options.source, options.out)
    print(f"{options.out}: {np.round(options.out.stat().st_size / 1e9, 3)} GB")


if __name__ == "__main__":
    main()
