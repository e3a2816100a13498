"""The control groups this process is in: a container's or a service's limits hold besides the machine's."""

from __future__ import annotations

from pathlib import Path

ROOT = Path("/sys/fs/cgroup")
MEMBERSHIP = Path("/proc/self/cgroup")


def folders() -> list[Path]:
    """Folders of the process's group and of all above it, up to the root that this process sees."""
    try:
        lines = MEMBERSHIP.read_text().splitlines()
    except OSError:
        return [ROOT]
    # Version 2 has one line, "0::/path"; inside a container the path may lie above what is visible here.
    paths = [line.split("::", 1)[1].strip("/") for line in lines if line.startswith("0::")]
    group = ROOT / paths[0] if paths and ".." not in paths[0] else ROOT
    return [folder for folder in (group, *group.parents) if folder == ROOT or ROOT in folder.parents]
