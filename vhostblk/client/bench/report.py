"""Results for people, tables, and for programs, JSON.

Knows nothing of how they came about.
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Sequence
from dataclasses import asdict

from vhostblk import __version__
from vhostblk.client.bench.compare import Comparison, metrics_of
from vhostblk.client.bench.options import BenchOptions
from vhostblk.client.bench.result import BenchResult, OpResult

__all__ = [
    "bandwidth",
    "comparison_json",
    "comparison_table",
    "format_table",
    "rate",
    "result_json",
    "table_of",
]

#: Columns of a comparison: title and metric.
_COMPARED = (
    ("IOPS", "iops"),
    ("mean us", "mean_us"),
    ("p50", "p50_us"),
    ("p99", "p99_us"),
    ("p99.9", "p99.9_us"),
    ("back-end CPU us", "backend_cpu_us"),
    ("kicks", "kicks_per_request"),
    ("calls", "calls_per_request"),
)


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
    checked = []
    if result.compared:
        checked.append(f"{result.compared} bytes of reads were right")
    if result.verified_blocks:
        blocks = result.verified_blocks
        checked.append(f"{blocks} blocks were read again afterwards, and were right")
    if checked:
        yield f"verified: {'; '.join(checked)}"


def table_of(result: BenchResult) -> str:
    """Everything about one run."""
    return "\n".join(_lines(result))


def _compared(values: dict[str, float | None]) -> list[str]:
    return [
        "n/a"
        if (value := values[metric]) is None
        else rate(value)
        if metric == "iops"
        else micro(value)
        for _, metric in _COMPARED
    ]


def comparison_table(comparison: Comparison) -> str:
    """Every run, medians, and what the first is of the second."""
    rows = [["run", *(title for title, _ in _COMPARED)]]
    pairs = zip(comparison.first, comparison.second, strict=True)
    for number, pair in enumerate(pairs, 1):
        for letter, result in zip("AB", pair, strict=True):
            rows.append([f"{number} {letter}", *_compared(metrics_of(result))])
    for letter, values in zip("AB", comparison.medians, strict=True):
        rows.append([f"median {letter}", *_compared(values)])
    ratios = comparison.ratios
    rows.append(
        [
            "A / B",
            *(
                "n/a" if (ratio := ratios[metric]) is None else f"{ratio:.2f}"
                for _, metric in _COMPARED
            ),
        ]
    )
    names = f"A = {comparison.first[0].socket}\nB = {comparison.second[0].socket}\n\n"
    return names + format_table(rows)


def _header(options: BenchOptions) -> dict[str, object]:
    return {"version": __version__, "options": asdict(options)}


def result_json(options: BenchOptions, result: BenchResult) -> str:
    """Everything about one run, and what it was."""
    return json.dumps({**_header(options), "result": asdict(result)}, indent=2)


def comparison_json(options: BenchOptions, comparison: Comparison) -> str:
    """Everything about a comparison."""
    sides = (("first", comparison.first), ("second", comparison.second))
    return json.dumps(
        {
            **_header(options),
            **{
                name: {
                    "socket": results[0].socket,
                    "medians": medians,
                    "runs": [asdict(result) for result in results],
                }
                for (name, results), medians in zip(sides, comparison.medians, strict=True)
            },
            "ratios": comparison.ratios,
        },
        indent=2,
    )
