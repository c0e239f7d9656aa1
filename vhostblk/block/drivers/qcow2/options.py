"""What users may ask of a qcow2 node: QEMU's names."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from vhostblk.block.drivers.qcow2.header import Compatible, Crypt, Header
from vhostblk.block.lean_dataclass import lean_dataclass
from vhostblk.block.options import BOOLEAN, SIZE, STRING, OptionType, choice, option, to_integer
from vhostblk.errors import ConfigError

_INT32_MAX = (1 << 31) - 1
_UINT32_MAX = (1 << 32) - 1
_MAX_L2_CACHE = 32 << 20
_MAX_SLICE = 64 << 10
_MIN_SLICE = 512


def _to_interval(name: str, value: object) -> int:
    """Seconds."""
    if value == "-1":
        value = _UINT32_MAX + 1  # what QEMU takes it for
    seconds = to_integer(name, value)
    if seconds > _UINT32_MAX:
        raise ConfigError(
            f"Parameter '{name}' expects a number up to {_UINT32_MAX}, not '{value}'",
            qemu_text="Cache clean interval too big",
        )
    return seconds


_TEMPLATES = {"overlap-check", "overlap-check.template"}
_CACHES = {"l2-cache-size", "refcount-cache-size"}

_NO_TEMPLATE = (
    "Unsupported value '{value}' for qcow2 option 'overlap-check'. "
    "Allowed are any of the following: none, constant, cached, all"
)


@lean_dataclass(frozen=True, slots=True)
class Qcow2Options:
    """QEMU's options for qcow2, besides `file`, `backing` and `data-file`."""

    l2_cache_size: int | None = option(
        SIZE,
        None,
        about="bytes of L2 tables to keep; absent: enough for the disk, at most 32 MiB",
        mutable=True,
    )
    l2_cache_entry_size: int | None = option(
        SIZE,
        None,
        about="bytes of an L2 table to read at a time, a power of two; absent: a cluster, at most 64 KiB",
        mutable=True,
    )
    refcount_cache_size: int | None = option(
        SIZE, None, about="bytes of reference counts to keep; absent: four clusters", mutable=True
    )
    cache_size: int | None = option(
        SIZE,
        None,
        about="bytes for tables of all kinds; what `l2-cache-size` does not say",
        mutable=True,
    )

    lazy_refcounts: bool | None = option(
        BOOLEAN,
        None,
        about="put off writing reference counts: a crash leaves an image that is repaired when it is opened for writing"
        "; absent: as the image says",
        mutable=True,
    )

    overlap_check: str | None = option(
        choice("none", "constant", "cached", "all", qemu_text=_NO_TEMPLATE),
        None,
        about="which tables are looked for where something is written; less than `cached` is the same as that",
        mutable=True,
    )
    overlap_template: str | None = option(
        choice("none", "constant", "cached", "all", qemu_text=_NO_TEMPLATE),
        None,
        name="overlap-check.template",
        about="the same",
        mutable=True,
    )
    overlap_main_header: bool | None = option(
        BOOLEAN, None, name="overlap-check.main-header", about="always checked", mutable=True
    )
    overlap_active_l1: bool | None = option(
        BOOLEAN, None, name="overlap-check.active-l1", about="always checked", mutable=True
    )
    overlap_active_l2: bool | None = option(
        BOOLEAN, None, name="overlap-check.active-l2", about="always checked", mutable=True
    )
    overlap_refcount_table: bool | None = option(
        BOOLEAN, None, name="overlap-check.refcount-table", about="always checked", mutable=True
    )
    overlap_refcount_block: bool | None = option(
        BOOLEAN, None, name="overlap-check.refcount-block", about="always checked", mutable=True
    )
    overlap_snapshot_table: bool | None = option(
        BOOLEAN, None, name="overlap-check.snapshot-table", about="always checked", mutable=True
    )
    overlap_inactive_l1: bool | None = option(
        BOOLEAN, None, name="overlap-check.inactive-l1", about="always checked", mutable=True
    )
    overlap_inactive_l2: bool | None = option(
        BOOLEAN,
        None,
        name="overlap-check.inactive-l2",
        about="check tables that only snapshots use, too",
        mutable=True,
    )
    overlap_bitmap_directory: bool | None = option(
        BOOLEAN, None, name="overlap-check.bitmap-directory", about="always checked", mutable=True
    )

    pass_discard_request: bool | None = option(
        BOOLEAN,
        None,
        about="give back the room of what is discarded; absent: as the option discard says",
        mutable=True,
    )
    pass_discard_snapshot: bool | None = option(
        BOOLEAN, None, about="no effect: as pass-discard-request", mutable=True
    )
    pass_discard_other: bool | None = option(
        BOOLEAN, None, about="no effect: as pass-discard-request", mutable=True
    )
    cache_clean_interval: int | None = option(
        OptionType(_to_interval, "number", qemu_text="Parameter '{name}' expects a number"),
        None,
        about="no effect: tables are kept as long as there is room",
        mutable=True,
    )

    encrypt_format: str | None = option(
        STRING, None, name="encrypt.format", about="how it has to be encrypted: luks or aes"
    )
    encrypt_key_secret: str | None = option(
        STRING,
        None,
        name="encrypt.key-secret",
        about="id of the secret with the password of an encrypted image",
        strong=True,
    )

    def check(self, header: Header) -> None:
        """Whether they go together, and this image allows them.

        Raises:
            ConfigError: the first that is wrong.
        """
        self._check_encryption(header)
        self._check_caches()
        l2, slice_ = self.l2_bytes(header), self.slice_bytes(header)
        self._check_size("L2 cache size", l2 // slice_)
        self._check_size("Refcount cache size", self.refcount_bytes() // header.cluster_size)
        self.is_lazy(header)
        check, template = self.overlap_check, self.overlap_template
        if check is not None and template is not None and check != template:
            raise ConfigError(
                f"Conflicting values for qcow2 options 'overlap-check' ('{check}') and "
                f"'overlap-check.template' ('{template}')"
            )

    def _check_caches(self) -> None:
        l2, refcounts, both = self.l2_cache_size, self.refcount_cache_size, self.cache_size
        if both is None:
            return
        if l2 is not None and refcounts is not None:
            raise ConfigError(
                "cache-size, l2-cache-size and refcount-cache-size may not be set at the same time"
            )
        for name, size in (("l2-cache-size", l2), ("refcount-cache-size", refcounts)):
            if size is not None and size > both:
                raise ConfigError(f"{name} may not exceed cache-size")

    def _check_encryption(self, header: Header) -> None:
        wanted = self.encrypt_format
        if wanted is None:
            return
        there = Crypt(header.crypt).name.lower()
        if not header.crypt:
            raise ConfigError(
                f"No encryption in image header, but options specified format '{wanted}'"
            )
        if wanted != there:
            raise ConfigError(
                f"Header reported '{there}' encryption format but options specify '{wanted}'"
            )

    def _check_size(self, what: str, entries: int) -> None:
        if entries > _INT32_MAX:
            raise ConfigError(f"{what} too big")

    @property
    def passes_discards(self) -> bool | None:
        """Whether room goes back to the host; None: as the node's `discard` says."""
        return self.pass_discard_request

    @property
    def protects_inactive(self) -> bool:
        """Whether L2 tables that only snapshots use are looked for, too. All others always are: that is cheap."""
        if self.overlap_inactive_l2 is not None:
            return self.overlap_inactive_l2
        return "all" in (self.overlap_check, self.overlap_template)

    def is_lazy(self, header: Header) -> bool:
        """Whether to put off writing reference counts.

        Raises:
            ConfigError: this image cannot say that they were.
        """
        if self.lazy_refcounts and header.version < 3:
            raise ConfigError(
                "Parameter 'lazy-refcounts' needs an image of version 3",
                qemu_text="Lazy refcounts require a qcow2 image with at least qemu 1.1 compatibility level",
            )
        if self.lazy_refcounts is None:
            return bool(header.compatible & Compatible.LAZY_REFCOUNTS)
        return self.lazy_refcounts

    def slice_bytes(self, header: Header) -> int:
        """Of an L2 table to read at a time.

        Raises:
            ConfigError: not what this image allows.
        """
        size = self.l2_cache_entry_size
        if size is None:
            size = min(header.cluster_size, _MAX_SLICE)
        if size.bit_count() != 1 or not _MIN_SLICE <= size <= header.cluster_size:
            raise ConfigError(
                "Parameter 'l2-cache-entry-size' must be a power of two between "
                f"{_MIN_SLICE} and the cluster size ({header.cluster_size})",
                qemu_text="L2 cache entry size must be a power of two between "
                f"{_MIN_SLICE} and the cluster size ({header.cluster_size})",
            )
        return size

    def l2_bytes(self, header: Header) -> int:
        """Of L2 tables to keep."""
        total, both = self.l2_cache_size, self.cache_size
        if total is not None:
            return total
        tables = header.l1_entries_needed(header.size) * header.cluster_size
        return (
            min(tables, _MAX_L2_CACHE) if both is None else both - (self.refcount_cache_size or 0)
        )

    def refcount_bytes(self) -> int:
        """Of reference counts to keep."""
        if self.refcount_cache_size is not None:
            return self.refcount_cache_size
        return max((self.cache_size or 0) - (self.l2_cache_size or 0), 0)


def join_options(new: Mapping[str, Any], old: Mapping[str, Any]) -> dict[str, Any]:
    """New options, and old ones that those do not replace.

    A new template replaces all that was said of overlap checks, a new size of all caches what was said of each; and
    sizes of each replace that of all.
    """
    left = dict(old)
    if _TEMPLATES & new.keys():
        left = {name: value for name, value in left.items() if not name.startswith("overlap-check")}
    if "cache-size" in new:
        left = {name: value for name, value in left.items() if name not in _CACHES}
    joined = {**left, **new}
    if joined.keys() >= _CACHES and "cache-size" not in new:
        joined.pop("cache-size", None)
    return joined
