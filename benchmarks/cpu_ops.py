"""The operator library beside onnxruntime's own operators and plain reading of memory, at Tiny's shapes.

    python benchmarks/cpu_ops.py [--threads 2] [--rounds 5] [--clock cpu]

Random INT4 weights (groups of 32), the same codes for all; results are compared before anything is timed. Each round
runs every candidate once, so that a noisy machine meets all of them; the table has medians over the rounds. GB/s count
what a form reads: MatMulNBits and QMoE have float32 scales (5 bits a weight), ours float16 (4.5 bits). `--clock cpu`
takes processor time, for one thread of a machine that is shared.
"""

from __future__ import annotations

import argparse
import json
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass

import numpy as np
import onnxruntime
from onnx import TensorProto, helper, numpy_helper

from vl2.operators import instruction_set, library_path
from vl2.plugins.native.layout import interleave, layout_for, pack

HIDDEN, INNER, EXPERTS, CHOSEN, SHARED, VOCAB, DENSE, GROUP = 1280, 896, 64, 6, 1792, 102400, 6848, 32
PREFILL_TOKENS = 600
READ_BYTES = 512 << 20
RNG = np.random.default_rng(0)
CLOCKS = {"wall": time.perf_counter, "cpu": time.process_time}


@dataclass(frozen=True)
class Candidate:
    """Something to time. bytes: what a call reads of weights; flops: 2 a product."""

    name: str
    run: Callable[[], object]
    size_bytes: int
    flops: int


def session(node, fed: dict[str, np.ndarray], held: dict[str, np.ndarray], threads: int) -> Callable[[], np.ndarray]:
    """A call of one node."""
    infos = [helper.make_tensor_value_info(name, TensorProto.FLOAT, None) for name in fed]
    output = helper.make_tensor_value_info("y", TensorProto.FLOAT, None)
    weights = [numpy_helper.from_array(array, name) for name, array in held.items()]
    graph = helper.make_graph([node], "one", infos, [output], weights)
    opsets = [helper.make_opsetid(domain, 1) for domain in ("vl2", "com.microsoft")]
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 20), *opsets], ir_version=10)
    options = onnxruntime.SessionOptions()
    options.register_custom_ops_library(str(library_path()[0]))
    options.intra_op_num_threads = threads
    made = onnxruntime.InferenceSession(model.SerializeToString(), options)
    return lambda: made.run(None, fed)[0]


def weight(rows: int, columns: int) -> tuple[np.ndarray, np.ndarray]:
    """INT4 codes and float16 scales of a random matrix."""
    codes = RNG.integers(-8, 8, (rows, columns), np.int8)
    return codes, ((RNG.random((rows, columns // GROUP), np.float32) + 0.5) * columns**-0.5 / 4).astype(np.float16)


def nibbles(codes: np.ndarray) -> np.ndarray:
    """Two codes a byte, the first in the low half, zero point 8."""
    unsigned = (codes + 8).astype(np.uint8)
    return unsigned[:, 0::2] | unsigned[:, 1::2] << 4


def linears(name: str, rows: int, columns: int, tokens: int, threads: int) -> list[Candidate]:
    """Ours, exact and fast, and MatMulNBits with float32 and with INT8 activations."""
    codes, scales = weight(rows, columns)
    x = RNG.standard_normal((tokens, columns), np.float32)
    layout = layout_for(codes.shape, "int4", scales.shape[1])
    packed = pack(layout, codes, scales)
    made = []
    for mode in ("exact", "fast"):
        node = helper.make_node("Linear", ["x", "w"], ["y"], domain="vl2", N=rows, K=columns, scheme="int4",
                                group_size=GROUP, mode=mode)
        made.append((f"{name}: vl2::Linear {mode}", session(node, {"x": x}, {"w": packed}, threads), packed.nbytes))
    held = {"w": nibbles(codes).reshape(rows, -1, GROUP // 2), "s": scales.astype(np.float32).reshape(-1)}
    for level in (1, 4):
        node = helper.make_node("MatMulNBits", ["x", "w", "s"], ["y"], domain="com.microsoft", N=rows, K=columns,
                                bits=4, block_size=GROUP, accuracy_level=level)
        size = sum(part.nbytes for part in held.values())
        made.append((f"{name}: MatMulNBits accuracy_level {level}", session(node, {"x": x}, held, threads), size))
    return checked([Candidate(*entry, 2 * tokens * rows * columns) for entry in made])


def checked(candidates: list[Candidate]) -> list[Candidate]:
    """The candidates, whose results agree with the first's within what INT8 activations cost."""
    want = candidates[0].run()
    for candidate in candidates[1:]:
        error = np.sqrt(np.mean((candidate.run() - want) ** 2) / np.mean(want**2))
        assert error < 0.05, f"{candidate.name}: differs by {error:.3g} of the RMS"
    return candidates


def experts(tokens: int, threads: int) -> list[Candidate]:
    """Ours, exact and fast, and QMoE with the shared experts as two more of its own."""
    count = EXPERTS + SHARED // INNER
    gate, up, down = ([weight(*shape) for _ in range(count)] for shape in [(INNER, HIDDEN)] * 2 + [(HIDDEN, INNER)])
    x = RNG.standard_normal((tokens, HIDDEN), np.float32)
    logits = RNG.standard_normal((tokens, EXPERTS), np.float32)
    inputs, size = our_experts(gate, up, down)
    made = []
    for mode in ("exact", "fast"):
        names = ["x", "logits", "gate_up", "down", "", "shared_gate_up", "shared_down"]
        node = helper.make_node("Experts", names, ["y"], domain="vl2", hidden_size=HIDDEN, inner_size=INNER,
                                experts=EXPERTS, top_k=CHOSEN, scheme="int4", group_size=GROUP, shared_size=SHARED,
                                mode=mode)
        call = session(node, {"x": x, "logits": logits}, inputs, threads)
        made.append((f"MoE layer, {tokens} token(s): vl2::Experts {mode}", call, size))
    for level in (1, 4):
        call = qmoe(gate, up, down, (x, logits, level, threads))
        made.append((f"MoE layer, {tokens} token(s): QMoE accuracy_level {level}", call, size * 5 // 4.5))
    flops = 2 * tokens * 3 * HIDDEN * (CHOSEN * INNER + SHARED)
    read = 1 if tokens == 1 else EXPERTS / CHOSEN
    return checked([Candidate(name, call, int(bytes_ * read), flops) for name, call, bytes_ in made])


def our_experts(gate, up, down) -> tuple[dict[str, np.ndarray], int]:
    """The inputs of vl2::Experts, and the bytes that a token reads."""
    def stack(pairs, rows, columns):
        layout = layout_for((rows, columns), "int4", columns // GROUP)
        return np.concatenate([pack(layout, *pair) for pair in pairs])

    turns = [tuple(interleave(a, b) for a, b in zip(*pair, strict=True)) for pair in zip(gate, up, strict=True)]
    first, rest = slice(None, EXPERTS), slice(EXPERTS, None)
    shared = tuple(interleave(*(np.concatenate([e[i] for e in side[rest]]) for side in (gate, up))) for i in (0, 1))
    wide = tuple(np.concatenate([e[i] for e in down[rest]], axis=1) for i in (0, 1))
    inputs = {"gate_up": stack(turns[first], 2 * INNER, HIDDEN), "down": stack(down[first], HIDDEN, INNER),
              "shared_gate_up": stack([shared], 2 * SHARED, HIDDEN), "shared_down": stack([wide], HIDDEN, SHARED)}
    routed = (inputs["gate_up"].nbytes + inputs["down"].nbytes) * CHOSEN // EXPERTS
    return inputs, routed + inputs["shared_gate_up"].nbytes + inputs["shared_down"].nbytes


def qmoe(gate, up, down, rest) -> Callable[[], np.ndarray]:
    """QMoE with softmax scores as weights, and a score of 1 for each shared expert."""
    x, logits, level, threads = rest
    by_turns = [tuple(np.stack(pair, axis=1).reshape(2 * INNER, -1) for pair in zip(g, u, strict=True))
                for g, u in zip(gate, up, strict=True)]
    held = {}
    for name, parts in (("1", by_turns), ("2", down)):
        held[f"w{name}"] = np.stack([nibbles(codes) for codes, _ in parts])
        held[f"s{name}"] = np.stack([scales.astype(np.float32) for _, scales in parts])
    scores = np.exp(logits - logits.max(axis=1, keepdims=True))
    scores = np.pad(scores / scores.sum(axis=1, keepdims=True), ((0, 0), (0, len(gate) - EXPERTS)), constant_values=1)
    names = ["x", "p", "w1", "s1", "", "w2", "s2", *[""] * 7, "p"]
    node = helper.make_node("QMoE", names, ["y"], domain="com.microsoft", k=CHOSEN + len(gate) - EXPERTS,
                            activation_type="swiglu", swiglu_fusion=1, activation_alpha=1.0, activation_beta=0.0,
                            expert_weight_bits=4, block_size=GROUP, normalize_routing_weights=0, accuracy_level=level)
    return session(node, {"x": x, "p": scores.astype(np.float32)}, held, threads)


def reading(threads: int) -> Candidate:
    """Sums over memory that no cache holds."""
    parts = np.array_split(np.ones(READ_BYTES // 8, np.uint64), threads)
    pool = ThreadPoolExecutor(threads)
    return Candidate("plain reading (NumPy sum)", lambda: list(pool.map(np.sum, parts)), READ_BYTES, 0)


def measure(candidates: list[Candidate], rounds: int, clock: Callable[[], float]) -> dict[str, float]:
    """Median seconds by name, of interleaved rounds after one that is not counted."""
    seconds: dict[str, list[float]] = {candidate.name: [] for candidate in candidates}
    for _ in range(rounds + 1):
        for candidate in candidates:
            begin = clock()
            candidate.run()
            seconds[candidate.name].append(clock() - begin)
    return {name: float(np.median(values[1:])) for name, values in seconds.items()}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--clock", choices=CLOCKS, default="wall")
    options = parser.parse_args()
    groups = [("lm_head, 1 token", VOCAB, HIDDEN, 1),
              (f"dense up, {PREFILL_TOKENS} tokens", DENSE, HIDDEN, PREFILL_TOKENS)]
    blocks = [lambda group=group: linears(*group, options.threads) for group in groups]
    blocks += [lambda tokens=tokens: experts(tokens, options.threads) for tokens in (1, PREFILL_TOKENS)]
    results = {"instruction_set": instruction_set(), "threads": options.threads, "onnxruntime": onnxruntime.__version__}
    print("| what | ms | GB/s | of reading | GFLOP/s |\n|---|---|---|---|---|")
    for block in blocks:
        candidates = [reading(options.threads), *block()]
        seconds = measure(candidates, options.rounds, CLOCKS[options.clock])
        limit = READ_BYTES / seconds[candidates[0].name]
        for candidate in candidates:
            time_s = seconds[candidate.name]
            rate = candidate.size_bytes / time_s
            print(f"| {candidate.name} | {time_s * 1e3:.2f} | {rate / 1e9:.1f} | {rate / limit:.2f} "
                  f"| {candidate.flops / time_s / 1e9:.0f} |", flush=True)
            results[candidate.name] = time_s
    print(json.dumps(results))


if __name__ == "__main__":
    main()
