"""Daemons and clients that are not root, for tests that are."""

from __future__ import annotations

import os
import sys
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path

from tests.requirements import require

__all__ = ["NOBODY", "as_user", "unprivileged"]

NOBODY = 65534

# Python may be installed in somebody's home, which others cannot enter: in a mount namespace of its own the daemon
# finds an empty folder there, and in it nothing but this Python.
_SHOW_PYTHON = """
set -e
closed=$1 python=$2 holder=$3
shift 3
mount --make-rprivate /
mount --bind "$python" "$holder"
mount -t tmpfs -o mode=755 none "$closed"
mkdir -p "$python"
mount --bind "$holder" "$python"
exec "$@"
"""


def unprivileged(folder: Path, *, memlock: int = 8 << 20) -> list[str]:
    """The beginning of a command that runs as nobody: no capabilities, no groups, and little memory to lock.

    Args:
        folder: becomes theirs.
        memlock: bytes.
    """
    setpriv = require("setpriv", "root", "prlimit", "unshare")
    os.chown(folder, NOBODY, NOBODY)
    command = [
        *("prlimit", f"--memlock={memlock}:{memlock}", setpriv),
        *(f"--reuid={NOBODY}", f"--regid={NOBODY}", "--clear-groups"),
        *("--bounding-set=-all", "--inh-caps=-all", "--no-new-privs"),
    ]
    python = Path(sys.base_prefix).resolve()
    closed = [parent for parent in python.parents if not parent.stat().st_mode & 0o001]
    if not closed:
        return command
    holder = folder / "python"
    holder.mkdir(exist_ok=True)
    places = [str(closed[-1]), str(python), str(holder)]
    return ["unshare", "--mount", "sh", "-c", _SHOW_PYTHON, "sh", *places, *command]


@contextmanager
def as_user(uid: int, gid: int, groups: Sequence[int] = ()) -> Iterator[None]:
    """What this process does inside it does as somebody else."""
    before = os.getgroups()
    os.setgroups(list(groups))
    os.setegid(gid)
    os.seteuid(uid)
    try:
        yield
    finally:
        os.seteuid(0)
        os.setegid(0)
        os.setgroups(before)
