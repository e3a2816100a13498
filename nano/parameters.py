"""vl2-nano's parameters: names and shapes as in the checkpoint (experts stacked), initial values, one flat buffer."""

from __future__ import annotations

import math

import numpy as np
import torch
from torch import Tensor

from vl2.nano.network import Shape


def parameter_shapes(shape: Shape) -> dict[str, tuple[int, ...]]:
    """Name → shape of every tensor; experts of a layer share one entry `….experts.{gate,up,down}_proj.weight`."""
    return {**_vision_shapes(shape.vision), **_projector_shapes(shape), **_language_shapes(shape.language)}


def _vision_shapes(v: dict) -> dict[str, tuple[int, ...]]:
    width, hidden, side = v["width"], int(v["width"] * v["mlp_ratio"]), v["image_size"] // v["patch_size"]
    shapes: dict[str, tuple[int, ...]] = {
        "vision.pos_embed": (1, side * side, width),
        "vision.patch_embed.proj.weight": (width, 3, v["patch_size"], v["patch_size"]),
        "vision.patch_embed.proj.bias": (width,),
        "vision.attn_pool.latent": (1, 1, width),
    }

    def add(name: str, outs: int, ins: int | None = None) -> None:
        shapes[name + ".weight"] = (outs,) if ins is None else (outs, ins)
        shapes[name + ".bias"] = (outs,)

    for name in [f"vision.blocks.{i}" for i in range(v["layers"])]:
        add(name + ".norm1", width)
        add(name + ".attn.qkv", 3 * width, width)
        add(name + ".attn.proj", width, width)
        add(name + ".norm2", width)
        add(name + ".mlp.fc1", hidden, width)
        add(name + ".mlp.fc2", width, hidden)
    add("vision.norm", width)
    pool = (("q", width, width), ("kv", 2 * width, width), ("proj", width, width), ("norm", width, None),
            ("mlp.fc1", hidden, width), ("mlp.fc2", width, hidden))
    for part, outs, ins in pool:
        add("vision.attn_pool." + part, outs, ins)
    return shapes


def _projector_shapes(shape: Shape) -> dict[str, tuple[int, ...]]:
    width, hidden = shape.vision["width"], shape.language["hidden_size"]
    return {
        "projector.layers.0.weight": (hidden, 4 * width), "projector.layers.0.bias": (hidden,),
        "projector.layers.2.weight": (hidden, hidden), "projector.layers.2.bias": (hidden,),
        "image_newline": (hidden,), "view_seperator": (hidden,),
    }


def _language_shapes(s: dict) -> dict[str, tuple[int, ...]]:
    hidden, vocab = s["hidden_size"], s["vocab_size"]
    shapes: dict[str, tuple[int, ...]] = {"language.model.embed_tokens.weight": (vocab, hidden)}
    for layer in range(s["num_hidden_layers"]):
        name = f"language.model.layers.{layer}"
        shapes[name + ".input_layernorm.weight"] = (hidden,)
        shapes[name + ".post_attention_layernorm.weight"] = (hidden,)
        shapes |= {f"{name}.self_attn.{part}": size for part, size in _attention_shapes(s).items()}
        if layer < s["first_k_dense_replace"]:
            shapes |= _ffn_shapes(name + ".mlp", (), s["intermediate_size"], hidden)
            continue
        inner = s["moe_intermediate_size"]
        shapes[name + ".mlp.gate.weight"] = (s["n_routed_experts"], hidden)
        shapes |= _ffn_shapes(name + ".mlp.experts", (s["n_routed_experts"],), inner, hidden)
        shapes |= _ffn_shapes(name + ".mlp.shared_experts", (), inner * s["n_shared_experts"], hidden)
    return {**shapes, "language.model.norm.weight": (hidden,), "language.lm_head.weight": (vocab, hidden)}


def _ffn_shapes(name: str, lead: tuple[int, ...], inner: int, hidden: int) -> dict[str, tuple[int, ...]]:
    into, out = (*lead, inner, hidden), (*lead, hidden, inner)
    return {f"{name}.gate_proj.weight": into, f"{name}.up_proj.weight": into, f"{name}.down_proj.weight": out}


def _attention_shapes(s: dict) -> dict[str, tuple[int, ...]]:
    hidden, heads = s["hidden_size"], s["num_attention_heads"]
    if not s["kv_lora_rank"]:
        return {f"{part}_proj.weight": (hidden, hidden) for part in "qkvo"}
    nope, rope, value, rank = s["qk_nope_head_dim"], s["qk_rope_head_dim"], s["v_head_dim"], s["kv_lora_rank"]
    return {
        "q_proj.weight": (heads * (nope + rope), hidden),
        "kv_a_proj_with_mqa.weight": (rank + rope, hidden),
        "kv_a_layernorm.weight": (rank,),
        "kv_b_proj.weight": (heads * (nope + value), rank),
        "o_proj.weight": (hidden, heads * value),
    }


def initial_values(shapes: dict[str, tuple[int, ...]], seed: int) -> dict[str, Tensor]:
    """float32 tensors in the host's memory: norms one, biases zero, matrices N(0, 1/inputs), residual outputs a third.

    The tower begins with attention to neighbours, which a ViT otherwise takes long to find: positions are sines and
    cosines, and each block's keys start equal to its queries (mimetic initialization, arXiv:2305.09828).
    """
    generator = torch.Generator().manual_seed(seed)
    values = {}
    for name, size in shapes.items():
        if name.endswith(".bias"):
            values[name] = torch.zeros(size, device="cpu")
        elif "norm" in name:
            values[name] = torch.ones(size, device="cpu")
        elif name == "vision.pos_embed":
            values[name] = _sine_positions(size)
        else:
            values[name] = torch.randn(size, generator=generator, device="cpu") * _deviation(name, size)
        if name.endswith("attn.qkv.weight"):
            queries, keys, _ = values[name].chunk(3)
            keys.copy_(queries)
    return values


def _sine_positions(size: tuple[int, ...]) -> Tensor:
    """[1, side², width]: a quarter of the channels each for sine and cosine of row and column, wavelengths 6 to 250."""
    side = math.isqrt(size[1])
    rates = 40.0 ** -torch.linspace(0, 1, size[2] // 4, device="cpu")
    angles = torch.outer(torch.arange(side, device="cpu").float(), rates)
    waves = torch.cat([angles.sin(), angles.cos()], 1)
    rows, columns = waves[:, None].expand(-1, side, -1), waves[None].expand(side, -1, -1)
    return torch.cat([rows, columns], -1).reshape(size)


def _deviation(name: str, size: tuple[int, ...]) -> float:
    if name == "vision.attn_pool.latent":
        return 0.3
    if "embed_tokens" in name or name in ("image_newline", "view_seperator"):
        return 1.0
    inputs = size[1] * size[2] * size[3] if len(size) == 4 else size[-1]
    residual = any(part in name for part in ("attn.proj", "mlp.fc2", "o_proj", "down_proj"))
    return (0.3 if residual else 0.2 if "lm_head" in name else 1.0) * inputs**-0.5


def placed(array: np.ndarray) -> Tensor:
    """The array as a tensor on the device on which a run trains (torch's default device)."""
    return torch.from_numpy(np.ascontiguousarray(array)).to(torch.get_default_device())


class FlatParameters:
    """All tensors as views of one float32 master vector, and of a bf16 working copy that autograd sees.

    One vector makes the optimizer three fused calls; `grad` (bf16) is filled through the views' .grad.
    """

    def __init__(self, values: dict[str, Tensor], dtype: torch.dtype = torch.bfloat16):
        self.sizes = {name: value.shape for name, value in values.items()}
        whole = torch.cat([value.flatten().float() for value in values.values()])
        self.master = whole.to(torch.get_default_device())
        self.working = self.master.to(dtype).share_memory_()
        self.grad = torch.zeros_like(self.working)
        self.weights: dict[str, Tensor] = {}
        start = 0
        for name, size in self.sizes.items():
            stop = start + size.numel()
            view = self.working[start:stop].view(size).requires_grad_(True)
            view.grad = self.grad[start:stop].view(size)
            self.weights[name] = view
            start = stop

    def refresh(self) -> None:
        """Copies the master values into the working tensors."""
        with torch.no_grad():
            self.working.copy_(self.master)

    def named(self, vector: Tensor) -> dict[str, Tensor]:
        """Views of a flat vector by parameter name."""
        parts = vector.split([size.numel() for size in self.sizes.values()])
        return {name: part.view(size) for (name, size), part in zip(self.sizes.items(), parts, strict=True)}
