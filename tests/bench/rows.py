"""What is measured, and what is wanted: one row each."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from vhostblk.client.bench.options import PATTERNS, BenchOptions

__all__ = ["ROWS", "Disk", "Fio", "Row", "Target"]

Disk = Literal["null", "tmpfs", "cached", "folios", "direct"]
"""Two are in the page cache of a disk's file system: page by page, or in large folios."""


@dataclass(frozen=True)
class Target:
    """A ratio that is wanted: ours divided by the other's."""

    metric: str
    """As in `vhostblk.client.bench.compare.METRICS`."""
    at_least: float | None = None
    at_most: float | None = None
    of: Literal["qemu", "fio"] = "qemu"

    def is_met(self, ratio: float) -> bool:
        """Whether the ratio is what is wanted."""
        if self.at_least is not None:
            return ratio >= self.at_least
        return self.at_most is None or ratio <= self.at_most

    def __str__(self) -> str:
        if self.at_least is not None:
            return f">= {self.at_least:g}"
        return "" if self.at_most is None else f"<= {self.at_most:g}"


@dataclass(frozen=True)
class Fio:
    """What fio does on the same file, without any daemon."""

    engine: Literal["io_uring", "psync"]
    """io_uring: with O_DIRECT, a registered file and fixed buffers; psync: through the page cache."""
    pattern: Literal["randread", "read", "write"]
    block: int = 4096
    depth: int = 32
    """psync has always one request in flight."""


@dataclass(frozen=True)
class Row:
    """One benchmark on one kind of disk."""

    name: str
    title: str
    disk: Disk
    options: BenchOptions
    targets: tuple[Target, ...]
    fio: Fio | None = None


_READ = BenchOptions(pattern=PATTERNS["randread"])
_WRITE = BenchOptions(pattern=PATTERNS["randwrite"])

ROWS = (
    Row("tmpfs-read", "tmpfs, random read", "tmpfs", _READ, (Target("iops", 2.5),)),
    Row("tmpfs-write", "tmpfs, random write", "tmpfs", _WRITE, (Target("iops", 2.0),)),
    Row(
        "cached-read",
        "ext4 in the page cache, random read",
        "cached",
        _READ,
        (Target("iops", 1.3),),
    ),
    Row(
        "cached-write",
        "ext4 in the page cache, random write",
        "cached",
        _WRITE,
        (Target("iops", 2.0),),
    ),
    Row(
        "folios-read",
        "ext4 in large folios of the page cache, random read",
        "folios",
        _READ,
        (Target("iops"),),
    ),
    Row(
        "folios-write",
        "ext4 in large folios of the page cache, random write",
        "folios",
        _WRITE,
        (Target("iops"),),
    ),
    Row(
        "direct-read",
        "ext4 with O_DIRECT, random read",
        "direct",
        _READ,
        (
            Target("iops", 1.0),
            Target("iops", 0.95, of="fio"),
            Target("backend_cpu_us", at_most=0.7),
        ),
        fio=Fio("io_uring", "randread"),
    ),
    Row("null", "null-co, indirect", "null", _READ, (Target("iops", 1.5),)),
    Row(
        "null-sleep",
        "null-co, depth 128, eventfd",
        "null",
        BenchOptions(pattern=PATTERNS["randread"], depth=128, sleep=True),
        (Target("backend_cpu_us", at_most=0.7), Target("iops")),
    ),
    Row(
        "latency",
        "null-co, depth 1, eventfd",
        "null",
        BenchOptions(pattern=PATTERNS["randread"], depth=1, sleep=True),
        (Target("p50_us", at_most=1.0), Target("mean_us", at_most=1.0)),
    ),
)
"""4 KiB and, unless the title says otherwise, depth 32, one queue, a client that polls."""
