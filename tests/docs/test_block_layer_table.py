"""docs/block-layer.md names files and tests that exist, in the order of the rows."""

from __future__ import annotations

import re

from tests.docs.documents import ROOT, read, table

FOLDERS = (
    *("tests/unit/block", "tests/unit/block/drivers", "tests/unit/cli", "tests/unit/export"),
    *("tests/integration", "tests/contract"),
)


def rows() -> list[dict[str, str]]:
    return list(table(read("docs/block-layer.md"), "The block layer, row by row"))


def test_rows_are_sorted_and_there_is_one_of_each() -> None:
    numbers = [row["row"] for row in rows()]
    assert numbers == sorted(set(numbers))


def test_every_file_and_every_test_that_is_named_exists() -> None:
    for row in rows():
        for name in re.findall(r"[\w/]+\.py", row["where"]):
            assert (ROOT / "vhostblk" / "block" / name).exists(), name
        for reference in row["tests"].replace("`", "").split(", "):
            file, _, test = reference.partition("::")
            found = [ROOT / folder / file for folder in FOLDERS if (ROOT / folder / file).exists()]
            assert found, file
            assert f"def {test}(" in found[0].read_text() or not test, reference
