"""Builds engines of published sizes without their weights: seconds, engine bytes and peak memory of the builder.

    python benchmarks/engine_build.py tiny --layers 2 --scheme int4 [--capability 8.6 …] [--vision 27 [--vision-int8]]

The decoder's weights are inputs, so that its engine needs none. The tower's are random numbers: of zeros an engine
keeps one copy. `--vision-int8` has INT8 matrices in it, a scale a row. `--layers 2` keeps the first, dense layer and
one MoE layer; 0 keeps all.
"""

from __future__ import annotations

import argparse
import json
import tempfile
from dataclasses import asdict, replace
from pathlib import Path

import numpy as np
import onnx_ir as ir

from vl2.config import ModelConfig
from vl2.export.engine_graph import build_engine_graph, engine_graphs
from vl2.export.graphs import declare_graphs
from vl2.export.passes.store_weights import DataFile
from vl2.export.schemes import FLOAT16
from vl2.export.storing import TRT, Storing
from vl2.model.checkpoint import parameter_shapes
from vl2.planning import models
from vl2.plugins.tensorrt.build import EngineJob, build_apart
from vl2.plugins.tensorrt.engines import EngineSizes, profiles
from vl2.plugins.tensorrt.flavour import RTX
from vl2.quantization import Form

# As the recipe int4 stores the decoder: experts in groups of 32, the rest in the largest that divides.
_EXPERTS, _OTHER_GROUPS = Form(4, 32), (128, 64, 32)


def shortened(variant: str, layers: int, vision_layers: int) -> ModelConfig:
    """The published configuration with fewer layers, as checkpoints have it."""
    values = json.loads(models._PUBLISHED.read_text("utf-8"))[variant]
    if layers:
        values["language_config"]["num_hidden_layers"] = layers
    values["vision_config"]["layers"] = vision_layers
    return ModelConfig.from_dict(values)


def storing_for(config: ModelConfig, scheme: str, vision_int8: bool = False) -> Storing:
    """Forms by parameter as the recipe would choose them."""
    shapes = parameter_shapes(config)
    storing = Storing("fp16", TRT, shapes, kv_cache="float16")
    if vision_int8:
        matrices = [name for name in shapes if name.startswith("vision.") and storing._is_multiplied(name)]
        return replace(storing, forms=dict.fromkeys(matrices, Form(8, None)), scales=dict.fromkeys(matrices, FLOAT16))
    if scheme == "fp16":
        return storing
    matrices = [name for name in shapes if name.startswith("language.") and storing._is_multiplied(name)]
    forms = {name: _EXPERTS if ".experts." in name else _largest_group(shapes[name][-1]) for name in matrices}
    return replace(storing, forms=forms, scales=dict.fromkeys(forms, FLOAT16))


def _largest_group(columns: int) -> Form:
    return Form(8, next(group for group in _OTHER_GROUPS if columns % group == 0))


def fill(path: Path, size: int) -> None:
    """Random positive float16 numbers, as scales have to be, repeated after a length that no tensor has."""
    block = (np.abs(np.random.default_rng(0).normal(scale=0.02, size=7_999_993)) + 1e-3).astype(np.float16).tobytes()
    with path.open("wb") as stream:
        while stream.tell() < size:
            stream.write(block[: size - stream.tell()])


def build(name: str, config: ModelConfig, storing: Storing, capability: str) -> dict:
    """Facts of one engine."""
    graph = engine_graphs(declare_graphs(config, storing.kv_cache))[name]
    with tempfile.TemporaryDirectory() as folder:
        model, placed = build_engine_graph(name, config, DataFile(graph.data_file, storing))
        weights = sum(place.size_bytes for place in placed)
        if name == "vision":
            fill(Path(folder, graph.data_file), placed[-1].end)
        model.ir_version = 10
        ir.save(model, Path(folder, graph.file))
        ranges = profiles(name, graph, EngineSizes())
        job = EngineJob(f"{folder}/{graph.file}", f"{folder}/engine", RTX, (capability,), ranges)
        return {"graph": name, "weight_bytes": weights, **asdict(build_apart(job))}


def main() -> None:
    """A line of JSON an engine."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("variant", choices=("tiny", "small", "base"))
    parser.add_argument("--layers", type=int, default=2)
    parser.add_argument("--scheme", choices=("fp16", "int4"), default="int4")
    parser.add_argument("--capability", nargs="+", default=["8.6"])
    parser.add_argument("--vision", type=int, default=0, metavar="LAYERS", help="the tower, and not the decoder")
    parser.add_argument("--vision-int8", action="store_true", help="with INT8 matrices")
    given = parser.parse_args()
    config = shortened(given.variant, given.layers, given.vision or 1)
    storing = storing_for(config, given.scheme, given.vision_int8)
    for capability in given.capability:
        facts = build("vision" if given.vision else "decoder", config, storing, capability)
        asked = {"variant": given.variant, "decoder_layers": given.layers, "tower_layers": given.vision,
                 "tower": "int8" if given.vision_int8 else "fp16"}  # fmt: skip
        print(json.dumps({**asked, "scheme": given.scheme, "capability": capability, **facts}), flush=True)


if __name__ == "__main__":
    main()
