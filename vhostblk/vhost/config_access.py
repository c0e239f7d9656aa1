"""Which accesses to the device's configuration space a session lets pass.

vhost-user, GET_CONFIG, SET_CONFIG, "Device configuration space".

Knows nothing about what the bytes mean, only how many there are and which the driver may write.
"""

from __future__ import annotations

from vhostblk.errors import PeerError
from vhostblk.vhost.action import ReadConfig, WriteConfig
from vhostblk.vhost.message import ConfigSpace, Message

__all__ = ["ConfigAccess"]

_MIGRATION = 1  # SET_CONFIG flag: the front-end restores a migrated configuration


class ConfigAccess:
    """The rules of one configuration space.

    Args:
        size: bytes that can be read.
        writable: bytes of it that the driver may write.
    """

    def __init__(self, size: int, writable: range) -> None:
        self._size = size
        self._writable = writable

    def read(self, message: Message) -> ReadConfig:
        """Raises: PeerError: what is asked for is not there."""
        config = self._checked(message)
        return ReadConfig(config.offset, config.size)

    def write(self, message: Message) -> WriteConfig:
        """Raises: PeerError: it is not there, not given, or not the driver's to write."""
        config = self._checked(message)
        if not config.data:
            raise PeerError("SET_CONFIG without data")
        if config.flags not in (0, _MIGRATION):
            raise PeerError(f"SET_CONFIG: flags {config.flags:#x}")
        end = config.offset + config.size
        writable = self._writable
        if not config.flags and not writable.start <= config.offset <= end <= writable.stop:
            raise PeerError(f"SET_CONFIG: bytes {config.offset} to {end - 1} are read-only")
        return WriteConfig(config.offset, config.data, config.flags == _MIGRATION)

    def _checked(self, message: Message) -> ConfigSpace:
        config = message.payload
        assert isinstance(config, ConfigSpace)
        if config.offset + config.size > self._size:
            raise PeerError(
                f"{message.name()}: {config.size} bytes at {config.offset}, there are {self._size}"
            )
        return config
