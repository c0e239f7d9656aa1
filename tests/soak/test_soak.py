"""A short soak, and whether one would find something; `make soak` is the long one."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import pytest

from tests.requirements import require
from tests.soak.daemons import Held
from tests.soak.figures import Ledger
from tests.soak.soak import Soak
from vhostblk.testing.resources import Resources

_ROUNDS = 2
_SECONDS = 5.0
_SEED = 1
_DONE = (
    *("daemons killed", "hostile: garbage", "guests: memory added", "guests: resized"),
    *("guests: booted with packed rings", "guests: booted with split rings"),
)


@pytest.fixture
def soak(socket_directory: Path) -> Iterator[Soak]:
    require("engine")
    soak = Soak(socket_directory, _SEED)
    yield soak
    soak.give_up()


@pytest.mark.timeout(400)
def test_daemons_survive_everything_at_once_and_hold_nothing_afterwards(soak: Soak) -> None:
    for _ in range(_ROUNDS):
        soak.round(_SECONDS)
    # On a machine that is busy with other things less is done in that time.
    while any(f"| {what} | " not in soak.figures() for what in _DONE):
        soak.round(_SECONDS)
    soak.finish()


def held(memory: int, **descriptors: int) -> Held:
    return Held(Resources(Counter(descriptors), Counter(), Counter()), 0, memory)


def test_leaks_are_found() -> None:
    ledger = Ledger("a daemon", held(10 << 20, socket=3))
    ledger.rounds += [held(20 << 20, socket=3)] * 3
    assert ledger.complaints(held(30 << 20, socket=3)) == []
    assert "1 more descriptors" in ledger.complaints(held(30 << 20, socket=4))[0]
    assert "60 MiB of memory" in ledger.complaints(held(60 << 20, socket=3))[0]
    assert "threads" in ledger.complaints(replace(held(30 << 20, socket=3), pool=65))[0]
