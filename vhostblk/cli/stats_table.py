"""The table of `vhostblk stats`: an export, its queues, their operations.

Queues without a request in the period are left out, as are operations that did not occur. Where several queues are
shown, their sum comes last.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from vhostblk.export.statistics import OperationStatistics, QueueStatistics, total
from vhostblk.export.stats_reader import PageCopy

_MIB = 1 << 20
# Requests that are in flight for longer are told of.
_LONG_NS = 1_000_000_000


def table(
    page: PageCopy,
    seconds: float,
    queues: Mapping[int, QueueStatistics],
    quantiles: Sequence[float],
    period: str,
) -> list[str]:
    """The lines for one export.

    Args:
        seconds: the length of the period that was counted.
        quantiles: fractions, 0 to 1.
        period: which one it is, in words.
    """
    lines = [_title(page)]
    busy = {str(index): queue for index, queue in queues.items() if queue.requests}
    if not busy:
        return [*lines, f"  no requests {period}, {_in_flight(total(queues.values()))} in flight"]
    if len(busy) > 1:
        busy["all"] = total(queues.values())
    titles = [f"p{fraction * 100:g} us" for fraction in quantiles]
    lines.append(
        f"  {'queue':<6}{'operation':<13}{'requests':>10}{'IOPS':>11}{'MiB/s':>10}{'errors':>8}"
        + "".join(f"{title:>11}" for title in (*titles, "max us"))
    )
    for name, queue in busy.items():
        lines += _queue(name, queue, seconds, quantiles)
    return lines


def _title(page: PageCopy) -> str:
    header = page.header
    path = "the engine" if page.is_native else "the Python data path"
    connected = "a front-end is connected" if header.connected else "no front-end is connected"
    partial = "; some queues are missing for want of shared memory" if page.is_partial else ""
    return (
        f"export {header.export} (process {header.pid}, {path}): {connected}, "
        f"{header.sessions} so far{partial}"
    )


def _in_flight(queue: QueueStatistics) -> str:
    """How many, and for how long if that is worth telling."""
    age = queue.oldest_age_ns or 0
    return f"{queue.in_flight}" + (f" (for up to {age / 1e9:.1f} s)" if age >= _LONG_NS else "")


def _queue(
    name: str, queue: QueueStatistics, seconds: float, quantiles: Sequence[float]
) -> list[str]:
    lines = [
        f"{operation_name:<13}{_operation(operation, seconds, quantiles)}"
        for operation_name, operation in queue.operations.items()
        if operation.requests
    ]
    hit_rate = 100 * (queue.hit_rate or 0)
    lines.append(
        f"in flight {_in_flight(queue)}, by the engine alone {hit_rate:.2f} %, for each request "
        f"{queue.per_request(queue.kicks) or 0:.3f} kicks and "
        f"{queue.per_request(queue.calls) or 0:.3f} calls ({queue.calls_suppressed} suppressed)"
    )
    first, *others = lines
    return [f"  {name:<6}{first}", *(f"  {'':<6}{line}" for line in others)]


def _operation(operation: OperationStatistics, seconds: float, quantiles: Sequence[float]) -> str:
    latencies = [operation.quantile(fraction) for fraction in quantiles]
    return (
        f"{operation.requests:>10}{operation.requests / seconds:>11.1f}"
        f"{operation.bytes / seconds / _MIB:>10.1f}{operation.errors:>8}"
        + "".join(f"{ns / 1000:>11.1f}" for ns in (*latencies, operation.latency_max_ns))
    )
