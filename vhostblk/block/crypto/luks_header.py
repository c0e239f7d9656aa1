"""The header of a LUKS volume, version 1 (LUKS On-Disk Format 1.2.3, figures 1 and 2).

Bytes in, values out, and the reverse. What a header says is checked before anybody uses it, in QEMU's words. Knows
nothing about files, and not how keys are stored.
"""

from __future__ import annotations

import struct
from dataclasses import dataclass, replace
from typing import Any

from vhostblk.block.crypto.sector_cipher import ALGORITHMS, HASHES, IVGENS, MODES, CipherSpec
from vhostblk.errors import ImageError

MAGIC = b"LUKS\xba\xbe"
VERSION = 1
SLOTS = 8
STRIPES = 4000
SALT_BYTES = 32
DIGEST_BYTES = 20
SECTOR = 512
HEADER_BYTES = 592
_ENABLED, _DISABLED = 0x00AC71F3, 0x0000DEAD
# Key material begins here, and is aligned to this.
_FIRST_SLOT = 4096
_FIRST_SECTORS = _FIRST_SLOT // SECTOR
_HEAD = struct.Struct(">6sH32s32s32sII20s32sI40s")
_SLOT = struct.Struct(">II32sII")


@dataclass(frozen=True, slots=True)
class KeySlot:
    """Where a copy of the key is, encrypted with somebody's password.

    Attributes:
        sector: where it begins.
        iterations: of PBKDF2.
    """

    sector: int
    active: bool = False
    iterations: int = 0
    salt: bytes = bytes(SALT_BYTES)

    @property
    def offset(self) -> int:
        """The same in bytes."""
        return self.sector * SECTOR


@dataclass(frozen=True, slots=True)
class LuksHeader:
    """A header that has been checked.

    Attributes:
        spec: how the volume is encrypted, and the key in its slots.
        hash: of PBKDF2 and the anti-forensic splitter.
        digest, digest_salt, digest_iterations: tell whether a key is the right one.
        payload_sector: where the volume's content begins.
        mode_text: the cipher's mode as it is in the header.
    """

    spec: CipherSpec
    hash: str
    payload_sector: int
    digest: bytes
    digest_salt: bytes
    digest_iterations: int
    uuid: str
    slots: tuple[KeySlot, ...]
    mode_text: str

    @property
    def key_bytes(self) -> int:
        """Of the key."""
        return self.spec.key_bytes

    @property
    def material_bytes(self) -> int:
        """Of the key as it is in a slot."""
        return self.key_bytes * STRIPES

    @property
    def payload_offset(self) -> int:
        """Where the volume's content begins, in bytes."""
        return self.payload_sector * SECTOR

    @property
    def active_slots(self) -> list[int]:
        """Numbers."""
        return [number for number, slot in enumerate(self.slots) if slot.active]

    def with_slot(self, number: int, slot: KeySlot) -> LuksHeader:
        """The same with another slot."""
        slots = (*self.slots[:number], slot, *self.slots[number + 1 :])
        return replace(self, slots=slots)

    # ------------------------------------------------------------------ bytes

    @classmethod
    def parse(cls, data: bytes) -> LuksHeader:
        """Read and check a header.

        Args:
            data: its 592 bytes.

        Raises:
            ImageError: what is wrong with it.
        """
        if len(data) < HEADER_BYTES or data[: len(MAGIC)] != MAGIC:
            raise ImageError("Volume is not in LUKS format")
        (_, version, cipher, mode, hash_, payload, key_bytes, digest, salt, iterations, uuid) = (
            _HEAD.unpack_from(data)
        )
        if version != VERSION:
            raise ImageError(f"LUKS version {version} is not supported")
        names = []
        for name, what in ((cipher, "cipher name"), (mode, "cipher mode"), (hash_, "hash spec")):
            if b"\0" not in name:
                raise ImageError(f"LUKS header {what} is not NUL terminated")
            names.append(name[: name.index(b"\0")].decode(errors="backslashreplace"))
        if payload < _FIRST_SECTORS:
            raise ImageError("LUKS payload is overlapping with the header")
        if not iterations:
            raise ImageError("LUKS key iteration count is zero")
        slots = _parse_slots(data, payload, key_bytes)
        spec, hash_name = _parse_names(names[0], names[1], names[2], key_bytes)
        return cls(
            spec=spec,
            hash=hash_name,
            payload_sector=payload,
            digest=digest,
            digest_salt=salt,
            digest_iterations=iterations,
            uuid=uuid.partition(b"\0")[0].decode(errors="backslashreplace"),
            slots=slots,
            mode_text=names[1],
        )

    def to_bytes(self) -> bytes:
        """As it goes to the volume's beginning."""
        head = _HEAD.pack(
            *(MAGIC, VERSION),
            self.spec.algorithm.partition("-")[0].encode(),
            self.mode_text.encode(),
            self.hash.encode(),
            *(self.payload_sector, self.key_bytes),
            *(self.digest, self.digest_salt, self.digest_iterations),
            self.uuid.encode(),
        )
        return head + b"".join(
            _SLOT.pack(
                _ENABLED if slot.active else _DISABLED,
                *(slot.iterations, slot.salt, slot.sector, STRIPES),
            )
            for slot in self.slots
        )

    def facts(self) -> dict[str, Any]:
        """What users may know, in QMP's words (`QCryptoBlockInfoLUKS`), in QEMU's order."""
        facts: dict[str, Any] = {
            "cipher-alg": self.spec.algorithm,
            "cipher-mode": self.spec.mode,
            "ivgen-alg": self.spec.ivgen,
        }
        if self.spec.ivgen == "essiv":
            facts["ivgen-hash-alg"] = self.spec.ivgen_hash
        return facts | {
            "hash-alg": self.hash,
            "payload-offset": self.payload_offset,
            "master-key-iters": self.digest_iterations,
            "uuid": self.uuid,
            "slots": [_slot_facts(slot) for slot in self.slots],
        }


def material_sectors(key_bytes: int) -> int:
    """How much room a slot has."""
    sectors = -(-key_bytes * STRIPES // SECTOR)
    return -(-sectors // _FIRST_SECTORS) * _FIRST_SECTORS


def empty_slots(key_bytes: int) -> tuple[KeySlot, ...]:
    """Those of a new volume, one behind the other."""
    each = material_sectors(key_bytes)
    return tuple(KeySlot(_FIRST_SECTORS + number * each) for number in range(SLOTS))


def payload_sector(key_bytes: int) -> int:
    """Where the content of a new volume begins."""
    return _FIRST_SECTORS + SLOTS * material_sectors(key_bytes)


def _parse_slots(data: bytes, payload: int, key_bytes: int) -> tuple[KeySlot, ...]:
    length = material_sectors(key_bytes)
    slots: list[KeySlot] = []
    for number in range(SLOTS):
        state, iterations, salt, sector, stripes = _SLOT.unpack_from(
            data, _HEAD.size + number * _SLOT.size
        )
        if stripes != STRIPES:
            # As a number that can be negative, as QEMU prints it.
            shown = stripes - (1 << 32) if stripes >> 31 else stripes
            raise ImageError(f"Keyslot {number} is corrupted (stripes {shown} != {STRIPES})")
        if state not in (_ENABLED, _DISABLED):
            raise ImageError(f"Keyslot {number} state (active/disable) is corrupted")
        if state == _ENABLED and not iterations:
            raise ImageError(f"Keyslot {number} iteration count is zero")
        if sector < _FIRST_SECTORS:
            raise ImageError(f"Keyslot {number} is overlapping with the LUKS header")
        if sector + length > payload:
            raise ImageError(f"Keyslot {number} is overlapping with the encrypted payload")
        slots.append(KeySlot(sector, state == _ENABLED, iterations, salt))
    for number, slot in enumerate(slots):
        for other in range(number + 1, SLOTS):
            if abs(slot.sector - slots[other].sector) < length:
                raise ImageError(f"Keyslots {number} and {other} are overlapping in the header")
    return tuple(slots)


def _parse_names(cipher: str, mode: str, hash_: str, key_bytes: int) -> tuple[CipherSpec, str]:
    """`aes`, `xts-plain64` or `cbc-essiv:sha256`, `sha256`."""
    mode_name, dash, rest = mode.partition("-")
    if not dash:
        raise ImageError(f"Unexpected cipher mode string format '{mode}'")
    ivgen, colon, ivgen_hash = rest.partition(":")
    if colon:
        _known(ivgen_hash, HASHES, "Hash algorithm")
    _known(mode_name, MODES, "Cipher mode")
    each = key_bytes // 2 if mode_name == "xts" else key_bytes
    found = [
        name
        for name, size in ALGORITHMS.items()
        if size == each and name.partition("-")[0] == cipher
    ]
    if not found or "-" not in found[0] or (mode_name == "xts" and key_bytes % 2):
        raise ImageError(f"Algorithm '{cipher}' with key size {each} bytes not supported")
    _known(hash_, HASHES, "Hash algorithm")
    _known(ivgen, IVGENS, "IV generator")
    if ivgen == "essiv" and not colon:
        raise ImageError("Missing IV generator hash specification")
    return CipherSpec(found[0], mode_name, ivgen, ivgen_hash if colon else None), hash_


def _known(name: str, names: tuple[str, ...], what: str) -> None:
    if name not in names:
        raise ImageError(f"{what} '{name}' not supported")


def _slot_facts(slot: KeySlot) -> dict[str, Any]:
    if not slot.active:
        return {"active": False, "key-offset": slot.offset}
    return {
        "active": True,
        "iters": slot.iterations,
        "stripes": STRIPES,
        "key-offset": slot.offset,
    }
