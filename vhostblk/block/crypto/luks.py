"""LUKS volumes: made, opened, and given other passwords (LUKS On-Disk Format 1.2.3, sections 4 and 5).

Theory of operation: the volume's key is random. Each of eight slots may have a copy of it, split (`af_split.py`) and
encrypted with what PBKDF2 makes of a password; a digest in the header tells whether a key is the right one. Whoever
adds a password writes the slot's material first, then what it was made with, and says last that it counts; whoever
removes one says first that it does not. So a crash never costs another password.

Where the header is, in a file of its own or in an image, the caller knows (`HeaderArea`). PBKDF2 runs in threads.

Context: the control loop.
"""

from __future__ import annotations

import asyncio
import errno
import hashlib
import os
import time
import uuid
from dataclasses import dataclass, replace
from typing import Protocol

from vhostblk.block.crypto.af_split import merge, split
from vhostblk.block.crypto.luks_header import (
    DIGEST_BYTES,
    HEADER_BYTES,
    SALT_BYTES,
    SLOTS,
    STRIPES,
    KeySlot,
    LuksHeader,
    empty_slots,
    payload_sector,
)
from vhostblk.block.crypto.sector_cipher import CipherSpec, SectorCipher, check_hash
from vhostblk.errors import ConfigError

DEFAULT_ITER_TIME = 2000
"""Milliseconds."""
DEFAULT_CIPHER = CipherSpec("aes-256", "xts", "plain64")
_LEAST_ITERATIONS = 1000
_MOST_ITERATIONS = (1 << 32) - 1
# Seconds to measure for, and what to begin with.
_ENOUGH = 0.05
_FIRST_GUESS = 1 << 14
# cryptsetup's: a digest is looked at for each slot.
_DIGEST_SHARE = 8
_ERASURES = 40


class HeaderArea(Protocol):
    """Where a volume's header, and key material are."""

    async def read(self, offset: int, length: int) -> bytes:
        """So many bytes. Raises BlockError, ConfigError."""

    async def write(self, offset: int, data: bytes) -> None:
        """All of them. Raises BlockError, ConfigError."""

    async def flush(self) -> None:
        """What was written is durable. Raises BlockError."""


@dataclass(frozen=True, slots=True, kw_only=True)
class LuksParameters:
    """What a new volume is like."""

    spec: CipherSpec = DEFAULT_CIPHER
    hash: str = "sha256"
    iter_time: int = DEFAULT_ITER_TIME

    def check(self) -> None:
        """Whether we can do that.

        Raises:
            ConfigError: not this cipher, hash, ...
        """
        self.spec.check()
        check_hash(self.hash)

    @property
    def payload_bytes(self) -> int:
        """How much room header and keys take."""
        return payload_sector(self.spec.key_bytes) * 512

    @property
    def mode_text(self) -> str:
        """As the header has it."""
        hash_ = f":{self.spec.ivgen_hash}" if self.spec.ivgen_hash is not None else ""
        return f"{self.spec.mode}-{self.spec.ivgen}{hash_}"


async def load_header(area: HeaderArea) -> LuksHeader:
    """The header, which has been checked.

    Raises:
        ImageError: it is damaged.
        BlockError, ConfigError: it cannot be read.
    """
    return LuksHeader.parse(await area.read(0, HEADER_BYTES))


async def format_volume(
    area: HeaderArea, parameters: LuksParameters, password: bytes
) -> tuple[LuksHeader, bytes]:
    """Write header and key of a new volume; the rest of the area is zero. Returns the header, and the key.

    Raises:
        ConfigError: not with these parameters.
        BlockError: the area's errno.
    """
    parameters.check()
    spec = parameters.spec
    key, salt = os.urandom(spec.key_bytes), os.urandom(SALT_BYTES)
    iterations = await asyncio.to_thread(
        _iterations, parameters.hash, key, salt, DIGEST_BYTES, parameters.iter_time, _DIGEST_SHARE
    )
    header = LuksHeader(
        spec=spec,
        hash=parameters.hash,
        payload_sector=payload_sector(spec.key_bytes),
        digest=await _derive(parameters.hash, key, salt, iterations, DIGEST_BYTES),
        digest_salt=salt,
        digest_iterations=iterations,
        uuid=str(uuid.uuid4()),
        slots=empty_slots(spec.key_bytes),
        mode_text=parameters.mode_text,
    )
    header = await add_key(area, header, 0, password, key, parameters.iter_time)
    return header, key


async def unlock(area: HeaderArea, header: LuksHeader, password: bytes) -> bytes:
    """The key of a volume.

    Raises:
        ConfigError: it is not the password of any slot; or the cipher is not supported.
        BlockError: the area's errno.
    """
    header.spec.check()
    check_hash(header.hash)
    for number in range(SLOTS):
        key = await key_in_slot(area, header, number, password)
        if key is not None:
            return key
    raise ConfigError("Invalid password, cannot unlock any keyslot", errno.EPERM)


async def key_in_slot(
    area: HeaderArea, header: LuksHeader, number: int, password: bytes
) -> bytes | None:
    """The key, if this is the password of the slot.

    Raises: as `unlock`.
    """
    slot = header.slots[number]
    if not slot.active:
        return None
    material = await area.read(slot.offset, header.material_bytes)
    slot_key = await _derive(header.hash, password, slot.salt, slot.iterations, header.key_bytes)
    key = await asyncio.to_thread(_open_slot, header, slot_key, material)
    digest = await _derive(
        *(header.hash, key, header.digest_salt, header.digest_iterations, DIGEST_BYTES)
    )
    return key if digest == header.digest else None


async def add_key(
    area: HeaderArea, header: LuksHeader, number: int, password: bytes, key: bytes, iter_time: int
) -> LuksHeader:
    """Put the key into a slot, for this password. Returns the header as it is then.

    Raises:
        ConfigError: ERANGE: PBKDF2 would have to take too long.
        BlockError: the area's errno.
    """
    salt = os.urandom(SALT_BYTES)
    iterations = await asyncio.to_thread(
        _iterations, header.hash, password, salt, header.key_bytes, iter_time
    )
    slot_key = await _derive(header.hash, password, salt, iterations, header.key_bytes)
    material = await asyncio.to_thread(_fill_slot, header, slot_key, key)
    slot = KeySlot(header.slots[number].sector, False, iterations, salt)
    await area.write(slot.offset, material)
    # The header is in two sectors, and a crash may come between them: a slot counts when the rest is there.
    for active in (False, True):
        header = header.with_slot(number, replace(slot, active=active))
        await area.flush()
        await area.write(0, header.to_bytes())
    await area.flush()
    return header


async def erase_key(area: HeaderArea, header: LuksHeader, number: int) -> LuksHeader:
    """Forget what is in a slot. Returns the header as it is then.

    Raises:
        BlockError: the area's errno.
    """
    slot = KeySlot(header.slots[number].sector)
    header = header.with_slot(number, slot)
    await area.write(0, header.to_bytes())
    await area.flush()
    for _ in range(_ERASURES):
        await area.write(slot.offset, os.urandom(header.material_bytes))
    await area.flush()
    return header


# ---------------------------------------------------------------------- in threads


def _open_slot(header: LuksHeader, slot_key: bytes, material: bytes) -> bytes:
    plain = SectorCipher(header.spec, slot_key).decrypt(0, material)
    return merge(plain, STRIPES, header.hash)


def _fill_slot(header: LuksHeader, slot_key: bytes, key: bytes) -> bytes:
    return SectorCipher(header.spec, slot_key).encrypt(0, split(key, STRIPES, header.hash))


async def _derive(
    hash_name: str, password: bytes, salt: bytes, iterations: int, size: int
) -> bytes:
    return await asyncio.to_thread(
        hashlib.pbkdf2_hmac, hash_name, password, salt, iterations, dklen=size
    )


def _iterations(
    hash_name: str, password: bytes, salt: bytes, size: int, milliseconds: int, share: int = 1
) -> int:
    """How often PBKDF2 hashes in so much time of this processor.

    Raises:
        ConfigError: ERANGE: more often than a header can say.
    """
    guess = _FIRST_GUESS
    while True:
        began = time.thread_time()
        hashlib.pbkdf2_hmac(hash_name, password, salt, guess, dklen=size)
        took = time.thread_time() - began
        if took >= _ENOUGH:
            break
        guess *= 4
    found = int(guess / took * milliseconds / 1000) // share
    if found > _MOST_ITERATIONS:
        raise ConfigError(
            f"PBKDF iterations {found} larger than {_MOST_ITERATIONS}: {os.strerror(errno.ERANGE)}",
            errno.ERANGE,
        )
    return max(found, _LEAST_ITERATIONS)
