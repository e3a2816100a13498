"""Writes a trained vl2-nano as a checkpoint of the family: `python -m vl2.nano.checkpoint_files RUN --out FOLDER`."""

from __future__ import annotations

import argparse
import json
import os
from pathlib import Path

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from vl2.nano.geometry import config_dict, write_description
from vl2.nano.losses import auxiliary_shapes
from vl2.nano.network import Shape
from vl2.nano.parameters import FlatParameters, parameter_shapes

WEIGHTS = "model-00001-of-000001.safetensors"  # the family's form: five digits, then six


def checkpoint_tensors(values: dict[str, Tensor], dtype: torch.dtype = torch.bfloat16) -> dict[str, Tensor]:
    """Training values → the checkpoint's tensors: auxiliary heads dropped, experts unstacked, cast to `dtype`."""
    tensors: dict[str, Tensor] = {}
    for name, value in values.items():
        if name.startswith("auxiliary."):
            continue
        if ".experts." in name:
            lead, part = name.split(".experts.")
            tensors |= {f"{lead}.experts.{e}.{part}": matrix for e, matrix in enumerate(value)}
        else:
            tensors[name] = value
    return {name: tensor.to(dtype).contiguous() for name, tensor in sorted(tensors.items())}


def training_values(folder: Path, shapes: dict[str, tuple[int, ...]]) -> dict[str, Tensor]:
    """The reverse of `checkpoint_tensors`: float32 values of a checkpoint's tensors by training name, experts stacked.

    Names of `shapes` that a checkpoint does not hold, the auxiliary heads, are left out.
    """
    stored = load_file(folder / WEIGHTS)
    values: dict[str, Tensor] = {}
    for name, size in shapes.items():
        if name.startswith("auxiliary."):
            continue
        lead, stacked, part = name.partition(".experts.")
        names = [f"{lead}.experts.{e}.{part}" for e in range(size[0])] if stacked else [name]
        values[name] = torch.stack([stored[one] for one in names]).view(size).float()
    return values


def read_state(run: Path) -> tuple[dict, dict[str, Tensor]]:
    """A run's state.pt and its averaged parameters by name, float32."""
    state = torch.load(run / "state.pt", weights_only=True, map_location="cpu")
    shape = Shape.from_config(config_dict(state["plan"]["variant"]))
    shapes = {**parameter_shapes(shape), **auxiliary_shapes(shape)}
    flat = FlatParameters({name: torch.zeros(size) for name, size in shapes.items()})
    return state, flat.named(state.get("average", state["master"]))


def write_checkpoint(run: Path, folder: Path) -> int:
    """Writes weights (bfloat16), index, configuration and tokenizer into `folder`; returns the bytes of the weights."""
    state, values = read_state(run)
    write_description(folder, state["plan"]["variant"])
    tensors = checkpoint_tensors(values)
    partial = folder / "weights.partial"
    save_file(tensors, partial, metadata={"format": "pt"})
    os.replace(partial, folder / WEIGHTS)
    size = sum(tensor.nbytes for tensor in tensors.values())
    index = {"metadata": {"total_size": size}, "weight_map": {name: WEIGHTS for name in tensors}}
    (folder / "model.safetensors.index.json").write_text(json.dumps(index, indent=2) + "\n")
    return size


def main(arguments: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(prog="python -m vl2.nano.checkpoint_files", description=__doc__.splitlines()[0])
    parser.add_argument("run", type=Path, help="folder with state.pt")
    parser.add_argument("--out", type=Path, required=True)
    options = parser.parse_args(arguments)
    print(f"{options.out}: {write_checkpoint(options.run, options.out):,} bytes of weights")


if __name__ == "__main__":
    main()
