"""Memory, cores and disk of this machine."""

from __future__ import annotations

import math
import os
import shutil
from collections.abc import Iterator
from pathlib import Path

from vl2.machine.check import MISSING, OK, Check
from vl2.memory import available_bytes
from vl2.runtime.cores import physical_cores

# The smallest full bundle (Tiny, int4) takes 2.3 GB of disk and, with a context of 2,048 tokens, 2.9 GB of memory.
_ENOUGH_MEMORY, _ENOUGH_DISK = 2.9e9, 2.3e9


def check_system(folder: Path) -> Iterator[Check]:
    """folder: where bundles are to lie."""
    total = os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
    available = available_bytes()
    enough = available >= _ENOUGH_MEMORY
    told = "as much as the system says" if math.isinf(available) else f"{available / 1e9:.1f} GB"
    yield Check("machine", "memory", OK if enough else MISSING, f"{told} of {total / 1e9:.1f} GB available",
                None if enough else "end other programs: Tiny as int4 takes 2.9 GB; `vl2 plan tiny` says more")
    yield Check("machine", "cores", OK, f"{physical_cores()} physical for this process, {os.cpu_count()} processors")
    free = shutil.disk_usage(folder).free
    enough = free >= _ENOUGH_DISK
    yield Check("machine", "disk", OK if enough else MISSING, f"{free / 1e9:.1f} GB free in {folder}",
                None if enough else "free some: Tiny as int4 takes 2.3 GB, and its checkpoint 6.7 GB to export it")
