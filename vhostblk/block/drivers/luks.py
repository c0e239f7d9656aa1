"""`luks`: a file that is a LUKS volume, version 1, as QEMU's driver of this name and cryptsetup have it.

Header and keys come first (`block/crypto/luks_header.py`), then the disk, sector by sector. What opens it is a secret;
without, all there is to know is what the header says.
"""

from __future__ import annotations

import errno
from dataclasses import dataclass
from types import MappingProxyType
from typing import TYPE_CHECKING, Any

from vhostblk.block.crypto import luks, luks_options
from vhostblk.block.crypto.encrypted_file import (
    Encryption,
    HeaderRange,
    open_luks,
    required_password,
)
from vhostblk.block.crypto.library import Aes
from vhostblk.block.crypto.luks import LuksParameters
from vhostblk.block.crypto.luks_amend import change_keys
from vhostblk.block.crypto.luks_header import MAGIC, VERSION, LuksHeader
from vhostblk.block.crypto.secret import Secrets
from vhostblk.block.driver import NodeInfo
from vhostblk.block.drivers.new_file import PREALLOCATION
from vhostblk.block.edge import Edge
from vhostblk.block.flags import Preallocation
from vhostblk.block.image_info import FormatInfo
from vhostblk.block.iov import IoVec
from vhostblk.block.length import Measurement
from vhostblk.block.limits import SECTOR_SIZE, align_down
from vhostblk.block.node import BlockNode, OpenContext, Role
from vhostblk.block.options import INTEGER, SIZE, STRING, option
from vhostblk.errors import ConfigError, ImageError

if TYPE_CHECKING:
    from vhostblk.block.creation import Creation

_SIGNATURE = MAGIC + VERSION.to_bytes(2)


@dataclass(frozen=True, slots=True)
class LuksOptions:
    """QEMU's options for luks, besides `file`."""

    key_secret: str | None = option(
        STRING, None, about="id of the secret with the password", strong=True
    )


@dataclass(frozen=True, slots=True, kw_only=True)
class _NewVolume:
    """What decides what a new volume is like."""

    size: int = option(SIZE, about="Virtual disk size")
    key_secret: str | None = option(
        STRING, None, about="ID of the secret that provides the keyslot passphrase"
    )
    cipher_alg: str | None = option(
        luks_options.CIPHER_ALG, None, about=luks_options.ABOUT_CIPHER_ALG
    )
    cipher_mode: str | None = option(
        luks_options.CIPHER_MODE, None, about=luks_options.ABOUT_CIPHER_MODE
    )
    ivgen_alg: str | None = option(luks_options.IVGEN_ALG, None, about=luks_options.ABOUT_IVGEN_ALG)
    ivgen_hash_alg: str | None = option(
        luks_options.IVGEN_HASH_ALG, None, about=luks_options.ABOUT_IVGEN_HASH_ALG
    )
    hash_alg: str | None = option(luks_options.HASH_ALG, None, about=luks_options.ABOUT_HASH_ALG)
    iter_time: int | None = option(INTEGER, None, about=luks_options.ABOUT_ITER_TIME)

    @property
    def parameters(self) -> LuksParameters:
        """The same for whoever makes it."""
        return luks_options.luks_parameters(
            cipher_alg=self.cipher_alg,
            cipher_mode=self.cipher_mode,
            ivgen_alg=self.ivgen_alg,
            ivgen_hash_alg=self.ivgen_hash_alg,
            hash_alg=self.hash_alg,
            iter_time=self.iter_time,
        )


@dataclass(frozen=True, slots=True, kw_only=True)
class LuksCreateOptions(_NewVolume):
    """QEMU's options for new luks images."""

    # It is the file's, as image tools tell it.
    preallocation: str = option(
        PREALLOCATION, "off", about="whether the disk gets its room now", listed=False
    )


@dataclass(frozen=True, slots=True, kw_only=True)
class LuksMeasureOptions(_NewVolume):
    """What decides how large an image gets."""


@dataclass(frozen=True, slots=True, kw_only=True)
class LuksAmendOptions:
    """QEMU's options for changes of luks images."""

    state: str | None = option(STRING, None, about=luks_options.ABOUT_STATE)
    keyslot: int | None = option(INTEGER, None, about=luks_options.ABOUT_KEYSLOT)
    old_secret: str | None = option(STRING, None, about=luks_options.ABOUT_OLD_SECRET)
    new_secret: str | None = option(STRING, None, about=luks_options.ABOUT_NEW_SECRET)
    iter_time: int | None = option(INTEGER, None, about=luks_options.ABOUT_ITER_TIME)


class LuksNode(BlockNode):
    """A LUKS volume."""

    driver_name = "luks"
    options_type = LuksOptions
    options: LuksOptions
    child_keys = ("file",)
    # Image tools write dashes here.
    create_aliases = MappingProxyType(
        {
            name: name
            for name in (
                *("key-secret", "cipher-alg", "cipher-mode", "ivgen-alg", "ivgen-hash-alg"),
                *("hash-alg", "iter-time"),
            )
        }
    )
    create_child_keys = ("file",)
    is_encrypted = True
    _file: Edge
    _luks: LuksHeader
    _encryption: Encryption | None = None
    _secrets: Secrets

    @classmethod
    def amend_options_type(cls) -> type[Any] | None:
        """Keys."""
        return LuksAmendOptions

    @classmethod
    def create_options_type(cls) -> type[Any] | None:
        """Ciphers, and a key."""
        return LuksCreateOptions

    @classmethod
    def probe(cls, header: bytes, filename: str) -> int:
        """By magic and version."""
        return 100 if header.startswith(_SIGNATURE) else 0

    @classmethod
    async def create(cls, creation: Creation, options: LuksCreateOptions) -> None:
        """Header and keys, and room for the disk, which nobody writes.

        Raises:
            ConfigError: the options; ENOSPC: a device is too small.
            BlockError: the child's errno.
        """
        password = required_password(creation.secrets, options.key_secret)
        parameters = options.parameters
        parameters.check()
        Aes(bytes(16))  # whether there is a library
        file = await creation.child("file")
        end = parameters.payload_bytes + options.size
        if await creation.emptied(file):
            await file.truncate(end, Preallocation(options.preallocation))
        elif file.length < end:
            raise ConfigError(
                f"Node '{file.node.node_name}' is too small: {file.length} bytes, not {end}",
                errno.ENOSPC,
            )
        await luks.format_volume(HeaderRange(file, 0, end), parameters, password)

    @classmethod
    def measure_options_type(cls) -> type[Any] | None:
        """Keys of other lengths take more room."""
        return LuksMeasureOptions

    @classmethod
    async def measure(cls, options: LuksMeasureOptions, source: BlockNode | None) -> Measurement:
        """All of the disk, and what is before it."""
        if options.key_secret is None:
            raise ConfigError("Parameter 'key-secret' is required for cipher")
        parameters = options.parameters
        parameters.check()
        size = parameters.payload_bytes + options.size
        return Measurement(size, size, None)

    async def open(self, context: OpenContext) -> None:
        """Read the header, and find the key.

        Raises:
            ConfigError: no LUKS volume, a damaged one, or not its password.
        """
        self._file = await context.open_child(self, "file", Role.IMAGE)
        self._secrets = context.secrets
        password = None
        if not self.without_io:
            password = required_password(context.secrets, self.options.key_secret)
        self._luks, self._encryption = await open_luks(self._area(), password, by_place=False)
        if self._luks.payload_offset > self._file.node.length:
            raise ConfigError("LUKS payload is behind the end of the file")
        self.length = self._length_in(self._file.node.length)

    def _area(self) -> HeaderRange:
        return HeaderRange(self._file, 0, self._file.node.length)

    def _length_in(self, available: int) -> int:
        return align_down(max(available - self._luks.payload_offset, 0), SECTOR_SIZE)

    def refresh_limits(self) -> None:
        """Whole sectors are encrypted."""
        self.limits.request_alignment = SECTOR_SIZE

    async def refresh_length(self) -> None:
        """As long as the child allows, which has to look first."""
        await super().refresh_length()
        self.child_resized(self._file)

    def child_resized(self, edge: Edge) -> None:
        """Follow."""
        self.set_length(self._length_in(edge.node.length))

    def info(self) -> NodeInfo | None:
        """The child's."""
        return self._file.node.info()

    async def driver_format_info(self) -> FormatInfo:
        """The header, without what is secret."""
        return FormatInfo(self.driver_name, self._luks.facts())

    async def driver_preadv(self, offset: int, length: int, iov: IoVec) -> None:
        """Decrypted."""
        assert self._encryption is not None
        place = self._luks.payload_offset + offset
        await self._encryption.read(self._file, offset, place, iov)

    async def driver_pwritev(self, offset: int, length: int, iov: IoVec, flags: int) -> None:
        """Encrypted."""
        assert self._encryption is not None
        place = self._luks.payload_offset + offset
        await self._encryption.write(self._file, offset, place, iov)

    async def driver_truncate(self, length: int, preallocation: Preallocation) -> None:
        """The child's end moves; what comes reads as anything."""
        await self._file.truncate(length + self._luks.payload_offset, preallocation)

    async def driver_amend(
        self, options: LuksAmendOptions, progress: Any, *, force: bool = False
    ) -> None:
        """Other passwords."""
        change = luks_options.key_change(
            state=options.state,
            keyslot=options.keyslot,
            new_secret=options.new_secret,
            old_secret=options.old_secret,
            iter_time=options.iter_time,
        )
        try:
            self._luks = await change_keys(
                self._area(), self._secrets, self.options.key_secret or "", change, force=force
            )
        except ImageError as error:
            raise ConfigError(str(error)) from None
