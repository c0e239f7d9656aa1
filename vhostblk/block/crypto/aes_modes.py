"""Modes of AES for runs of sectors, each of which begins with an IV of its own (IEEE 1619-2007; NIST SP 800-38A).

A library's mode begins anew for each sector, which costs more than the encryption of the sector. Here all blocks of a
run go through AES at once, and what a mode adds to them is made for all sectors at once, with numbers of many digits.

Bytes in, bytes out. Knows nothing about where IVs come from.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import lru_cache
from typing import Any, Protocol

from vhostblk.block.crypto.library import Aes

SECTOR = 512
_BLOCK = 16
_BLOCKS = SECTOR // _BLOCK
_TOP = 8 * _BLOCK - 1
# x^128 = x^7 + x^2 + x + 1 (IEEE 1619-2007, 5.2).
_FEEDBACK = 0x87


class Mode(Protocol):
    """Sectors to sectors; `ivs` has one of 16 bytes for each sector."""

    def encrypt(self, ivs: Sequence[bytes], data: Any) -> bytes:
        """Plain to encrypted."""

    def decrypt(self, ivs: Sequence[bytes], data: Any) -> bytes:
        """Encrypted to plain."""


def xor(one: Any, other: Any) -> bytes:
    """Bytes of the same length."""
    length = len(one)
    return (int.from_bytes(one, "little") ^ int.from_bytes(other, "little")).to_bytes(
        length, "little"
    )


class Xts:
    """XEX with tweaks, of whole blocks.

    Args:
        key: two keys of the same length.
    """

    def __init__(self, key: bytes) -> None:
        half = len(key) // 2
        self._data = Aes(key[:half])
        self._tweak = Aes(key[half:])

    def encrypt(self, ivs: Sequence[bytes], data: Any) -> bytes:
        """See `Mode`."""
        return self._transform(self._data.encrypt_blocks, ivs, data)

    def decrypt(self, ivs: Sequence[bytes], data: Any) -> bytes:
        """See `Mode`."""
        return self._transform(self._data.decrypt_blocks, ivs, data)

    def _transform(self, blocks: Callable[[Any], bytes], ivs: Sequence[bytes], data: Any) -> bytes:
        length = len(data)
        first = self._tweak.encrypt_blocks(b"".join(ivs))
        tweaks = int.from_bytes(_tweaks(first, len(ivs)), "little")
        hidden = (int.from_bytes(data, "little") ^ tweaks).to_bytes(length, "little")
        done = int.from_bytes(blocks(hidden), "little") ^ tweaks
        return done.to_bytes(length, "little")


@lru_cache(maxsize=64)
def _lowest_bits(count: int) -> int:
    """The lowest bit of each of so many blocks."""
    return int.from_bytes((b"\1" + bytes(_BLOCK - 1)) * count, "little")


def _tweaks(first: bytes, sectors: int) -> bytearray:
    """Tweaks of all blocks, from those of the first block of each sector: each is the one before, times x.

    The blocks of one number, of all sectors, are one number of many digits.
    """
    found = bytearray(sectors * SECTOR)
    words = memoryview(found).cast("Q")
    step = SECTOR // 8
    lowest = _lowest_bits(sectors)
    length = len(first)
    here = int.from_bytes(first, "little")
    for number in range(_BLOCKS):
        if number:
            over = here >> _TOP & lowest
            here = (here ^ over << _TOP) << 1 ^ over * _FEEDBACK
        source = memoryview(here.to_bytes(length, "little")).cast("Q")
        words[2 * number :: step] = source[::2]
        words[2 * number + 1 :: step] = source[1::2]
    return found


class Cbc:
    """Cipher block chaining, anew in each sector."""

    def __init__(self, key: bytes) -> None:
        self._aes = Aes(key)

    def encrypt(self, ivs: Sequence[bytes], data: Any) -> bytes:
        """See `Mode`. Each block needs the one before."""
        encrypt, view = self._aes.cbc_encrypt, memoryview(data)
        return b"".join(
            encrypt(iv, view[at : at + SECTOR])
            for iv, at in zip(ivs, range(0, len(view), SECTOR), strict=True)
        )

    def decrypt(self, ivs: Sequence[bytes], data: Any) -> bytes:
        """See `Mode`. What each block needs is there: the encrypted block before, or the IV."""
        before = bytearray(_BLOCK)
        before += memoryview(data)[:-_BLOCK]
        for iv, at in zip(ivs, range(0, len(data), SECTOR), strict=True):
            before[at : at + _BLOCK] = iv
        return xor(self._aes.decrypt_blocks(data), before)


class Ctr:
    """A counter that begins with the IV."""

    def __init__(self, key: bytes) -> None:
        self._aes = Aes(key)

    def encrypt(self, ivs: Sequence[bytes], data: Any) -> bytes:
        """See `Mode`."""
        most = (1 << 8 * _BLOCK) - 1
        counters = b"".join(
            (int.from_bytes(iv) + number & most).to_bytes(_BLOCK)
            for iv in ivs
            for number in range(_BLOCKS)
        )
        return xor(data, self._aes.encrypt_blocks(counters))

    decrypt = encrypt


class Ecb:
    """Nothing but the cipher: IVs do not matter."""

    def __init__(self, key: bytes) -> None:
        self._aes = Aes(key)

    def encrypt(self, ivs: Sequence[bytes], data: Any) -> bytes:
        """See `Mode`."""
        return self._aes.encrypt_blocks(data)

    def decrypt(self, ivs: Sequence[bytes], data: Any) -> bytes:
        """See `Mode`."""
        return self._aes.decrypt_blocks(data)
