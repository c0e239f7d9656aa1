"""Random images and command lines through vhostblk-img and qemu-img: same output, exit code and files, and new images
have what they have in the same layer.
"""

from __future__ import annotations

import json
import os
import shlex
import tempfile
from pathlib import Path
from random import Random
from typing import Any

from hypothesis import HealthCheck, Phase, example, given, settings
from hypothesis import strategies as st

from tests.differential.img_images import IMAGES
from tests.differential.img_matrix import Row, Templates, compare
from tests.differential.random_changes import random_change
from tests.differential.random_rows import OUTPUT, random_row
from tests.differential.tools import MEMORY
from tests.qcow2_images import qemu_img
from vhostblk.testing.plugin import ExpectedLog
from vhostblk.testing.requirements import require

#: More, and others each time: VHOSTBLK_DIFFERENTIAL=1000.
EXAMPLES = int(os.environ.get("VHOSTBLK_DIFFERENTIAL", "0"))


@settings(
    max_examples=EXAMPLES or 25,
    derandomize=not EXAMPLES,
    deadline=None,
    phases=[Phase.explicit, Phase.reuse, Phase.generate],  # a smaller seed is no simpler
    suppress_health_check=[HealthCheck.function_scoped_fixture, HealthCheck.too_slow],
)
@example(seed=349999175)  # subclusters that nobody writes to
@given(seed=st.integers(0, (1 << 32) - 1))
def test_images_are_the_same(seed: int, expect_log: ExpectedLog) -> None:
    require("qemu-img", "qemu-io")
    expect_log.allow("")  # it is a part of the output, which is compared
    row = random_row(Random(seed))
    with tempfile.TemporaryDirectory(dir=MEMORY if MEMORY.is_dir() else None) as name:
        folder = Path(name)
        compare(row, Templates(IMAGES, folder / "templates"), folder)
        if _is_new(row) and (folder / "ours" / OUTPUT).exists():
            assert _layers(folder / "ours") == _layers(folder / "theirs"), str(row)


@settings(
    max_examples=EXAMPLES or 25,
    derandomize=not EXAMPLES,
    deadline=None,
    phases=[Phase.explicit, Phase.reuse, Phase.generate],
    suppress_health_check=[HealthCheck.function_scoped_fixture, HealthCheck.too_slow],
)
@given(seed=st.integers(0, (1 << 32) - 1))
def test_images_are_changed_and_named_in_the_same_way(seed: int, expect_log: ExpectedLog) -> None:
    require("qemu-img", "qemu-io")
    expect_log.allow("")
    row = random_change(Random(seed))
    with tempfile.TemporaryDirectory(dir=MEMORY if MEMORY.is_dir() else None) as name:
        folder = Path(name)
        compare(row, Templates(IMAGES, folder / "templates"), folder)


def _is_new(row: Row) -> bool:
    """Whether `convert` makes the image; of one that was there QEMU clears more than it has to."""
    words = shlex.split(row.command)
    return words[0] == "convert" and "-n" not in words and "-c" not in words


def _layers(folder: Path) -> list[Any]:
    """Which ranges are in the new image itself, and which of them take room."""
    merged: list[Any] = []
    for extent in json.loads(qemu_img("map", "--output=json", folder / OUTPUT)):
        kind = [extent["depth"], extent["present"], extent["data"] or bool(extent["depth"])]
        if merged and merged[-1][1] == kind:
            merged[-1][0] += extent["length"]
        else:
            merged.append([extent["length"], kind])
    return merged
