"""What a soak has done, in a table, and what its daemons held after each round.

Knows nothing of how either came about.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

from tests.soak.daemons import Held

__all__ = ["Ledger", "table"]

_WARM_UP = 3
"""Rounds in which memory may grow: caches fill, and the allocator finds out what is usual."""
_GROWTH = 24 << 20
"""Bytes by which a daemon may be larger later than in those."""
_MOST_WORKERS = 3 * 16 + 16
"""A pool for each engine thread, and two of the control loop."""


@dataclass
class Ledger:
    """One daemon, or one kind of daemons that follow each other.

    Args:
        name: in the table.
        before: what it held when each of its disks had had one front-end.
    """

    name: str
    before: Held
    rounds: list[Held] = field(default_factory=list)

    def complaints(self, held: Held) -> list[str]:
        """What is held that should not be."""
        found = held.resources.beyond(self.before.resources)
        if held.pool > _MOST_WORKERS:
            found.append(f"{held.pool} threads for I/O")
        if len(self.rounds) >= _WARM_UP:
            most = max(earlier.memory for earlier in self.rounds[:_WARM_UP])
            if held.memory > most + _GROWTH:
                found.append(f"{held.memory >> 20} MiB of memory, {most >> 20} at first")
        return [f"{self.name} holds too much: {what}" for what in found]

    def rows(self) -> list[tuple[str, str]]:
        """Its part of the table."""
        if not self.rounds:
            return []
        early, late = self.rounds[: len(self.rounds) // 4 or 1], self.rounds[-1:]
        early_mib = [held.memory >> 20 for held in early]
        return [
            (
                f"{self.name}: descriptors, shared mappings, threads",
                f"{_counts(self.before)} at first, {_counts(late[-1])} in the end",
            ),
            (
                f"{self.name}: memory of its own, MiB",
                f"{min(early_mib)} to {max(early_mib)} in the first quarter,"
                f" {late[-1].memory >> 20} in the end",
            ),
        ]


def _counts(held: Held) -> str:
    descriptors, mappings, threads = held.counts
    return f"{descriptors}, {mappings}, {threads}"


def table(
    facts: Sequence[tuple[str, str]], counts: Mapping[str, int], ledgers: Sequence[Ledger]
) -> str:
    """All figures, as Markdown."""
    rows = [
        *facts,
        *((name, f"{count:,}".replace(",", " ")) for name, count in sorted(counts.items())),
    ]
    for ledger in ledgers:
        rows += ledger.rows()
    lines = ["| what | how many |", "|---|---|", *(f"| {name} | {value} |" for name, value in rows)]
    return "\n".join(lines)


def total(counters: Sequence[Mapping[str, int]]) -> Counter[str]:
    """All of them together."""
    result: Counter[str] = Counter()
    for counter in counters:
        result.update(counter)
    return result
