"""Tools that some tests need: a clear skip where one is missing, a failure where it must not be.

VHOSTBLK_REQUIRE=qemu,fio names the groups whose absence is a failure; CI sets it.
"""

from __future__ import annotations

import os
import shutil

import pytest

__all__ = ["require"]


def require(tool: str, *, group: str | None = None) -> str:
    """Give the path of `tool`, or skip the test.

    Args:
        tool: a program in PATH.
        group: its name in VHOSTBLK_REQUIRE; None: the tool's own.
    """
    path = shutil.which(tool)
    if path is not None:
        return path
    reason = f"{tool} is not installed"
    if (group or tool) in os.environ.get("VHOSTBLK_REQUIRE", "").split(","):
        pytest.fail(f"{reason}, and VHOSTBLK_REQUIRE demands it")
    pytest.skip(reason)
