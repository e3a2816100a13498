"""What the original computed beside what our model computes: the tests assert it, `parity_table` prints it."""

from __future__ import annotations

import json
from collections.abc import Iterator
from dataclasses import dataclass, field
from functools import lru_cache
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor

from tests.conftest import GOLDENS
from tests.tolerances import FEATURES, LOGITS, ROUTER_MARGIN, ROUTER_WEIGHTS, Bound
from vl2.model.checkpoint import load_model
from vl2.model.decoder import positions_from_mask
from vl2.model.moe import MoE, Routing
from vl2.model.vl2 import DeepseekVL2

CASES = ("one", "text", "tiled", "two", "batch")
GENERATED_CASES = ("one", "text", "tiled", "batch")
SAMPLED = 8  # the goldens keep the last 8 positions of hidden states and logits


class Pair(NamedTuple):
    """One comparison; `stage` is a column of the parity table."""

    stage: str
    what: str
    got: Any
    want: Any
    bound: Bound


@dataclass(frozen=True)
class Mini:
    """A miniature checkpoint with its recordings."""

    name: str
    folder: Path
    model: DeepseekVL2
    golden: dict[str, np.ndarray]
    generation: dict[str, np.ndarray]
    facts: dict[str, Any]


@dataclass
class Trace:
    """What happened in one forward of the decoder."""

    attention_out: list[Tensor] = field(default_factory=list)
    mlp_out: list[Tensor] = field(default_factory=list)
    hidden: list[Tensor] = field(default_factory=list)
    routing: dict[int, Routing] = field(default_factory=dict)
    logits: Tensor | None = None
    cache: tuple[Tensor, ...] = ()


@lru_cache
def load_mini(folder: Path) -> Mini:
    golden = folder / "golden"
    arrays, generation = (dict(np.load(golden / name)) for name in ("model.npz", "generation.npz"))
    facts = json.loads((golden / "model.json").read_text())
    return Mini(folder.name, folder, load_model(folder), arrays, generation, facts)


@lru_cache
def recorded_tiles(*images: str) -> Tensor:
    """The recorded pixels of images under tiling, normalised: float32 [N, 3, S, S]."""
    pixels = np.load(GOLDENS / "processor" / "pixels.npz")
    tiles = [torch.from_numpy(pixels[f"{image}/crop/tiles_u8"]) for image in images] or [torch.zeros(0, 384, 384, 3)]
    return ((torch.cat(tiles).permute(0, 3, 1, 2).float() / 255) - 0.5) / 0.5


def case_inputs(mini: Mini, case: str) -> tuple[Tensor, Tensor]:
    """inputs_embeds [B, T, H] and attention_mask [B, T] of a recorded case, images merged by our model."""
    return _case_inputs(mini.folder, case)


@lru_cache
def _case_inputs(folder: Path, case: str) -> tuple[Tensor, Tensor]:
    mini = load_mini(folder)
    images = mini.facts["cases"][case]["images"]
    names = [name for row in images for name in row] if case == "batch" else images
    ids, seq_mask, crops = (torch.from_numpy(mini.golden[f"{case}/{key}"]) for key in
                            ("input_ids", "images_seq_mask", "images_spatial_crop"))
    crops = crops.flatten(0, 1)
    mask = mini.golden.get(f"{case}/attention_mask", np.ones(ids.shape, dtype=bool))
    with torch.inference_mode():
        embeds = mini.model.embed(ids.long(), seq_mask, recorded_tiles(*names), crops[crops.any(dim=1)].long())
    return embeds, torch.from_numpy(mask)


@lru_cache
def traced_case(folder: Path, case: str) -> Trace:
    mini = load_mini(folder)
    embeds, mask = case_inputs(mini, case)
    trace, hooks = Trace(), []
    for l, layer in enumerate(mini.model.language.layers):
        hooks.append(layer.self_attn.register_forward_hook(lambda _, __, out: trace.attention_out.append(out[0])))
        hooks.append(layer.mlp.register_forward_hook(lambda _, __, out: trace.mlp_out.append(out)))
        hooks.append(layer.register_forward_hook(lambda _, __, out: trace.hidden.append(out[0])))
        if isinstance(layer.mlp, MoE):
            hooks.append(layer.mlp.gate.register_forward_hook(lambda _, __, out, l=l: trace.routing.update({l: out})))
    with torch.inference_mode():
        hidden, trace.cache = mini.model.language(embeds, positions_from_mask(mask), mask)
        trace.logits = mini.model.language.logits(hidden)
    trace.hidden = [embeds, *trace.hidden, hidden]
    for hook in hooks:
        hook.remove()
    return trace


def vision_pairs(mini: Mini) -> Iterator[Pair]:
    """Every recorded stage of the tower and the projector on the tiles of one image."""
    golden, model = mini.golden, mini.model
    stages: dict[str, Tensor] = {}

    def keep(name: str):
        return lambda _, __, out: stages.update({name: out})

    hooks = [model.vision.patch_embed.register_forward_hook(keep("patch"))]
    hooks += [model.vision.blocks[0].attn.register_forward_hook(keep("attn0"))]
    hooks += [block.register_forward_hook(keep(f"block{i}")) for i, block in enumerate(model.vision.blocks)]
    with torch.inference_mode():
        out = model.vision(recorded_tiles(mini.facts["vision"]["image"]))
        projected = model.projector(out)
    for hook in hooks:
        hook.remove()
    stages["pos"] = stages["patch"] + model.vision.pos_embed.detach()
    for name, value in stages.items():
        yield Pair("vision", name, value[:, golden["vision/rows"]], golden[f"vision/{name}_rows"], FEATURES)
    yield from _feature_pairs("vision", out, golden)
    yield from _feature_pairs("projector", projected, golden)


def _feature_pairs(stage: str, out: Tensor, golden: dict[str, np.ndarray]) -> Iterator[Pair]:
    yield Pair(stage, "out", out[:, golden[f"{stage}/rows"]], golden[f"{stage}/out_rows"], FEATURES)
    yield Pair(stage, "global tile", out[0], golden[f"{stage}/out_tile0"], FEATURES)
    yield Pair(stage, "mean", out.mean(-1), golden[f"{stage}/out_mean"], FEATURES)
    yield Pair(stage, "std", out.std(-1, correction=0), golden[f"{stage}/out_std"], FEATURES)


def embedding_pairs(mini: Mini, case: str) -> Iterator[Pair]:
    """Embeddings after merging; the long cases recorded sampled rows and every row's mean and deviation."""
    golden, embeds = mini.golden, traced_case(mini.folder, case).hidden[0]
    if case == "batch":
        tail = golden["batch/inputs_embeds_row1_tail"]
        yield Pair("embeddings", "text row", embeds[1, -len(tail):], tail, FEATURES)
    elif f"{case}/inputs_embeds" in golden:
        yield Pair("embeddings", "all", embeds, golden[f"{case}/inputs_embeds"], FEATURES)
    else:
        rows = golden[f"{case}/embed_rows"]
        yield Pair("embeddings", "rows", embeds[:, rows], golden[f"{case}/inputs_embeds_rows"], FEATURES)
        yield Pair("embeddings", "mean", embeds.mean(-1), golden[f"{case}/inputs_embeds_mean"], FEATURES)
        yield Pair("embeddings", "std", embeds.std(-1, correction=0), golden[f"{case}/inputs_embeds_std"], FEATURES)


def layer_pairs(mini: Mini, case: str) -> Iterator[Pair]:
    """Attention, FFN and hidden states of every layer at the last positions (all real, in the batch too)."""
    trace = traced_case(mini.folder, case)
    for stage, key, values in (("attention", "attn_out_last", trace.attention_out),
                               ("mlp", "mlp_out_last", trace.mlp_out), ("hidden", "hidden_last", trace.hidden)):
        recorded = mini.golden[f"{case}/{key}"]
        assert len(recorded) == len(values)
        for l, (got, want) in enumerate(zip(values, recorded, strict=True)):
            yield Pair(stage, f"{key} {l}", got[:, -SAMPLED:], want, FEATURES)


def logits_pairs(mini: Mini, case: str) -> Iterator[Pair]:
    """Logits at the last positions, and their maximum and log-sum-exp at every real position."""
    real = case_inputs(mini, case)[1]
    logits = traced_case(mini.folder, case).logits
    yield Pair("logits", "last", logits[:, -SAMPLED:], mini.golden[f"{case}/logits_last"], LOGITS)
    yield Pair("logits", "max", logits.amax(-1)[real], mini.golden[f"{case}/logits_max"][real], LOGITS)
    yield Pair("logits", "lse", logits.logsumexp(-1)[real], mini.golden[f"{case}/logits_lse"][real], LOGITS)


def cache_pairs(mini: Mini, case: str) -> Iterator[Pair]:
    """Cache entries at the last 4 positions; the original keeps heads before positions, MLA as rope key and latent."""
    language, cache = mini.model.config.language_config, traced_case(mini.folder, case).cache
    for l in range(language.num_hidden_layers):
        if language.use_mla:
            latent, key = cache[l][:, -4:].split((language.kv_lora_rank, language.qk_rope_head_dim), dim=-1)
            entries = (key[:, None], latent[:, None])
        else:
            entries = tuple(entry[:, -4:].transpose(1, 2) for entry in cache[2 * l : 2 * l + 2])
        for i, entry in enumerate(entries):
            yield Pair("cache", f"cache{i} {l}", entry, mini.golden[f"{case}/cache{i}_last4.{l}"], FEATURES)


def router_choices(mini: Mini, case: str) -> Iterator[tuple[int, np.ndarray, np.ndarray]]:
    """Per MoE layer: its number, our chosen experts and the recorded ones, [tokens, k] ascending, real tokens only."""
    real = case_inputs(mini, case)[1].numpy()
    for l, routing in traced_case(mini.folder, case).routing.items():
        decided = real & (mini.golden[f"{case}/router_margin.{l}"] > ROUTER_MARGIN)
        got = routing.idx.sort(dim=-1).values.view(*real.shape, -1).numpy()
        yield l, got[decided], mini.golden[f"{case}/router_idx.{l}"][decided]


def router_pairs(mini: Mini, case: str) -> Iterator[Pair]:
    """Weights of the chosen experts and gate logits, real tokens only."""
    real = case_inputs(mini, case)[1]
    for l, routing in traced_case(mini.folder, case).routing.items():
        order = routing.idx.argsort(dim=-1)
        got = routing.weights.gather(-1, order).view(*real.shape, -1)
        yield Pair("router", f"weights {l}", got[real], mini.golden[f"{case}/router_weight.{l}"][real], ROUTER_WEIGHTS)
        logits = routing.logits.view(*real.shape, -1)[:, -SAMPLED:]
        yield Pair("router", f"logits {l}", logits, mini.golden[f"{case}/router_logits_last.{l}"], FEATURES)


def all_pairs(mini: Mini) -> Iterator[Pair]:
    """Everything recorded with a number in it."""
    yield from vision_pairs(mini)
    for case in CASES:
        for pairs in (embedding_pairs, layer_pairs, router_pairs, logits_pairs, cache_pairs):
            yield from pairs(mini, case)
