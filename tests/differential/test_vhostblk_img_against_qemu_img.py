"""Every row of the matrix (`img_rows/`) through vhostblk-img and Debian's qemu-img: same text, exit code and files."""

from __future__ import annotations

import tempfile
from collections.abc import Iterator
from importlib import import_module
from pathlib import Path

import pytest

from tests.differential.img_images import IMAGES
from tests.differential.img_matrix import Row, Templates
from tests.differential.img_matrix import compare as compare_outcomes
from tests.differential.tools import MEMORY
from vhostblk.cli.img.table import SYNOPSES
from vhostblk.testing.plugin import ExpectedLog
from vhostblk.testing.requirements import require

MODULES = (
    "program",
    "amend",
    "bench",
    "bitmap",
    "check",
    "commit",
    "compare",
    "convert",
    "create",
    "dd",
    "info",
    "map",
    "measure",
    "rebase",
    "resize",
    "snapshot",
)
# Of what is there: a subcommand can be a column of the table before it can do anything.
ROWS = [
    row
    for name in MODULES
    for row in import_module(f"tests.differential.img_rows.{name}").ROWS
    if row.is_possible(SYNOPSES)
]


@pytest.fixture(scope="module")
def templates() -> Iterator[Templates]:
    require("qemu-img", "qemu-io")
    with tempfile.TemporaryDirectory() as folder:
        yield Templates(IMAGES, Path(folder))


def _parameter(row: Row) -> object:
    marks = [pytest.mark.xfail(strict=True, reason=row.differs)] if row.differs else []
    return pytest.param(row, id=str(row), marks=marks)


@pytest.mark.parametrize("row", [_parameter(row) for row in ROWS])
def test_output_exit_code_and_files_are_the_same(
    row: Row, templates: Templates, expect_log: ExpectedLog
) -> None:
    expect_log.allow("")  # it is a part of the output, which is compared
    parent = None if row.on_disk or not MEMORY.is_dir() else MEMORY
    with tempfile.TemporaryDirectory(dir=parent) as folder:
        compare_outcomes(row, templates, Path(folder))


def test_every_image_can_be_made(templates: Templates, tmp_path: Path) -> None:
    for name in IMAGES:
        templates.put(name, tmp_path)
    assert {path.name for path in tmp_path.iterdir()} >= IMAGES.keys()
