"""What this process holds, so that tests can see that nothing is left behind."""

from __future__ import annotations

import gc
import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path


def open_fds() -> set[str]:
    """Every open fd with what it is."""
    found = set()
    for name in os.listdir("/proc/self/fd"):
        try:
            found.add(f"{name} {os.readlink(f'/proc/self/fd/{name}')}")
        except FileNotFoundError:
            pass  # the one that lists the folder
    return found


def mappings(name: str) -> int:
    """How many mappings of files with this name there are."""
    return sum(name in line for line in Path("/proc/self/maps").read_text().splitlines())


@contextmanager
def nothing_left() -> Iterator[None]:
    """Fail if fds are open afterwards that were not before."""
    before = open_fds()
    yield
    if open_fds() - before:
        gc.collect()  # cycles, of a failed assertion for example
    assert open_fds() - before == set()
