"""Which files may still be opened, made and removed, and where TCP may connect to: landlock(7).

A rule is for a file or a folder with all that is below, whatever its name becomes. What is open already stays open. The
kernel needs no rule for what is not opened: names may still be looked up.

Landlock belongs to threads as capabilities do; see `privileges`.
"""

from __future__ import annotations

import errno
import os
import sys
import sysconfig
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import vhostblk
from vhostblk.block.host_needs import HostNeeds
from vhostblk.sandbox import libraries

__all__ = ["Places", "restrict_files"]

_STATISTICS = "/dev/shm"
# What Python and the C library open by themselves, late.
_LIBRARIES = ("/lib", "/lib64", "/usr/lib", "/usr/lib64", "/usr/local/lib", "/etc/ld.so.cache")
# And to find the address of a host.
_RESOLVER = (
    *("/etc/resolv.conf", "/etc/hosts", "/etc/nsswitch.conf", "/etc/host.conf", "/etc/gai.conf"),
    *("/etc/services", "/etc/protocols", "/run/systemd/resolve"),
)
_DNS_PORT = 53


@dataclass(frozen=True, slots=True)
class Places:
    """Where the daemon itself makes and removes files.

    Attributes:
        sockets: paths that it is going to bind.
        pid_file: one that it has made.
    """

    sockets: tuple[str, ...] = ()
    pid_file: Path | None = None


def restrict_files(needs: HostNeeds, places: Places) -> str | None:
    """Open, make and remove nothing any more but what is needed.

    Returns:
        Why files are not restricted: this kernel cannot do it. None if they are.

    Raises:
        ConfigError: the library is missing.
        OSError: the kernel refuses.

    Context: the only thread there is.
    """
    landlock = libraries.landlock()
    try:
        rules = landlock.Ruleset(
            handled_net=landlock.AccessNet.BIND_TCP | landlock.AccessNet.CONNECT_TCP,
            scoped=landlock.Scope.ABSTRACT_UNIX_SOCKET,
        )
    except landlock.UnsupportedError as error:
        return str(error.strerror or error)
    with rules:
        _allow(rules, landlock.AccessFS, needs, places)
        ports = {*needs.tcp_ports, _DNS_PORT} - {0} if needs.tcp_ports else set()
        for port in sorted(ports):
            rules.allow_port(port, landlock.AccessNet.CONNECT_TCP)
        rules.restrict()
    return None


def _allow(rules: Any, access: Any, needs: HostNeeds, places: Places) -> None:
    readable = access.READ_FILE | access.READ_DIR
    for path in _existing([*_python(), *_LIBRARIES, *(_RESOLVER if needs.tcp_ports else ())]):
        _allow_path(rules, access, path, readable)
    _allow_path(rules, access, os.devnull, access.READ_FILE | access.WRITE_FILE)
    for fd in needs.files:
        # By what is open, not by its name, which may be another file's by now. Whether it may be written is for its
        # permissions to say: a file that is only read may have to be reopened.
        image = access.READ_FILE | access.WRITE_FILE | access.TRUNCATE | access.IOCTL_DEV
        _allow_path(rules, access, f"/proc/self/fd/{fd}", image)
    # The folder: the file of a server that comes back is a new one.
    for folder in _existing(os.path.dirname(os.path.abspath(path)) for path in needs.unix_sockets):
        _allow_path(rules, access, folder, access.RESOLVE_UNIX)
    # One that is not there is told of when the socket is made.
    for folder in _existing(os.path.dirname(os.path.abspath(path)) for path in places.sockets):
        made = access.MAKE_SOCK | access.REMOVE_FILE | access.READ_DIR | access.RESOLVE_UNIX
        _allow_path(rules, access, folder, made)
    removed = [_STATISTICS, *([str(places.pid_file.parent)] if places.pid_file else [])]
    for folder in _existing(removed):
        _allow_path(rules, access, folder, access.REMOVE_FILE)


def _allow_path(rules: Any, access: Any, path: str, rights: Any) -> None:
    if not os.path.isdir(path):
        rights &= (
            access.READ_FILE
            | access.WRITE_FILE
            | access.TRUNCATE
            | access.IOCTL_DEV
            | access.EXECUTE
        )
    try:
        rules.allow_path(path, rights)
    except OSError as error:
        # Memory that looks like a file (memfd_create(2)) is in no file system that could have rules, and needs none.
        if error.errno != errno.EBADFD:
            raise


def _python() -> Iterator[str]:
    """Where modules are that are imported when they are needed. Not the folder that the daemon was started in."""
    yield from sysconfig.get_paths().values()
    yield os.path.join(sys.base_prefix, "lib")
    yield from vhostblk.__path__


def _existing(paths: Iterable[str]) -> list[str]:
    return sorted({path for path in paths if os.path.exists(path)})
