"""The header of a qcow2 image, and its extensions (qcow2 specification, "Header" and "Header extensions").

Bytes in, values out, and the reverse. Whatever a header says is checked here before anybody uses it: the file may come
from anywhere. Unknown fields and extensions are kept, so that `to_bytes` gives back what was read.

Knows nothing about files.
"""

from __future__ import annotations

import enum
import struct
from collections.abc import Iterator
from dataclasses import dataclass, field

from vhostblk.block.limits import MAX_LENGTH
from vhostblk.errors import ImageError

MAGIC = b"QFI\xfb"
_V2 = struct.Struct(">4sIQIIQIIQQIIQ")
_V3 = struct.Struct(">QQQII")
_EXTENSION = struct.Struct(">II")
_FEATURE = struct.Struct(">BB46s")
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


class Compatible(enum.IntFlag):
    """Features that may be ignored."""

    LAZY_REFCOUNTS = 1


class AutoClear(enum.IntFlag):
    """Features that whoever writes without knowing them has to clear."""

    BITMAPS = 1
    RAW_DATA_FILE = 2


class ExtensionType(enum.IntEnum):
    """Extensions that have a meaning here; others are kept as they are."""

    END = 0
    BACKING_FORMAT = 0xE2792ACA
    FEATURE_NAMES = 0x6803F857
    BITMAPS = 0x23852875
    ENCRYPTION = 0x0537BE77
    DATA_FILE = 0x44415441


class Compression(enum.IntEnum):
    """How compressed clusters are compressed."""

    ZLIB = 0
    ZSTD = 1


_INCOMPATIBLE = sum(Incompatible)
# "Feature name table": type, bit and name of each feature, for programs that do not know it.
_FEATURE_NAMES = (
    (0, 0, b"dirty bit"),
    (0, 1, b"corrupt bit"),
    (0, 2, b"external data file"),
    (0, 3, b"compression type"),
    (0, 4, b"extended L2 entries"),
    (1, 0, b"lazy refcounts"),
    (2, 0, b"bitmaps"),
    (2, 1, b"raw external data"),
)
_LEAST_FOR_NAMES = 8192
_CRYPT_METHODS = ("none", "AES", "LUKS")


@dataclass(frozen=True, slots=True)
class Extension:
    """A header extension as it is in the file."""

    type: int
    data: bytes


@dataclass(frozen=True, slots=True)
class Header:
    """A header that has been checked. Offsets and sizes are bytes in the image file.

    Attributes:
        size: of the disk.
        l1_entries: of the active L1 table.
        backing_name: as it is written in the image; empty: there is no backing file.
        backing_offset: where that is in the first cluster, if there is a gap before; else it is behind the extensions.
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

    # ------------------------------------------------------------------ what follows from it

    @property
    def cluster_size(self) -> int:
        """Bytes."""
        return 1 << self.cluster_bits

    @property
    def has_subclusters(self) -> bool:
        """Whether parts of a cluster can be allocated (extended L2 entries)."""
        return bool(self.incompatible & Incompatible.EXTENDED_L2)

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

    def _string(self, type_: ExtensionType) -> str:
        for extension in reversed(self.extensions):
            if extension.type == type_:
                return _decode(extension.data)
        return ""

    # ------------------------------------------------------------------ bytes

    @classmethod
    def parse(cls, data: bytes) -> Header:
        """Read and check a header.

        Args:
            data: the beginning of the file: its first cluster, or less if the file is shorter.

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
        extensions = tuple(_parse_extensions(data, length, backing_offset))
        _refuse_unknown_features(known.incompatible, extensions)
        if crypt:
            name = _CRYPT_METHODS[crypt] if crypt < len(_CRYPT_METHODS) else str(crypt)
            raise ImageError(f"Encrypted images are not supported (method {name})")
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
        )
        header.check()
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
                0,
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
        for extension in self.extensions:
            tail += _EXTENSION.pack(extension.type, len(extension.data))
            tail += extension.data + bytes(-len(extension.data) % 8)
        if self.backing_name and _V2_LENGTH + len(tail) == self.backing_offset:
            return tail  # the name ends them where there is no room for more
        return tail + _EXTENSION.pack(ExtensionType.END, 0)

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
        if not self.refcount_table_clusters:
            raise ImageError("Image does not contain a reference count table")
        refcount_bytes = self.refcount_table_clusters * self.cluster_size
        self._check_offset("Reference count table", self.refcount_table_offset, refcount_bytes)
        if self.snapshots > MAX_SNAPSHOTS:
            raise ImageError("Snapshot table too large")
        # Even if there are none.
        if self.snapshots_offset % self.cluster_size or self.snapshots_offset > MAX_OFFSET:
            raise ImageError("Snapshot table offset invalid")
        self._check_offset("Active L1 table", self.l1_offset, self.l1_entries * 8)
        if self.l1_entries_needed(self.size) > _INT_MAX:
            raise ImageError("Image is too big")
        if self.l1_entries < self.l1_entries_needed(self.size):
            raise ImageError("L1 table is too small")

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


def feature_names(cluster_size: int) -> tuple[Extension, ...]:
    """The extension that names all features, if clusters are so large that something else has room, too."""
    if cluster_size < _LEAST_FOR_NAMES:
        return ()
    names = b"".join(_FEATURE.pack(*feature) for feature in _FEATURE_NAMES)
    return (Extension(ExtensionType.FEATURE_NAMES, names),)


def cluster_size_of(data: bytes | bytearray) -> int:
    """How much of the file `Header.parse` wants, from its first bytes; 0 if they are no header."""
    if len(data) < _V2_LENGTH or data[:4] != MAGIC:
        return 0
    bits = int(_V2.unpack_from(data)[4])
    return 1 << bits if MIN_CLUSTER_BITS <= bits <= MAX_CLUSTER_BITS else 0


@dataclass(frozen=True, slots=True)
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


def _parse_extensions(data: bytes, start: int, backing_offset: int) -> Iterator[Extension]:
    """Extensions, up to the one that ends them, or to the name of the backing file."""
    end = min(backing_offset, len(data)) if backing_offset else len(data)
    seen: set[int] = set()
    while start < end:
        if start + _EXTENSION.size > end:
            if backing_offset:
                raise ImageError("Header extension too large")
            return  # behind the end of the file is nothing
        type_, length = _EXTENSION.unpack_from(data, start)
        start += _EXTENSION.size
        if type_ == ExtensionType.END:
            return
        if length > end - start:
            raise ImageError("Header extension too large")
        # Of formats of the backing file the last one counts, as in QEMU.
        if (
            type_ in seen
            and type_ in tuple(ExtensionType)
            and type_ != ExtensionType.BACKING_FORMAT
        ):
            raise ImageError(f"Header extension {type_:#x} appears twice")
        seen.add(type_)
        yield Extension(type_, data[start : start + length])
        start += length + -length % 8


def _refuse_unknown_features(incompatible: int, extensions: tuple[Extension, ...]) -> None:
    unknown = incompatible & ~_INCOMPATIBLE
    if not unknown:
        return
    found = []
    for extension in extensions:
        if extension.type == ExtensionType.FEATURE_NAMES:
            whole = len(extension.data) // _FEATURE.size * _FEATURE.size
            for kind, bit, name in _FEATURE.iter_unpack(extension.data[:whole]):
                if kind == 0 and unknown >> bit & 1:
                    found.append(_decode(name.rstrip(b"\0")))
                    unknown &= ~(1 << bit)
    if unknown:
        found.append(f"Unknown incompatible feature: {unknown:x}")
    raise ImageError(f"Unsupported qcow2 feature(s): {', '.join(found)}")


def _backing_name(data: bytes, offset: int, length: int, cluster_bits: int) -> str:
    if not offset:
        return ""
    if length > min(MAX_BACKING_NAME, (1 << cluster_bits) - offset):
        raise ImageError("Backing file name too long")
    name = data[offset : offset + length]
    if len(name) != length or b"\0" in name:
        raise ImageError("Invalid backing file name")
    return _decode(name)


def _decode(name: bytes) -> str:
    """Names are bytes to the kernel, and to us, too."""
    return name.decode(errors="surrogateescape")
