"""Counts what a process holds, so that a test can tell that it gave everything back.

Counted are file descriptors, shared writable mappings (guest memory, rings of io_uring, statistics
pages) and threads, also those that Python does not know of. Garbage is collected first, and what
ends by itself a moment later (an exiting thread, a ring the kernel is taking down) is waited for.
"""

from __future__ import annotations

import gc
import os
import time
from collections import Counter
from dataclasses import dataclass
from pathlib import Path

__all__ = ["Resources", "wait_until_released"]

#: Kernel threads that serve an io_uring belong to the ring, and end some time after it.
_KERNEL_WORKER = "iou-"


@dataclass(frozen=True)
class Resources:
    """What process `pid` ("self": this one) holds, by name, with counts."""

    descriptors: Counter[str]
    mappings: Counter[str]
    threads: Counter[str]

    @classmethod
    def of(cls, pid: int | str = "self") -> Resources:
        """Counts now."""
        process = Path("/proc") / str(pid)
        return cls(_descriptors(process), _mappings(process), _threads(process))

    def beyond(self, earlier: Resources) -> list[str]:
        """What is held now and was not then, one line for each; empty: nothing leaked."""
        lines = []
        for kind in ("descriptors", "mappings", "threads"):
            now: Counter[str] = getattr(self, kind)
            then: Counter[str] = getattr(earlier, kind)
            more = now.total() - then.total()
            if more > 0:
                names = ", ".join(f"{count} x {name}" for name, count in (now - then).items())
                lines.append(f"{more} more {kind}: {names}")
        return lines


def wait_until_released(
    earlier: Resources, *, seconds: float = 3.0, pid: int | str = "self"
) -> list[str]:
    """Waits until nothing is held beyond `earlier`.

    Returns:
        What is still held after `seconds`; empty if nothing leaked.
    """
    deadline = time.monotonic() + seconds
    while True:
        leaks = Resources.of(pid).beyond(earlier)
        if not leaks:
            return []
        if time.monotonic() > deadline:
            return leaks
        if pid == "self":
            gc.collect()
        time.sleep(0.01)


def _descriptors(process: Path) -> Counter[str]:
    names: Counter[str] = Counter()
    for entry in os.listdir(process / "fd"):
        try:
            target = os.readlink(process / "fd" / entry)
        except FileNotFoundError:  # the one that lists this folder
            continue
        # A socket's or a pipe's number is of no use to a reader, and differs every time.
        names[target.split("[")[0] if target.startswith(("socket:", "pipe:")) else target] += 1
    return names


def _mappings(process: Path) -> Counter[str]:
    names: Counter[str] = Counter()
    for line in (process / "maps").read_text().splitlines():
        fields = line.split(maxsplit=5)
        permissions = fields[1]
        if permissions[1] == "w" and permissions[3] == "s":
            names[fields[5] if len(fields) > 5 else "anonymous"] += 1
    return names


def _threads(process: Path) -> Counter[str]:
    names: Counter[str] = Counter()
    for entry in os.listdir(process / "task"):
        try:
            name = (process / "task" / entry / "comm").read_text().strip()
        except (FileNotFoundError, ProcessLookupError):
            continue
        if not name.startswith(_KERNEL_WORKER):
            names[name] += 1
    return names
