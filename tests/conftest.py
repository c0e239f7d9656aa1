"""Every test is held to the rules of vhostblk's own plugin."""

from __future__ import annotations

import os
import shutil
import tempfile

import pytest
from hypothesis import HealthCheck, settings

from tests.schedule import HUNT

# A run tries the same as the last one, so that what fails is what was changed; VHOSTBLK_HUNT looks for more.
settings.register_profile(
    "vhostblk",
    max_examples=100 * HUNT,
    derandomize=HUNT == 1,
    deadline=None,  # machines are slow at times
    suppress_health_check=[HealthCheck.too_slow],
)
settings.load_profile("vhostblk")

pytest_plugins = [
    "vhostblk.testing.plugin",
    "tests.daemons",
    "tests.event_loops",
    "tests.locks",
]


def pytest_configure(config: pytest.Config) -> None:
    """What the environment says is changed, for this process and all that it starts."""
    # pytest explains a failure at any length when it sees these: two images that differ are compared for minutes, until
    # the test's time-out strikes inside of that, and ends the run instead of the test.
    for name in ("CI", "BUILD_NUMBER"):
        os.environ.pop(name, None)
    # Hundreds of programs are started: where none may leave bytecode beside the sources, they share a folder of it.
    if os.environ.pop("PYTHONDONTWRITEBYTECODE", "") and "PYTHONPYCACHEPREFIX" not in os.environ:
        folder = tempfile.mkdtemp(prefix="vb-bytecode-")
        os.environ["PYTHONPYCACHEPREFIX"] = folder
        config.add_cleanup(lambda: shutil.rmtree(folder, ignore_errors=True))
