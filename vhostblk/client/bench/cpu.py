"""CPU time of another process, in nanoseconds.

clock_getcpuclockid(3): each process has a clock that counts the CPU time of all its threads, also of
those that have ended, such as workers of io_uring; /proc/PID/stat counts in hundredths of a second,
and /proc/PID/task/*/schedstat forgets threads. The clock's number is Linux's, and so is this module.
"""

from __future__ import annotations

import time

__all__ = ["cpu_seconds"]

_CPUCLOCK_SCHED = 2


def cpu_seconds(pid: int) -> float | None:
    """CPU time that a process has used; None if there is no such process, or none we may see."""
    if pid <= 0:
        return None
    try:
        return time.clock_gettime_ns(~pid << 3 | _CPUCLOCK_SCHED) / 1e9
    except OSError:
        return None
