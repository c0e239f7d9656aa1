"""Encryption of requests: beside the control loop, where it takes long.

A request of a few clusters is done where it is: to hand it to a thread takes as long. The library works in pieces that
stay in the processor's cache.

Context: the control loop. Knows nothing about files.
"""

from __future__ import annotations

import asyncio
import threading
from collections.abc import Callable

from vhostblk.block.crypto.sector_cipher import SECTOR, CipherSpec, SectorCipher
from vhostblk.block.iov import IoVec

_AT_ONCE = 32 << 10
_PIECE = 64 << 10


class ThreadedCipher:
    """One key, for any number of requests at a time.

    Raises:
        ConfigError: not this way, or not without the library.
    """

    def __init__(self, spec: CipherSpec, key: bytes) -> None:
        self._spec = spec
        self._key = key
        self._own = threading.local()
        self._cipher()

    def __repr__(self) -> str:
        return f"ThreadedCipher({self._spec})"

    def _cipher(self) -> SectorCipher:
        """This thread's: none is used by two at a time."""
        cipher: SectorCipher | None = getattr(self._own, "cipher", None)
        if cipher is None:
            cipher = self._own.cipher = SectorCipher(self._spec, self._key)
        return cipher

    async def encrypt(self, sector: int, iov: IoVec) -> bytearray:
        """What is to be written for whole sectors, the first of which has this number; `iov` stays as it is."""
        plain = bytearray(iov.length)
        # All of it at once: a guest may change its memory meanwhile, and each byte is read once.
        iov.copy_to(memoryview(plain))
        await self._run(self._encrypt, sector, plain)
        return plain

    async def decrypt(self, sector: int, data: bytearray) -> None:
        """Whole sectors, in place."""
        await self._run(self._decrypt, sector, data)

    async def _run(
        self, function: Callable[[int, bytearray], None], sector: int, data: bytearray
    ) -> None:
        if len(data) <= _AT_ONCE:
            function(sector, data)
        else:
            await asyncio.to_thread(function, sector, data)

    def _encrypt(self, sector: int, data: bytearray) -> None:
        _in_pieces(self._cipher().encrypt, sector, data)

    def _decrypt(self, sector: int, data: bytearray) -> None:
        _in_pieces(self._cipher().decrypt, sector, data)


def _in_pieces(transform: Callable[[int, memoryview], bytes], sector: int, data: bytearray) -> None:
    view = memoryview(data)
    for at in range(0, len(view), _PIECE):
        piece = view[at : at + _PIECE]
        piece[:] = transform(sector + at // SECTOR, piece)
