"""What a qcow2 node does about encryption when it is opened, and when its keys change.

The rest is in `encryption.py`. Knows nothing about requests.
"""

from __future__ import annotations

import errno
from dataclasses import replace
from typing import TYPE_CHECKING

from vhostblk.block.crypto import luks_amend
from vhostblk.block.driver import OpenContext
from vhostblk.block.drivers.qcow2 import encryption
from vhostblk.block.drivers.qcow2.header import Crypt, Header
from vhostblk.block.drivers.qcow2.options import Qcow2Options
from vhostblk.block.edge import Edge
from vhostblk.block.node import BlockNode
from vhostblk.errors import ConfigError, ImageError

if TYPE_CHECKING:
    from vhostblk.block.crypto.encrypted_file import Encryption
    from vhostblk.block.crypto.luks_amend import KeyChange
    from vhostblk.block.crypto.secret import Secrets
    from vhostblk.block.drivers.qcow2.encryption import Opened


class EncryptedNode(BlockNode):
    """The part of a qcow2 node that knows of keys.

    Attributes:
        _encryption: None: there is none, or nobody wants the data.
    """

    options: Qcow2Options
    _header: Header
    _file: Edge
    _encryption: Encryption | None = None
    _opened: Opened | None = None
    _secrets: Secrets

    async def _open_encryption(self, context: OpenContext) -> None:
        """What the header says of it, if it says anything.

        Raises:
            ConfigError: no secret, a wrong one, or a damaged header.
        """
        header = self._header
        if not header.crypt:
            return
        if header.crypt == Crypt.AES and context.serves_guests:
            raise ConfigError(
                "Images in the old encryption format 'aes' are for image tools only: it is not safe; "
                "convert them to format 'luks'",
                errno.ENOSYS,
            )
        self.is_encrypted = True
        self.prepares_writes = False  # whoever writes past us writes what anybody can read
        self._opened = await encryption.open_encryption(
            *(self._file, header, context.secrets, self.options.encrypt_key_secret),
            with_data=not self.without_io,
        )
        self._encryption = self._opened.encryption
        self._secrets = context.secrets

    async def _change_keys(self, change: KeyChange | None, *, force: bool) -> None:
        """Other passwords; what is open stays open.

        Raises:
            ConfigError: why not.
            BlockError: the file's errno.
        """
        assert change is not None
        assert self._opened is not None
        area = encryption.header_range(self._file, self._header)
        opened_with = self.options.encrypt_key_secret or ""
        try:
            header = await luks_amend.change_keys(
                area, self._secrets, opened_with, change, force=force
            )
        except ImageError as error:
            raise ConfigError(str(error)) from None
        self._opened = replace(self._opened, luks=header)
