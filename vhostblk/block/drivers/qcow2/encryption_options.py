"""QEMU's options for encrypted qcow2 images, in its words.

Knows nothing about what becomes of them: `encryption.py`.
"""

from __future__ import annotations

import dataclasses
from typing import TYPE_CHECKING, Any

from vhostblk.block.crypto import luks_options
from vhostblk.block.drivers.qcow2.header import Crypt
from vhostblk.block.lean_dataclass import lean_dataclass
from vhostblk.block.options import BOOLEAN, INTEGER, STRING, option, word
from vhostblk.errors import ConfigError

if TYPE_CHECKING:
    from vhostblk.block.crypto.luks import LuksParameters
    from vhostblk.block.crypto.luks_amend import KeyChange

_PREFIX = "encrypt."


def said_of_encryption(options: Any) -> list[str]:
    """The names of those options that somebody has said, without what they begin with."""
    return [
        field.metadata["name"].removeprefix(_PREFIX)
        for field in dataclasses.fields(options)
        if field.metadata["name"].startswith(_PREFIX) and getattr(options, field.name) is not None
    ]


@lean_dataclass(frozen=True, slots=True, kw_only=True)
class NewEncryption:
    """For new images."""

    encryption: bool | None = option(
        BOOLEAN,
        None,
        about="Encrypt the image with format 'aes'. (Deprecated in favor of encrypt.format=aes)",
        tacit=True,
    )
    encrypt_format: str | None = option(
        word("aes", "qcow", "luks", said="format"),
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
        luks_options.CIPHER_ALG,
        None,
        name="encrypt.cipher-alg",
        about=luks_options.ABOUT_CIPHER_ALG,
    )
    encrypt_cipher_mode: str | None = option(
        luks_options.CIPHER_MODE,
        None,
        name="encrypt.cipher-mode",
        about=luks_options.ABOUT_CIPHER_MODE,
    )
    encrypt_ivgen_alg: str | None = option(
        luks_options.IVGEN_ALG,
        None,
        name="encrypt.ivgen-alg",
        about=luks_options.ABOUT_IVGEN_ALG,
    )
    encrypt_ivgen_hash_alg: str | None = option(
        luks_options.IVGEN_HASH_ALG,
        None,
        name="encrypt.ivgen-hash-alg",
        about=luks_options.ABOUT_IVGEN_HASH_ALG,
    )
    encrypt_hash_alg: str | None = option(
        luks_options.HASH_ALG,
        None,
        name="encrypt.hash-alg",
        about=luks_options.ABOUT_HASH_ALG,
    )
    encrypt_iter_time: int | None = option(
        INTEGER, None, name="encrypt.iter-time", about=luks_options.ABOUT_ITER_TIME
    )

    @property
    def crypt(self) -> Crypt:
        """How the image is going to be encrypted.

        Raises:
            ConfigError: what was said does not go together.
        """
        said = said_of_encryption(self)
        if self.encryption and "format" in said:
            raise ConfigError(
                "'encrypt.format' and its alias 'encryption' can't be used at the same time"
            )
        if said and not self.encryption and "format" not in said:
            raise ConfigError("Parameter 'encrypt.format' is missing")
        if not self.encryption and not said:
            return Crypt.NONE
        if self.encrypt_format == "luks":
            return Crypt.LUKS
        for name in said:
            if name not in ("format", "key-secret"):
                raise ConfigError(f"Parameter '{_PREFIX}{name}' is unexpected")
        return Crypt.AES

    @property
    def luks(self) -> LuksParameters:
        """What a LUKS volume is going to be like."""
        return luks_options.luks_parameters(
            cipher_alg=self.encrypt_cipher_alg,
            cipher_mode=self.encrypt_cipher_mode,
            ivgen_alg=self.encrypt_ivgen_alg,
            ivgen_hash_alg=self.encrypt_ivgen_hash_alg,
            hash_alg=self.encrypt_hash_alg,
            iter_time=self.encrypt_iter_time,
        )


@lean_dataclass(frozen=True, slots=True, kw_only=True)
class OtherEncryption:
    """For changes of images."""

    encrypt_state: str | None = option(
        STRING,
        None,
        name="encrypt.state",
        about=luks_options.ABOUT_STATE,
    )
    encrypt_keyslot: int | None = option(
        INTEGER,
        None,
        name="encrypt.keyslot",
        about=luks_options.ABOUT_KEYSLOT,
    )
    encrypt_old_secret: str | None = option(
        STRING,
        None,
        name="encrypt.old-secret",
        about=luks_options.ABOUT_OLD_SECRET,
    )
    encrypt_new_secret: str | None = option(
        STRING,
        None,
        name="encrypt.new-secret",
        about=luks_options.ABOUT_NEW_SECRET,
    )
    encrypt_iter_time: int | None = option(
        INTEGER, None, name="encrypt.iter-time", about=luks_options.ABOUT_ITER_TIME
    )

    def key_change(self, crypt: int) -> KeyChange | None:
        """What becomes of the keys of an image that is encrypted this way; None: nothing.

        Raises:
            ConfigError: that cannot be.
        """
        if not said_of_encryption(self):
            return None
        if crypt == Crypt.NONE:
            raise ConfigError("Can't amend encryption options - encryption not present")
        if crypt != Crypt.LUKS:
            raise ConfigError("Only LUKS encryption options can be amended")
        return luks_options.key_change(
            state=self.encrypt_state,
            keyslot=self.encrypt_keyslot,
            new_secret=self.encrypt_new_secret,
            old_secret=self.encrypt_old_secret,
            iter_time=self.encrypt_iter_time,
        )
