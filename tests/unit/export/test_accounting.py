"""Statistics in QEMU's words (row B30)."""

from __future__ import annotations

from vhostblk.block import introspection
from vhostblk.export.accounting import block_device_stats
from vhostblk.export.statistics import QueueCounters, QueueStatistics
from vhostblk.export.stats_layout import QUEUE_WORDS


def count(counters: QueueCounters, operation: str, ok: int, failed: int, refused: int) -> None:
    for number in range(ok + failed + refused):
        age = counters.began()
        counters.finished(operation, 1000, number >= ok, 10, age, refused=number >= ok + failed)


def test_numbers_add_up_and_have_the_names_of_qemu() -> None:
    words = memoryview(bytearray(QUEUE_WORDS * 8)).cast("Q")
    counters = QueueCounters(words)
    count(counters, "read", 7, 2, 1)
    count(counters, "write", 5, 0, 3)
    count(counters, "write_zeroes", 4, 1, 0)
    count(counters, "flush", 2, 1, 0)
    count(counters, "discard", 1, 0, 2)
    stats = block_device_stats(QueueStatistics.of(words), 4096)
    assert 0 < stats.pop("idle_time_ns") < 60 * 10**9
    assert stats == {
        "rd_bytes": 7000,
        "rd_operations": 7,
        "failed_rd_operations": 2,
        "invalid_rd_operations": 1,
        "rd_total_time_ns": 100,
        "rd_merged": 0,
        "wr_bytes": 9000,  # zero-writes are writes
        "wr_operations": 9,
        "failed_wr_operations": 1,
        "invalid_wr_operations": 3,
        "wr_total_time_ns": 130,
        "wr_merged": 0,
        "flush_operations": 2,
        "failed_flush_operations": 1,
        "invalid_flush_operations": 0,
        "flush_total_time_ns": 30,
        "unmap_bytes": 1000,
        "unmap_operations": 1,
        "failed_unmap_operations": 0,
        "invalid_unmap_operations": 2,
        "unmap_total_time_ns": 30,
        "unmap_merged": 0,
        "wr_highest_offset": 4096,
        "account_failed": True,
        "account_invalid": True,
        "timed_stats": [],
    }
    assert set(introspection._COUNTED_ELSEWHERE) < set(stats)


def test_device_that_served_nothing_has_no_idle_time() -> None:
    assert "idle_time_ns" not in block_device_stats(QueueStatistics(), 0)
