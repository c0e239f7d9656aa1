"""Changing the passwords of a LUKS volume (`qemu-img amend`, with QEMU's checks).

Knows nothing about where the header is: `luks.py` has the rest.
"""

from __future__ import annotations

from dataclasses import dataclass

from vhostblk.block.crypto.luks import (
    DEFAULT_ITER_TIME,
    HeaderArea,
    add_key,
    erase_key,
    key_in_slot,
    load_header,
    unlock,
)
from vhostblk.block.crypto.luks_header import SLOTS, LuksHeader
from vhostblk.block.crypto.secret import Secrets
from vhostblk.errors import ConfigError


@dataclass(frozen=True, slots=True, kw_only=True)
class KeyChange:
    """What is to become of which slots.

    Attributes:
        state: "active": one gets a password, "inactive": some lose theirs.
        new_secret, old_secret: ids.
        iter_time: milliseconds.
    """

    state: str
    keyslot: int | None = None
    new_secret: str | None = None
    old_secret: str | None = None
    iter_time: int | None = None


async def change_keys(
    area: HeaderArea, secrets: Secrets, opened_with: str, change: KeyChange, *, force: bool
) -> LuksHeader:
    """Do it; returns the header as it is then.

    Args:
        opened_with: the id of the secret that the volume was opened with.
        force: also what may make the content unreadable for ever.

    Raises:
        ConfigError: why not.
        ImageError: the header is damaged.
        BlockError: the area's errno.
    """
    header = await load_header(area)
    if change.state == "active":
        return await _add(area, header, secrets, opened_with, change, force=force)
    return await _erase(area, header, secrets, change, force=force)


async def _add(
    area: HeaderArea,
    header: LuksHeader,
    secrets: Secrets,
    opened_with: str,
    change: KeyChange,
    *,
    force: bool,
) -> LuksHeader:
    if change.new_secret is None:
        raise ConfigError("'new-secret' is required to activate a keyslot")
    if change.old_secret is not None:
        raise ConfigError("'old-secret' must not be given when activating keyslots")
    number = change.keyslot
    if number is not None:
        _check_slot(number)
    else:
        free = [one for one in range(SLOTS) if not header.slots[one].active]
        if not free:
            raise ConfigError("Can't add a keyslot - all keyslots are in use")
        number = free[0]
    if not force and header.slots[number].active:
        raise ConfigError(f"Refusing to overwrite active keyslot {number} - please erase it first")
    key = await unlock(area, header, secrets.password(opened_with))
    password = secrets.password(change.new_secret)
    iter_time = change.iter_time if change.iter_time is not None else DEFAULT_ITER_TIME
    return await add_key(area, header, number, password, key, iter_time)


async def _erase(
    area: HeaderArea, header: LuksHeader, secrets: Secrets, change: KeyChange, *, force: bool
) -> LuksHeader:
    if change.new_secret is not None:
        raise ConfigError("'new-secret' must not be given when erasing keyslots")
    if change.iter_time is not None:
        raise ConfigError("'iter-time' must not be given when erasing keyslots")
    password = secrets.password(change.old_secret) if change.old_secret is not None else None
    if change.keyslot is not None:
        await _check_erasure(area, header, change.keyslot, password, force=force)
        return await erase_key(area, header, change.keyslot)
    if password is None:
        raise ConfigError(
            "To erase keyslot(s), either explicit keyslot index "
            "or the password currently contained in them must be given"
        )
    matching = [
        number
        for number in range(SLOTS)
        if await key_in_slot(area, header, number, password) is not None
    ]
    if not matching:
        raise ConfigError("No keyslots match given (old) password for erase operation")
    if not force and matching == header.active_slots:
        raise ConfigError(
            "All the active keyslots match the (old) password that was given and erasing them will "
            "erase all the data in the image irreversibly - refusing operation"
        )
    for number in matching:
        header = await erase_key(area, header, number)
    return header


async def _check_erasure(
    area: HeaderArea, header: LuksHeader, number: int, password: bytes | None, *, force: bool
) -> None:
    _check_slot(number)
    if password is not None and await key_in_slot(area, header, number, password) is None:
        raise ConfigError(
            f"Given keyslot {number} doesn't contain the given old password for erase operation"
        )
    if not force and not header.slots[number].active:
        raise ConfigError(f"Given keyslot {number} is already erased (inactive) ")
    if not force and len(header.active_slots) == 1:
        raise ConfigError(
            f"Attempt to erase the only active keyslot {number} which will erase all the data in "
            "the image irreversibly - refusing operation"
        )


def _check_slot(number: int) -> None:
    if not 0 <= number < SLOTS:
        raise ConfigError(f"Invalid keyslot {number} specified, must be between 0 and {SLOTS - 1}")
