"""Making qcow2 images (block layer row B35).

Theory of operation: everything that a new image has is known before anything is written (`layout.py`). The old header
goes first, the new one comes last, with a flush before: a file whose making ended early is no image. What a header says
is checked as for an image that is opened.

Options are those of `qemu-img create -o`. Knows nothing about names, and backing files that have to be there:
`block/create.py`.
"""

from __future__ import annotations

import contextlib
import errno
from typing import TYPE_CHECKING, Any

from vhostblk.block.backend import BlockBackend
from vhostblk.block.crypto import encrypted_file, luks
from vhostblk.block.drivers.qcow2 import encryption
from vhostblk.block.drivers.qcow2.compressed import codec
from vhostblk.block.drivers.qcow2.encryption_options import NewEncryption
from vhostblk.block.drivers.qcow2.extensions import (
    Extension,
    ExtensionType,
    encryption_header,
    feature_names,
)
from vhostblk.block.drivers.qcow2.header import (
    MAX_CLUSTER_BITS,
    MIN_CLUSTER_BITS,
    MIN_EXTENDED_CLUSTER_BITS,
    AutoClear,
    Compatible,
    Compression,
    Crypt,
    Header,
    Incompatible,
)
from vhostblk.block.drivers.qcow2.layout import Layout
from vhostblk.block.flags import Preallocation
from vhostblk.block.introspection import filename
from vhostblk.block.iov import IoVec
from vhostblk.block.lean_dataclass import lean_dataclass
from vhostblk.block.limits import SECTOR_SIZE
from vhostblk.block.options import BOOLEAN, INTEGER, SIZE, STRING, OptionType, option, word
from vhostblk.errors import BlockError, ConfigError, ImageError

if TYPE_CHECKING:
    from vhostblk.block.creation import Creation

_VERSIONS = {"0.10": 2, "v2": 2, "1.1": 3, "v3": 3}
_NEEDS_V3 = "compatibility level 1.1 and above (use version=v3 or greater)"


def version_type(complaint: str) -> OptionType:
    """A compatibility level, as a version of the format.

    Args:
        complaint: what is said of others, with `{}` where they are.
    """

    def read(name: str, value: Any) -> int:
        if isinstance(value, str) and value in _VERSIONS:
            return _VERSIONS[value]
        raise ConfigError(complaint.format(value))

    return OptionType(read, "0.10|1.1")


@lean_dataclass(frozen=True, slots=True, kw_only=True)
class Qcow2CreateOptions(NewEncryption):
    """QEMU's options for new qcow2 images: in its order, and in its words, because image tools tell them."""

    cluster_size: int = option(SIZE, 65536, name="cluster_size", about="qcow2 cluster size")
    extended_l2: bool = option(BOOLEAN, False, name="extended_l2", about="Extended L2 tables")
    preallocation: str = option(
        word("off", "metadata", "falloc", "full"),
        "off",
        about="Preallocation mode (allowed values: off, metadata, falloc, full)",
        tacit=True,
    )
    compression_type: str = option(
        word("zlib", "zstd", said="compression-type"),
        "zlib",
        name="compression_type",
        about="Compression method used for image cluster compression",
    )
    size: int = option(SIZE, about="Virtual disk size")
    compat: int = option(
        version_type("Parameter 'version' does not accept value '{}'"),
        3,
        about="Compatibility level (v2 [0.10] or v3 [1.1])",
        tacit=True,
    )
    backing_file: str | None = option(
        STRING, None, name="backing_file", about="File name of a base image"
    )
    backing_fmt: str | None = option(
        STRING, None, name="backing_fmt", about="Image format of the base image"
    )
    # The data file is a child by the time that there is an image: this is for lists of options.
    data_file: str | None = option(
        STRING, None, name="data_file", about="File name of an external data file"
    )
    data_file_raw: bool = option(
        BOOLEAN,
        False,
        name="data_file_raw",
        about="The external data file must stay valid as a raw image",
        tacit=True,
    )
    lazy_refcounts: bool = option(
        BOOLEAN, False, name="lazy_refcounts", about="Postpone refcount updates"
    )
    refcount_bits: int = option(
        INTEGER, 16, name="refcount_bits", about="Width of a reference count entry in bits"
    )

    def __post_init__(self) -> None:
        if self.size % SECTOR_SIZE:
            raise ConfigError(f"Image size must be a multiple of {SECTOR_SIZE} bytes")
        self._refuse_in_version_2(self.extended_l2, "Extended L2 entries are only supported with")
        check_cluster_size(self.cluster_size, extended_l2=self.extended_l2)
        if self.backing_file and self.preallocation != "off" and not self.extended_l2:
            raise ConfigError(
                "Backing file and preallocation can only be used at the same time if extended_l2 is on"
            )
        if not self.backing_file and self.backing_fmt is not None:
            raise ConfigError("Backing format cannot be used without backing file")
        self._refuse_in_version_2(self.lazy_refcounts, "Lazy refcounts only supported with")
        check_refcount_bits(self.refcount_bits)
        self._refuse_in_version_2(
            self.refcount_bits != 16,
            "Different refcount widths than 16 bits require",
            "compatibility level 1.1 or above (use version=v3 or greater)",
        )
        if self.backing_file and self.data_file_raw:
            raise ConfigError("Backing file and data-file-raw cannot be used at the same time")
        self._refuse_in_version_2(
            self.compression_type != "zlib", "Non-zlib compression type is only supported with"
        )

    def _refuse_in_version_2(self, wanted: bool, what: str, needed: str = _NEEDS_V3) -> None:
        if wanted and self.compat < 3:
            raise ConfigError(f"{what} {needed}")


def check_cluster_size(size: int, *, extended_l2: bool) -> None:
    """Refuse a size that no image can have.

    Raises:
        ConfigError: says which there are.
    """
    least, most = 1 << MIN_CLUSTER_BITS, 1 << MAX_CLUSTER_BITS
    if size.bit_count() != 1 or not least <= size <= most:
        raise ConfigError(f"Cluster size must be a power of two between {least} and {most >> 10}k")
    if extended_l2 and size < 1 << MIN_EXTENDED_CLUSTER_BITS:
        raise ConfigError(
            "Extended L2 entries are only supported with cluster sizes of at least "
            f"{1 << MIN_EXTENDED_CLUSTER_BITS} bytes"
        )


def check_refcount_bits(bits: int) -> None:
    """Refuse a width that reference counts cannot have.

    Raises:
        ConfigError: says which there are.
    """
    if bits > 64 or bits.bit_count() != 1:
        raise ConfigError("Refcount width must be a power of two and may not exceed 64 bits")


def layout_of(options: Qcow2CreateOptions, *, external: bool = False) -> Layout:
    """What a new image has.

    Args:
        external: guest data are in a file of their own.
    """
    return Layout(
        size=options.size,
        cluster_size=options.cluster_size,
        refcount_order=options.refcount_bits.bit_length() - 1,
        l2_entry_size=16 if options.extended_l2 else 8,
        crypt_bytes=options.luks.payload_bytes if options.crypt == Crypt.LUKS else 0,
        # A raw data file shows the same with tables and without: they say where everything is.
        preallocated=options.preallocation != "off" or options.data_file_raw,
        external=external,
    )


def plan(options: Qcow2CreateOptions, *, data_file: str | None) -> tuple[Layout, Header]:
    """What a new image has, and its header.

    Args:
        data_file: the name of the external data file.

    Raises:
        ConfigError: EFBIG: the disk is too large for such clusters; names are too long; options contradict each other.
    """
    if options.crypt and options.data_file_raw:
        raise ConfigError("An encrypted image cannot have a raw external data file")
    if data_file is None and options.data_file_raw:
        raise ConfigError("data-file-raw requires data-file")
    if data_file is not None and options.compat < 3:
        raise ConfigError(f"External data files are only supported with {_NEEDS_V3}")
    layout = layout_of(options, external=data_file is not None)
    header = Header(
        version=options.compat,
        cluster_bits=options.cluster_size.bit_length() - 1,
        size=options.size,
        l1_entries=layout.l1_entries,
        l1_offset=layout.l1_offset,
        refcount_table_offset=layout.refcount_table_offset,
        refcount_table_clusters=layout.refcount_table_clusters,
        incompatible=_incompatible(options, data_file),
        compatible=Compatible.LAZY_REFCOUNTS if options.lazy_refcounts else 0,
        autoclear=AutoClear.RAW_DATA_FILE if options.data_file_raw else 0,
        refcount_order=layout.refcount_order,
        compression=Compression[options.compression_type.upper()],
        backing_name=options.backing_file or "",
        extensions=_extensions(options, data_file, layout),
        crypt=options.crypt,
    )
    try:
        header.check_sizes()
    except ImageError as error:
        raise ConfigError(str(error), errno.EFBIG) from None
    try:
        # What nobody could open must not be made.
        Header.parse(header.to_bytes())
    except ImageError as error:
        raise ConfigError(f"Image would not be usable: {error}") from None
    return layout, header


def _incompatible(options: Qcow2CreateOptions, data_file: str | None) -> int:
    found = Incompatible(0)
    if data_file is not None:
        found |= Incompatible.DATA_FILE
    if options.compression_type != "zlib":
        found |= Incompatible.COMPRESSION
    if options.extended_l2:
        found |= Incompatible.EXTENDED_L2
    return found


def _extensions(
    options: Qcow2CreateOptions, data_file: str | None, layout: Layout
) -> tuple[Extension, ...]:
    found = []
    if options.backing_fmt is not None:
        found.append(Extension(ExtensionType.BACKING_FORMAT, _bytes(options.backing_fmt)))
    if data_file is not None:
        found.append(Extension(ExtensionType.DATA_FILE, _bytes(data_file)))
    if layout.crypt_bytes:
        found.append(encryption_header(layout.crypt_offset, layout.crypt_bytes))
    if options.compat >= 3:
        found += feature_names(options.cluster_size)
    return tuple(found)


def _bytes(name: str) -> bytes:
    return name.encode(errors="surrogateescape")


async def create(creation: Creation, options: Qcow2CreateOptions) -> None:
    """Make an image in the child `file`, with its data in the child `data-file` if there is one.

    Raises:
        ConfigError: the options; or the children are not to be had.
        BlockError: a child's errno; the file has no header then.
    """
    has_data_file = creation.has_child("data-file")
    plan(options, data_file="" if has_data_file else None)  # before anything is touched
    if options.compression_type != "zlib":
        codec(Compression.ZSTD)
    password = _password(creation, options)
    file = await creation.child("file")
    data = await creation.child("data-file") if has_data_file else None
    layout, header = plan(options, data_file=filename(data.node) if data is not None else None)
    mode = Preallocation(options.preallocation)
    if data is not None:
        await _prepare_data_file(data, layout, mode)
        mode = Preallocation.OFF
    await _make_room(creation, file, layout, mode)
    for offset, tables in layout.refcount_tables():
        await file.pwritev(offset, IoVec.of(tables))
    for offset, tables in layout.mapping_tables():
        await file.pwritev(offset, IoVec.of(tables))
    if layout.crypt_bytes:
        await luks.format_volume(encryption.header_range(file, header), options.luks, password)
    await file.flush()
    try:
        await file.pwritev(0, IoVec.of(header.to_bytes().ljust(layout.cluster_size, b"\0")))
        await file.flush()
    except BaseException:
        with contextlib.suppress(BlockError):
            await file.pwrite_zeroes(0, SECTOR_SIZE)
        raise


def _password(creation: Creation, options: Qcow2CreateOptions) -> bytes:
    """What an encrypted image is going to be opened with.

    Raises:
        ConfigError: there is no such secret; or it cannot be encrypted like that.
    """
    if not options.crypt:
        return b""
    password = encrypted_file.required_password(
        creation.secrets, options.encrypt_key_secret, "encrypt."
    )
    if options.crypt == Crypt.LUKS:
        options.luks.check()
    encryption.aes_cipher(password)  # whether there is a library
    return password


async def _prepare_data_file(data: BlockBackend, layout: Layout, mode: Preallocation) -> None:
    """As long as the disk; what it has is kept."""
    size = layout.guest_clusters * layout.cluster_size if layout.preallocated else layout.size
    if data.length != size:
        grows = data.length < size and mode is not Preallocation.METADATA
        await data.truncate(size, mode if grows else Preallocation.OFF)


async def _make_room(
    creation: Creation, file: BlockBackend, layout: Layout, mode: Preallocation
) -> None:
    """A file that is long enough, has no header, and is zero where nothing else will be written."""
    if await creation.emptied(file):
        if mode in (Preallocation.FALLOC, Preallocation.FULL):
            # As in QEMU, tables before these are written, and the rest of their clusters is of no use to anybody.
            await file.truncate(layout.l2_offset, Preallocation.OFF)
            await file.truncate(layout.end, mode)
        else:
            await file.truncate(layout.end, Preallocation.OFF)
        if file.node.has_zero_init():
            return
    elif file.length < layout.end:
        raise ConfigError(
            f"Node '{file.node.node_name}' is too small: {file.length} bytes, not {layout.end}",
            errno.ENOSPC,
        )
    await file.pwrite_zeroes(0, min(layout.cluster_size, layout.end))
    await file.flush()
    start = layout.l1_offset
    if start:
        await file.pwrite_zeroes(start, layout.end - start)
