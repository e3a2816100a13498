"""A bundle small enough to build in milliseconds, and the same two graphs in NumPy as an independent backend.

Its decoder mixes all earlier positions with weights that fall with their distance, so that a wrong cache, mask or
position changes every logit.
"""

import json
import shutil
from dataclasses import replace
from pathlib import Path

import numpy as np
import onnx
from onnx import TensorProto, helper, numpy_helper

from vl2 import __version__
from vl2.manifest import (
    CACHE_ROW,
    CachePorts,
    Embeddings,
    Graph,
    ImageFacts,
    LanguageFacts,
    Manifest,
    ModuleFacts,
    Port,
    Source,
    StoredTensor,
    TokenIds,
    file_facts,
    read_manifest,
    write_manifest,
)
from vl2.prompt import Processor
from vl2.runtime import Model
from vl2.runtime.backend import Backend
from vl2.runtime.embeddings import Embeddings as StoredEmbeddings
from vl2.runtime.engine import Engine

GOLDENS = Path(__file__).parents[1] / "goldens"
HIDDEN, VOCAB, SIDE, PATCH, LIMIT = 16, 640, 32, 4, 700
RATE, GAIN = np.float32(0.03125), np.float32(0.25)
RESOLUTIONS = ((32, 32), (64, 32), (32, 64), (64, 64))
WEIGHTS = np.random.default_rng(7)
W_VISION = WEIGHTS.normal(size=(3 * (SIDE // 4) ** 2, HIDDEN)).astype(np.float32)
W_HEAD = WEIGHTS.normal(size=(HIDDEN, VOCAB)).astype(np.float32)
TABLES = {"embed_tokens": WEIGHTS.normal(size=(VOCAB, HIDDEN)).astype(np.float32),
          "image_newline": WEIGHTS.normal(size=HIDDEN).astype(np.float32),
          "view_seperator": WEIGHTS.normal(size=HIDDEN).astype(np.float32)}


class NumpyBackend(Backend):
    """The graphs of the small bundle, written out; `runs` records what was run with how many tiles or tokens."""

    description = "NumPy"

    def __init__(self):
        self.runs = []

    def load(self, graph):
        """There is nothing to load."""

    def run(self, graph, feeds, results):
        if graph == "vision":
            self.runs.append((graph, len(feeds["tiles"])))
            tiles = feeds["tiles"].reshape(-1, 3, 4, SIDE // 4, 4, SIDE // 4).transpose(0, 2, 4, 1, 3, 5)
            results["image_features"][:] = np.tanh(tiles.reshape(-1, 16, 3 * (SIDE // 4) ** 2) @ W_VISION)
            return
        embeds, positions = feeds["inputs_embeds"], feeds["position_ids"]
        assert embeds.flags.c_contiguous and feeds["past_key.0"].flags.c_contiguous
        self.runs.append((graph, embeds.shape[1]))
        results["new_key.0"][:] = embeds[:, :, None]
        results["new_value.0"][:] = positions[:, :, None, None].astype(np.float32)
        keys = np.concatenate([feeds["past_key.0"], results["new_key.0"]], axis=1)[:, :, 0]
        at = np.concatenate([feeds["past_value.0"], results["new_value.0"]], axis=1)[:, :, 0]
        weights = np.exp((at - at[:, -1:]) * RATE) * feeds["attention_mask"][:, :, None]
        results["logits"][:] = np.tanh((keys * weights).sum(axis=1) * GAIN) @ W_HEAD


class SlotsBackend(NumpyBackend):
    """The same decoder over caches with slots, each row computed by itself; `batches`: rows of each decoder run."""

    def __init__(self):
        super().__init__()
        self.batches = []

    def run(self, graph, feeds, results):
        if graph == "vision":
            return super().run(graph, feeds, results)
        embeds, rows = feeds["inputs_embeds"], feeds["cache_row"].tolist()
        assert len(set(rows)) == len(rows) and all(buffer.flags.c_contiguous for buffer in feeds.values())
        self.runs.append((graph, embeds.shape[1]))
        self.batches.append(len(rows))
        for row, (slot, past) in enumerate(zip(rows, feeds["past_length"].tolist(), strict=True)):
            end = past + embeds.shape[1]
            keys, at = feeds["key_cache.0"][slot, :end, 0], feeds["value_cache.0"][slot, :end, 0]
            keys[past:], at[past:, 0] = embeds[row], feeds["position_ids"][row]
            weights = np.exp((at - at[-1:]) * RATE)
            results["logits"][row] = np.tanh((keys * weights).sum(axis=0) * GAIN) @ W_HEAD


SLOTS_GRAPH = Graph(
    "decoder.onnx", "decoder.data",
    (Port("inputs_embeds", "float32", ("batch", "tokens", HIDDEN)), Port("position_ids", "int64", ("batch", "tokens")),
     Port("past_length", "int64", ("batch",)), Port(CACHE_ROW, "int64", ("batch",)),
     Port("key_cache.0", "float32", ("slots", "capacity", 1, HIDDEN)),
     Port("value_cache.0", "float32", ("slots", "capacity", 1, 1))),
    (Port("logits", "float32", ("batch", VOCAB)),),
    (CachePorts("key_cache.0", None), CachePorts("value_cache.0", None)))


def vision_graph() -> onnx.GraphProto:
    nodes = [
        helper.make_node("Reshape", ["tiles", "split"], ["grid"]),
        helper.make_node("Transpose", ["grid"], ["rows"], perm=[0, 2, 4, 1, 3, 5]),
        helper.make_node("Reshape", ["rows", "flat"], ["patches"]),
        helper.make_node("MatMul", ["patches", "w_vision"], ["products"]),
        helper.make_node("Tanh", ["products"], ["image_features"]),
    ]
    constants = {"split": np.array([-1, 3, 4, SIDE // 4, 4, SIDE // 4]),
                 "flat": np.array([-1, 16, 3 * (SIDE // 4) ** 2]), "w_vision": W_VISION}
    return graph("vision", nodes, constants, [("tiles", TensorProto.FLOAT, ["tiles", 3, SIDE, SIDE])],
                 [("image_features", TensorProto.FLOAT, ["tiles", 16, HIDDEN])])


def decoder_graph() -> onnx.GraphProto:
    nodes = [
        helper.make_node("Unsqueeze", ["inputs_embeds", "two"], ["new_key.0"]),
        helper.make_node("Cast", ["position_ids"], ["positions"], to=TensorProto.FLOAT),
        helper.make_node("Unsqueeze", ["positions", "two_three"], ["new_value.0"]),
        helper.make_node("Concat", ["past_key.0", "new_key.0"], ["keys4"], axis=1),
        helper.make_node("Concat", ["past_value.0", "new_value.0"], ["at4"], axis=1),
        helper.make_node("Squeeze", ["keys4", "two"], ["keys"]),
        helper.make_node("Squeeze", ["at4", "two"], ["at"]),
        helper.make_node("Slice", ["at", "minus_one", "end", "one"], ["last"]),
        helper.make_node("Sub", ["at", "last"], ["distance"]),
        helper.make_node("Mul", ["distance", "rate"], ["exponent"]),
        helper.make_node("Exp", ["exponent"], ["decay"]),
        helper.make_node("Cast", ["attention_mask"], ["visible"], to=TensorProto.FLOAT),
        helper.make_node("Unsqueeze", ["visible", "two"], ["visible3"]),
        helper.make_node("Mul", ["decay", "visible3"], ["weights"]),
        helper.make_node("Mul", ["keys", "weights"], ["weighted"]),
        helper.make_node("ReduceSum", ["weighted", "one"], ["mixed"], keepdims=0),
        helper.make_node("Mul", ["mixed", "gain"], ["scaled"]),
        helper.make_node("Tanh", ["scaled"], ["squashed"]),
        helper.make_node("MatMul", ["squashed", "w_head"], ["logits"]),
    ]
    constants = {"two": np.array([2]), "two_three": np.array([2, 3]), "one": np.array([1]),
                 "minus_one": np.array([-1]), "end": np.array([2 ** 62]),
                 "rate": RATE, "gain": GAIN, "w_head": W_HEAD}
    cache = [("past_key.0", TensorProto.FLOAT, ["batch", "past", 1, HIDDEN]),
             ("past_value.0", TensorProto.FLOAT, ["batch", "past", 1, 1])]
    inputs = [("inputs_embeds", TensorProto.FLOAT, ["batch", "tokens", HIDDEN]),
              ("position_ids", TensorProto.INT64, ["batch", "tokens"]),
              ("attention_mask", TensorProto.BOOL, ["batch", "total"]), *cache]
    outputs = [("logits", TensorProto.FLOAT, ["batch", VOCAB]),
               ("new_key.0", TensorProto.FLOAT, ["batch", "tokens", 1, HIDDEN]),
               ("new_value.0", TensorProto.FLOAT, ["batch", "tokens", 1, 1])]
    return graph("decoder", nodes, constants, inputs, outputs)


def graph(name, nodes, constants, inputs, outputs) -> onnx.GraphProto:
    return helper.make_graph(
        nodes, name, [helper.make_tensor_value_info(*port) for port in inputs],
        [helper.make_tensor_value_info(*port) for port in outputs],
        [numpy_helper.from_array(np.asarray(value), key) for key, value in constants.items()])


def ports(infos) -> tuple[Port, ...]:
    names = {TensorProto.FLOAT: "float32", TensorProto.INT64: "int64", TensorProto.BOOL: "bool"}
    return tuple(Port(info.name, names[info.type.tensor_type.elem_type],
                      tuple(side.dim_param or side.dim_value for side in info.type.tensor_type.shape.dim))
                 for info in infos)


def save_graph(folder: Path, proto: onnx.GraphProto, cache=()) -> Graph:
    model = helper.make_model(proto, opset_imports=[helper.make_opsetid("", 18)], ir_version=10)
    onnx.checker.check_model(model)
    onnx.save_model(model, folder / f"{proto.name}.onnx", save_as_external_data=True, size_threshold=100,
                    location=f"{proto.name}.data")
    return Graph(f"{proto.name}.onnx", f"{proto.name}.data", ports(proto.input), ports(proto.output), cache)


def save_tensors(path: Path, tensors: dict[str, np.ndarray], dtype: str | dict[str, str] = "F32") -> None:
    header, offset = {}, 0
    for name, array in tensors.items():
        kind = dtype if isinstance(dtype, str) else dtype.get(name, "F32")
        header[name] = {"dtype": kind, "shape": list(array.shape), "data_offsets": [offset, offset + array.nbytes]}
        offset += array.nbytes
    text = json.dumps(header).encode()
    path.write_bytes(len(text).to_bytes(8, "little") + text + b"".join(array.tobytes() for array in tensors.values()))


def build_bundle(folder: Path) -> Path:
    folder.mkdir()
    for name in ("tokenizer.json", "tokenizer_config.json", "special_tokens_map.json"):
        shutil.copy(GOLDENS / "tiny-mini" / name, folder)
    config = json.loads((GOLDENS / "tiny-mini" / "processor_config.json").read_text())
    config |= {"candidate_resolutions": RESOLUTIONS, "patch_size": PATCH}
    (folder / "processor_config.json").write_text(json.dumps(config))
    graphs = {"vision": save_graph(folder, vision_graph()),
              "decoder": save_graph(folder, decoder_graph(), (CachePorts("past_key.0", "new_key.0"),
                                                              CachePorts("past_value.0", "new_value.0")))}
    save_tensors(folder / "embeddings.safetensors", TABLES)
    write_manifest(folder, Manifest(
        vl2_version=__version__, variant="custom", scheme="fp32", source=Source("small", {}),
        image=ImageFacts(SIDE, PATCH, 2, 4, RESOLUTIONS, (0.5,) * 3, (0.5,) * 3, "head"),
        language=LanguageFacts(HIDDEN, VOCAB, 1, "mha", LIMIT), tokens=TokenIds(0, 1, 2, 620), graphs=graphs,
        embeddings=Embeddings("embeddings.safetensors",
                              {name: StoredTensor("F32", table.shape) for name, table in TABLES.items()}),
        files={path.name: file_facts(path) for path in sorted(folder.iterdir())},
        modules={"decoder": ModuleFacts(W_HEAD.size, W_HEAD.nbytes)}, tools={}, conversion={},
        verify={"status": "skipped"}))
    return folder


def numpy_model_of(bundle: Path) -> Model:
    """The small bundle on the NumPy backend."""
    manifest = read_manifest(bundle)
    processor = Processor.from_folder(bundle)
    return Model(Engine(manifest, processor, StoredEmbeddings(bundle, manifest), NumpyBackend()))


def slots_model_of(bundle: Path, backend: NumpyBackend | None = None, kv_cache_bytes: int = 1 << 20) -> Model:
    """The small bundle with a decoder that takes several sequences in one batch."""
    manifest = read_manifest(bundle)
    manifest = replace(manifest, graphs={**manifest.graphs, "decoder": SLOTS_GRAPH})
    processor = Processor.from_folder(bundle)
    engine = Engine(manifest, processor, StoredEmbeddings(bundle, manifest), backend or SlotsBackend())
    return Model(engine, kv_cache_bytes)
