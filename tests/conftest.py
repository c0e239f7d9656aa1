"""Every test is held to the rules of vhostblk's own plugin."""

from __future__ import annotations

pytest_plugins = [
    "vhostblk.testing.plugin",
    "tests.daemons",
    "tests.event_loops",
    "tests.locks",
]
