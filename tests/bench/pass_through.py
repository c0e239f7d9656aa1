"""A daemon with a RAM disk behind a filter that does nothing, so that every request goes through Python.

    python -m tests.bench.pass_through SOCKET BYTES

It writes SOCKET.pid when it listens, and ends at SIGTERM.
"""

from __future__ import annotations

import asyncio
import signal
import sys
from pathlib import Path

from vhostblk.block.drivers import DRIVERS
from vhostblk.block.filters.filter import FilterNode
from vhostblk.daemon import Daemon, DaemonConfig
from vhostblk.export.options import ExportConfig


class PassThroughNode(FilterNode):
    """Sees every request, because it maps nothing, and passes it on."""

    driver_name = "pass-through"


async def serve(socket: str, size: str) -> None:
    """Serve until SIGTERM."""
    disk = {
        "driver": "pass-through",
        "node-name": "d",
        "file.driver": "memory",
        "file.size": size,
    }
    daemon = Daemon(
        DaemonConfig(
            blockdevs=[disk],
            exports=[ExportConfig(id="e", node_name="d", socket_path=socket, writable=True)],
            pid_file=Path(f"{socket}.pid"),
            drivers={**DRIVERS, "pass-through": PassThroughNode},
        )
    )
    asyncio.get_running_loop().add_signal_handler(signal.SIGTERM, daemon.stop)
    await daemon.run()


if __name__ == "__main__":
    asyncio.run(serve(*sys.argv[1:]))
