"""`snapshot`: states that an image keeps: list them, make one, go back to one, forget one."""

from __future__ import annotations

import os
import time

from vhostblk.block.backend import BlockBackend
from vhostblk.block.internal_snapshot import (
    MAX_NAME,
    create_snapshot,
    delete_snapshot,
    go_to_snapshot,
    list_snapshots,
)
from vhostblk.block.lean_dataclass import lean_dataclass
from vhostblk.cli.img.arguments import ImageArguments, ImgError, UsageError, flag, valued
from vhostblk.cli.img.session import Session, reason
from vhostblk.cli.img.table import Command
from vhostblk.errors import BlockError, ConfigError

_ACTIONS = ("list", "apply", "create", "delete")


@lean_dataclass(slots=True)
class Snapshot(ImageArguments):
    """Its options."""

    list: bool = flag("l")
    apply: str | None = valued("a")
    create: str | None = valued("c")
    delete: str | None = valued("d")
    quiet: bool = flag("q")
    force_share: bool = flag("U", "force-share")

    def taken(self) -> None:
        """See `Arguments.taken`."""
        if sum(name in _ACTIONS for name in self.order) > 1:
            raise UsageError("Cannot mix '-l', '-a', '-c', '-d'")

    def check(self) -> None:
        """See `Arguments.check`."""
        self.check_one_image()


async def run(session: Session, args: Snapshot) -> int:
    """Do what was asked for, if anything was."""
    image = await session.open(
        args.words[0],
        image_opts=args.image_opts,
        writable=not args.list,
        force_share=args.force_share,
    )
    if args.list:
        await _list(session, image)
    elif args.create is not None:
        await _create(session, image, args.create)
    elif args.apply is not None:
        await _apply(session, image, args.apply)
    elif args.delete is not None:
        await _delete(session, image, args.delete)
    return 0


async def _list(session: Session, image: BlockBackend) -> None:
    from vhostblk.cli.image_info_text import snapshot_table

    try:
        snapshots = await list_snapshots(image.node)
    except ConfigError:
        return  # qemu-img says nothing either
    if snapshots:
        session.out("Snapshot list:")
        for line in snapshot_table(snapshots):
            session.out(line)


async def _create(session: Session, image: BlockBackend, name: str) -> None:
    cut = name.encode(errors="surrogateescape")[:MAX_NAME].decode(errors="surrogateescape")
    try:
        await create_snapshot(session.graph, image.node, cut, date=_now(), icount=0)
    except (ConfigError, BlockError) as error:
        number = error.errno or 0
        raise ImgError(
            f"Could not create snapshot '{name}': {-number} ({os.strerror(number)})"
        ) from None


def _now() -> int:
    """In the precision that qemu-img has."""
    return time.time_ns() // 1000 * 1000


async def _apply(session: Session, image: BlockBackend, name: str) -> None:
    try:
        await go_to_snapshot(session.graph, image.node, name)
    except (ConfigError, BlockError) as error:
        raise ImgError(f"Could not apply snapshot '{name}': {reason(error)}") from None


async def _delete(session: Session, image: BlockBackend, name: str) -> None:
    try:
        snapshots = await list_snapshots(image.node)
    except ConfigError:
        snapshots = ()
    found = next((one for one in snapshots if one.name == name), None)
    if found is None:
        raise ImgError(f"Could not delete snapshot '{name}': snapshot not found")
    try:
        await delete_snapshot(session.graph, image.node, found.id, found.name)
    except (ConfigError, BlockError) as error:
        raise ImgError(f"Could not delete snapshot '{name}': {reason(error)}") from None


COMMAND = Command(Snapshot, run)
