"""What other programs do to the machine meanwhile."""

from __future__ import annotations

import os
from pathlib import Path

__all__ = ["Weather", "machine"]

_TICK = os.sysconf("SC_CLK_TCK")


class Weather:
    """CPU time of all programs but this and those named, since it was made. Threads of the kernel do not count.

    Args:
        known: processes whose time is no disturbance.
    """

    def __init__(self, *known: int) -> None:
        self._known = {os.getpid(), *known}
        self._before = self._times()

    def others(self) -> float:
        """Seconds; of programs that have begun and ended meanwhile nothing is known."""
        after = self._times()
        return sum(time - self._before.get(pid, 0.0) for pid, time in after.items())

    def _times(self) -> dict[int, float]:
        found = {}
        for path in Path("/proc").glob("[0-9]*"):
            try:
                # A thread of the kernel has no memory: field 23, vsize, is 0.
                fields = (path / "stat").read_text().rpartition(")")[2].split()
            except OSError:
                continue
            if int(path.name) not in self._known and int(fields[20]):
                found[int(path.name)] = (int(fields[11]) + int(fields[12])) / _TICK
        return found


def machine() -> str:
    """One line about the machine: processor, how many, kernel; no names."""
    found: dict[str, str] = {}
    for line in Path("/proc/cpuinfo").read_text().splitlines():
        key, _, value = line.partition(":")
        found.setdefault(key.strip(), value.strip())
    model = found.get("model name", "unknown processor")
    if "cpu family" in found:
        model += f" (family {found['cpu family']}, model {found.get('model', '?')})"
    # What follows the version is whose kernel it is.
    release = os.uname().release.partition("-")[0]
    return f"{model}, {os.cpu_count()} processors, Linux {release}"
