"""What a node can take in one request (block layer row B12), and the sizes every request obeys (row B02).

Knows nothing about drivers: they fill these in, the pipeline obeys them.
"""

from __future__ import annotations

import mmap
from dataclasses import field, fields

from vhostblk.block.lean_dataclass import lean_dataclass

SECTOR_SIZE = 512
# Row B02, "Sizes": 2 and 3.
MAX_REQUEST = 0x7FFF_FFFF // SECTOR_SIZE * SECTOR_SIZE
MAX_ALIGNMENT = 1 << 30
MAX_LENGTH = (1 << 63) - MAX_ALIGNMENT
# Largest buffer of zeroes, or of bounced data, that one request may hold.
MAX_ZEROES_BOUNCE = 16 << 20
MAX_BOUNCE = 1 << 20
# How many requests of one node may hold a bounce buffer at once. Guests choose where their memory
# begins, and how much they ask for at once.
MAX_BOUNCING = 64

IOV_MAX = 1024
_INT_MAX = 0x7FFF_FFFF


def align_down(value: int, alignment: int) -> int:
    """The largest multiple of `alignment` that is not above `value`."""
    return value // alignment * alignment


def align_up(value: int, alignment: int) -> int:
    """The smallest multiple of `alignment` that is not below `value`."""
    return -(-value // alignment) * alignment


@lean_dataclass(slots=True)
class BlockLimits:
    """Limits of one node, in bytes; 0 means "no limit" unless said otherwise (row B12.1)."""

    # Offset and length of every request the driver sees are multiples of it; a power of two.
    request_alignment: int = 1
    max_pdiscard: int = 0
    pdiscard_alignment: int = 0  # 0: request_alignment is enough
    max_pwrite_zeroes: int = 0
    pwrite_zeroes_alignment: int = 0  # 0: request_alignment is enough
    opt_transfer: int = 0
    max_transfer: int = 0
    # Element addresses and lengths that need no bounce buffer; and those a bounce buffer gets.
    min_mem_alignment: int = SECTOR_SIZE
    opt_mem_alignment: int = mmap.PAGESIZE
    max_iov: int = IOV_MAX
    # Whatever is in one piece and not longer than this needs no look at the others; `check` finds out.
    as_is: int = field(default=0, init=False)

    def merge(self, child: BlockLimits) -> None:
        """Take over what a node inherits from a child (row B12.3): transfer and memory limits only."""
        self.opt_transfer = max(self.opt_transfer, child.opt_transfer)
        self.max_transfer = _min_non_zero(self.max_transfer, child.max_transfer)
        self.min_mem_alignment = max(self.min_mem_alignment, child.min_mem_alignment)
        self.opt_mem_alignment = max(self.opt_mem_alignment, child.opt_mem_alignment)
        self.max_iov = _min_non_zero(self.max_iov, child.max_iov)

    def fit(self, inherited: BlockLimits) -> None:
        """Make what was inherited whole blocks; the child's pipeline cuts smaller what it cannot take at once."""
        align = self.request_alignment
        if 0 < self.max_transfer == inherited.max_transfer < align:
            self.max_transfer = align
        if self.opt_transfer == inherited.opt_transfer:
            self.opt_transfer = align_up(self.opt_transfer, align)

    def check(self) -> None:
        """Assert what a driver promises (rows B12.1 and B12.5); a violation is a bug of the driver. Sets `as_is`."""
        for limit in fields(self):
            value = getattr(self, limit.name)
            assert 0 <= value <= _INT_MAX, f"{limit.name}={value}"
        align = self.request_alignment
        for name in ("request_alignment", "min_mem_alignment", "opt_mem_alignment"):
            value = getattr(self, name)
            assert value.bit_count() == 1, f"{name}={value} is not a power of two"
        assert align <= MAX_ALIGNMENT, f"request_alignment={align}"
        for name in ("pdiscard_alignment", "pwrite_zeroes_alignment", "opt_transfer"):
            assert not getattr(self, name) % align, f"{name} is no multiple of {align}"
        assert not self.max_transfer or self.max_transfer >= align, "max_transfer below one block"
        for most, unit in (
            (self.max_pdiscard, self.discard_unit),
            (self.max_pwrite_zeroes, self.zeroes_unit),
        ):
            assert not most or most >= unit, f"a limit of {most} with a unit of {unit}"
        self.as_is = self.transfer if align == self.min_mem_alignment == 1 else 0

    @property
    def transfer(self) -> int:
        """Bytes of the largest read or write the driver takes, a multiple of the alignment (row B12.7)."""
        return align_down(self.max_transfer or MAX_REQUEST, self.request_alignment)

    @property
    def discard_unit(self) -> int:
        """Alignment at which a discard is efficient (row B18.4)."""
        return max(self.pdiscard_alignment, self.request_alignment)

    @property
    def discard_transfer(self) -> int:
        """Bytes of the largest discard, a multiple of the unit."""
        return align_down(self.max_pdiscard or MAX_REQUEST, self.discard_unit)

    @property
    def zeroes_unit(self) -> int:
        """Alignment at which a zero-write is efficient (row B17.6)."""
        return max(self.pwrite_zeroes_alignment, self.request_alignment)

    @property
    def zeroes_transfer(self) -> int:
        """Bytes of the largest zero-write, a multiple of the unit (row B17.9)."""
        return align_down(self.max_pwrite_zeroes or MAX_REQUEST, self.zeroes_unit)


def _min_non_zero(a: int, b: int) -> int:
    return min(a, b) if a and b else a or b
