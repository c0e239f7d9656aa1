"""A file with sectors that are encrypted, and keys: what formats with encryption have in common.

Theory of operation: what is written is encrypted in a buffer of ours; whoever's memory it comes from stays as it is. A
large request goes piece by piece, so that it takes little memory.

Context: the control loop. Knows nothing about nodes: a file is whatever can be read and written.
"""

from __future__ import annotations

from typing import Protocol

from vhostblk.block.crypto import luks
from vhostblk.block.crypto.luks_header import LuksHeader
from vhostblk.block.crypto.secret import Secrets
from vhostblk.block.crypto.sector_cipher import SECTOR
from vhostblk.block.crypto.threaded import ThreadedCipher
from vhostblk.block.iov import IoVec
from vhostblk.errors import BlockError, ConfigError, ImageError

# Of data that are encrypted at a time.
_MOST = 2 << 20


class File(Protocol):
    """An edge or a block backend."""

    async def preadv(self, offset: int, iov: IoVec) -> None:
        """Read."""

    async def pwritev(self, offset: int, iov: IoVec) -> None:
        """Write."""

    async def flush(self) -> None:
        """What was written is durable."""


class HeaderRange:
    """The range of a file that has a LUKS header and its keys; see `luks.HeaderArea`."""

    def __init__(self, file: File, offset: int, length: int) -> None:
        self._file = file
        self._offset = offset
        self._length = length

    async def read(self, offset: int, length: int) -> bytes:
        """See `HeaderArea`."""
        self._check(offset, length)
        data = bytearray(length)
        try:
            await self._file.preadv(self._offset + offset, IoVec.of(data))
        except BlockError as error:
            raise ConfigError(
                f"Could not read encryption header: {error.strerror}", error.errno or 0
            ) from None
        return bytes(data)

    async def write(self, offset: int, data: bytes) -> None:
        """See `HeaderArea`."""
        self._check(offset, len(data))
        await self._file.pwritev(self._offset + offset, IoVec.of(data))

    async def flush(self) -> None:
        """See `HeaderArea`."""
        await self._file.flush()

    def _check(self, offset: int, length: int) -> None:
        if offset + length > self._length:
            raise ConfigError("Request for data outside of extension header")


class Encryption:
    """A disk's data to encrypted sectors of a file, and back.

    Args:
        by_place: sectors count from the beginning of the file, not of the disk.
    """

    def __init__(self, cipher: ThreadedCipher, *, by_place: bool) -> None:
        self._cipher = cipher
        self._by_place = by_place

    async def read(self, file: File, offset: int, place: int, iov: IoVec) -> None:
        """Read whole sectors.

        Args:
            offset: on the disk. place: in the file.

        Raises:
            BlockError: the file's errno.
        """
        for at in range(0, iov.length, _MOST):
            part = bytearray(min(_MOST, iov.length - at))
            await file.preadv(place + at, IoVec.of(part))
            await self._cipher.decrypt(self._sector(offset + at, place + at), part)
            iov.copy_from(part, at)

    async def write(self, file: File, offset: int, place: int, iov: IoVec) -> None:
        """Write whole sectors; see `read`."""
        for at in range(0, iov.length, _MOST):
            part = iov.slice(at, min(_MOST, iov.length - at))
            encrypted = await self._cipher.encrypt(self._sector(offset + at, place + at), part)
            await file.pwritev(place + at, IoVec.of(encrypted))

    def _sector(self, offset: int, place: int) -> int:
        place = place if self._by_place else offset
        assert place % SECTOR == 0
        return place // SECTOR


async def open_luks(
    area: HeaderRange, password: bytes | None, *, by_place: bool
) -> tuple[LuksHeader, Encryption | None]:
    """The header of a volume; and, with a password, what reads its data.

    Raises:
        ConfigError: the wrong one; a damaged header.
    """
    try:
        header = await luks.load_header(area)
    except ImageError as error:
        raise ConfigError(str(error)) from None
    if password is None:
        return header, None
    cipher = ThreadedCipher(header.spec, await luks.unlock(area, header, password))
    return header, Encryption(cipher, by_place=by_place)


def required_password(secrets: Secrets, key_secret: str | None, prefix: str = "") -> bytes:
    """The password that somebody who opens an image, or makes one, has to have.

    Args:
        key_secret: the id of a secret. prefix: what the option's name begins with.

    Raises:
        ConfigError: there is none.
    """
    if key_secret is None:
        raise ConfigError(f"Parameter '{prefix}key-secret' is required for cipher")
    return secrets.password(key_secret)
