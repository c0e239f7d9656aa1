"""Tables as they are printed, as Markdown, and as CSV; and the parts of a document that are written by program.

Knows nothing of what is measured.
"""

from __future__ import annotations

import csv
import io
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from statistics import median

from vhostblk.client.bench.report import format_table, rate

__all__ = ["Table", "as_csv", "markdown", "number", "ratio", "replace_part", "text"]

_STAR = "* other programs used more than a fifth of a processor during some run"


@dataclass
class Table:
    """What a report shows: the first row has titles."""

    name: str
    """Of the part of the document that it is written to."""
    title: str
    rows: list[list[str]] = field(default_factory=list)
    notes: list[str] = field(default_factory=list)
    """Lines that belong below."""

    @property
    def all_notes(self) -> list[str]:
        """The notes, and what stars mean if there are any."""
        starred = any(cell.endswith("*") for row in self.rows for cell in row)
        return [*self.notes, *([_STAR] if starred else [])]


def number(value: float | None) -> str:
    """Three digits and a bit, or n/a."""
    if value is None:
        return "n/a"
    return rate(value) if value >= 1000 else f"{value:.3g}"


def ratio(ours: float | None, theirs: float | None, star: bool = False) -> str:
    """The first divided by the second, or nothing if that cannot be."""
    return "" if ours is None or not theirs else f"{ours / theirs:.2f}" + "*" * star


def text(table: Table) -> str:
    """For a terminal."""
    lines = [table.title] if table.title else []
    return "\n".join([*lines, format_table(table.rows), *table.all_notes])


def markdown(table: Table) -> str:
    """For a document; the title is the document's business."""
    titles, *rows = [[cell.replace("|", "\\|") for cell in row] for row in table.rows]
    lines = [titles, ["---", *("---:" for _ in titles[1:])], *rows]
    shown = "\n".join("| " + " | ".join(line) + " |" for line in lines)
    notes = "".join(f"\n{note.replace('*', chr(92) + '*', 1)}\n" for note in table.all_notes)
    return f"{shown}\n{notes}"


def as_csv(results: Mapping[str, Mapping[str, Sequence[Mapping[str, float | None]]]]) -> str:
    """Medians of all metrics: one line for each program of each row."""
    metrics: dict[str, None] = {}
    lines: list[dict[str, object]] = []
    for row, programs in results.items():
        for program, runs in programs.items():
            line: dict[str, object] = {"row": row, "program": program, "runs": len(runs)}
            for metric in dict.fromkeys(key for run in runs for key in run):
                metrics[metric] = None
                known = [value for run in runs if (value := run.get(metric)) is not None]
                line[metric] = median(known) if known else None
            lines.append(line)
    shown = io.StringIO()
    writer = csv.DictWriter(shown, ["row", "program", "runs", *metrics], lineterminator="\n")
    writer.writeheader()
    writer.writerows(lines)
    return shown.getvalue()


def replace_part(document: str, name: str, content: str) -> str:
    """Write what stands between `<!-- measured: NAME -->` and `<!-- end -->`.

    Raises:
        KeyError: the document has no such part.
    """
    pattern = re.compile(rf"(<!-- measured: {re.escape(name)} -->\n).*?(<!-- end -->)", re.DOTALL)
    found, count = pattern.subn(
        lambda match: f"{match[1]}{content.rstrip()}\n\n{match[2]}", document
    )
    if count != 1:
        raise KeyError(name)
    return found
