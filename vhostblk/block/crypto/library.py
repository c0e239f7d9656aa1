"""The package that has the ciphers, `cryptography`: imported when the first image is encrypted, and nowhere else.

What is used of it is AES without a mode, and AES-CBC; modes for whole runs of sectors are made of these
(`aes_modes.py`). Hashes and PBKDF2 are the standard library's.
"""

from __future__ import annotations

import errno
from collections.abc import Callable
from typing import Any

from vhostblk.errors import ConfigError

Transform = Callable[[Any], bytes]
"""Bytes to as many bytes."""


class Aes:
    """AES with one key.

    Args:
        key: 16, 24 or 32 bytes.

    Raises:
        ConfigError: ENOTSUP: the library is not installed.

    Context: one thread at a time.
    """

    def __init__(self, key: bytes) -> None:
        try:
            from cryptography.hazmat.primitives.ciphers import Cipher, algorithms, modes
        except ImportError:
            raise ConfigError(
                "Encryption needs the Python package 'cryptography' (pip install vhostblk[crypto])",
                errno.ENOTSUP,
            ) from None
        self._cipher = Cipher
        self._cbc = modes.CBC
        self._algorithm = algorithms.AES(key)
        ecb = Cipher(self._algorithm, modes.ECB())
        # Blocks of one call do not depend on those of others, so these are used for ever.
        self.encrypt_blocks: Transform = ecb.encryptor().update
        self.decrypt_blocks: Transform = ecb.decryptor().update

    def cbc_encrypt(self, iv: bytes, data: Any) -> bytes:
        """One chain of blocks."""
        return self._cipher(self._algorithm, self._cbc(iv)).encryptor().update(data)

    def cbc_decrypt(self, iv: bytes, data: Any) -> bytes:
        """One chain of blocks."""
        return self._cipher(self._algorithm, self._cbc(iv)).decryptor().update(data)
