"""The slow truth for streaming: the whole reference model over the same sequences, its Linears' inputs hooked."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import torch
from safetensors.torch import load_file
from torch import Tensor

from vl2.calib.calibration_set import read_calibration_set
from vl2.model.checkpoint import load_model
from vl2.model.decoder import DecoderLayer
from vl2.model.moe import MoE
from vl2.model.vl2 import DeepseekVL2


@dataclass
class Layer:
    """What happened in one layer. inputs: site → rows [n, K]; idx, weights, logits as in `Routing`, of all tokens."""

    inputs: dict[str, Tensor]
    idx: Tensor
    weights: Tensor
    logits: Tensor


def reference_model(folder: Path) -> DeepseekVL2:
    """The model with the naive form of latent attention, in which every Linear is applied as one."""
    model = load_model(folder)
    model.language.use_absorbed(False)
    return model


@torch.inference_mode()
def final_states(model: DeepseekVL2, calibration_set: Path) -> Tensor:
    """[tokens, H] after the final norm, each sequence on its own."""
    hidden = load_file(calibration_set / "embeddings.safetensors")["hidden"]
    states = []
    for start, stop in read_calibration_set(calibration_set).spans():
        x, size = hidden[None, start:stop], stop - start
        states.append(model.language(x, torch.arange(size)[None], torch.ones(1, size, dtype=torch.bool))[0][0])
    return torch.cat(states)


def observe_layer(model: DeepseekVL2, l: int, calibration_set: Path) -> Layer:
    """Hooks layer l and runs the model."""
    layer = model.language.layers[l]
    inputs: dict[str, list[Tensor]] = {}
    routing = []
    hooks = [module.register_forward_pre_hook(
        lambda _, args, site=site: inputs.setdefault(site, []).append(args[0].flatten(0, -2)))
        for site, module in _modules(layer).items()]
    if isinstance(layer.mlp, MoE):
        hooks.append(layer.mlp.gate.register_forward_hook(lambda _, __, out: routing.append(out)))
    final_states(model, calibration_set)
    for hook in hooks:
        hook.remove()
    parts = [torch.cat(part) for part in zip(*routing, strict=True)] or [torch.zeros(0)] * 3
    return Layer({site: torch.cat(rows) for site, rows in inputs.items()}, *parts)


def _modules(layer: DecoderLayer) -> dict[str, torch.nn.Module]:
    attention, mlp = layer.self_attn, layer.mlp
    modules = {"attention.output": attention.o_proj, "mlp.input": mlp}
    modules["attention.input"] = attention.q_a_proj if hasattr(attention, "q_a_proj") else attention.q_proj
    if hasattr(attention, "kv_b_proj"):
        modules["attention.latent"] = attention.kv_b_proj
    if hasattr(attention, "q_b_proj"):
        modules["attention.q_latent"] = attention.q_b_proj
    if not isinstance(mlp, MoE):
        modules["mlp.down"] = mlp.down_proj
    elif mlp.shared_experts is not None:
        modules["shared.down"] = mlp.shared_experts.down_proj
    return modules


def expert_rows(layer: Layer, e: int) -> Tensor:
    """Tokens that chose expert e, ascending, found without our code."""
    return torch.tensor([t for t, chosen in enumerate(layer.idx.tolist()) if e in chosen], dtype=torch.long)


def expert_inner(model: DeepseekVL2, l: int, e: int, x: Tensor) -> Tensor:
    """What enters down_proj of expert e, in float64."""
    experts = model.language.layers[l].mlp.experts
    gate, up = (x.double() @ matrix[e].double().T for matrix in (experts.gate_proj.detach(), experts.up_proj.detach()))
    return gate / (1 + (-gate).exp()) * up


def weighted_hessian(x: Tensor, a: Tensor) -> Tensor:
    """Σ a x xᵀ / Σ a in float64, one token after another in effect."""
    x, a = x.double(), a.double()
    return torch.einsum("t,ti,tj->ij", a, x, x) / a.sum()
