"""What open nodes need of the host as long as they are open: files, and servers that they connect to again.

For whoever takes everything else away from this process (`vhostblk.sandbox`). Knows nothing of how that is done.
"""

from __future__ import annotations

from collections.abc import Iterable

from vhostblk.block.lean_dataclass import lean_dataclass

__all__ = ["HostNeeds", "all_needs"]


@lean_dataclass(frozen=True, slots=True)
class HostNeeds:
    """Attributes:
    files: fds of files that may be opened once more, by way of /proc/self/fd.
    unix_sockets: paths of servers.
    tcp_ports: ports of servers, on any host.
    """

    files: tuple[int, ...] = ()
    unix_sockets: tuple[str, ...] = ()
    tcp_ports: tuple[int, ...] = ()


def all_needs(each: Iterable[HostNeeds]) -> HostNeeds:
    """What all of them need together."""
    every = tuple(each)
    return HostNeeds(
        files=tuple(fd for needs in every for fd in needs.files),
        unix_sockets=tuple(path for needs in every for path in needs.unix_sockets),
        tcp_ports=tuple(port for needs in every for port in needs.tcp_ports),
    )
