"""The drivers a graph knows: by name, by protocol, by content; and which of them are allowed (rows B03 and B04).

Knows nothing about nodes that exist.
"""

from __future__ import annotations

import errno
from collections.abc import Callable, Collection, Iterator, Mapping
from typing import TYPE_CHECKING, Any

from vhostblk.block import foreign_formats
from vhostblk.block.driver_table import DriverPlace, DriverTable
from vhostblk.block.filename import protocol_prefix
from vhostblk.errors import ConfigError

if TYPE_CHECKING:
    from vhostblk.block.node import BlockNode

PROBE_SIZE = 512
# The score of a driver that takes whatever it is given.
_ANYTHING = 1


class DriverRegistry(Mapping[str, "type[BlockNode]"]):
    """Name to node class, the latest registered first.

    Args:
        drivers: what is registered from the start, in the order in which they are searched.
        read_write: names that may be used in any way.
        read_only: names that may be used by read-only nodes. Both empty: everything is allowed.

    Context: the control loop.
    """

    def __init__(
        self,
        drivers: Mapping[str, type[BlockNode]],
        *,
        read_write: Collection[str] = (),
        read_only: Collection[str] = (),
    ) -> None:
        # Those of a table are imported when they are used.
        self._drivers: Mapping[str, type[BlockNode] | DriverPlace]
        self._drivers = drivers.places if isinstance(drivers, DriverTable) else dict(drivers)
        self._read_write = frozenset(read_write)
        self._read_only = frozenset(read_only)

    def register(self, driver: type[BlockNode]) -> None:
        """Add a driver; it is searched before all others (row B03.1)."""
        self._drivers = {driver.driver_name: driver, **self._drivers}

    def __getitem__(self, name: str) -> type[BlockNode]:
        found = self._drivers[name]
        return found.load() if isinstance(found, DriverPlace) else found

    def __iter__(self) -> Iterator[str]:
        return iter(self._drivers)

    def __len__(self) -> int:
        return len(self._drivers)

    def find(self, name: object, option: str = "driver") -> type[BlockNode]:
        """The driver of this name.

        Args:
            option: where the name was found, for the message.

        Raises:
            ConfigError: ENOENT; there is none.
        """
        if not isinstance(name, str) or name not in self._drivers:
            if name in foreign_formats.NAMES:
                raise ConfigError(
                    f"Unknown driver '{name}': images of this format are not supported, "
                    "qemu-img converts them",
                    errno.ENOENT,
                )
            known = ", ".join(sorted(self._drivers))
            raise ConfigError(
                f"Unknown driver '{name}' for '{option}' (known: {known})",
                errno.ENOENT,
                qemu_text=f"Unknown driver '{name}'",
            )
        return self[name]

    def names(self, *, read_only: bool = True) -> list[str]:
        """The drivers that may be used in this way, sorted (row B03.3)."""
        return sorted(name for name in self._drivers if self.is_allowed(name, read_only=read_only))

    @property
    def has_whitelist(self) -> bool:
        """Whether some drivers may be forbidden."""
        return bool(self._read_write or self._read_only)

    def is_allowed(self, name: str, *, read_only: bool) -> bool:
        """Whether a node may use this driver (row B03.4)."""
        return (
            not self.has_whitelist
            or name in self._read_write
            or (read_only and name in self._read_only)
        )

    def check_allowed(self, name: str, *, read_only: bool) -> None:
        """Refuse a driver that may not be used.

        Raises:
            ConfigError: ENOTSUP.
        """
        if self.is_allowed(name, read_only=read_only):
            return
        if self.is_allowed(name, read_only=True):
            raise ConfigError(
                f"Driver '{name}' can only be used for read-only devices", errno.ENOTSUP
            )
        raise ConfigError(f"Driver '{name}' is not whitelisted", errno.ENOTSUP)

    def protocol_of(self, filename: str, *, allow_prefix: bool = True) -> type[BlockNode]:
        """The protocol driver for a file name (row B04.7).

        Devices come first: udev makes names with colons.

        Raises:
            ConfigError: ENOENT; no driver has this prefix.
        """
        devices = self._asked(lambda place: place.devices)
        best = max(devices, key=lambda driver: driver.probe_device(filename), default=None)
        if best is not None and best.probe_device(filename) > 0:
            return best
        prefix = protocol_prefix(filename)
        if prefix is None or not allow_prefix:
            return self.find("file", "file name")
        for driver in self._asked(lambda place: prefix in (place.protocol, *place.more_protocols)):
            if prefix in (driver.protocol_name, *driver.more_protocol_names):
                return driver
        raise ConfigError(f"Unknown protocol '{prefix}'", errno.ENOENT)

    def options_of(self, filename: str) -> dict[str, Any]:
        """The options that a file name stands for: a protocol driver's, flat (row B04.6).

        Raises:
            ConfigError: as `protocol_of`; or the driver makes no sense of the name.
        """
        protocol = self.protocol_of(filename)
        return {"driver": protocol.driver_name, **protocol.parse_filename(filename, self)}

    def probe(self, header: bytes | bytearray, filename: str) -> type[BlockNode] | None:
        """The format that content which begins like this is in: the highest score, the first of equals (row B04.9).

        None: no driver is sure, and it looks like a format that there is no driver for.
        """
        begin = bytes(header)
        best, best_score = None, 0
        for driver in self._asked(lambda place: place.may_begin(begin)):
            score = driver.probe(begin, filename)
            if score > best_score:
                best, best_score = driver, score
        is_sure = best_score > _ANYTHING
        return best if is_sure or not foreign_formats.foreign_format(begin, filename) else None

    def _asked(self, can_tell: Callable[[DriverPlace], bool]) -> list[type[BlockNode]]:
        """The drivers, but of those that need not have been imported only some."""
        return [
            self[name]
            for name, found in self._drivers.items()
            if not isinstance(found, DriverPlace) or can_tell(found)
        ]
