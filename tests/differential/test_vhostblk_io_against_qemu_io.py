"""The same random scripts through vhostblk-io and Debian's qemu-io: same output, same bytes, same allocation."""

from __future__ import annotations

import os
import tempfile
from collections.abc import Iterator
from pathlib import Path

import pytest
from hypothesis import HealthCheck, Phase, given, settings

from tests.differential import scripts
from tests.differential.tools import MEMORY, command_line, compare
from vhostblk.testing.plugin import ExpectedLog
from vhostblk.testing.requirements import require

EXAMPLES = int(os.environ.get("VHOSTBLK_DIFFERENTIAL_EXAMPLES", "40"))
HARD = settings(
    max_examples=EXAMPLES,
    deadline=None,
    phases=[Phase.explicit, Phase.reuse, Phase.generate],  # shrinking takes minutes
    suppress_health_check=[HealthCheck.function_scoped_fixture, HealthCheck.too_slow],
)


@pytest.fixture(autouse=True)
def _qemu_io() -> None:
    require("qemu-io")


@pytest.fixture
def memory() -> Iterator[Path]:
    """A folder in memory."""
    if not MEMORY.is_dir():
        pytest.skip(f"needs {MEMORY}")
    with tempfile.TemporaryDirectory(dir=MEMORY) as folder:
        yield Path(folder)


@HARD
@given(image=scripts.images(), modes=scripts.modes(direct=False), script=scripts.scripts())
def test_raw_file_in_memory(
    memory: Path, image: scripts.Image, modes: dict[str, str], script: list[str]
) -> None:
    compare(memory, image.make, lambda path: command_line(script, scripts.raw(path, modes)))


@HARD
@given(image=scripts.images(), modes=scripts.modes(), script=scripts.scripts())
def test_raw_file_on_disk(
    tmp_path: Path, image: scripts.Image, modes: dict[str, str], script: list[str]
) -> None:
    if modes.get("cache.direct") == "on":
        image = image.with_data_at_the_beginning()
    compare(
        tmp_path,
        image.make,
        lambda path: command_line(script, scripts.raw(path, modes)),
    )


@HARD
@given(
    image=scripts.images(),
    limits=scripts.limits(),
    modes=scripts.modes(direct=False),
    script=scripts.scripts(),
)
def test_odd_limits(
    memory: Path,
    image: scripts.Image,
    limits: dict[str, str],
    modes: dict[str, str],
    script: list[str],
) -> None:
    compare(
        memory,
        image.of_whole_blocks().make,
        lambda path: command_line(script, scripts.debugged(path, limits, modes)),
    )


@pytest.fixture
def _failing_flushes(expect_log: ExpectedLog) -> None:
    """Those at the end, too."""
    expect_log.allow("flush at close failed")


@pytest.mark.usefixtures("_failing_flushes")
@HARD
@given(
    image=scripts.images(),
    options=scripts.debug_options(),
    script=scripts.scripts(faulty=True),
)
def test_injected_errors(
    memory: Path, image: scripts.Image, options: dict[str, str], script: list[str]
) -> None:
    compare(
        memory,
        image.of_whole_blocks().make,
        lambda path: [
            *("-t", "writeback"),
            *command_line(script, scripts.debugged(path, options, {"discard": "unmap"})),
        ],
    )
