"""What a benchmark does: operations, sizes, depth, waiting, for how long.

Knows nothing of sockets, rings and command lines.
"""

from __future__ import annotations

from dataclasses import dataclass

from vhostblk.errors import ConfigError
from vhostblk.native.load import LoadOp

__all__ = ["PATTERNS", "BenchOptions", "Pattern", "parse_pattern"]

OPS = {op.name.lower().replace("_", "-"): op for op in LoadOp}
"""Names of operations, as options and reports spell them."""

MAX_DEPTH = 16384
MAX_WEIGHT = 1_000_000


@dataclass(frozen=True)
class Pattern:
    """Which operations, and where."""

    name: str
    weights: tuple[int, int, int, int, int]
    """How often each `LoadOp` is chosen."""
    random: bool

    def has(self, op: LoadOp) -> bool:
        """Whether the operation occurs."""
        return self.weights[op] > 0


def _pattern(name: str, random: bool, **weights: int) -> Pattern:
    read, write, flush, discard, zeroes = (weights.get(op.name.lower(), 0) for op in LoadOp)
    return Pattern(name, (read, write, flush, discard, zeroes), random)


PATTERNS = {
    pattern.name: pattern
    for pattern in (
        _pattern("read", False, read=1),
        _pattern("write", False, write=1),
        _pattern("rw", False, read=1, write=1),
        _pattern("randread", True, read=1),
        _pattern("randwrite", True, write=1),
        _pattern("randrw", True, read=1, write=1),
        _pattern("flush", False, flush=1),
        _pattern("discard", False, discard=1),
        _pattern("write-zeroes", False, write_zeroes=1),
    )
}


def parse_pattern(text: str, read_percent: int | None = None) -> Pattern:
    """Read a pattern: a name of `PATTERNS`, or `OP=WEIGHT,...` at random places.

    Args:
        read_percent: of reads in `rw` and `randrw`; None: half.

    Raises:
        ConfigError: it is none.
    """
    if pattern := PATTERNS.get(text):
        if read_percent is None:
            return pattern
        if not (pattern.has(LoadOp.READ) and pattern.has(LoadOp.WRITE)):
            raise ConfigError(f"read-percent: the pattern '{text}' has not both reads and writes")
        weights = (read_percent, 100 - read_percent, 0, 0, 0)
        return Pattern(text, weights, pattern.random)
    if read_percent is not None:
        raise ConfigError("read-percent is for the patterns rw and randrw")
    weights_by_op = [0] * len(LoadOp)
    for part in text.split(","):
        name, equals, weight = part.partition("=")
        if name not in OPS or not equals or not weight.isascii() or not weight.isdigit():
            raise ConfigError(
                f"pattern '{text}': one of {', '.join(PATTERNS)}, or a list of OP=WEIGHT with"
                f" the operations {', '.join(OPS)}"
            )
        if len(weight) > 7 or int(weight) > MAX_WEIGHT:
            raise ConfigError(f"pattern '{text}': weights up to {MAX_WEIGHT} are allowed")
        weights_by_op[OPS[name]] += int(weight)
    if not any(weights_by_op):
        raise ConfigError(f"pattern '{text}': all weights are 0")
    read, write, flush, discard, zeroes = weights_by_op
    return Pattern(text, (read, write, flush, discard, zeroes), True)


@dataclass(frozen=True)
class BenchOptions:
    """One benchmark. Sizes and offsets are bytes, times are seconds."""

    pattern: Pattern = PATTERNS["randread"]
    block_min: int = 4096
    block_max: int = 4096
    """Requests are multiples of `block_min` up to this."""
    depth: int = 32
    """Requests in flight on each queue."""
    queues: int = 1
    queue_size: int = 0
    """Entries; 0: as many as needed, at least 128."""
    threads: int = 1
    indirect: bool = True
    event_idx: bool = True
    packed: bool = False
    """The rings' format is the packed one."""
    segments: int = 1
    """Descriptors for the data of each request."""
    sleep: bool = False
    """Wait for the call eventfd; False: poll the ring."""
    batch: int = 0
    """Requests made visible at once, at most; 0: the generator's choice."""
    flush_every: int = 0
    unmap: bool = False
    verify: bool = False
    duration: float = 10.0
    ramp: float = 1.0
    rate: int = 0
    """Requests a second; 0: as many as possible."""
    requests: int = 0
    """0: until the time is over."""
    once: bool = False
    offset: int = 0
    size: int = 0
    """0: up to the end of the disk."""
    seed: int = 1
    timeout: float = 10.0
    """Give up when nothing finishes for so long."""
    pid: int = 0
    """The back-end's process; 0: whoever listens on the socket."""

    @property
    def entries_per_request(self) -> int:
        """Descriptors of the ring that a request takes."""
        return 1 if self.indirect else self.segments + 2

    @property
    def ring_size(self) -> int:
        """Entries of each ring."""
        if self.queue_size:
            return self.queue_size
        return max(128, 1 << (self.depth * self.entries_per_request - 1).bit_length())

    def check(self) -> None:
        """Find what contradicts itself, whatever the back-end.

        Raises:
            ConfigError: names the option.
        """
        size = self.ring_size
        if size & (size - 1) or size > 32768:
            raise ConfigError(f"queue-size {size}: a power of two up to 32768 is needed")
        if self.depth * self.entries_per_request > size:
            raise ConfigError(
                f"depth {self.depth}: {self.depth * self.entries_per_request} descriptors do not fit"
                f" into a queue-size of {size}"
            )
        if self.block_min % 512 or self.block_min < 512:
            raise ConfigError(f"block-size {self.block_min}: a multiple of 512 is needed")
        if self.block_max < self.block_min or self.block_max % self.block_min:
            raise ConfigError(
                f"block-size {self.block_min}-{self.block_max}: the second must be a multiple of the first"
            )
        if self.block_max > 64 << 20:
            raise ConfigError(f"block-size {self.block_max}: 64 MiB is the most")
        if self.segments * 512 > self.block_min:
            raise ConfigError(f"segments {self.segments}: more than block-size has sectors")
        if self.threads > self.queues:
            raise ConfigError(f"threads {self.threads}: there are only {self.queues} queues")
        if self.once and self.pattern.random:
            raise ConfigError(f"once: the pattern '{self.pattern.name}' has no end")
        if self.once and not any(self.pattern.has(op) for op in LoadOp if op != LoadOp.FLUSH):
            raise ConfigError("once: flushes have no end")
        if not self.has_end and self.duration <= 0:
            raise ConfigError(f"duration {self.duration:g}: nothing can be measured in no time")
        if self.offset % 512 or self.size % 512:
            raise ConfigError("offset, size: multiples of 512 are needed")

    @property
    def has_end(self) -> bool:
        """Whether it ends by itself, not by time."""
        return bool(self.once or self.requests)
