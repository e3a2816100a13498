"""The full-size decoder on a CPU beside its peers: `python benchmarks/cpu_peers.py --work DIR [--llama-python PYTHON]`.

Makes a random checkpoint of Tiny's published size once (6.7 GB; its residual outputs are small, so that tokens stay
apart and routers spread them over the experts), from it INT4 and INT8 bundles (`FORMS`), and GGUF files for llama.cpp
(`pip install llama-cpp-python gguf`, in any environment: --llama-python; where it crashes in its AMX product, build it
with CMAKE_ARGS="-DCMAKE_C_FLAGS=-mno-amx-tile -DCMAKE_CXX_FLAGS=-mno-amx-tile"). Every round runs every peer once, in a
process of its own (benchmarks/peer_probes.py); medians over the rounds. Prints the bandwidth of reading memory in the
same rounds, the table, and one JSON line.
"""

from __future__ import annotations

import argparse
import json
import statistics
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path

from export_fullsize import make_checkpoint

from vl2.machine.rates import read_bandwidth
from vl2.runtime.cores import physical_cores

PROBES = Path(__file__).with_name("peer_probes.py")
PREFILL = 600
RESIDUAL_GAIN = 0.1


@dataclass(frozen=True)
class Peer:
    """name: in the table. kind: of the probe. path: what it opens. python: that has what it imports."""

    name: str
    kind: str
    path: Path
    python: str


# How a bundle is exported, by what the table calls it; the last computes as llama.cpp does.
FORMS = {"cpu": ("--lowering", "cpu"), "ort": ("--lowering", "ort"),
         "cpu fast, fp16 cache": ("--lowering", "cpu", "--mode", "fast", "--kv-cache", "fp16")}


def vl2(*arguments: object) -> None:
    code = "import sys; from vl2.cli import main; sys.exit(main())"
    subprocess.run([sys.executable, "-c", code, *map(str, arguments)], check=True, stdout=sys.stderr)


def bundles(work: Path, checkpoint: Path) -> list[Peer]:
    """Quantized once a scheme by rounding: speed does not depend on how codes were found."""
    peers = []
    for scheme in ("int4", "int8"):
        quantized = work / f"tiny-{scheme}"
        if not quantized.exists():
            vl2("quantize", checkpoint, "--scheme", scheme, "--head", "int8", "--method", "rtn",
                "--out", quantized)
        for form, options in FORMS.items():
            out = work / f"tiny-{scheme}-{form.replace(', ', '-').replace(' ', '-')}.bundle"
            if not out.exists():
                vl2("export", quantized, *options, "--no-verify", "--out", out)
            peers.append(Peer(f"vl2 {scheme}, {form}", "bundle", out, sys.executable))
    return peers


def gguf_files(work: Path, checkpoint: Path, python: str) -> list[Peer]:
    """Q4_K_M is made by llama.cpp itself of the Q8_0 file: how codes were found does not matter here."""
    peers = []
    for kind in ("Q4_0", "Q8_0", "Q4_K_M"):
        out = work / f"tiny-{kind}.gguf"
        if not out.exists():
            script = Path(__file__).with_name("gguf_file.py")
            source = work / "tiny-Q8_0.gguf" if kind == "Q4_K_M" else checkpoint
            subprocess.run([python, script, source, out, "--type", kind], check=True, stdout=sys.stderr)
        peers.append(Peer(f"llama.cpp {kind}", "llama", out, python))
    return peers


def measure(peer: Peer, threads: int) -> dict:
    done = subprocess.run([peer.python, PROBES, peer.kind, peer.path, str(threads)], capture_output=True, text=True,
                          check=False)
    if done.returncode:
        sys.exit(f"{peer.name}: {done.stderr[-2000:]}")
    return json.loads(done.stdout.splitlines()[-1])


def table(readings: dict[str, list[dict]], bandwidth: float) -> list[dict]:
    """Medians a peer, as rows of the printed table."""
    rows = []
    for name, found in readings.items():
        middle = {key: statistics.median(reading[key] for reading in found) for key in found[0]}
        rows.append({"peer": name, "decode_tokens_per_second": 1 / middle["decode_seconds"],
                     "best_decode_tokens_per_second": 1 / min(reading["decode_seconds"] for reading in found),
                     "prefill_tokens_per_second": PREFILL / middle["prefill_seconds"],
                     "load_seconds": middle["load_seconds"], "peak_rss_bytes": middle["peak_rss_bytes"],
                     "likeliest": found[0]["likeliest"]})
    print(f"read bandwidth {bandwidth / 1e9:.1f} GB/s (median)\n"
          f"{'peer':32}{'decode tok/s':>13}{'best':>8}{'prefill tok/s':>15}{'load s':>8}{'peak RSS GB':>13}")
    for row in rows:
        print(f"{row['peer']:32}{row['decode_tokens_per_second']:13.1f}{row['best_decode_tokens_per_second']:8.1f}"
              f"{row['prefill_tokens_per_second']:15.1f}{row['load_seconds']:8.2f}{row['peak_rss_bytes'] / 1e9:13.2f}")
    return rows


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--work", type=Path, required=True, help="20 GB are needed there")
    parser.add_argument("--llama-python", help="one that has llama-cpp-python, gguf and vl2; without it no llama.cpp")
    parser.add_argument("--eager", action="store_true", help="PyTorch in float32 as well: 11 GB of memory")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--threads", type=int, default=physical_cores())
    options = parser.parse_args()
    checkpoint = make_checkpoint(options.work / "tiny", "tiny", RESIDUAL_GAIN)
    peers = bundles(options.work, checkpoint)
    if options.llama_python:
        peers += gguf_files(options.work, checkpoint, options.llama_python)
    if options.eager:
        peers.append(Peer("PyTorch eager, float32", "eager", checkpoint, sys.executable))
    readings: dict[str, list[dict]] = {peer.name: [] for peer in peers}
    rates = []
    for _ in range(options.rounds):
        for peer in peers:
            rates.append(read_bandwidth(options.threads))
            readings[peer.name].append(measure(peer, options.threads))
    bandwidth = statistics.median(rates)
    rows = table(readings, bandwidth)
    print(json.dumps({"threads": options.threads, "rounds": options.rounds, "read_bandwidth": bandwidth,
                      "peers": rows}))


if __name__ == "__main__":
    main()
