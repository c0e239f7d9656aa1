"""Benchmarks that are as short as the machine lets them be."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

__all__ = ["SECONDS", "run_shortly"]

_ROOT = Path(__file__).parents[2]
_DURATIONS = ("0.1", "0.5")
SECONDS = 100
"""That one of two may take."""


def run_shortly(module: str, *words: str) -> subprocess.CompletedProcess[str]:
    """Run one of these programs, with runs of a tenth of a second; longer, if it had no turn in that time, and says so.

    Args:
        module: whose name.
        words: its other options.
    """
    for duration in _DURATIONS:
        done = subprocess.run(
            [sys.executable, "-m", module, *words, "--duration", duration],
            cwd=_ROOT,
            capture_output=True,
            text=True,
            timeout=SECONDS,
            check=False,
        )
        if "got no processor while it was measured" not in done.stderr:
            break
    return done
