"""What becomes of a system call that the sandbox does not allow."""

from __future__ import annotations

import enum

__all__ = ["SandboxMode"]


class SandboxMode(enum.Enum):
    """`--sandbox`, but `off`."""

    ON = "on"
    """It fails with EPERM, and the kernel logs it."""
    KILL = "kill"
    """It ends the process (SIGSYS), and the kernel logs it."""
    LOG = "log"
    """It is done, and the kernel logs it."""
