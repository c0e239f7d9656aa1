"""What users may ask of a qcow2 node: QEMU's names."""

from __future__ import annotations

from dataclasses import dataclass

from vhostblk.block.drivers.qcow2.header import Compatible, Header
from vhostblk.block.options import BOOLEAN, SIZE, choice, option
from vhostblk.errors import ConfigError

_MAX_L2_CACHE = 32 << 20
_MAX_SLICE = 64 << 10
_MIN_SLICE = 512


_NO_TEMPLATE = (
    "Unsupported value '{{value}}' for qcow2 option '{}'. "
    "Allowed are any of the following: none, constant, cached, all"
)


@dataclass(frozen=True, slots=True)
class Qcow2Options:
    """QEMU's options for qcow2, besides `file`, `backing` and `data-file`."""

    l2_cache_size: int | None = option(
        SIZE, None, about="bytes of L2 tables to keep; absent: enough for the disk, at most 32 MiB"
    )
    l2_cache_entry_size: int | None = option(
        SIZE,
        None,
        about="bytes of an L2 table to read at a time, a power of two; absent: a cluster, at most 64 KiB",
    )
    refcount_cache_size: int | None = option(
        SIZE, None, about="bytes of reference counts to keep; absent: four clusters"
    )
    cache_size: int | None = option(
        SIZE, None, about="bytes for tables of all kinds; what `l2-cache-size` does not say"
    )

    lazy_refcounts: bool | None = option(
        BOOLEAN,
        None,
        about="put off writing reference counts: a crash leaves an image that is repaired when it is opened for writing"
        "; absent: as the image says",
        mutable=True,
    )

    overlap_check: str | None = option(
        choice("none", "constant", "cached", "all", qemu_text=_NO_TEMPLATE.format("overlap-check")),
        None,
        about="which tables are looked for where something is written; less than `cached` is the same as that",
    )
    overlap_template: str | None = option(
        choice(
            *("none", "constant", "cached", "all"),
            qemu_text=_NO_TEMPLATE.format("overlap-check.template"),
        ),
        None,
        name="overlap-check.template",
        about="the same",
    )
    overlap_main_header: bool | None = option(
        BOOLEAN, None, name="overlap-check.main-header", about="always checked"
    )
    overlap_active_l1: bool | None = option(
        BOOLEAN, None, name="overlap-check.active-l1", about="always checked"
    )
    overlap_active_l2: bool | None = option(
        BOOLEAN, None, name="overlap-check.active-l2", about="always checked"
    )
    overlap_refcount_table: bool | None = option(
        BOOLEAN, None, name="overlap-check.refcount-table", about="always checked"
    )
    overlap_refcount_block: bool | None = option(
        BOOLEAN, None, name="overlap-check.refcount-block", about="always checked"
    )
    overlap_snapshot_table: bool | None = option(
        BOOLEAN, None, name="overlap-check.snapshot-table", about="always checked"
    )
    overlap_inactive_l1: bool | None = option(
        BOOLEAN, None, name="overlap-check.inactive-l1", about="always checked"
    )
    overlap_inactive_l2: bool | None = option(
        BOOLEAN,
        None,
        name="overlap-check.inactive-l2",
        about="check tables that only snapshots use, too",
    )
    overlap_bitmap_directory: bool | None = option(
        BOOLEAN, None, name="overlap-check.bitmap-directory", about="always checked"
    )

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
        """Of L2 tables to keep.

        Raises:
            ConfigError: sizes that contradict each other.
        """
        l2, counts, both = self.l2_cache_size, self.refcount_cache_size, self.cache_size
        if both is not None:
            if l2 is not None and counts is not None:
                raise ConfigError(
                    "cache-size, l2-cache-size and refcount-cache-size may not be set at the same time"
                )
            for name, size in (("l2-cache-size", l2), ("refcount-cache-size", counts)):
                if size is not None and size > both:
                    raise ConfigError(f"{name} may not exceed cache-size")
        if l2 is not None:
            return l2
        tables = header.l1_entries_needed(header.size) * header.cluster_size
        return min(tables, _MAX_L2_CACHE) if both is None else both - (counts or 0)

    def refcount_bytes(self) -> int:
        """Of reference counts to keep."""
        if self.refcount_cache_size is not None:
            return self.refcount_cache_size
        return max((self.cache_size or 0) - (self.l2_cache_size or 0), 0)
