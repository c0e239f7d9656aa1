"""Sectors of 512 bytes, encrypted each for itself with the number of the sector (as dm-crypt does, and in the words of
LUKS: `aes-xts-plain64`, `aes-cbc-essiv:sha256`).

Numbers and bytes in, bytes out. Knows nothing about files, and which number a sector has.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable
from functools import partial
from types import MappingProxyType
from typing import Any

from vhostblk.block.crypto.aes_modes import SECTOR, Cbc, Ctr, Ecb, Mode, Xts
from vhostblk.block.crypto.library import Aes
from vhostblk.block.lean_dataclass import lean_dataclass
from vhostblk.errors import ConfigError

__all__ = ["ALGORITHMS", "HASHES", "IVGENS", "MODES", "SECTOR", "CipherSpec", "SectorCipher"]

# QEMU's names, and bytes of a key.
ALGORITHMS = MappingProxyType(
    {
        "des": 8,
        "3des": 24,
        "cast5-128": 16,
        **{
            f"{name}-{bits}": bits // 8
            for name in ("aes", "serpent", "twofish")
            for bits in (128, 192, 256)
        },
    }
)
MODES = ("ecb", "cbc", "xts", "ctr")
IVGENS = ("plain", "plain64", "essiv")
HASHES = ("md5", "sha1", "sha224", "sha256", "sha384", "sha512", "ripemd160")
_MODES: MappingProxyType[str, Callable[[bytes], Mode]] = MappingProxyType(
    {"ecb": Ecb, "cbc": Cbc, "xts": Xts, "ctr": Ctr}
)


@lean_dataclass(frozen=True, slots=True)
class CipherSpec:
    """How sectors are encrypted; QEMU's names.

    Attributes:
        ivgen_hash: of `essiv`.
    """

    algorithm: str
    mode: str
    ivgen: str
    ivgen_hash: str | None = None

    @property
    def key_bytes(self) -> int:
        """XTS has two keys."""
        return ALGORITHMS[self.algorithm] * (2 if self.mode == "xts" else 1)

    def check(self) -> None:
        """Whether we can do that.

        Raises:
            ConfigError: a name of it.
        """
        if not self.algorithm.startswith("aes-"):
            raise ConfigError(f"Algorithm '{self.algorithm}' not supported")
        if self.ivgen == "essiv":
            check_hash(self.ivgen_hash or "")
            length = hashlib.new(self.ivgen_hash or "").digest_size
            if length not in (16, 24, 32):
                raise ConfigError(f"No AES cipher with key size {length} available")


def check_hash(name: str) -> None:
    """Whether there is such a hash here.

    Raises:
        ConfigError: there is none.
    """
    try:
        hashlib.new(name)
    except ValueError:
        raise ConfigError(f"Hash algorithm '{name}' not supported") from None


class SectorCipher:
    """Encrypts sectors with one key.

    Raises:
        ConfigError: not this way, or not without the library.

    Context: one thread at a time.
    """

    def __init__(self, spec: CipherSpec, key: bytes) -> None:
        spec.check()
        assert len(key) == spec.key_bytes
        self._mode = _MODES[spec.mode](key)
        self._ivs = _ivs_of(spec, key)

    def encrypt(self, sector: int, data: Any) -> bytes:
        """Whole sectors, the first of which has this number."""
        return self._mode.encrypt(self._ivs(sector, len(data) // SECTOR), data)

    def decrypt(self, sector: int, data: Any) -> bytes:
        """The reverse."""
        return self._mode.decrypt(self._ivs(sector, len(data) // SECTOR), data)


def _ivs_of(spec: CipherSpec, key: bytes) -> Callable[[int, int], list[bytes]]:
    if spec.ivgen == "essiv":
        name = spec.ivgen_hash or ""
        return partial(_essiv, Aes(hashlib.new(name, key).digest()))
    return _plain if spec.ivgen == "plain" else _plain64


def _plain64(sector: int, count: int) -> list[bytes]:
    return [number.to_bytes(16, "little") for number in range(sector, sector + count)]


def _plain(sector: int, count: int) -> list[bytes]:
    return [
        (number & 0xFFFF_FFFF).to_bytes(16, "little") for number in range(sector, sector + count)
    ]


def _essiv(salt: Aes, sector: int, count: int) -> list[bytes]:
    found = salt.encrypt_blocks(b"".join(_plain64(sector, count)))
    return [found[at : at + 16] for at in range(0, len(found), 16)]
