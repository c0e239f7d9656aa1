"""Leaky buckets: how fast, and in what bursts, requests may come (block layer row B30.4).

A bucket fills with what requests take and leaks at the rate that is allowed; a request that finds it fuller than it
may be waits until it has leaked enough. A burst makes the bucket larger: `maximum` for `burst_length` seconds; during a
burst of more than a second a second, smaller bucket keeps the rate at `maximum`. Numbers and rules are QEMU's.

Knows nothing about requests or clocks: who uses it says how many seconds have passed.
"""

from __future__ import annotations

from dataclasses import dataclass, fields

from vhostblk.block.options import INTEGER, option
from vhostblk.errors import ConfigError

LARGEST = 1_000_000_000_000_000
# Without a burst, so many seconds' worth may come at once.
_SLACK = 0.1


@dataclass(slots=True)
class LeakyBucket:
    """One limit.

    Attributes:
        average: units a second; 0: no limit.
        maximum: units a second during a burst; 0: no bursts.
        burst_length: seconds that a burst may last.
    """

    average: float
    maximum: float = 0
    burst_length: int = 1
    level: float = 0
    burst_level: float = 0

    def leak(self, seconds: float) -> None:
        """Let time pass."""
        self.level = max(self.level - self.average * seconds, 0)
        if self.burst_length > 1:
            self.burst_level = max(self.burst_level - self.maximum * seconds, 0)

    def fill(self, units: float) -> None:
        """A request was let through."""
        self.level += units
        if self.burst_length > 1:
            self.burst_level += units

    def wait(self) -> float:
        """Seconds until the next request may come."""
        if not self.average:
            return 0
        if not self.maximum:
            return max(self.level - self.average * _SLACK, 0) / self.average
        extra = self.level - self.maximum * self.burst_length
        if extra > 0:
            return extra / self.average
        if self.burst_length > 1:
            return max(self.burst_level - self.maximum * _SLACK, 0) / self.maximum
        return 0


@dataclass(frozen=True, slots=True)
class ThrottleLimits:
    """What a group may do; names are those of qemu-storage-daemon's `--object throttle-group,limits.…`.

    Raises:
        ConfigError: limits that contradict each other.
    """

    bps_total: int = option(INTEGER, 0, about="bytes a second")
    bps_read: int = option(INTEGER, 0, about="bytes read a second")
    bps_write: int = option(INTEGER, 0, about="bytes written a second")
    iops_total: int = option(INTEGER, 0, about="requests a second")
    iops_read: int = option(INTEGER, 0, about="reads a second")
    iops_write: int = option(INTEGER, 0, about="writes a second")
    bps_total_max: int = option(INTEGER, 0, about="bytes a second in a burst")
    bps_read_max: int = option(INTEGER, 0, about="bytes read a second in a burst")
    bps_write_max: int = option(INTEGER, 0, about="bytes written a second in a burst")
    iops_total_max: int = option(INTEGER, 0, about="requests a second in a burst")
    iops_read_max: int = option(INTEGER, 0, about="reads a second in a burst")
    iops_write_max: int = option(INTEGER, 0, about="writes a second in a burst")
    bps_total_max_length: int = option(INTEGER, 1, about="seconds of a burst")
    bps_read_max_length: int = option(INTEGER, 1, about="seconds of a burst")
    bps_write_max_length: int = option(INTEGER, 1, about="seconds of a burst")
    iops_total_max_length: int = option(INTEGER, 1, about="seconds of a burst")
    iops_read_max_length: int = option(INTEGER, 1, about="seconds of a burst")
    iops_write_max_length: int = option(INTEGER, 1, about="seconds of a burst")
    iops_size: int = option(
        INTEGER, 0, about="a larger request counts as so many of this size; 0: as one"
    )

    def bucket(self, kind: str) -> LeakyBucket:
        """The bucket of one limit.

        Args:
            kind: `bps_total`, `iops_read` and so on.
        """
        return LeakyBucket(
            getattr(self, kind), getattr(self, f"{kind}_max"), getattr(self, f"{kind}_max_length")
        )

    def __post_init__(self) -> None:
        for field in fields(self):
            name = field.name.replace("_", "-")
            if getattr(self, field.name) > LARGEST:
                raise ConfigError(f"Parameter '{name}' must be within [0, {LARGEST}]")
        for unit in ("bps", "iops"):
            for suffix in ("", "_max"):
                total = getattr(self, f"{unit}_total{suffix}")
                if total and any(
                    getattr(self, f"{unit}_{way}{suffix}") for way in ("read", "write")
                ):
                    dashed = suffix.replace("_", "-")
                    raise ConfigError(
                        f"'{unit}-total{dashed}' cannot be used with '{unit}-read{dashed}' or "
                        f"'{unit}-write{dashed}'"
                    )
            for way in ("total", "read", "write"):
                self._check_bucket(f"{unit}_{way}")
        if self.iops_size and not (self.iops_total or self.iops_read or self.iops_write):
            raise ConfigError("'iops-size' requires an iops limit")

    def _check_bucket(self, kind: str) -> None:
        bucket, name = self.bucket(kind), kind.replace("_", "-")
        if not bucket.burst_length:
            raise ConfigError(f"'{name}-max-length' cannot be 0")
        if bucket.burst_length > 1 and not bucket.maximum:
            raise ConfigError(f"'{name}-max-length' requires '{name}-max'")
        if bucket.maximum and bucket.burst_length > LARGEST / bucket.maximum:
            raise ConfigError(f"'{name}-max-length' is too high for '{name}-max'")
        if bucket.maximum and not bucket.average:
            raise ConfigError(f"'{name}-max' requires '{name}'")
        if bucket.maximum and bucket.maximum < bucket.average:
            raise ConfigError(f"'{name}-max' cannot be lower than '{name}'")
