"""VHOSTBLK_GUEST=ARGUMENTS gives every guest of these tests more of QEMU's arguments, VHOSTBLK_CPUS=N gives those whose
test does not say how many so many processors, and with them queues: `make verify` runs them all with packed rings.
"""

from __future__ import annotations

import os
import shlex
from collections.abc import Iterable
from typing import Any

import pytest

from vhostblk.testing.guest import Guest

_ARGUMENTS = shlex.split(os.environ.get("VHOSTBLK_GUEST", ""))
_CPUS = int(os.environ.get("VHOSTBLK_CPUS", "0"))


@pytest.fixture(autouse=True)
def _other_guests(monkeypatch: pytest.MonkeyPatch) -> None:
    begin = Guest.__init__

    def begin_otherwise(
        guest: Guest, *disks: Any, extra_arguments: Iterable[str] = (), **options: Any
    ) -> None:
        if _CPUS:
            options.setdefault("cpus", _CPUS)
        # A test's own come last, and have the last word.
        begin(guest, *disks, extra_arguments=[*_ARGUMENTS, *extra_arguments], **options)

    if _ARGUMENTS or _CPUS:
        monkeypatch.setattr(Guest, "__init__", begin_otherwise)
