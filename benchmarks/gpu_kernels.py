"""Every CUDA kernel against float64 on random inputs, and its time, over the family's shapes.

    python benchmarks/gpu_kernels.py                      on a GPU: check, then time; a table, then one JSON line
    python benchmarks/gpu_kernels.py --emulate            on a CPU: the same plans and references, smaller; no times
    python benchmarks/gpu_kernels.py --only "experts small" --rounds 50

A case is captured into one CUDA graph over so many copies of its buffers that no cache holds them all. GB/s count
weights and caches once; `share` is that over the rate of a large copy (read + written bytes) measured in the same run.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
from gpu_cases import Case, Extent, cases

_COPIED_BYTES, _ROTATED_BYTES, _MOST_COPIES = 1 << 30, 512 << 20, 64


class Gpu:
    """Device 0 through the driver API. driver: `cuda.bindings.driver` or what stands for it."""

    def __init__(self, driver: Any):
        from vl2.plugins.cuda.pack import ARCHITECTURES
        from vl2.plugins.tensorrt.launcher import Launcher, call

        self._call = lambda name, *given: call(driver, name, *given)
        self._driver = driver
        self._call("cuInit", 0)
        device = self._call("cuDeviceGet", 0)
        self._call("cuCtxSetCurrent", self._call("cuDevicePrimaryCtxRetain", device))
        kind = driver.CUdevice_attribute
        major, minor = (self._call("cuDeviceGetAttribute", attribute, device) for attribute in (
            kind.CU_DEVICE_ATTRIBUTE_COMPUTE_CAPABILITY_MAJOR, kind.CU_DEVICE_ATTRIBUTE_COMPUTE_CAPABILITY_MINOR))
        self.architecture = f"sm_{major}{minor}"
        found = self.architecture if self.architecture in ARCHITECTURES else "compute_80"
        self.name = self._call("cuDeviceGetName", 128, device).split(b"\0")[0].decode()
        self._launcher = Launcher(driver, found)
        self._stream = self._call("cuStreamCreate", 0)

    def check(self, case: Case) -> dict[str, np.ndarray]:
        """Runs the plan once; the buffers that it was to write."""
        buffers, workspace = self._upload(case)
        self._launcher.run(case.plan, buffers, workspace, self._stream)
        self._call("cuStreamSynchronize", self._stream)
        results = {name: np.empty_like(case.arrays[name]) for name in case.wanted}
        for name, array in results.items():
            self._call("cuMemcpyDtoH", array.ctypes.data, buffers[name], array.nbytes)
        self._free([*buffers.values(), workspace])
        return results

    @staticmethod
    def copies(case: Case) -> int:
        """How many sets of buffers no cache holds."""
        return max(1, min(_MOST_COPIES, _ROTATED_BYTES // max(case.read_bytes, 1)))

    def seconds(self, case: Case, rounds: int) -> float:
        """The median time of one run over `rounds` replays of a graph of many."""
        copies = self.copies(case)
        return self.step_seconds([case] * copies, rounds) / copies

    def step_seconds(self, cases: Sequence[Case], rounds: int) -> float:
        """The median time of all of them in order, in one graph, each with buffers of its own."""
        made = [(case, *self._upload(case)) for case in cases]
        # a kernel's first run loads it and allows its shared memory, which a capture may refuse
        for case, buffers, workspace in {id(each[0]): each for each in made}.values():
            self._launcher.run(case.plan, buffers, workspace, self._stream)
        self._call("cuStreamSynchronize", self._stream)
        mode = self._driver.CUstreamCaptureMode.CU_STREAM_CAPTURE_MODE_THREAD_LOCAL
        self._call("cuStreamBeginCapture", self._stream, mode)
        for case, buffers, workspace in made:
            self._launcher.run(case.plan, buffers, workspace, self._stream)
        graph = self._call("cuGraphInstantiate", self._call("cuStreamEndCapture", self._stream), 0)
        elapsed = self._timed(lambda: self._call("cuGraphLaunch", graph, self._stream), rounds)
        self._call("cuGraphExecDestroy", graph)
        for _, buffers, workspace in made:
            self._free([*buffers.values(), workspace])
        return elapsed

    def copy_bytes_per_second(self, rounds: int) -> float:
        """Bytes read and written by a second of a large copy on the device."""
        source, target = (self._call("cuMemAlloc", _COPIED_BYTES) for _ in range(2))
        copy = ("cuMemcpyDtoDAsync", target, source, _COPIED_BYTES, self._stream)
        elapsed = self._timed(lambda: self._call(*copy), rounds)
        self._free([source, target])
        return 2 * _COPIED_BYTES / elapsed

    def _timed(self, work: Callable[[], object], rounds: int) -> float:
        events = [self._call("cuEventCreate", 0) for _ in range(2)]
        found = []
        for _ in range(rounds + 2):
            self._call("cuEventRecord", events[0], self._stream)
            work()
            self._call("cuEventRecord", events[1], self._stream)
            self._call("cuEventSynchronize", events[1])
            found.append(self._call("cuEventElapsedTime", *events) / 1e3)
        return float(np.median(found[2:]))

    def _upload(self, case: Case) -> tuple[dict[str, int], int]:
        from vl2.plugins.cuda.launch import workspace_bytes

        buffers = {}
        for name, array in case.arrays.items():
            buffers[name] = int(self._call("cuMemAlloc", max(array.nbytes, 16)))
            self._call("cuMemcpyHtoD", buffers[name], array.ctypes.data, array.nbytes)
        size = max(workspace_bytes(case.plan), 16)
        workspace = int(self._call("cuMemAlloc", size))
        # What no kernel wrote is a NaN.
        self._call("cuMemsetD8", workspace, 0xFF, size)
        return buffers, workspace

    def _free(self, addresses: list[int]) -> None:
        for address in addresses:
            self._call("cuMemFree", address)


class EmulatedGpu:
    """The same checks on the CPU; it has no times."""

    architecture, name = "emulated", "CPU"

    def __init__(self):
        from vl2.plugins.cuda.emulate import Emulator

        self._emulator = Emulator()

    def check(self, case: Case) -> dict[str, np.ndarray]:
        self._emulator.run(case.plan, case.arrays)
        return {name: case.arrays[name] for name in case.wanted}


def error_of(case: Case, results: dict[str, np.ndarray]) -> float:
    """max |Δ| beyond the rounding of float16 results, over the RMS of what is wanted; the worst of the buffers."""
    worst = 0.0
    for name, want in case.wanted.items():
        got = results[name].astype(np.float64)
        free = np.abs(want) * 2.0**-11 if results[name].dtype == np.float16 else 0.0
        excess = np.maximum(np.abs(got - want) - free, 0).max() / max(np.sqrt((want**2).mean()), 1e-30)
        worst = max(worst, float(excess) if np.isfinite(got).all() else float("inf"))
    return worst


def measure(gpu: Gpu | EmulatedGpu, case: Case, rounds: int, copy_rate: float | None) -> dict[str, Any]:
    """One row of the table."""
    error = error_of(case, gpu.check(case))
    row = {"case": case.name, "error": error, "bound": case.bound, "good": error <= case.bound}
    if copy_rate is not None:
        seconds = gpu.seconds(case, rounds)
        rate = case.read_bytes / seconds
        row |= {"us": seconds * 1e6, "gb_per_s": rate / 1e9, "share": rate / copy_rate}
        row["tflops"] = case.flops / seconds / 1e12
    return row


def show(row: dict[str, Any]) -> str:
    """A line of the table."""
    line = f"{row['case']:40} {row['error']:9.1e} {'ok' if row['good'] else 'WRONG':6}"
    if "us" in row:
        line += f"{row['us']:10.1f} {row['gb_per_s']:9.1f} {row['share']:7.2f} {row['tflops']:8.2f}"
    return line


def main(arguments: list[str]) -> int:
    """Prints the table and the JSON line; 0 where every case is within its bound."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--emulate", action="store_true", help="run on the CPU: smaller problems, no times")
    parser.add_argument("--full", action="store_true", help="with --emulate: whole layers (minutes)")
    parser.add_argument("--only", default="", help="cases whose name has this in it")
    parser.add_argument("--rounds", type=int, default=20)
    given = parser.parse_args(arguments)
    if given.emulate:
        gpu, extent = EmulatedGpu(), Extent(9, 70, given.full)
    else:
        from cuda.bindings import driver

        gpu, extent = Gpu(driver), Extent(1024, 2000, True)
    copy_rate = None if given.emulate else gpu.copy_bytes_per_second(given.rounds)
    print(f"{'case':40} {'error':>9} {'':6}{'us':>10} {'GB/s':>9} {'share':>7} {'TFLOP/s':>8}")
    rows = []
    for name, make in cases(extent):
        if given.only in name:
            rows.append(measure(gpu, make(np.random.default_rng(0), name), given.rounds, copy_rate))
            print(show(rows[-1]), flush=True)
    commit = subprocess.run(["git", "rev-parse", "--short", "HEAD"], capture_output=True, text=True).stdout.strip()
    print(json.dumps({"device": gpu.name, "architecture": gpu.architecture, "commit": commit, "rows": rows,
                      "copy_bytes_per_s": copy_rate, "date": time.strftime("%Y-%m-%d")}))  # fmt: skip
    return 0 if rows and all(row["good"] for row in rows) else 1


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
