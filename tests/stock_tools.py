"""QEMU's own tools, as they are installed."""

from __future__ import annotations

import subprocess
from collections.abc import Sequence
from pathlib import Path

# How QEMU's LUKS gives up, before it has written anything, when the machine is too busy for it to count iterations.
_NOT_MEASURED = b"Unable to get accurate CPU usage"


def run_stock(
    words: Sequence[str], folder: Path | None = None, timeout: float = 120
) -> subprocess.CompletedProcess[bytes]:
    """Run one, and again if it could not measure how fast the machine is; gives what it has said, and its exit status.

    Args:
        folder: where; the current one if absent.
        timeout: seconds for each time.
    """
    while True:
        done = subprocess.run(
            words,
            cwd=folder,
            stdin=subprocess.DEVNULL,
            capture_output=True,
            timeout=timeout,
            check=False,
        )
        if _NOT_MEASURED not in done.stderr:
            return done
