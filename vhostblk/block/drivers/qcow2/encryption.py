"""Encrypted qcow2 images: what opens them (qcow2 specification, `crypt_method`, "Full disk encryption header pointer").

Theory of operation: clusters of guest data are encrypted, and nothing else: tables, bitmaps and names are plain. With
LUKS, the header of a LUKS volume is in clusters of the image, and the number of a sector is its place in the file; in
the old format, "aes", the password is the key, and the number of a sector is its place on the disk.

What users say of encryption is in `encryption_options.py`. Knows nothing about tables.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from vhostblk.block.crypto.encrypted_file import (
    Encryption,
    File,
    HeaderRange,
    open_luks,
    required_password,
)
from vhostblk.block.crypto.luks_header import LuksHeader
from vhostblk.block.crypto.secret import Secrets
from vhostblk.block.crypto.sector_cipher import CipherSpec
from vhostblk.block.crypto.threaded import ThreadedCipher
from vhostblk.block.drivers.qcow2.header import Crypt, Header

__all__ = ["Encryption", "Opened", "aes_cipher", "header_range", "open_encryption"]

# As QEMU has it: what a password is longer than this, nobody looks at.
_AES_BYTES = 16
_AES = CipherSpec("aes-128", "cbc", "plain64")


@dataclass(frozen=True, slots=True)
class Opened:
    """The encryption of an image that is open.

    Attributes:
        encryption: None: nobody wants its data.
        luks: None: the old format.
    """

    encryption: Encryption | None = None
    luks: LuksHeader | None = None

    def facts(self) -> dict[str, Any]:
        """What users may know (QMP's `ImageInfoSpecificQCow2Encryption`)."""
        if self.luks is None:
            return {"format": "aes"}
        return {"format": "luks", **self.luks.facts()}


def aes_cipher(password: bytes) -> ThreadedCipher:
    """That of the old format.

    Raises:
        ConfigError: the library is not installed.
    """
    return ThreadedCipher(_AES, password[:_AES_BYTES].ljust(_AES_BYTES, b"\0"))


def header_range(file: File, header: Header) -> HeaderRange:
    """Where the LUKS header of an image is."""
    return HeaderRange(file, *header.crypt_area)


async def open_encryption(
    file: File, header: Header, secrets: Secrets, key_secret: str | None, *, with_data: bool
) -> Opened:
    """The encryption of an image that has any.

    Args:
        key_secret: the id of what opens it.
        with_data: somebody wants to read them.

    Raises:
        ConfigError: no secret, a wrong one, or a damaged header.
    """
    password = required_password(secrets, key_secret, "encrypt.") if with_data else None
    if header.crypt == Crypt.AES:
        if password is None:
            return Opened()
        return Opened(Encryption(aes_cipher(password), by_place=False))
    luks, encryption = await open_luks(header_range(file, header), password, by_place=True)
    return Opened(encryption, luks)
