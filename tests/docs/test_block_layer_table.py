"""docs/block-layer.md names files and tests that exist, in the order of the rows."""

from __future__ import annotations

import re

from tests.docs.documents import ROOT, read, table

FOLDERS = (
    *(
        "tests/unit/block",
        "tests/unit/block/crypto",
        "tests/unit/block/drivers",
        "tests/unit/cli",
        "tests/unit/export",
    ),
    *("tests/integration", "tests/contract", "tests/differential"),
)


def rows() -> list[dict[str, str]]:
    return list(table(read("docs/block-layer.md"), "The block layer, row by row"))


def test_every_file_of_the_block_layer_is_named_where_one_looks_for_it() -> None:
    """In the package's docstring those of the folder itself, in ARCHITECTURE.md all; and none that is not there."""
    block = ROOT / "vhostblk" / "block"
    top = {path.name for path in block.glob("*.py")} - {"__init__.py"}
    below = {path.name for path in block.glob("*/*.py")} - {"__init__.py"}
    folders = {f"{path.parent.name}/" for path in block.glob("*/*/__init__.py")}
    named = set(re.findall(r"`(\w+\.py)`", (block / "__init__.py").read_text()))
    assert named == top
    cells = [
        row["files in vhostblk/block/"] for row in table(read("ARCHITECTURE.md"), "The block layer")
    ]
    named = set(re.findall(r"\w+(?:\.py|/)", " ".join(cells)))
    assert named == top | below | folders | {"crypto/", "drivers/", "filters/"}


def test_rows_are_sorted_and_there_is_one_of_each() -> None:
    numbers = [row["row"] for row in rows()]
    assert numbers == sorted(set(numbers))


def test_every_file_and_every_test_that_is_named_exists() -> None:
    for row in rows():
        for name in re.findall(r"[\w/]+\.py", row["where"]):
            folders = (
                ROOT / "vhostblk" / "block",
                ROOT / "vhostblk",
            )  # of the package, if it is no node's
            assert any((folder / name).exists() for folder in folders), name
        for reference in row["tests"].replace("`", "").split(", "):
            file, _, test = reference.partition("::")
            found = [ROOT / folder / file for folder in FOLDERS if (ROOT / folder / file).exists()]
            assert found, file
            assert any(f"def {test}(" in path.read_text() for path in found) or not test, reference
