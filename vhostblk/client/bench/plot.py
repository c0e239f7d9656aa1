"""Results as a drawing: latency by percentile, throughput by time. Needs matplotlib, an extra.

Knows nothing of how results came about.
"""

from __future__ import annotations

import importlib
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from vhostblk.client.bench.result import BenchResult
from vhostblk.errors import ConfigError

__all__ = ["check_plot", "plot"]

_TICKS = (50, 90, 99, 99.9, 99.99)


def check_plot(path: str) -> None:
    """Find out whether drawing will be possible, before the work that shall be drawn.

    Raises:
        ConfigError: no matplotlib, a kind of file it does not write, or no such folder.
    """
    figure = _figure()
    kinds = figure.canvas.get_supported_filetypes()
    suffix = Path(path).suffix.lstrip(".").lower()
    if suffix not in kinds:
        raise ConfigError(
            f"plot '{path}': its name must end in one of .{', .'.join(sorted(kinds))}"
        )
    if not Path(path).resolve().parent.is_dir():
        raise ConfigError(f"plot '{path}': no such folder")


def plot(path: str, title: str, sides: Mapping[str, Sequence[BenchResult]]) -> None:
    """Draw into a file whose name says its kind (.svg, .png, .pdf).

    Args:
        sides: runs of each back-end, by what to call it.

    Raises:
        ConfigError: see `check_plot`.
        OSError: the file cannot be written.
    """
    figure = _figure()
    latency, throughput = figure.subplots(1, 2)
    for number, (name, results) in enumerate(sides.items()):
        color = f"C{number}"
        for index, result in enumerate(results):
            label = name if not index else None
            # As far from 100 % as the eye can still tell apart.
            points = [(1 / (1 - percent / 100), us) for percent, us in result.curve if us]
            latency.plot(
                *zip(*points, strict=True), color=color, label=label, alpha=0.7
            ) if points else None
            samples = [(second, iops / 1000) for second, iops in result.samples]
            samples = samples or [(result.seconds, result.iops / 1000)]
            marker = "." if len(samples) == 1 else ""
            throughput.plot(
                *zip(*samples, strict=True), color=color, marker=marker, label=label, alpha=0.7
            )
    latency.set_xscale("log")
    latency.set_yscale("log")
    latency.set_xticks([1 / (1 - p / 100) for p in _TICKS], [f"{p:g} %" for p in _TICKS])
    latency.minorticks_off()
    latency.set_xlabel("requests that were not slower")
    latency.set_ylabel("latency, us")
    throughput.set_xlim(left=0)
    throughput.set_ylim(bottom=0)
    throughput.set_xlabel("seconds")
    throughput.set_ylabel("1000 IOPS")
    for axes in (latency, throughput):
        axes.grid(alpha=0.3)
        axes.legend()
    figure.suptitle(title)
    figure.savefig(path)


def _figure() -> Any:
    try:
        module = importlib.import_module("matplotlib.figure")
    except ImportError:
        raise ConfigError(
            "plot: matplotlib is not installed; pip install 'vhostblk[plot]' does that"
        ) from None
    return module.Figure(figsize=(11, 4.5), layout="constrained")
