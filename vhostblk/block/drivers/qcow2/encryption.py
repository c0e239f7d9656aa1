"""QEMU's options for encrypted qcow2 images: they are known by name, told as image tools tell them, and refused."""

from __future__ import annotations

import dataclasses
import errno
from dataclasses import dataclass

from vhostblk.block.options import BOOLEAN, INTEGER, STRING, option
from vhostblk.errors import ConfigError


@dataclass(frozen=True, slots=True, kw_only=True)
class _EncryptionOptions:
    """What both kinds of options have."""

    def refuse_encryption(self, why: str) -> None:
        """Nothing here can be done.

        Raises:
            ConfigError: ENOTSUP: somebody wants it.
        """
        for field in dataclasses.fields(self):
            if field.name.startswith("encrypt") and getattr(self, field.name) not in (None, False):
                raise ConfigError(why, errno.ENOTSUP)


@dataclass(frozen=True, slots=True, kw_only=True)
class NewEncryption(_EncryptionOptions):
    """For new images."""

    encryption: bool = option(
        BOOLEAN,
        False,
        about="Encrypt the image with format 'aes'. (Deprecated in favor of encrypt.format=aes)",
        tacit=True,
    )
    encrypt_format: str | None = option(
        STRING,
        None,
        name="encrypt.format",
        about="Encrypt the image, format choices: 'aes', 'luks'",
    )
    encrypt_key_secret: str | None = option(
        STRING,
        None,
        name="encrypt.key-secret",
        about="ID of secret providing qcow AES key or LUKS passphrase",
    )
    encrypt_cipher_alg: str | None = option(
        STRING, None, name="encrypt.cipher-alg", about="Name of encryption cipher algorithm"
    )
    encrypt_cipher_mode: str | None = option(
        STRING, None, name="encrypt.cipher-mode", about="Name of encryption cipher mode"
    )
    encrypt_ivgen_alg: str | None = option(
        STRING, None, name="encrypt.ivgen-alg", about="Name of IV generator algorithm"
    )
    encrypt_ivgen_hash_alg: str | None = option(
        STRING, None, name="encrypt.ivgen-hash-alg", about="Name of IV generator hash algorithm"
    )
    encrypt_hash_alg: str | None = option(
        STRING, None, name="encrypt.hash-alg", about="Name of encryption hash algorithm"
    )
    encrypt_iter_time: int | None = option(
        INTEGER, None, name="encrypt.iter-time", about="Time to spend in PBKDF in milliseconds"
    )


@dataclass(frozen=True, slots=True, kw_only=True)
class OtherEncryption(_EncryptionOptions):
    """For changes of images."""

    encrypt_state: str | None = option(
        STRING,
        None,
        name="encrypt.state",
        about="Select new state of affected keyslots (active/inactive)",
    )
    encrypt_keyslot: int | None = option(
        INTEGER,
        None,
        name="encrypt.keyslot",
        about="Select a single keyslot to modify explicitly",
    )
    encrypt_old_secret: str | None = option(
        STRING,
        None,
        name="encrypt.old-secret",
        about="Select all keyslots that match this password",
    )
    encrypt_new_secret: str | None = option(
        STRING,
        None,
        name="encrypt.new-secret",
        about="New secret to set in the matching keyslots. Empty string to erase",
    )
    encrypt_iter_time: int | None = option(
        INTEGER, None, name="encrypt.iter-time", about="Time to spend in PBKDF in milliseconds"
    )
