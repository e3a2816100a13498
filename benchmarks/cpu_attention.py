"""Attention on a CPU: the operators of `plugins/` against the memory's read rate and onnxruntime's own.

    python benchmarks/cpu_attention.py [--threads N] [--rounds N] [--contexts 500 2000] [--tokens 600] [--isas …]

Decode of one token behind `--contexts`: Tiny (12 layers, 10 heads of 128) beside com.microsoft GroupQueryAttention
with a shared float32 buffer, and Small's latent attention (27 layers, 16 heads, 512 + 64), which onnxruntime lacks.
Prefill of `--tokens`, one layer of each; the tower, one layer (729 tokens, 16 heads of 72) beside onnxruntime's MatMul
and Softmax as the lowering `ort` has them. Ours run with each instruction set of `--isas`, by default the best one.
Rounds are interleaved, medians are printed; the read rate is measured before each round. Times are of the processor
with one thread, else of the clock.
"""

from __future__ import annotations

import argparse
import os
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
TOWER_TOKENS, TOWER_HEADS, TOWER_SIZE = 729, 16, 72
BEST = "best"
ONNX = {"float32": TensorProto.FLOAT, "float16": TensorProto.FLOAT16, "int8": TensorProto.INT8,
        "int64": TensorProto.INT64, "int32": TensorProto.INT32}  # fmt: skip
Run = Callable[[], object]


def session_of(
    nodes: list, feeds: dict[str, np.ndarray], how: tuple[str, int], outputs: tuple[str, ...] = ()
) -> onnxruntime.InferenceSession:
    """Nodes side by side; their outputs are the graph's unless told. how: instruction set of ours, threads."""
    inputs = [helper.make_tensor_value_info(name, ONNX[str(array.dtype)], [None] * array.ndim)
              for name, array in feeds.items()]
    names = outputs or [name for node in nodes for name in node.output]
    values = [helper.make_tensor_value_info(name, TensorProto.FLOAT, None) for name in names]
    graph = helper.make_graph(nodes, "layers", inputs, values)
    opsets = [helper.make_opsetid(domain, 20 if not domain else 1) for domain in ("", "vl2", "com.microsoft")]
    model = helper.make_model(graph, opset_imports=opsets, ir_version=10)
    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads, options.log_severity_level = how[1], 3
    os.environ["VL2_CPU_ISA"] = "" if how[0] == BEST else how[0]
    options.register_custom_ops_library(str(library_path()[0]))
    return onnxruntime.InferenceSession(model.SerializeToString(), options)


def random(dtype: str, *shape: int) -> np.ndarray:
    draw = np.random.default_rng(0)
    if dtype == "int8":
        return draw.integers(-127, 128, shape, dtype=np.int8)
    return draw.standard_normal(shape, dtype=np.float32).astype(dtype)


def ours(context: int, tokens: int, dtype: str, how: tuple[str, int], latent: bool) -> tuple[Run, int]:
    """A run of all layers for one token, or of one layer for more, and the bytes of cache that it reads."""
    capacity, layers = context + 8, 1 if tokens > 1 else LATENT_LAYERS if latent else LAYERS
    angles = random("float32", 1, tokens, ROPE if latent else SIZE)
    feeds = {"cos": angles, "sin": angles, "past_length": np.array(context - tokens)}
    if latent:
        rows = {"query": (1, LATENT_HEADS, tokens, RANK), "query_rope": (1, tokens, LATENT_HEADS, ROPE),
                "latent": (1, tokens, RANK), "key_rope": (1, tokens, ROPE)}  # fmt: skip
        caches, scale = {"cache": (1, capacity, RANK + ROPE)}, {"cache_scale": (1, capacity, 2)}
    else:
        rows = dict.fromkeys(("query", "key", "value"), (1, tokens, HEADS * SIZE))
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
        nodes.append(helper.make_node(op, names, [f"y.{l}"], domain="vl2", scale=0.02 if latent else 0.08))
    session = session_of(nodes, feeds, how)
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
    session = session_of(nodes, feeds, (BEST, threads))
    binding = session.io_binding()
    held = {name: onnxruntime.OrtValue.ortvalue_from_numpy(array) for name, array in feeds.items()}
    for name, value in held.items():
        binding.bind_ortvalue_input(name, value)
    for l in range(LAYERS):
        binding.bind_output(f"y.{l}")
        for name in ("key", "value"):
            binding.bind_ortvalue_output(f"new_{name}.{l}", held[f"past_{name}.{l}"])
    return lambda: (session.run_with_iobinding(binding), held), 2 * LAYERS * context * HEADS * SIZE * 4


def tower(how: tuple[str, int]) -> tuple[Run, int]:
    """One layer of one tile by our operator; nothing is read that counts."""
    feeds = {"qkv": random("float32", 1, TOWER_TOKENS, 3 * TOWER_HEADS * TOWER_SIZE)}
    node = helper.make_node("VisionAttention", ["qkv"], ["y"], domain="vl2", heads=TOWER_HEADS, scale=TOWER_SIZE**-0.5)
    session = session_of([node], feeds, how)
    return lambda: session.run(None, feeds), 0


def their_tower(threads: int) -> tuple[Run, int]:
    """The same by standard operators, as PyTorch's attention is traced: query and key times the root of the scale."""
    feeds = {"qkv": random("float32", 1, TOWER_TOKENS, 3 * TOWER_HEADS * TOWER_SIZE)}
    feeds |= {"shape": np.array([1, TOWER_TOKENS, 3, TOWER_HEADS, TOWER_SIZE]),
              "root": np.array(TOWER_SIZE**-0.25, np.float32),
              "flat": np.array([1, TOWER_TOKENS, TOWER_HEADS * TOWER_SIZE])}  # fmt: skip
    heads, turned = {"perm": [2, 0, 3, 1, 4]}, {"perm": [2, 0, 3, 4, 1]}
    steps = [("Reshape", "qkv shape", "parts", {}),
             ("Split", "parts", "q5 k5 v5", {"axis": 2, "num_outputs": 3}),
             ("Transpose", "q5", "q", heads), ("Transpose", "k5", "k", turned), ("Transpose", "v5", "v", heads),
             ("Mul", "q root", "qs", {}), ("Mul", "k root", "ks", {}),
             ("MatMul", "qs ks", "scores", {}), ("Softmax", "scores", "w", {}), ("MatMul", "w v", "y4", {}),
             ("Transpose", "y4", "rows", {"perm": [0, 1, 3, 2, 4]}), ("Reshape", "rows flat", "y", {})]  # fmt: skip
    nodes = [helper.make_node(op, inputs.split(), outputs.split(), **attributes)
             for op, inputs, outputs, attributes in steps]
    session = session_of(nodes, feeds, (BEST, threads), ("y",))
    return lambda: session.run(None, feeds), 0


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


def measure(cases: dict[str, tuple[Run, int]], threads: int, rounds: int) -> tuple[dict[str, float], float]:
    """Median seconds of each case over interleaved rounds behind one that warms up, and the median read rate."""
    times: dict[str, list[float]] = {name: [] for name in cases}
    rates = []
    for number in range(rounds + 1):
        rates.append(read_rate(threads))
        for name, (run, _) in cases.items():
            elapsed = seconds(run, threads)
            if number:
                times[name].append(elapsed)
    return {name: statistics.median(found) for name, found in times.items()}, statistics.median(rates)


def named(name: str, isa: str) -> str:
    return name if isa == BEST else f"{name}, {isa}"


def decode_table(context: int, isas: list[str], threads: int, rounds: int) -> None:
    dtypes = ("float32", "float16", "int8")
    cases = {named(f"tiny {dtype}", isa): ours(context, 1, dtype, (isa, threads), False)
             for dtype in dtypes for isa in isas}
    cases |= {"tiny onnxruntime GroupQueryAttention float32": theirs(context, threads)}
    cases |= {named(f"small latent {dtype}", isa): ours(context, 1, dtype, (isa, threads), True)
              for dtype in dtypes for isa in isas}
    times, rate = measure(cases, threads, rounds)
    print(f"\ncontext {context}, {threads} threads, read rate {rate / 1e9:.1f} GB/s, medians of {rounds} rounds\n")
    print("| case | ms a token | cache MB | share of the read rate |\n|---|---|---|---|")
    for name, (_, size) in cases.items():
        print(f"| {name} | {times[name] * 1e3:.2f} | {size / 1e6:.0f} | {size / times[name] / rate:.2f} |")


def many_table(tokens: int, isas: list[str], threads: int, rounds: int) -> None:
    pairs = tokens * (tokens + 1) // 2  # of tokens that see each other
    flops = {"tiny prefill": 4 * pairs * HEADS * SIZE,
             "small latent prefill": 2 * pairs * LATENT_HEADS * (2 * RANK + ROPE),
             "tower": 4 * TOWER_TOKENS**2 * TOWER_HEADS * TOWER_SIZE}  # fmt: skip
    cases, counts = {}, {}
    for isa in isas:
        how = (isa, threads)
        made = {"tiny prefill": ours(tokens, tokens, "float32", how, False), "tower": tower(how),
                "small latent prefill": ours(tokens, tokens, "float32", how, True)}
        cases |= {named(name, isa): case for name, case in made.items()}
        counts |= {named(name, isa): flops[name] for name in made}
    cases["tower, onnxruntime MatMul and Softmax"] = their_tower(threads)
    counts["tower, onnxruntime MatMul and Softmax"] = flops["tower"]
    times, _ = measure(cases, threads, rounds)
    print(f"\n{tokens} tokens, one layer, {threads} threads, medians of {rounds} rounds\n")
    print("| case | ms | GFLOP/s |\n|---|---|---|")
    for name, count in counts.items():
        print(f"| {name} | {times[name] * 1e3:.2f} | {count / times[name] / 1e9:.0f} |")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--contexts", type=int, nargs="*", default=[500, 2000])
    parser.add_argument("--tokens", type=int, nargs="*", default=[600])
    parser.add_argument("--isas", nargs="+", default=[BEST])
    given = parser.parse_args()
    for context in given.contexts:
        decode_table(context, given.isas, given.threads, given.rounds)
    for tokens in given.tokens:
        many_table(tokens, given.isas, given.threads, given.rounds)


if __name__ == "__main__":
    main()
