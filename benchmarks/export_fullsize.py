"""Exports a full-size checkpoint and reports time and peak memory beside what the disk gives in the same run.

    python benchmarks/export_fullsize.py --work /big/disk                     # makes a random Tiny first, 6.7 GB
    python benchmarks/export_fullsize.py --work /big/disk --checkpoint FOLDER --scheme fp16 --scheme fp32

Peak memory is the kernel's figure for the export's own process (what `/usr/bin/time -v` prints), torch included.
Ends in one JSON line.
"""

from __future__ import annotations

import argparse
import json
import os
import re
import shutil
import subprocess
import sys
import time
from pathlib import Path

GOLDENS = Path(__file__).parents[1] / "tests" / "goldens"
SHARD = "model-00001-of-000001.safetensors"
DISK_BYTES = 1 << 30

EXPORT = """
import json, sys, time
from pathlib import Path
from vl2.export import ExportOptions, export_checkpoint
stages = {}
def progress(stage, done, total):
    stages.setdefault(stage, [time.time(), 0])[1] = time.time()
source, out, scheme, verify = sys.argv[1:]
manifest = export_checkpoint(Path(source), Path(out), ExportOptions(scheme, verify == "verify", True), progress)
print(json.dumps({"stages_s": {name: round(end - start, 1) for name, (start, end) in stages.items()},
                  "verify": manifest.verify,
                  "bundle_bytes": sum(facts.size_bytes for facts in manifest.files.values())}))
"""


def make_checkpoint(folder: Path, variant: str, residual_gain: float = 1.0) -> Path:
    """A checkpoint of the published names and shapes with random bfloat16 numbers; made once, one tensor in memory.

    residual_gain: of what attention and experts add to the residual stream.
    """
    import torch

    if (folder / "config.json").exists():
        return folder
    folder.mkdir(parents=True)
    shapes = json.loads((GOLDENS / "published" / f"{variant}.tensors.json").read_text())
    header, end = {}, 0
    for name, shape in shapes.items():
        size = 2 * torch.Size(shape).numel()
        header[name] = {"dtype": "BF16", "shape": shape, "data_offsets": [end, end + size]}
        end += size
    text = json.dumps(header).encode()
    generator = torch.Generator().manual_seed(0)
    with (folder / SHARD).open("wb") as file:
        file.write(len(text).to_bytes(8, "little") + text)
        for name, shape in shapes.items():
            # unit gain for matrices, ones for norms: activations neither die nor explode
            gain = residual_gain if re.search(r"language.*\.(o_proj|down_proj)\.", name) else 1.0
            gain = shape[-1] ** 0.5 if "embed_tokens" in name else gain
            matrix = len(shape) > 1
            tensor = torch.randn(shape, generator=generator) * gain * shape[-1] ** -0.5 if matrix else torch.ones(shape)
            file.write(tensor.to(torch.bfloat16).view(torch.int16).numpy().tobytes())
    index = {"metadata": {"total_size": end}, "weight_map": dict.fromkeys(shapes, SHARD)}
    (folder / "model.safetensors.index.json").write_text(json.dumps(index))
    for name in ("tokenizer.json", "tokenizer_config.json", "special_tokens_map.json"):
        shutil.copyfile(GOLDENS / "tiny-mini" / name, folder / name)
    shutil.copyfile(GOLDENS / "published" / "processor_config.json", folder / "processor_config.json")
    shutil.copyfile(GOLDENS / "published" / f"{variant}.config.json", folder / "config.json")
    return folder


def write_rate(folder: Path) -> float:
    """Bytes a second of a plain sequential write with fsync."""
    path, block = folder / "disk-rate.tmp", os.urandom(16 << 20)
    start = time.perf_counter()
    with path.open("wb", buffering=0) as file:
        for _ in range(DISK_BYTES // len(block)):
            file.write(block)
        os.fsync(file.fileno())
    rate = DISK_BYTES / (time.perf_counter() - start)
    path.unlink()
    return rate


def export(checkpoint: Path, out: Path, scheme: str, verify: bool) -> dict:
    """One export in a process of its own, with its wall time, processor time and peak memory."""
    arguments = [str(checkpoint), str(out), scheme, "verify" if verify else "skip"]
    start = time.perf_counter()
    process = subprocess.Popen([sys.executable, "-c", EXPORT, *arguments], stdout=subprocess.PIPE, text=True)
    text = process.stdout.read()
    _, status, usage = os.wait4(process.pid, 0)
    if status:
        sys.exit(f"the export failed with status {status}")
    facts = json.loads(text.splitlines()[-1])
    peak = usage.ru_maxrss * (1 if sys.platform == "darwin" else 1024)
    return {"scheme": scheme, "wall_s": round(time.perf_counter() - start, 1),
            "cpu_s": round(usage.ru_utime + usage.ru_stime, 1), "peak_rss_bytes": peak, **facts}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--work", type=Path, required=True, help="folder on the disk to measure")
    parser.add_argument("--checkpoint", type=Path, help="a checkpoint folder instead of a random one")
    parser.add_argument("--variant", default="tiny", choices=("tiny", "small", "base"))
    parser.add_argument("--scheme", action="append", choices=("fp32", "fp16"))
    parser.add_argument("--verify", action="store_true", help="include the parity run in time and memory")
    options = parser.parse_args()
    options.work.mkdir(parents=True, exist_ok=True)
    checkpoint = options.checkpoint or make_checkpoint(options.work / options.variant, options.variant)
    rate = write_rate(options.work)
    runs = [export(checkpoint, options.work / f"{checkpoint.name}-{scheme}.bundle", scheme, options.verify)
            for scheme in options.scheme or ["fp16"]]
    print(f"disk writes {rate / 1e6:.0f} MB/s; {os.cpu_count()} processors, load {os.getloadavg()[0]:.1f}")
    for run in runs:
        ideal = run["bundle_bytes"] / rate
        print(f"{run['scheme']}: {run['bundle_bytes'] / 1e9:.2f} GB in {run['wall_s']} s (disk alone {ideal:.0f} s), "
              f"{run['cpu_s']} s of processor, peak {run['peak_rss_bytes'] / 1e9:.2f} GB")
    print(json.dumps({"checkpoint": str(checkpoint), "disk_bytes_per_s": round(rate), "runs": runs}))


if __name__ == "__main__":
    main()
