"""Checkpoints in GPTQ's format, packed code by code from the format's formulas; shares nothing with vl2's packing."""

from __future__ import annotations

import json
import shutil
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors.torch import load_file, save_file

META = {"quantizer": ["gptqmodel:5.7.0"], "uri": "https://github.com/modelcloud/gptqmodel", "damp_percent": 0.05}


@dataclass
class GptqFile:
    """weights: what each quantized module is worth, float32 [N, K], by s · (u − z)."""

    folder: Path
    weights: dict[str, torch.Tensor]
    tensors: dict[str, torch.Tensor]
    values: dict[str, Any] = field(default_factory=dict)

    def save(self) -> Path:
        """Writes tensors and `quantization_config` as they are now."""
        save_file(self.tensors, self.folder / "model.safetensors")
        path = self.folder / "config.json"
        config = json.loads(path.read_text()) | {"quantization_config": self.values}
        path.write_text(json.dumps(config))
        return self.folder


def gptq_file(source: Path, folder: Path, modules: list[str], bits: int = 4, group: int = 32, v2: bool = False,
              signs: bool = False, seed: int = 0) -> GptqFile:
    """`source` with random codes for `modules` (group −1: one group); signs: some scales are negative."""
    folder.mkdir()
    for path in (path for path in source.glob("*.json") if not path.name.endswith("index.json")):
        shutil.copyfile(path, folder / path.name)
    tensors = {name: tensor for path in source.glob("*.safetensors") for name, tensor in load_file(path).items()}
    random = np.random.default_rng(seed)
    weights = {}
    for module in modules:
        rows, columns = tensors.pop(module + ".weight").shape
        size = columns if group == -1 else group
        groups = (columns + size - 1) // size
        codes = random.integers(0, 1 << bits, (columns, rows))
        scales = random.uniform(0.001, 0.02, (groups, rows)).astype(np.float16)
        if signs:
            scales *= np.where(random.random(scales.shape) < 0.3, -1, 1).astype(np.float16)
        zeros = np.full((groups, rows), 1 << (bits - 1))
        index = np.arange(columns) // size
        worth = scales.astype(np.float32)[index] * (codes - (1 << (bits - 1))).astype(np.float32)
        weights[module] = torch.from_numpy(worth.T.copy())
        tensors[module + ".qweight"] = pack_down(codes, bits)
        tensors[module + ".qzeros"] = pack_down((zeros if v2 else zeros - 1).T, bits).T.contiguous()
        tensors[module + ".scales"] = torch.from_numpy(scales)
        tensors[module + ".g_idx"] = torch.from_numpy(index.astype(np.int32))
    values = {"quant_method": "gptq", "bits": bits, "group_size": group, "sym": True, "desc_act": False,
              "lm_head": False, "pack_dtype": "int32", "checkpoint_format": "gptq_v2" if v2 else "gptq", "meta": META}
    return GptqFile(folder, weights, tensors, values)


def pack_down(numbers: np.ndarray, bits: int) -> torch.Tensor:
    """Unsigned numbers [K, N] to int32 [K·bits/32, N]: number k lies in word ⌊k·bits/32⌋ from bit k·bits mod 32 on."""
    per_word = 32 // bits
    words = np.zeros((numbers.shape[0] // per_word, numbers.shape[1]), np.uint64)
    for k in range(numbers.shape[0]):
        words[k // per_word] += numbers[k].astype(np.uint64) * np.uint64(2 ** (bits * (k % per_word)))
    return torch.from_numpy(words.astype(np.uint32).view(np.int32).copy())
