"""Results for people: a table.

Knows nothing of how they came about.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence

from vhostblk.client.bench.result import BenchResult, OpResult

__all__ = ["bandwidth", "format_table", "rate", "table_of"]


def rate(value: float) -> str:
    """Something per second, three digits."""
    for unit, name in ((1e6, "M"), (1e3, "k")):
        if value >= unit:
            return f"{value / unit:.4g}{name}"
    return f"{value:.4g}"


def bandwidth(value: float) -> str:
    """Bytes per second."""
    for unit, name in ((1 << 30, "GiB"), (1 << 20, "MiB"), (1 << 10, "KiB")):
        if value >= unit:
            return f"{value / unit:.4g} {name}/s"
    return f"{value:.4g} B/s"


def micro(value: float | None) -> str:
    """Microseconds."""
    return "n/a" if value is None else f"{value:.3g}" if value < 100 else f"{value:.0f}"


def format_table(rows: Sequence[Sequence[str]]) -> str:
    """Align columns: the first to the left, others to the right."""
    widths = [max(len(row[i]) for row in rows) for i in range(len(rows[0]))]
    return "\n".join(
        "  ".join(
            cell.rjust(width) if i else cell.ljust(width)
            for i, (cell, width) in enumerate(zip(row, widths, strict=True))
        ).rstrip()
        for row in rows
    )


def _row(name: str, op: OpResult) -> list[str]:
    times = [op.mean_us, *op.percentiles_us.values(), op.max_us]
    return [
        name,
        str(op.requests),
        rate(op.iops),
        bandwidth(op.bytes_per_second),
        *map(micro, times),
    ]


def _lines(result: BenchResult) -> Iterator[str]:
    assert result.latency is not None
    percent = [f"p{name}" for name in result.latency.percentiles_us]
    rows = [["operation", "requests", "IOPS", "bandwidth", "mean us", *percent, "max"]]
    rows += [_row(name, op) for name, op in result.operations.items()]
    if len(result.operations) != 1:
        rows.append(_row("all", result.latency))
    yield format_table(rows)
    yield ""
    load = (
        ""
        if result.backend_cpu_percent is None
        else f" ({result.backend_cpu_percent:.0f} % of a CPU)"
    )
    yield (
        f"per request: back-end {micro(result.backend_cpu_us)} us of CPU{load},"
        f" client {micro(result.client_cpu_us)} us of CPU, {micro(result.client_busy_us)} us of them at work;"
        f" {result.kicks_per_request:.3g} kicks, {result.calls_per_request:.3g} calls"
    )
    if result.compared:
        blocks = result.verified_blocks
        after = f"; {blocks} blocks read again afterwards" if blocks else ""
        yield f"verified: {result.compared} bytes of reads were right{after}"


def table_of(result: BenchResult) -> str:
    """Everything about one run."""
    return "\n".join(_lines(result))
