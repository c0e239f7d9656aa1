"""What can be changed in a qcow2 image: QEMU's options for `qemu-img amend -o`, and which of them cannot be.

Knows nothing about how it is done: `amend.py`.
"""

from __future__ import annotations

import errno

from vhostblk.block.drivers.qcow2.create import check_refcount_bits, version_type
from vhostblk.block.drivers.qcow2.encryption_options import OtherEncryption
from vhostblk.block.drivers.qcow2.header import AutoClear, Header, Incompatible
from vhostblk.block.lean_dataclass import lean_dataclass
from vhostblk.block.options import BOOLEAN, INTEGER, SIZE, STRING, option
from vhostblk.errors import ConfigError


@lean_dataclass(frozen=True, slots=True, kw_only=True)
class Qcow2AmendOptions(OtherEncryption):
    """QEMU's options for changes of qcow2 images; absent: as it is."""

    size: int | None = option(SIZE, None, about="Virtual disk size")
    compat: int | None = option(
        version_type("Unknown compatibility level {}"),
        None,
        about="Compatibility level (v2 [0.10] or v3 [1.1])",
    )
    backing_file: str | None = option(
        STRING, None, name="backing_file", about="File name of a base image"
    )
    backing_fmt: str | None = option(
        STRING, None, name="backing_fmt", about="Image format of the base image"
    )
    data_file: str | None = option(
        STRING, None, name="data_file", about="File name of an external data file"
    )
    data_file_raw: bool | None = option(
        BOOLEAN,
        None,
        name="data_file_raw",
        about="The external data file must stay valid as a raw image",
    )
    lazy_refcounts: bool | None = option(
        BOOLEAN, None, name="lazy_refcounts", about="Postpone refcount updates"
    )
    refcount_bits: int | None = option(
        INTEGER, None, name="refcount_bits", about="Width of a reference count entry in bits"
    )

    def check(self, header: Header) -> None:
        """Refuse what cannot be, before anything is changed.

        Raises:
            ConfigError: in QEMU's words.
        """
        self.key_change(header.crypt)
        version = self.compat or header.version
        bits = self.refcount_bits or 1 << header.refcount_order
        if self.refcount_bits is not None:
            check_refcount_bits(self.refcount_bits)
            if version < 3 and self.refcount_bits != 16:
                raise ConfigError(
                    "Refcount widths other than 16 bits require compatibility level 1.1 or above "
                    "(use compat=1.1 or greater)"
                )
        if self.data_file is not None and not header.has_data_file:
            raise ConfigError("data-file can only be set for images that use an external data file")
        is_raw = bool(header.autoclear & AutoClear.RAW_DATA_FILE)
        if self.data_file_raw and not is_raw:
            raise ConfigError("data-file-raw cannot be set on existing images")
        said = self.backing_file, self.backing_fmt
        # As in QEMU, whoever says one of them says both.
        if said not in ((None, None), (header.backing_name or None, header.backing_format or None)):
            what = "Cannot amend the backing file"
            hint = "You can use 'qemu-img rebase' instead."
            raise ConfigError(f"{what} (rebase does that)", qemu_text=f"{what}\n{hint}")
        if version >= 3:
            return
        if self.lazy_refcounts:
            raise ConfigError(
                "Lazy refcounts only supported with compatibility level 1.1 and above "
                "(use compat=1.1 or greater)"
            )
        if header.version >= 3:
            self._check_downgrade(header, bits)

    def _check_downgrade(self, header: Header, bits: int) -> None:
        why = ""
        left = header.incompatible & ~Incompatible.COMPRESSION
        if bits != 16:
            why = "compat=0.10 requires refcount_bits=16"
        elif header.has_data_file:
            why = "Cannot downgrade an image with a data file"
        elif left:
            why = f"Cannot downgrade an image with incompatible features {left:#x} set"
        elif header.autoclear & AutoClear.BITMAPS:
            why = "Cannot downgrade an image with persistent bitmaps"
        if why:
            raise ConfigError(why, errno.ENOTSUP)
