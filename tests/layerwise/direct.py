"""The slow truth of the layer figures: two whole models, hooks, and NumPy in float64, one position after another."""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
import torch

from vl2.calib.data import CalibrationData
from vl2.model.checkpoint import load_model
from vl2.model.vl2 import DeepseekVL2
from vl2.prompt import Processor


@dataclass
class Trace:
    """What passed each module of a model, by its name: inputs and outputs float64 [n, K] of all sequences in order and
    the arguments of its calls; chosen experts by layer; image: bool [tokens]."""

    inputs: dict[str, list] = field(default_factory=dict)
    outputs: dict[str, list] = field(default_factory=dict)
    chosen: dict[int, list] = field(default_factory=dict)
    image: list = field(default_factory=list)
    calls: dict[str, list] = field(default_factory=dict)

    def entering(self, name: str) -> np.ndarray:
        return np.concatenate(self.inputs[name])

    def leaving(self, name: str) -> np.ndarray:
        return np.concatenate(self.outputs[name])


def whole_model(folder: Path) -> DeepseekVL2:
    model = load_model(folder)
    model.language.use_absorbed(False)
    return model


@torch.no_grad()
def trace(model: DeepseekVL2, processor: Processor, data: CalibrationData) -> Trace:
    """Hooks every module and runs every conversation by itself."""
    found = Trace()

    def keep(name: str, args: tuple, output: object) -> None:
        found.calls.setdefault(name, []).append(args)
        if hasattr(output, "idx"):
            found.chosen.setdefault(int(name.split(".")[2]), []).append(output.idx.numpy())
            return
        first = output[0] if isinstance(output, tuple) else output
        found.inputs.setdefault(name, []).append(args[0].flatten(0, -2).double().numpy())
        found.outputs.setdefault(name, []).append(first.flatten(0, -2).double().numpy())

    hooks = [module.register_forward_hook(lambda _, args, output, name=name: keep(name, args, output))
             for name, module in model.named_modules() if name and not name.endswith("embed_tokens")]
    for one in data.samples:
        prompt = processor.encode(one.sample.opened(), inference=not one.sample.is_answered)
        ids, mask = torch.from_numpy(prompt.input_ids)[None], torch.from_numpy(prompt.images_seq_mask)[None]
        embeds = model.embed(ids, mask, torch.from_numpy(prompt.tiles), torch.from_numpy(prompt.crops))
        size = embeds.shape[1]
        found.outputs.setdefault("embeddings", []).append(embeds[0].double().numpy())
        visible = torch.ones(1, size, dtype=torch.bool)
        model.language.logits(model.language(embeds, torch.arange(size)[None], visible)[0])
        found.image.append(prompt.images_seq_mask)
    for hook in hooks:
        hook.remove()
    return found


@torch.no_grad()
def again(model: DeepseekVL2, name: str, calls: list) -> np.ndarray:
    """What a module of `model` gives for the arguments of recorded calls: float64 [n, K]."""
    outputs = (model.get_submodule(name)(*args) for args in calls)
    return np.concatenate([(y[0] if isinstance(y, tuple) else y).flatten(0, -2).double().numpy() for y in outputs])


def figures(y: np.ndarray, z: np.ndarray) -> dict[str, float]:
    """error and mean cosine of two [n, K]."""
    cosines = [a @ b / np.sqrt((a @ a) * (b @ b)) for a, b in zip(y, z, strict=True)]
    return {"positions": len(y), "error": ((z - y) ** 2).sum() / (y**2).sum(), "cosine": float(np.mean(cosines))}


def expert_figures(a: DeepseekVL2, b: DeepseekVL2, traced: Trace, place: tuple[int, int, str]) -> dict[str, float]:
    """Of one matrix ("gate_proj", …) of an expert, on the reference's tokens for it, found one by one."""
    l, e, matrix = place
    x, chosen = traced.entering(f"language.layers.{l}.mlp"), np.concatenate(traced.chosen[l])
    x = x[[e in row for row in chosen.tolist()]]
    mine, theirs = ({name: getattr(model.language.layers[l].mlp.experts, name)[e].detach().double().numpy()
                     for name in ("gate_proj", "up_proj", "down_proj")} for model in (a, b))
    if matrix == "down_proj":
        gate = x @ mine["gate_proj"].T
        x = gate / (1 + np.exp(-gate)) * (x @ mine["up_proj"].T)
    return figures(x @ mine[matrix].T, x @ theirs[matrix].T)


def changed_percent(mine: list, theirs: list) -> float:
    """Share of positions whose sets of experts differ."""
    pairs = zip(np.concatenate(mine).tolist(), np.concatenate(theirs).tolist(), strict=True)
    return 100 * float(np.mean([set(one) != set(other) for one, other in pairs]))
