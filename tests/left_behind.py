"""What this process holds of shared memory, in numbers that no other process changes."""

from __future__ import annotations

import os
from pathlib import Path

__all__ = ["left_behind"]


def left_behind() -> tuple[int, int, int]:
    """Open fds, shared mappings, and how many of these have a name in /dev/shm still.

    What else is in that folder is other daemons', which come and go.
    """
    maps = Path("/proc/self/maps").read_text().splitlines()
    shared = [line for line in maps if " rw-s " in line]
    named = [line for line in shared if "/dev/shm/" in line and not line.endswith(" (deleted)")]
    return len(os.listdir("/proc/self/fd")), len(shared), len(named)
