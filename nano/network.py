"""vl2-nano's training forward: the family's computation on a dictionary of tensors, shaped for speed on a CPU.

It differs from `vl2.model` in form only: batches have one crop, sequences are padded on the right, and tokens are
sorted by expert, with rows of zero weight between, so that products have few different shapes.
tests/nano compares both on the same weights.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from vl2.nano.gradients import gelu, rms_norm, routed_experts

Weights = dict[str, Tensor]


# Layers whose first head is taught to attend to where the next answer token is written.
POINTING_LAYERS = (2, 3, 4)
# Layers whose second head is taught to attend, from a word in a question, to the same word on the page.
FINDING_LAYERS = (1, 2)
FINDING_SHARE = 0.3  # of the weight that the other pointing has; it is the easier one
# Layer into which image tokens are to bring where on the page their word is; pointing heads can then read it off.
PLACING_LAYER = 2


@dataclass
class SideLosses:
    """Losses collected inside the decoder: expert balance over the MoE layers, and, where they are set, two more.

    pointer, subject: int64 [B, L], for the last L queries the key position that a head should attend to, −1 for any.
    places: float32 [B, rows, columns, 4], what the map of image tokens that starts at `places_start` should know.
    """

    balance: Tensor | float = 0.0
    pointer: Tensor | None = None
    pointing: Tensor | float = 0.0
    pointed: float = 0.0
    subject: Tensor | None = None
    found: float = 0.0
    places: Tensor | None = None
    places_start: int = 0
    placing: Tensor | float = 0.0

    def place(self, w: Weights, x: Tensor) -> None:
        """Adds the distance of word boxes read off the image tokens of x [B, T, H]; rows end with a newline token."""
        batch, rows, columns, _ = self.places.shape
        tokens = x[:, self.places_start: self.places_start + rows * (columns + 1)]
        tokens = tokens.unflatten(1, (rows, columns + 1))[:, :, :columns]
        known = ~self.places[..., 0].isnan()
        if not known.any():
            return
        guess = F.linear(rms_norm(torch.ones_like(tokens[0, 0, 0]), tokens[known]), w["auxiliary.places.weight"],
                         w["auxiliary.places.bias"]).float()
        self.placing = (guess - self.places[known]).abs().mean()

    def point(self, layer: int, q: Tensor, k: Tensor, mask: Tensor) -> None:
        """Adds the cross-entropies of the attention of two heads of a layer, q and k [B, heads, T, dim]."""
        if layer in POINTING_LAYERS:
            loss, self.pointed = _pointing(q[:, 0], k[:, 0], mask, self.pointer)
            self.pointing = self.pointing + loss / len(POINTING_LAYERS)
        if layer in FINDING_LAYERS:
            loss, self.found = _pointing(q[:, 1], k[:, 1], mask, self.subject)
            self.pointing = self.pointing + FINDING_SHARE * loss / len(FINDING_LAYERS)


def _pointing(q: Tensor, k: Tensor, mask: Tensor, target: Tensor) -> tuple[Tensor, float]:
    """Cross-entropy of one head's attention, q and k [B, T, dim], against `target`, and the share of hits."""
    length, known = target.shape[1], target >= 0
    scores = torch.bmm(q[:, -length:] * q.shape[-1] ** -0.5, k.mT) + mask[-length:]
    scores, target = scores[known].float(), target[known]
    if not len(target):
        return scores.sum(), 0.0
    return F.cross_entropy(scores, target), (scores.detach().argmax(-1) == target).float().mean().item()


@dataclass(frozen=True)
class Run:
    """What one attention layer is to do: its number, how many of the last positions ask, where pointing is scored."""

    layer: int
    queries: int
    side: SideLosses | None = None


@dataclass(frozen=True)
class Shape:
    """Sizes the forward needs, from config.json's dictionaries."""

    vision: dict
    language: dict

    @classmethod
    def from_config(cls, config: dict) -> Shape:
        return cls(config["vision_config"], config["language_config"])


def linear(w: Weights, name: str, x: Tensor) -> Tensor:
    return F.linear(x, w[name + ".weight"], w.get(name + ".bias"))


def layer_norm(w: Weights, name: str, x: Tensor) -> Tensor:
    return F.layer_norm(x, (x.shape[-1],), w[name + ".weight"], w[name + ".bias"], 1e-6)


def attention(q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None) -> Tensor:
    """Softmax attention, q [B, heads, Q, dim] on the last Q of k and v [B, heads, T, dim]; `mask` [Q, T] is added.

    Plain matrix products: the fused CPU kernel's backward is three times slower.
    """
    batch, heads, length, dim = q.shape
    q, k = (q * dim**-0.5).reshape(-1, length, dim), k.reshape(-1, k.shape[2], dim)
    scores = torch.bmm(q, k.mT) if mask is None else torch.baddbmm(mask, q, k.mT)
    return torch.bmm(scores.softmax(-1), v.reshape(-1, v.shape[2], v.shape[-1])).view(batch, heads, length, -1)


def causal_attention(q: Tensor, k: Tensor, v: Tensor, mask: Tensor) -> Tensor:
    """Causal attention in two halves, so that the first does not score the keys of the second."""
    half = q.shape[2] // 2
    if q.shape[2] < k.shape[2]:
        return attention(q, k, v, mask[-q.shape[2]:])
    first = attention(q[:, :, :half], k[:, :, :half], v[:, :, :half], mask[:half, :half])
    return torch.cat([first, attention(q[:, :, half:], k, v, mask[half:])], 2)


def causal_mask(length: int, dtype: torch.dtype) -> Tensor:
    return torch.full((length, length), -1e4, dtype=dtype).triu(1)


def tower(w: Weights, shape: Shape, tiles: Tensor) -> Tensor:
    """tiles: uint8 [N, 3, S, S] → tokens [N, (S/patch)², width] after the final norm."""
    patch, heads = shape.vision["patch_size"], shape.vision["heads"]
    count, side = len(tiles), tiles.shape[-1] // patch
    kernel = w["vision.patch_embed.proj.weight"]
    pixels = tiles.to(kernel.dtype).sub_(127.5).mul_(1 / 127.5)
    patches = pixels.view(count, 3, side, patch, side, patch).permute(0, 2, 4, 1, 3, 5).reshape(count, side * side, -1)
    x = F.linear(patches, kernel.flatten(1), w["vision.patch_embed.proj.bias"]) + w["vision.pos_embed"]
    for block in range(shape.vision["layers"]):
        name = f"vision.blocks.{block}"
        qkv = linear(w, name + ".attn.qkv", layer_norm(w, name + ".norm1", x))
        q, k, v = qkv.view(count, side * side, 3, heads, -1).permute(2, 0, 3, 1, 4).contiguous().unbind()
        attended = attention(q, k, v, None).transpose(1, 2).flatten(2)
        x = x + linear(w, name + ".attn.proj", attended)
        hidden = gelu(linear(w, name + ".mlp.fc1", layer_norm(w, name + ".norm2", x)))
        x = x + linear(w, name + ".mlp.fc2", hidden)
    return layer_norm(w, "vision.norm", x)


def project(w: Weights, tokens: Tensor) -> Tensor:
    """tokens [N, s², width], s even → image features [N, s/2, s/2, hidden], blocks unfolded channel-major."""
    count, side = len(tokens), math.isqrt(tokens.shape[1])
    blocks = tokens.view(count, side // 2, 2, side // 2, 2, -1).permute(0, 1, 3, 5, 2, 4).flatten(3)
    return linear(w, "projector.layers.2", F.gelu(linear(w, "projector.layers.0", blocks)))


def assemble(w: Weights, global_view: Tensor, local: Tensor) -> Tensor:
    """global_view [B, h, h, H], local [B, th, tw, h, h, H] → the image block [B, tokens, H], global view first."""
    batch, high, wide, side, _, hidden = local.shape
    local = local.transpose(2, 3).reshape(batch, high * side, wide * side, hidden)

    def rows(grid: Tensor) -> Tensor:
        newline = w["image_newline"].expand(batch, grid.shape[1], 1, hidden)
        return torch.cat([grid, newline], 2).flatten(1, 2)

    return torch.cat([rows(global_view), w["view_seperator"].expand(batch, 1, hidden), rows(local)], 1)


def rotary(length: int, dim: int, theta: float = 10000.0) -> tuple[Tensor, Tensor]:
    """cos and sin, float32 [length, dim], the angles twice."""
    angles = torch.outer(torch.arange(length).float(), theta ** (-torch.arange(0, dim, 2).float() / dim))
    angles = torch.cat([angles, angles], 1)
    return angles.cos(), angles.sin()


def rotate(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """RoPE on x [..., T, dim] in the half-split layout."""
    # A product with a signed permutation: (a, b) to (−b, a), exact, and cheaper than slices that are put together.
    half = torch.eye(x.shape[-1] // 2, dtype=x.dtype)
    none = torch.zeros_like(half)
    turn = torch.cat([torch.cat([none, half], 1), torch.cat([-half, none], 1)])
    return torch.addcmul(x * cos, x @ turn, sin)


def plain_attention(w: Weights, name: str, x: Tensor, settings: dict, run: Run) -> Tensor:
    """Causal multi-head attention, x [B, T, H]."""
    batch, length, hidden = x.shape
    heads = settings["num_attention_heads"]
    cos, sin = (table.to(x.dtype) for table in rotary(length, hidden // heads))
    fused = torch.cat([w[f"{name}.{part}_proj.weight"] for part in "qkv"])
    # Contiguous at once: RoPE and the products would otherwise copy each part, in both directions.
    qk, v = F.linear(x, fused).view(batch, length, 3, heads, -1).permute(2, 0, 3, 1, 4).contiguous().split([2, 1])
    q, k = rotate(qk, cos, sin).unbind()
    v, mask = v.squeeze(0), causal_mask(length, x.dtype)
    if run.side is not None:
        run.side.point(run.layer, q, k, mask)
    out = causal_attention(q[:, :, -run.queries:], k, v, mask)
    return linear(w, name + ".o_proj", out.transpose(1, 2).flatten(2))


def latent_attention(w: Weights, name: str, x: Tensor, settings: dict, run: Run) -> Tensor:
    """Causal multi-head latent attention in its naive form, x [B, T, H]; rope pairs are interleaved in the weights."""
    batch, length, _ = x.shape
    heads, rank = settings["num_attention_heads"], settings["kv_lora_rank"]
    nope, rope, value = (settings[k] for k in ("qk_nope_head_dim", "qk_rope_head_dim", "v_head_dim"))
    cos, sin = (table.to(x.dtype) for table in rotary(length, rope))
    q = linear(w, name + ".q_proj", x).view(batch, length, heads, nope + rope).transpose(1, 2)
    latent, key = linear(w, name + ".kv_a_proj_with_mqa", x).split([rank, rope], -1)
    latent = rms_norm(w[name + ".kv_a_layernorm.weight"], latent)
    kv = linear(w, name + ".kv_b_proj", latent).view(batch, length, heads, nope + value).transpose(1, 2)

    def halves(part: Tensor) -> Tensor:
        return torch.cat([part[..., 0::2], part[..., 1::2]], -1)

    q = torch.cat([q[..., :nope], rotate(halves(q[..., nope:]), cos, sin)], -1)
    shared = rotate(halves(key), cos, sin).unsqueeze(1).expand(batch, heads, length, rope)
    k = torch.cat([kv[..., :nope], shared], -1)
    mask = causal_mask(length, x.dtype)
    if run.side is not None:
        run.side.point(run.layer, q, k, mask)
    out = causal_attention(q[:, :, -run.queries:], k, kv[..., nope:], mask)
    return linear(w, name + ".o_proj", out.transpose(1, 2).flatten(2))


def dense(w: Weights, name: str, x: Tensor) -> Tensor:
    return linear(w, name + ".down_proj", F.silu(linear(w, name + ".gate_proj", x)) * linear(w, name + ".up_proj", x))


def mixture(w: Weights, name: str, x: Tensor, top_k: int, side: SideLosses) -> Tensor:
    """Softmax greedy mixture of experts with shared experts, x [B, T, H]; tokens run through the experts they chose."""
    scores = F.linear(x.float(), w[name + ".gate.weight"].float()).softmax(-1)
    weight, expert = scores.flatten(0, 1).topk(top_k, -1)
    experts = scores.shape[-1]
    chosen = expert.flatten().bincount(minlength=experts) / len(expert)
    side.balance = side.balance + (chosen * scores.mean((0, 1))).sum() * experts / top_k
    gate, up, down = (w[f"{name}.experts.{part}_proj.weight"] for part in ("gate", "up", "down"))
    routed = routed_experts(x.flatten(0, 1), weight.to(x.dtype), expert, (torch.cat([gate, up], 1), down))
    return routed.view_as(x) + dense(w, name + ".shared_experts", x)


def decoder(w: Weights, shape: Shape, x: Tensor, side: SideLosses, last: int | None = None) -> Tensor:
    """x: embeddings [B, T, H] → hidden of the `last` positions (default all) after the final norm; positions 0…T−1."""
    settings = shape.language
    attend = latent_attention if settings["kv_lora_rank"] else plain_attention
    layers = settings["num_hidden_layers"]
    for layer in range(layers):
        name = f"language.model.layers.{layer}"
        if layer == PLACING_LAYER and side.places is not None:
            side.place(w, x)
        watched = side if side.pointer is not None else None
        run = Run(layer, last if last and layer == layers - 1 else x.shape[1], watched)
        attended = attend(w, name + ".self_attn", rms_norm(w[name + ".input_layernorm.weight"], x), settings, run)
        x = x[:, -run.queries:] + attended
        normed = rms_norm(w[name + ".post_attention_layernorm.weight"], x)
        if layer < settings["first_k_dense_replace"]:
            x = x + dense(w, name + ".mlp", normed)
        else:
            x = x + mixture(w, name + ".mlp", normed, settings["num_experts_per_tok"], side)
    return rms_norm(w["language.model.norm.weight"], x)
