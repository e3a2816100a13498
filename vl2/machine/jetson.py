"""What is particular to Jetson boards: JetPack, power mode, swap, where wheels with their kernels are."""

from __future__ import annotations

import platform
import re
import shutil
import subprocess
from collections.abc import Iterator
from pathlib import Path

from vl2.machine.check import MISSING, OK, Check

RELEASE_FILE = Path("/etc/nv_tegra_release")
_MODEL_FILE, _SWAPS_FILE = Path("/proc/device-tree/model"), Path("/proc/swaps")
# L4T → JetPack (NVIDIA's archive pages); the longest match counts.
_JETPACKS = {"36.3": "6.0", "36.4.0": "6.1", "36.4": "6.2", "36.5": "6.2.2", "38.2": "7.0", "38.4": "7.1",
             "39.2": "7.2"}
# Wheels with kernels for the boards: PyPI's onnxruntime-gpu 1.31 for aarch64 has none for sm_87 and sm_110.
_INDEX = {"6": "https://pypi.jetson-ai-lab.io/jp6/cu126", "7": "https://pypi.jetson-ai-lab.io/sbsa/cu130"}
# JetPack 6 has a driver of CUDA 12, which takes nothing of 13; NVRTC 12.6 does not know JetPack 7's sm_110.
_NVRTC = {"6": "nvidia-cuda-nvrtc-cu12==12.6.77", "7": "'nvidia-cuda-nvrtc>=13'"}
_BINDINGS = {"6": "'cuda-bindings==12.*'", "7": "'cuda-bindings>=13'"}


def is_jetson() -> bool:
    """Whether this is a Jetson board."""
    return RELEASE_FILE.is_file() and platform.machine() == "aarch64"


def check_jetson() -> Iterator[Check]:
    """Nothing on other machines."""
    if not is_jetson():
        return
    board = _MODEL_FILE.read_text(errors="replace").strip("\0\n ") if _MODEL_FILE.is_file() else "a Jetson"
    release = l4t_release(_release_text())
    known = jetpack_of(release)
    yield Check("Jetson", "JetPack", OK if known else MISSING, f"{board}, L4T {release or 'unknown'}, JetPack "
                f"{known or 'unknown'}", None if known else "sudo apt install nvidia-jetpack")
    yield _check_power()
    swaps = _SWAPS_FILE.read_text().splitlines()[1:] if _SWAPS_FILE.is_file() else []
    yield Check("Jetson", "swap", OK if swaps else MISSING, f"{len(swaps)} areas" if swaps else "none",
                None if swaps else "sudo fallocate -l 8G /swap && sudo chmod 600 /swap && sudo mkswap /swap && "
                "sudo swapon /swap")


def wheel_index() -> str:
    """The package index whose onnxruntime-gpu has kernels for this board."""
    return _INDEX[_generation()]


def nvrtc_package() -> str:
    """What compiles the plugins' kernels for this board's driver, as pip takes it."""
    return _NVRTC[_generation()]


def bindings_package() -> str:
    """The cuda-bindings of this board's driver, as pip takes it."""
    return _BINDINGS[_generation()]


def _generation() -> str:
    """6 or 7; a JetPack that is not known is taken for the older."""
    return (jetpack_of(l4t_release(_release_text())) or "6")[0]


def _release_text() -> str:
    return RELEASE_FILE.read_text(errors="replace")


def l4t_release(text: str) -> str:
    """`# R36 (release), REVISION: 4.3, …` → 36.4.3; empty where it cannot be read."""
    match = re.search(r"R(\d+)\s*\(release\),\s*REVISION:\s*([\d.]+)", text)
    return f"{match[1]}.{match[2]}" if match else ""


def jetpack_of(release: str) -> str | None:
    """The JetPack of an L4T release, None for one that this version does not know."""
    found = [key for key in _JETPACKS if release == key or release.startswith(f"{key}.")]
    return _JETPACKS[max(found, key=len)] if found else None


def _check_power() -> Check:
    """The mode decides clocks and with them bandwidth: an Orin Nano has 68 GB/s below its 25 W mode."""
    mend = "sudo nvpmodel -p --verbose, then sudo nvpmodel -m MODE, then sudo jetson_clocks"
    if shutil.which("nvpmodel") is None:
        return Check("Jetson", "power mode", MISSING, "there is no nvpmodel", "sudo apt install nvidia-l4t-nvpmodel")
    try:
        done = subprocess.run(["nvpmodel", "-q"], capture_output=True, text=True, timeout=20)
    except (OSError, subprocess.TimeoutExpired) as error:
        return Check("Jetson", "power mode", MISSING, f"nvpmodel does not answer: {error}", mend)
    match = re.search(r"NV Power Mode:\s*(\S+)", done.stdout)
    fast = match is not None and ("MAXN" in match[1] or "25W" in match[1])
    detail = match[1] if match else "nvpmodel does not say"
    return Check("Jetson", "power mode", OK if fast else MISSING, detail, None if fast else mend)
