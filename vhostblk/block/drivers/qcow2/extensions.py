"""Extensions of the header of a qcow2 image (qcow2 specification, "Header extensions").

Those that are not known are kept. Knows nothing about files.
"""

from __future__ import annotations

import enum
import struct
from collections.abc import Iterator

from vhostblk.block.lean_dataclass import lean_dataclass
from vhostblk.errors import ImageError

_EXTENSION = struct.Struct(">II")
_PLACE = struct.Struct(">QQ")
_FEATURE = struct.Struct(">BB46s")
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


class ExtensionType(enum.IntEnum):
    """Extensions that have a meaning here; others are kept as they are."""

    END = 0
    BACKING_FORMAT = 0xE2792ACA
    FEATURE_NAMES = 0x6803F857
    BITMAPS = 0x23852875
    ENCRYPTION = 0x0537BE77
    DATA_FILE = 0x44415441


@lean_dataclass(frozen=True, slots=True)
class Extension:
    """A header extension as it is in the file."""

    type: int
    data: bytes

    def to_bytes(self) -> bytes:
        """As it goes to the file."""
        return _EXTENSION.pack(self.type, len(self.data)) + self.data + bytes(-len(self.data) % 8)


def encryption_header(offset: int, length: int) -> Extension:
    """The extension that says where the LUKS header is ("Full disk encryption header pointer")."""
    return Extension(ExtensionType.ENCRYPTION, _PLACE.pack(offset, length))


def feature_names(cluster_size: int) -> tuple[Extension, ...]:
    """The extension that names all features, if clusters are so large that something else has room, too."""
    if cluster_size < _LEAST_FOR_NAMES:
        return ()
    names = b"".join(_FEATURE.pack(*feature) for feature in _FEATURE_NAMES)
    return (Extension(ExtensionType.FEATURE_NAMES, names),)


def parse_extensions(data: bytes, start: int, backing_offset: int) -> Iterator[Extension]:
    """Extensions, up to the one that ends them, or to the name of the backing file.

    Args:
        data: the beginning of the file.
        start: where the fields end.
        backing_offset: where the name is; 0: there is none.

    Raises:
        ImageError: one has no room, or is there twice.
    """
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


def refuse_features(unknown: int, extensions: tuple[Extension, ...]) -> None:
    """Refuse an image that has these incompatible features, in the names it has for them.

    Raises:
        ImageError: there are any.
    """
    if not unknown:
        return
    found = []
    for extension in extensions:
        if extension.type == ExtensionType.FEATURE_NAMES:
            data = extension.data + bytes(-len(extension.data) % _FEATURE.size)
            for kind, bit, name in _FEATURE.iter_unpack(data):
                said = name.partition(b"\0")[0]
                if not said:
                    break
                if kind == 0 and unknown >> bit & 1:
                    found.append(decode(said))
                    unknown &= ~(1 << bit)
    if unknown:
        found.append(f"Unknown incompatible feature: {unknown:x}")
    raise ImageError(f"Unsupported qcow2 feature(s): {', '.join(found)}")


def decode(name: bytes) -> str:
    """Names are bytes to the kernel, and to us, too."""
    return name.decode(errors="surrogateescape")
