"""The header of a qcow2 image (qcow2 specification, "Header").

Bytes in, values out, and the reverse. Whatever a header says is checked here before anybody uses it: the file may come
from anywhere. Unknown fields and extensions are kept, so that `to_bytes` gives back what was read.

Knows nothing about files.
"""

from __future__ import annotations

import enum
import struct
from dataclasses import field

from vhostblk.block.drivers.qcow2.extensions import (
    Extension,
    ExtensionType,
    decode,
    parse_extensions,
    refuse_features,
)
from vhostblk.block.lean_dataclass import lean_dataclass
from vhostblk.block.limits import MAX_LENGTH
from vhostblk.errors import ImageError

MAGIC = b"QFI\xfb"
_V2 = struct.Struct(">4sIQIIQIIQQIIQ")
_V3 = struct.Struct(">QQQII")
_V2_LENGTH = _V2.size
_V3_LENGTH = _V2.size + _V3.size

# The specification's limits, and those of everybody who reads such images.
MIN_CLUSTER_BITS = 9
MAX_CLUSTER_BITS = 21
MIN_EXTENDED_CLUSTER_BITS = 14
MAX_BACKING_NAME = 1023
MAX_L1_BYTES = 32 << 20
MAX_REFCOUNT_TABLE_BYTES = 8 << 20
MAX_SNAPSHOTS = 65536
# What QEMU counts entries with.
_INT_MAX = (1 << 31) - 1
_MAX_REFCOUNT_ORDER = 6
_V2_REFCOUNT_ORDER = 4
SUBCLUSTERS = 32
MAX_OFFSET = 1 << 56
"""Offsets in tables have 56 bits."""


class Incompatible(enum.IntFlag):
    """Features without which nobody may open the image."""

    DIRTY = 1
    CORRUPT = 2
    DATA_FILE = 4
    COMPRESSION = 8
    EXTENDED_L2 = 16


# As a number: it is asked for often, and a test of an enumeration's flags takes a microsecond.
_EXTENDED_L2 = int(Incompatible.EXTENDED_L2)


class Compatible(enum.IntFlag):
    """Features that may be ignored."""

    LAZY_REFCOUNTS = 1


class AutoClear(enum.IntFlag):
    """Features that whoever writes without knowing them has to clear."""

    BITMAPS = 1
    RAW_DATA_FILE = 2


class Compression(enum.IntEnum):
    """How compressed clusters are compressed."""

    ZLIB = 0
    ZSTD = 1


class Crypt(enum.IntEnum):
    """How guest data are encrypted."""

    NONE = 0
    AES = 1
    LUKS = 2


_INCOMPATIBLE = sum(Incompatible)
_CRYPT_HEADER = struct.Struct(">QQ")
# A header with keys of the longest kind takes 2 MiB.
_MAX_CRYPT_BYTES = 64 << 20


@lean_dataclass(frozen=True, slots=True)
class Header:
    """A header that has been checked. Offsets and sizes are bytes in the image file.

    Attributes:
        size: of the disk.
        l1_entries: of the active L1 table.
        backing_name: as it is written in the image; empty: there is no backing file.
        backing_offset: where that is in the first cluster, if there is a gap before; else it is behind the extensions.
        crypt: how guest data are encrypted.
        unknown: what a header longer than any we know has behind the known fields.
    """

    version: int
    cluster_bits: int
    size: int
    l1_entries: int
    l1_offset: int
    refcount_table_offset: int
    refcount_table_clusters: int
    snapshots: int = 0
    snapshots_offset: int = 0
    incompatible: int = 0
    compatible: int = 0
    autoclear: int = 0
    refcount_order: int = _V2_REFCOUNT_ORDER
    compression: int = Compression.ZLIB
    backing_name: str = ""
    backing_offset: int = field(default=0, compare=False)
    extensions: tuple[Extension, ...] = field(default=())
    unknown: bytes = b""
    crypt: int = Crypt.NONE

    # ------------------------------------------------------------------ what follows from it

    @property
    def cluster_size(self) -> int:
        """Bytes."""
        return 1 << self.cluster_bits

    @property
    def has_subclusters(self) -> bool:
        """Whether parts of a cluster can be allocated (extended L2 entries)."""
        return bool(self.incompatible & _EXTENDED_L2)

    @property
    def subcluster_size(self) -> int:
        """The smallest unit of allocation, in bytes."""
        return self.cluster_size // SUBCLUSTERS if self.has_subclusters else self.cluster_size

    @property
    def l2_entry_size(self) -> int:
        """Bytes."""
        return 16 if self.has_subclusters else 8

    @property
    def l2_entries(self) -> int:
        """Of an L2 table."""
        return self.cluster_size // self.l2_entry_size

    @property
    def has_data_file(self) -> bool:
        """Whether guest data is in a file of its own."""
        return bool(self.incompatible & Incompatible.DATA_FILE)

    @property
    def backing_format(self) -> str:
        """The driver of the backing file; empty: the image does not say."""
        return self._string(ExtensionType.BACKING_FORMAT)

    @property
    def data_file_name(self) -> str:
        """The external data file, as it is written in the image; empty: the image does not say."""
        return self._string(ExtensionType.DATA_FILE)

    @property
    def crypt_area(self) -> tuple[int, int]:
        """Where the encryption's own header is, and its length; nothing: it has none."""
        for extension in self.extensions:
            if extension.type == ExtensionType.ENCRYPTION and self.crypt == Crypt.LUKS:
                offset, length = _CRYPT_HEADER.unpack(extension.data)
                return offset, length
        return 0, 0

    def _string(self, type_: ExtensionType) -> str:
        for extension in reversed(self.extensions):
            if extension.type == type_:
                return decode(extension.data)
        return ""

    # ------------------------------------------------------------------ bytes

    @classmethod
    def parse(cls, data: bytes, *, for_check: bool = False) -> Header:
        """Read and check a header.

        Args:
            data: the beginning of the file: its first cluster, or less if the file is shorter.
            for_check: of an image whose table of snapshots is going to be checked, and may be damaged.

        Raises:
            ImageError: what is wrong, or not supported.
        """
        if len(data) < _V2_LENGTH or data[:4] != MAGIC:
            raise ImageError("Image is not in qcow2 format")
        (_, version, backing_offset, backing_length, cluster_bits, size, crypt, l1_entries, l1_offset,
         refcount_offset, refcount_clusters, snapshots, snapshots_offset) = _V2.unpack_from(data)  # fmt: skip
        if version not in (2, 3):
            raise ImageError(f"Unsupported qcow2 version {version}")
        if not MIN_CLUSTER_BITS <= cluster_bits <= MAX_CLUSTER_BITS:
            raise ImageError(f"Unsupported cluster size: 2^{cluster_bits}")
        known, unknown, length = _parse_version_3(data, version, cluster_bits)
        if backing_offset > 1 << cluster_bits:
            raise ImageError("Invalid backing file offset")
        extensions = tuple(parse_extensions(data, length, backing_offset))
        refuse_features(known.incompatible & ~_INCOMPATIBLE, extensions)
        if crypt not in tuple(Crypt):
            raise ImageError(f"Unsupported encryption method {crypt}")
        header = cls(
            version=version,
            cluster_bits=cluster_bits,
            size=size,
            l1_entries=l1_entries,
            l1_offset=l1_offset,
            refcount_table_offset=refcount_offset,
            refcount_table_clusters=refcount_clusters,
            snapshots=snapshots,
            snapshots_offset=snapshots_offset,
            incompatible=known.incompatible,
            compatible=known.compatible,
            autoclear=known.autoclear,
            refcount_order=known.refcount_order,
            compression=known.compression,
            backing_name=_backing_name(data, backing_offset, backing_length, cluster_bits),
            backing_offset=backing_offset,
            extensions=extensions,
            unknown=unknown,
            crypt=crypt,
        )
        header.check()
        if not for_check:
            header.check_snapshots("Snapshot table")
        return header

    def to_bytes(self) -> bytes:
        """The header, its extensions and the name of the backing file, as they go to offset 0.

        Raises:
            ImageError: that is more than a cluster.
        """
        extensions = self._extensions_to_bytes()
        name = self.encoded_backing_name
        start = self.backing_start
        head = _V2.pack(
            *(
                MAGIC,
                self.version,
                start if name else 0,
                len(name),
                self.cluster_bits,
                self.size,
                self.crypt,
            ),
            *(self.l1_entries, self.l1_offset, self.refcount_table_offset),
            *(self.refcount_table_clusters, self.snapshots, self.snapshots_offset),
        )
        if start + len(name) > self.cluster_size:
            raise ImageError("The header does not fit into a cluster: names are too long")
        gap = bytes(start - len(head) - len(extensions)) if name else b""
        return head + extensions + gap + name

    @property
    def encoded_backing_name(self) -> bytes:
        """As it is in the file."""
        return self.backing_name.encode(errors="surrogateescape")

    @property
    def extensions_end(self) -> int:
        """Where the extensions end, in bytes from the beginning."""
        return _V2_LENGTH + len(self._extensions_to_bytes())

    @property
    def backing_start(self) -> int:
        """Where the name of the backing file begins, or would."""
        end = self.extensions_end
        return self.backing_offset if self.backing_name and self.backing_offset >= end else end

    def _extensions_to_bytes(self) -> bytes:
        """All that is behind the fields of version 2, but for the name."""
        tail = b""
        if self.version >= 3:
            fields = bytes([self.compression]) + bytes(7) + self.unknown
            length = _V3_LENGTH + len(fields)
            tail = _V3.pack(
                self.incompatible, self.compatible, self.autoclear, self.refcount_order, length
            )
            tail += fields
        tail += b"".join(extension.to_bytes() for extension in self.extensions)
        if self.backing_name and _V2_LENGTH + len(tail) == self.backing_offset:
            return tail  # the name ends them where there is no room for more
        return tail + Extension(ExtensionType.END, b"").to_bytes()

    # ------------------------------------------------------------------ checks

    def check(self) -> None:
        """What holds between fields.

        Raises:
            ImageError: what does not.
        """
        if self.has_subclusters and self.cluster_bits < MIN_EXTENDED_CLUSTER_BITS:
            raise ImageError("Extended L2 entries need clusters of at least 16 KiB")
        if self.refcount_order > _MAX_REFCOUNT_ORDER:
            raise ImageError("Reference count entry width too large; may not exceed 64 bits")
        if bool(self.incompatible & Incompatible.COMPRESSION) != bool(self.compression):
            raise ImageError("Compression type and its feature bit contradict each other")
        if self.compression not in tuple(Compression):
            raise ImageError(f"Unknown compression type {self.compression}")
        if self.autoclear & AutoClear.RAW_DATA_FILE and self.backing_name:
            raise ImageError("An image with a raw external data file cannot have a backing file")
        self.check_sizes()
        self._check_crypt()
        if not self.refcount_table_clusters:
            raise ImageError("Image does not contain a reference count table")
        refcount_bytes = self.refcount_table_clusters * self.cluster_size
        self._check_offset("Reference count table", self.refcount_table_offset, refcount_bytes)
        self._check_offset("Active L1 table", self.l1_offset, self.l1_entries * 8)
        if self.l1_entries_needed(self.size) > _INT_MAX:
            raise ImageError("Image is too big")
        if self.l1_entries < self.l1_entries_needed(self.size):
            raise ImageError("L1 table is too small")

    def _check_crypt(self) -> None:
        """An encrypted image says where the keys are, and no other one does."""
        for extension in self.extensions:
            if extension.type != ExtensionType.ENCRYPTION:
                continue
            if self.crypt != Crypt.LUKS:
                raise ImageError(
                    "CRYPTO header extension only expected with LUKS encryption method"
                )
            if len(extension.data) != _CRYPT_HEADER.size:
                raise ImageError(
                    f"CRYPTO header extension size {len(extension.data)}, but expected size {_CRYPT_HEADER.size}"
                )
        offset, length = self.crypt_area
        if self.crypt == Crypt.LUKS and not length:
            raise ImageError(f"Missing CRYPTO header for crypt method {self.crypt:d}")
        if offset % self.cluster_size:
            raise ImageError(
                f"Encryption header offset '{offset}' is not a multiple of cluster size '{self.cluster_size}'"
            )
        if length > _MAX_CRYPT_BYTES:
            raise ImageError(f"Encryption header is too large: {length} bytes")
        if length:
            self._check_offset("Encryption header", offset, length)
        if self.crypt and self.autoclear & AutoClear.RAW_DATA_FILE:
            raise ImageError("An encrypted image cannot have a raw external data file")

    def check_snapshots(self, name: str) -> None:
        """Whether a table of snapshots can be where it says.

        Raises:
            ImageError: it cannot; begins with this name of it.
        """
        if self.snapshots > MAX_SNAPSHOTS:
            raise ImageError(f"{name} too large")
        # Even if there are none.
        if self.snapshots_offset % self.cluster_size or self.snapshots_offset > MAX_OFFSET:
            raise ImageError(f"{name} offset invalid")

    def check_sizes(self) -> None:
        """Nothing is larger than anybody would read.

        Raises:
            ImageError: what is.
        """
        if self.size > MAX_LENGTH:
            raise ImageError(f"Image is too large: {self.size} bytes")
        if self.l1_entries * 8 > MAX_L1_BYTES:
            raise ImageError("Active L1 table too large")
        if self.refcount_table_clusters * self.cluster_size > MAX_REFCOUNT_TABLE_BYTES:
            raise ImageError("Reference count table too large")

    def l1_entries_needed(self, size: int) -> int:
        """Entries that the L1 table of a disk of this size has."""
        return -(-size // (self.cluster_size * self.l2_entries))

    def _check_offset(self, name: str, offset: int, length: int) -> None:
        if offset % self.cluster_size or offset > MAX_OFFSET - length or (length and not offset):
            raise ImageError(f"{name} offset invalid")


def cluster_size_of(data: bytes | bytearray) -> int:
    """How much of the file `Header.parse` wants, from its first bytes; 0 if they are no header."""
    if len(data) < _V2_LENGTH or data[:4] != MAGIC:
        return 0
    bits = int(_V2.unpack_from(data)[4])
    return 1 << bits if MIN_CLUSTER_BITS <= bits <= MAX_CLUSTER_BITS else 0


@lean_dataclass(frozen=True, slots=True)
class _Version3:
    """What version 2 has not."""

    incompatible: int = 0
    compatible: int = 0
    autoclear: int = 0
    refcount_order: int = _V2_REFCOUNT_ORDER
    compression: int = 0


def _parse_version_3(data: bytes, version: int, cluster_bits: int) -> tuple[_Version3, bytes, int]:
    """The fields that version 2 does not have, what is behind them, and where the header ends."""
    if version == 2:
        return _Version3(), b"", _V2_LENGTH
    if len(data) < _V3_LENGTH:
        raise ImageError("qcow2 header is too short")
    incompatible, compatible, autoclear, order, length = _V3.unpack_from(data, _V2_LENGTH)
    if length < _V3_LENGTH:
        raise ImageError("qcow2 header too short")
    if length > min(1 << cluster_bits, len(data)):
        raise ImageError("qcow2 header exceeds cluster size")
    if length % 8:
        raise ImageError("qcow2 header length is no multiple of 8")
    compression = data[_V3_LENGTH] if length > _V3_LENGTH else 0
    unknown = data[_V3_LENGTH + 8 : length]
    return _Version3(incompatible, compatible, autoclear, order, compression), unknown, length


def _backing_name(data: bytes, offset: int, length: int, cluster_bits: int) -> str:
    if not offset:
        return ""
    if length > min(MAX_BACKING_NAME, (1 << cluster_bits) - offset):
        raise ImageError("Backing file name too long")
    name = data[offset : offset + length]
    if len(name) != length or b"\0" in name:
        raise ImageError("Invalid backing file name")
    return decode(name)
