"""Decode attention on a CPU: the operators of `plugins/` against the memory's read rate and onnxruntime's own.

    python benchmarks/cpu_attention.py [--threads N] [--rounds N] [--contexts 500 2000]

Shapes: Tiny (12 layers, 10 heads of 128) beside com.microsoft GroupQueryAttention with a shared float32 buffer, and
Small's latent attention (27 layers, 16 heads, 512 + 64), which onnxruntime does not have. Rounds are interleaved,
medians are printed; the read rate is measured before each round. Times are of the processor with one thread, else of
the clock.
"""

from __future__ import annotations

import argparse
import statistics
import time
from collections.abc import Callable

import numpy as np
import onnxruntime
import torch
from onnx import TensorProto, helper

from vl2.operators import library_path

HEADS, SIZE, LAYERS = 10, 128, 12
LATENT_HEADS, RANK, ROPE, LATENT_LAYERS = 16, 512, 64, 27
ONNX = {"float32": TensorProto.FLOAT, "float16": TensorProto.FLOAT16, "int8": TensorProto.INT8,
        "int64": TensorProto.INT64, "int32": TensorProto.INT32}  # fmt: skip
Run = Callable[[], object]


def session_of(nodes: list, feeds: dict[str, np.ndarray], threads: int) -> onnxruntime.InferenceSession:
    """Nodes side by side; their outputs are the graph's."""
    inputs = [helper.make_tensor_value_info(name, ONNX[str(array.dtype)], [None] * array.ndim)
              for name, array in feeds.items()]
    names = [name for node in nodes for name in node.output]
    outputs = [helper.make_tensor_value_info(name, TensorProto.FLOAT, None) for name in names]
    graph = helper.make_graph(nodes, "layers", inputs, outputs)
    opsets = [helper.make_opsetid(domain, 20 if not domain else 1) for domain in ("", "vl2", "com.microsoft")]
    model = helper.make_model(graph, opset_imports=opsets, ir_version=10)
    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads, options.log_severity_level = threads, 3
    options.register_custom_ops_library(str(library_path()[0]))
    return onnxruntime.InferenceSession(model.SerializeToString(), options)


def random(dtype: str, *shape: int) -> np.ndarray:
    draw = np.random.default_rng(0)
    if dtype == "int8":
        return draw.integers(-127, 128, shape, dtype=np.int8)
    return draw.standard_normal(shape, dtype=np.float32).astype(dtype)


def ours(context: int, dtype: str, threads: int, latent: bool) -> tuple[Run, int]:
    """A run of all layers for one token, and the bytes of cache that it reads."""
    capacity, layers = context + 8, LATENT_LAYERS if latent else LAYERS
    angles = random("float32", 1, 1, ROPE if latent else SIZE)
    feeds = {"cos": angles, "sin": angles, "past_length": np.array(context - 1)}
    if latent:
        rows = {"query": (1, LATENT_HEADS, 1, RANK), "query_rope": (1, 1, LATENT_HEADS, ROPE), "latent": (1, 1, RANK),
                "key_rope": (1, 1, ROPE)}  # fmt: skip
        caches, scale = {"cache": (1, capacity, RANK + ROPE)}, {"cache_scale": (1, capacity, 2)}
    else:
        rows = dict.fromkeys(("query", "key", "value"), (1, 1, HEADS * SIZE))
        caches = dict.fromkeys(("key_cache", "value_cache"), (1, capacity, HEADS, SIZE))
        scale = dict.fromkeys(("key_scale", "value_scale"), (1, capacity, HEADS))
    feeds |= {name: random("float32", *shape) for name, shape in rows.items()}
    nodes = []
    for l in range(layers):
        own = {f"{name}.{l}": random(dtype, *shape) for name, shape in caches.items()}
        if dtype == "int8":
            own |= {f"{name}.{l}": np.full(shape, 0.01, np.float32) for name, shape in scale.items()}
        feeds |= own
        names = [*rows, "cos", "sin", *list(own)[:len(caches)], "past_length", *list(own)[len(caches):]]
        op = "LatentAttention" if latent else "Attention"
        nodes.append(helper.make_node(op, names, [f"y.{l}"], domain="vl2", scale=0.08))
    session = session_of(nodes, feeds, threads)
    read = sum(array.nbytes for name, array in feeds.items() if "cache" in name or "_scale" in name)
    return lambda: session.run(None, feeds), read * context // capacity


def theirs(context: int, threads: int) -> tuple[Run, int]:
    """GroupQueryAttention, past and present in one buffer."""
    feeds = {name: random("float32", 1, 1, HEADS * SIZE) for name in ("query", "key", "value")}
    feeds |= {"seqlens": np.array([[context - 1]], np.int32), "total": np.array([context], np.int32)}
    shape, nodes = (1, HEADS, context + 8, SIZE), []
    tables = {name: random("float32", context + 8, SIZE // 2) for name in ("cos", "sin")}
    feeds |= tables
    for l in range(LAYERS):
        feeds |= {f"{name}.{l}": random("float32", *shape) for name in ("past_key", "past_value")}
        names = ["query", "key", "value", f"past_key.{l}", f"past_value.{l}", "seqlens", "total", "cos", "sin"]
        nodes.append(helper.make_node("GroupQueryAttention", names, [f"y.{l}", f"new_key.{l}", f"new_value.{l}"],
                                      domain="com.microsoft", num_heads=HEADS, kv_num_heads=HEADS, do_rotary=1))
    session = session_of(nodes, feeds, threads)
    binding = session.io_binding()
    held = {name: onnxruntime.OrtValue.ortvalue_from_numpy(array) for name, array in feeds.items()}
    for name, value in held.items():
        binding.bind_ortvalue_input(name, value)
    for l in range(LAYERS):
        binding.bind_output(f"y.{l}")
        for name in ("key", "value"):
            binding.bind_ortvalue_output(f"new_{name}.{l}", held[f"past_{name}.{l}"])
    return lambda: (session.run_with_iobinding(binding), held), 2 * LAYERS * context * HEADS * SIZE * 4


def seconds(run: Run, threads: int) -> float:
    clock = time.thread_time if threads == 1 else time.perf_counter
    start = clock()
    run()
    return clock() - start


def read_rate(threads: int) -> float:
    """Bytes a second of a dot product of 256 MB with itself."""
    torch.set_num_threads(threads)
    x = torch.ones(64 << 20)
    return x.nbytes / min(seconds(lambda: torch.dot(x, x), threads) for _ in range(3))


def table(context: int, threads: int, rounds: int) -> None:
    cases = {f"tiny {dtype}": ours(context, dtype, threads, False) for dtype in ("float32", "float16", "int8")}
    cases |= {"tiny onnxruntime GroupQueryAttention float32": theirs(context, threads)}
    cases |= {f"small latent {dtype}": ours(context, dtype, threads, True) for dtype in ("float32", "float16", "int8")}
    times: dict[str, list[float]] = {name: [] for name in cases}
    rates = []
    for number in range(rounds + 1):
        rates.append(read_rate(threads))
        for name, (run, _) in cases.items():
            elapsed = seconds(run, threads)
            if number:
                times[name].append(elapsed)
    rate = statistics.median(rates)
    print(f"\ncontext {context}, {threads} threads, read rate {rate / 1e9:.1f} GB/s, medians of {rounds} rounds\n")
    print("| case | ms a token | cache MB | share of the read rate |\n|---|---|---|---|")
    for name, (_, size) in cases.items():
        elapsed = statistics.median(times[name])
        print(f"| {name} | {elapsed * 1e3:.2f} | {size / 1e6:.0f} | {size / elapsed / rate:.2f} |")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--contexts", type=int, nargs="+", default=[500, 2000])
    given = parser.parse_args()
    for context in given.contexts:
        table(context, given.threads, given.rounds)


if __name__ == "__main__":
    main()
