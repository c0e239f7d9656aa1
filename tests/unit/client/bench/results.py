"""Results that no back-end had to be run for."""

from __future__ import annotations

from vhostblk.client.bench.result import PERCENTILES, BenchResult, OpResult

__all__ = ["result"]


def result(
    iops: float = 1000.0, *, socket: str = "a.sock", us: float = 10.0, cpu: float | None = 0.5
) -> BenchResult:
    """A run of two seconds."""
    requests = int(iops * 2)
    latency = OpResult(
        requests=requests,
        bytes=requests * 4096,
        iops=iops,
        bytes_per_second=iops * 4096,
        mean_us=us,
        percentiles_us={f"{p:g}": us * (1 + n) for n, p in enumerate(PERCENTILES)},
        max_us=us * 10,
    )
    return BenchResult(
        socket=socket,
        seconds=2.0,
        requests=requests,
        iops=iops,
        bytes_per_second=iops * 4096,
        latency=latency,
        operations={"read": latency},
        backend_cpu_us=cpu,
        backend_cpu_percent=None if cpu is None else 50.0,
        client_cpu_us=1.0,
        client_busy_us=0.05,
        kicks_per_request=0.5,
        calls_per_request=0.0,
        batch=4.0,
        compared=0,
        curve=[(1.0, us), (50.0, us * 2), (99.99, us * 5)],
        samples=[(0.5, iops), (1.0, iops)],
    )
