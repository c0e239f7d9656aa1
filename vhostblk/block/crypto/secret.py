"""Secrets: what users hand over in order to open encrypted images (`--object secret`, QEMU's options).

A secret is looked at when it is made, and kept as bytes; nothing else has them, and nothing prints them: neither
messages nor the names of nodes have more than an id.

Knows nothing about images.
"""

from __future__ import annotations

import binascii
import os
from collections.abc import Iterator
from dataclasses import field

from vhostblk.block.crypto.library import Aes
from vhostblk.block.lean_dataclass import lean_dataclass
from vhostblk.errors import ConfigError

_BASE64 = frozenset(b"ABCDEFGHIJKLMNOPQRSTUVWXYZabcdefghijklmnopqrstuvwxyz0123456789+/=\n")
_KEY_BYTES = 32
_BLOCK = 16
# More than anybody would want to keep secret.
_MOST_BYTES = 1 << 20


@lean_dataclass(frozen=True, slots=True)
class SecretConfig:
    """What users say of one.

    Attributes:
        data: itself, as text. file: where it is. One of them.
        format: "raw", or "base64".
        keyid: it is encrypted with this other secret: AES-256-CBC, with the iv (base64).
    """

    name: str
    data: str | None = field(default=None, repr=False)
    file: str | None = None
    format: str = "raw"
    keyid: str | None = None
    iv: str | None = None


class Secrets:
    """All secrets of a graph, by id."""

    def __init__(self) -> None:
        self._known: dict[str, bytes] = {}

    def __contains__(self, name: object) -> bool:
        return name in self._known

    def __iter__(self) -> Iterator[str]:
        return iter(self._known)

    def add(self, config: SecretConfig) -> None:
        """Read it, decode it, keep it.

        Raises:
            ConfigError: it cannot be had, in QEMU's words.
        """
        content = _content(config)
        if config.keyid is not None:
            content = self._decrypted(config, content)
        elif config.format == "base64":
            content = _decoded(content)
        self._known[config.name] = content

    def content(self, name: str) -> bytes:
        """Any bytes.

        Raises:
            ConfigError: there is no such secret.
        """
        if name not in self._known:
            raise ConfigError(f"No secret with id '{name}'")
        return self._known[name]

    def password(self, name: str) -> bytes:
        """Text, as a user would type it, in UTF-8.

        Raises:
            ConfigError: there is no such secret, or it is none.
        """
        content = self.content(name)
        try:
            content.decode()
        except UnicodeDecodeError:
            is_text = False
        else:
            is_text = b"\0" not in content
        if not is_text:
            raise ConfigError(f"Data from secret {name} is not valid UTF-8")
        return content

    def _decrypted(self, config: SecretConfig, content: bytes) -> bytes:
        key = self.content(config.keyid or "")
        if len(key) != _KEY_BYTES:
            raise ConfigError(f"Key should be {_KEY_BYTES} bytes in length")
        if config.iv is None:
            raise ConfigError("IV is required to decrypt secret")
        iv = _decoded(config.iv.encode(errors="surrogateescape"))
        if len(iv) != _BLOCK:
            raise ConfigError(f"IV should be {_BLOCK} bytes in length not {len(iv)}")
        if config.format == "base64":
            content = _decoded(content)
        if len(content) % _BLOCK or not content:
            raise ConfigError(
                f"Length {len(content)} must be a multiple of block size {_BLOCK}, and not 0"
            )
        plain = Aes(key).cbc_decrypt(iv, content)
        padding = plain[-1]
        if padding > min(_BLOCK, len(plain)):
            raise ConfigError(
                f"Incorrect number of padding bytes ({padding}) found on decrypted data"
            )
        return plain[: len(plain) - padding]


def _content(config: SecretConfig) -> bytes:
    """As it is written."""
    if config.file is not None and config.data is not None:
        raise ConfigError("'file' and 'data' are mutually exclusive")
    if config.data is not None:
        return config.data.encode(errors="surrogateescape")
    if config.file is None:
        raise ConfigError("Either 'file' or 'data' must be provided")
    try:
        with open(config.file, "rb") as file:
            content = file.read(_MOST_BYTES + 1)
    except OSError as error:
        what = "Error reading" if isinstance(error, IsADirectoryError) else "Failed to open"
        reason = error.strerror or os.strerror(error.errno or 0)
        raise ConfigError(
            f"Unable to read {config.file}: {reason}",
            qemu_text=f"Unable to read {config.file}: {what} file “{config.file}”: {reason}",
        ) from None
    if len(content) > _MOST_BYTES:
        raise ConfigError(f"Unable to read {config.file}: it is larger than {_MOST_BYTES} bytes")
    return content


def _decoded(text: bytes) -> bytes:
    """Base64; as in QEMU, what is left over at the end does not count."""
    wrong = "Base64 data contains invalid characters"
    if not _BASE64.issuperset(text):
        raise ConfigError(wrong)
    letters = text.replace(b"\n", b"")
    try:
        return binascii.a2b_base64(letters[: len(letters) // 4 * 4])
    except binascii.Error:
        raise ConfigError(wrong) from None
