"""Tools that some tests need: see `vhostblk.testing.requirements`."""

from __future__ import annotations

from vhostblk.testing.requirements import require, require_no_sandbox

__all__ = ["require", "require_no_sandbox"]
