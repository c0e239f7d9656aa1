"""What an export has served, in the words of QEMU's `query-blockstats` (block layer row B30).

The numbers are those of the statistics page (statistics.py), which the engine and the Python data path fill alike;
nothing is counted a second time. Knows nothing of how they are asked for.
"""

from __future__ import annotations

from typing import Any

from vhostblk.export.statistics import OperationStatistics, QueueStatistics

# QEMU's virtio-blk counts zero-writes as writes, and discards as unmaps.
_KINDS = {
    "rd": ("read",),
    "wr": ("write", "write_zeroes"),
    "flush": ("flush",),
    "unmap": ("discard",),
}


def block_device_stats(served: QueueStatistics, highest_offset: int) -> dict[str, Any]:
    """`BlockDeviceStats` of a device.

    Operations are those that succeeded. Failed and refused requests have their own counts, and their share in the times
    (`account_failed`, `account_invalid`). Requests are never merged here. `timed_stats` are not kept: whoever wants an
    interval subtracts (`vhostblk stats --watch`).

    Args:
        served: all queues together.
        highest_offset: how far was written, bytes (row B24.4).
    """
    stats: dict[str, Any] = {}
    for kind, names in _KINDS.items():
        counted = OperationStatistics()
        for name in names:
            counted.add(served.operations[name])
        if kind != "flush":
            stats[f"{kind}_bytes"] = counted.bytes
            stats[f"{kind}_merged"] = 0
        stats[f"{kind}_operations"] = counted.requests - counted.errors
        stats[f"{kind}_total_time_ns"] = counted.latency_ns
        stats[f"failed_{kind}_operations"] = counted.errors - counted.invalid
        stats[f"invalid_{kind}_operations"] = counted.invalid
    if served.idle_ns is not None:
        stats["idle_time_ns"] = served.idle_ns
    return stats | {
        "wr_highest_offset": highest_offset,
        "account_failed": True,
        "account_invalid": True,
        "timed_stats": [],
    }
