"""What a format can do with an image as a whole: make it, look through it, change what it is like, keep states of it.

Each of these has a module that users call, with the checks that are the same for all drivers: `create.py`,
`measure.py`, `check.py`, `amend.py`, `backing.py`, `commit.py`, `internal_snapshot.py`, `dirty_bitmap.py`. What a
driver leaves out is refused.

Knows nothing about requests: `driver.py`.
"""

from __future__ import annotations

import errno
import os
from collections.abc import Callable, Mapping
from types import MappingProxyType
from typing import TYPE_CHECKING, Any, ClassVar

from vhostblk.block.flags import CheckMode
from vhostblk.block.lean_dataclass import lean_dataclass
from vhostblk.errors import BlockError, ConfigError

if TYPE_CHECKING:
    from vhostblk.block.check import CheckResult
    from vhostblk.block.creation import Creation
    from vhostblk.block.image_info import FormatInfo
    from vhostblk.block.internal_snapshot import SnapshotInfo
    from vhostblk.block.length import Measurement
    from vhostblk.block.node import BlockNode


@lean_dataclass(frozen=True, slots=True)
class BackingName:
    """What an image says it is backed by: a name as it is written there, and a driver. Both may be empty."""

    filename: str = ""
    driver: str = ""


class ImageDriver:
    """A part of `Driver`.

    Context: the control loop.
    """

    driver_name: ClassVar[str]
    node_name: str
    # Other names that programs write for some of the options for new images.
    create_aliases: ClassVar[Mapping[str, str]] = MappingProxyType({})
    # Children in which images are made.
    create_child_keys: ClassVar[tuple[str, ...]] = ()
    # Whether the image can keep states of the disk (row B36): `driver_snapshot_*`.
    has_internal_snapshots: ClassVar[bool] = False
    # Opened only to be checked: a damaged image will do, and is not written but to be repaired (row B35.10).
    for_check: bool = False
    # Nobody wants to know more than what it is like: other processes may write it (`BlockGraph.looks_only`).
    looks_only: bool = False
    # What the image says it is backed by is not opened.
    without_backing: bool = False
    # Only to say what it is like: there are no requests, so where data is in a file of its own that is not opened.
    without_io: bool = False

    # ------------------------------------------------------------------ making

    @classmethod
    async def create(cls, creation: Creation, options: Any) -> None:
        """Make an image in children that `creation` gives; look at the options before asking for them (row B35.1).

        Args:
            options: of `create_options_type`.

        Raises: ConfigError, BlockError: what was written so far does not look like an image.
        """
        raise ConfigError(
            f"Driver '{cls.driver_name}' does not support image creation", errno.ENOTSUP
        )

    @classmethod
    def create_options_type(cls) -> type[Any] | None:
        """What a new image of this driver can be like; None: the driver cannot make images (row B35).

        Made of `options.option()` fields in the spelling of `qemu-img create -o`; the set refuses what contradicts
        itself.
        """
        return None

    @classmethod
    def amend_options_type(cls) -> type[Any] | None:
        """The same for what can be changed later (row B35.8), where absent is as it is."""
        return None

    @classmethod
    def measure_options_type(cls) -> type[Any] | None:
        """Those options of new images that decide how large one gets, with checks of their own; None: nobody knows."""
        return None

    @classmethod
    async def measure(cls, options: Any, source: BlockNode | None) -> Measurement:
        """What an image takes that is made with these options, to have the content of `source` (row B31.6)."""
        raise ConfigError(
            f"Block driver '{cls.driver_name}' does not support size measurement", errno.ENOTSUP
        )

    # ------------------------------------------------------------------ looking, and changing

    async def driver_format_info(self) -> FormatInfo | None:
        """What only this format knows of its images, as QMP's `ImageInfoSpecific`; see `image_info.py` (row B41.6).

        Raises: ConfigError: it cannot be read.
        """
        return None

    async def driver_check(self, fix: CheckMode, result: CheckResult) -> None:
        """Look through the image, while nothing is in flight, and repair what can be (rows B35.9 and B35.10).

        What cannot be looked at counts as `check_errors`.

        Args: result: is told what is found, as it is found.
        """
        raise BlockError(errno.ENOTSUP, f"{self.node_name}: no check for this kind of node")

    async def driver_amend(
        self, options: Any, progress: Callable[[int, int], None], *, force: bool = False
    ) -> None:
        """Change what the image is like (row B35.8); nobody else uses it meanwhile.

        Args:
            options: of `amend_options_type`. progress: to be called with what is done, and all.
            force: also what may make the content unreadable for ever.
        """
        raise BlockError(errno.ENOTSUP, f"{self.node_name}: nothing can be amended")

    # ------------------------------------------------------------------ what it is backed by

    def recorded_backing(self) -> BackingName:
        """What the image says it is backed by, which options may have overridden."""
        return BackingName()

    async def driver_change_backing(self, filename: str, driver: str) -> None:
        """Write into the image what it is backed by, nothing if `filename` is empty (rows B08.10 and B32.6).

        Durable when it returns, and whenever it is interrupted, the image says either the old or the new.
        """
        raise BlockError(errno.ENOTSUP, f"{self.node_name}: no backing file can be recorded")

    async def driver_make_empty(self) -> None:
        """Give up all that this layer has, so that it shows what it is backed by (row B32.11).

        Nobody writes meanwhile. Durable when it returns.
        """
        raise BlockError(errno.ENOTSUP, f"{self.node_name}: cannot be emptied")

    # ------------------------------------------------------------------ what it keeps

    async def driver_snapshots(self) -> tuple[SnapshotInfo, ...]:
        """The image's snapshots, in its order; of this and the next ones see `internal_snapshot.py`."""
        raise BlockError(errno.ENOTSUP)

    async def driver_snapshot_create(self, snapshot: SnapshotInfo) -> SnapshotInfo:
        """Keep what the disk shows; nothing is in flight. EEXIST if the ID is taken; returns what it is now."""
        raise BlockError(errno.ENOTSUP)

    async def driver_snapshot_delete(self, id_: str | None, name: str | None) -> SnapshotInfo:
        """Forget one; nothing is in flight. ENOENT if there is none; returns what it was."""
        raise BlockError(errno.ENOTSUP)

    async def driver_snapshot_goto(self, id_: str) -> None:
        """Show what this one has, in its length; nothing is in flight."""
        raise BlockError(errno.ENOTSUP)

    async def driver_snapshot_load(self, id_: str | None, name: str | None) -> SnapshotInfo:
        """Show it without changing the image, which is read-only; returns what it is."""
        raise BlockError(errno.ENOTSUP)

    def keeps_bitmaps(self) -> bool:
        """Whether this kind of image can keep dirty bitmaps."""
        return False

    def driver_check_bitmap(self, name: str, granularity: int) -> None:
        """Whether the image could keep a further dirty bitmap; raises ConfigError if not."""
        raise ConfigError(
            f"Can't store persistent bitmaps to {self.node_name}: {os.strerror(errno.ENOTSUP)}",
            errno.ENOTSUP,
        )

    async def driver_remove_bitmap(self, name: str) -> None:
        """Forget a dirty bitmap that the image keeps, if it has one of this name yet; nothing is in flight."""
        raise BlockError(errno.ENOTSUP)

    async def driver_bitmap_room(self, cluster_size: int) -> int | None:
        """What the bitmaps that are kept in the image take in one with such clusters; None: there cannot be any."""
        return None
