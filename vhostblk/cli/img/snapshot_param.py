"""`-l` of subcommands that read an image: one of the states that it keeps, instead of what it shows now."""

from __future__ import annotations

import errno

from vhostblk.block.internal_snapshot import load_snapshot
from vhostblk.block.keyval import parse_flat
from vhostblk.block.lean_dataclass import lean_dataclass
from vhostblk.block.node import BlockNode
from vhostblk.cli.img.arguments import ImgError
from vhostblk.cli.img.session import Session, reason
from vhostblk.errors import BlockError, ConfigError

_PREFIX = "snapshot."
_ID, _NAME = f"{_PREFIX}id", f"{_PREFIX}name"


@lean_dataclass(frozen=True, slots=True)
class SnapshotParam:
    """Which one: by ID and name, where they are given; or by whichever of them is right.

    Attributes:
        either: an ID, or else a name.
    """

    id: str | None = None
    name: str | None = None
    either: str | None = None


def read_snapshot_param(text: str) -> SnapshotParam:
    """What `-l` was given.

    Raises:
        ImgError: it begins as a list of options does, and is none.
    """
    if not text.startswith(_PREFIX):
        return SnapshotParam(either=text)
    found = parse_flat(text)
    for name in found:
        if name not in (_ID, _NAME, "id"):
            raise ImgError(
                f"Invalid parameter '{name}'", more=[f"Failed in parsing snapshot param '{text}'"]
            )
    return SnapshotParam(found.get(_ID), found.get(_NAME))


async def show_snapshot(session: Session, node: BlockNode, wanted: SnapshotParam | None) -> None:
    """Let a read-only node show it, if one is wanted.

    Raises:
        ImgError: there is none, or it cannot be loaded.
    """
    if wanted is None:
        return
    graph = session.graph
    try:
        if wanted.either is None:
            await load_snapshot(graph, node, wanted.id, wanted.name)
            return
        try:
            await load_snapshot(graph, node, wanted.either)
        except ConfigError as error:
            if error.errno not in (errno.ENOENT, errno.EINVAL):
                raise
            await load_snapshot(graph, node, None, wanted.either)
    except (ConfigError, BlockError) as error:
        raise ImgError(f"Failed to load snapshot: {reason(error)}") from None
