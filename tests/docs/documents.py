"""What the tests of the documentation share: documents, their fenced blocks and their tables."""

from __future__ import annotations

import re
from dataclasses import dataclass
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
DOCS = ROOT / "docs"

#: One for each part of the program; each has an example that runs.
FEATURES = (
    "backing-chains.md",
    "bench.md",
    "block-nodes.md",
    "check.md",
    "client.md",
    "data-paths.md",
    "hostile.md",
    "statistics.md",
    "storage-daemon.md",
    "testing-guests.md",
    "vhost-user.md",
    "vhostblk-io.md",
    "virtio-blk.md",
)

_FENCE = re.compile(
    r"(?:<!-- needs: (?P<needs>[\w, ]+) -->\n)?^```(?P<kind>\w+)\n(?P<text>.*?)^```$",
    re.MULTILINE | re.DOTALL,
)


@dataclass(frozen=True)
class Block:
    """A fenced block."""

    kind: str
    text: str
    line: int
    """Where its text begins in the document."""
    needs: tuple[str, ...]
    """Tools without which it cannot run: `<!-- needs: qemu -->` above the fence."""


def read(name: str) -> str:
    """A document, named from the root of the repository."""
    return (ROOT / name).read_text()


def blocks(text: str) -> list[Block]:
    """All fenced blocks, in order."""
    return [
        Block(
            match["kind"],
            match["text"],
            text.count("\n", 0, match.start("text")) + 1,
            tuple(match["needs"].replace(",", " ").split()) if match["needs"] else (),
        )
        for match in _FENCE.finditer(text)
    ]


def table(text: str, heading: str) -> list[dict[str, str]]:
    """The first table below a heading: one dictionary per row, by the column's title; no backquotes."""
    section = re.split(rf"^#+ {re.escape(heading)}$", text, maxsplit=1, flags=re.MULTILINE)
    assert len(section) == 2, f"no heading '{heading}'"
    body = re.split(r"^#+ ", section[1], maxsplit=1, flags=re.MULTILINE)[0]
    first = re.search(r"^\|.*?(?:\n(?!\|)|\Z)", body, re.MULTILINE | re.DOTALL)
    rows = [_cells(line) for line in first[0].splitlines()] if first else []
    assert len(rows) > 2, f"no table below '{heading}'"
    titles, _, *content = rows
    assert all(len(row) == len(titles) for row in content), f"ragged table below '{heading}'"
    return [dict(zip(titles, row, strict=True)) for row in content]


def _cells(line: str) -> list[str]:
    cells = re.split(r"(?<!\\)\|", line.strip().strip("|"))
    return [cell.strip().replace("\\|", "|").replace("`", "") for cell in cells]
