"""Where an NBD server is: QEMU's options and file names for it, and connecting to it.

Knows nothing about what is said on the connection.
"""

from __future__ import annotations

import asyncio
import errno
import os
import socket
from dataclasses import dataclass
from typing import Any
from urllib.parse import parse_qsl, unquote, urlsplit

from vhostblk.block.drivers.nbd_handshake import MAX_STRING
from vhostblk.block.host_needs import HostNeeds
from vhostblk.block.options import INTEGER, STRING, OptionType, choice, option, to_string
from vhostblk.block.seconds import SECONDS
from vhostblk.errors import ConfigError

DEFAULT_PORT = "10809"
_EXPORT_NAME = ":exportname="
_MAX_PATH = 107  # sockaddr_un, and a zero behind it
_MAX_FILENAME = 1024  # longer names are none, as in QEMU

# Nothing waits to be sent together; a host that has gone without a word is noticed. There is no TCP_USER_TIMEOUT: it
# would also end the connection to a server that is there, but takes nothing for a while.
_TCP = (
    (socket.IPPROTO_TCP, socket.TCP_NODELAY, 1),
    (socket.SOL_SOCKET, socket.SO_KEEPALIVE, 1),
    (socket.IPPROTO_TCP, socket.TCP_KEEPIDLE, 30),
    (socket.IPPROTO_TCP, socket.TCP_KEEPINTVL, 10),
    (socket.IPPROTO_TCP, socket.TCP_KEEPCNT, 6),
)


def _to_text(name: str, value: Any) -> str:
    """A string, or a number that JSON has written as such; it is going to be bytes."""
    if isinstance(value, int) and not isinstance(value, bool):
        return str(value)
    text = to_string(name, value)
    try:
        os.fsencode(text)
    except UnicodeEncodeError:
        raise ConfigError(f"Parameter '{name}' expects text, not {text!a}") from None
    return text


TEXT = OptionType(_to_text, "string")


@dataclass(frozen=True, slots=True)
class NbdOptions:
    """QEMU's options for nbd; `request-timeout` is ours.

    Raises:
        ConfigError: there is no server, or there are two; TLS.
    """

    server_type: str | None = option(
        choice("inet", "unix", qemu_text="Parameter 'server.type' does not accept value '{value}'"),
        None,
        name="server.type",
        about="what kind of address the server has",
        strong=True,
    )
    server_path: str | None = option(
        TEXT, None, name="server.path", about="path of its socket (unix)", strong=True
    )
    server_host: str | None = option(
        TEXT, None, name="server.host", about="its name or address (inet)", strong=True
    )
    server_port: str | None = option(
        TEXT, None, name="server.port", about="its port (inet)", strong=True
    )
    path: str | None = option(TEXT, None, about="the same as server.path", strong=True)
    host: str | None = option(TEXT, None, about="the same as server.host", strong=True)
    port: str | None = option(
        TEXT, None, about=f"the same as server.port; {DEFAULT_PORT} with a host", strong=True
    )
    export: str | None = option(
        TEXT, None, about="name of the export; the server's default if absent", strong=True
    )
    tls_creds: str | None = option(STRING, None, about="refused: TLS is not supported")
    tls_hostname: str | None = option(STRING, None, about="refused, too")
    x_dirty_bitmap: str | None = option(
        TEXT,
        None,
        about="the metadata context that is shown as block status, instead of base:allocation",
    )
    reconnect_delay: int = option(
        INTEGER,
        0,
        about="seconds for which requests wait for a server that has gone to come back",
    )
    open_timeout: int = option(
        INTEGER, 0, about="seconds for which opening tries to connect; 0: once"
    )
    request_timeout: float = option(
        SECONDS,
        0,
        about="seconds after which a server that has not answered a request is given up; 0: never (not in QEMU)",
    )

    def __post_init__(self) -> None:
        if self.tls_creds is not None or self.tls_hostname is not None:
            raise ConfigError(
                f"Parameter '{'tls-creds' if self.tls_creds is not None else 'tls-hostname'}': "
                "TLS is not supported by the driver 'nbd'",
                errno.ENOTSUP,
                qemu_text=f"No TLS credentials with id '{self.tls_creds}'"
                if self.tls_creds is not None
                else "",
            )
        self.address()
        if len(os.fsencode(self.export or "")) > MAX_STRING:
            raise ConfigError("export name too long to send to server")
        if len(os.fsencode(self.x_dirty_bitmap or "")) > MAX_STRING:
            raise ConfigError("x-dirty-bitmap query too long to send to server")

    def address(self) -> Address:
        """Where the server is.

        Raises:
            ConfigError: the options do not say, or contradict each other.
        """
        server = (self.server_type, self.server_path, self.server_host, self.server_port)
        if self.path is not None or self.host is not None or self.port is not None:
            return self._by_short_names(any(value is not None for value in server))
        if self.server_type is None:
            if any(value is not None for value in server):
                raise ConfigError("Parameter 'server.type' is missing")
            raise ConfigError("NBD server address missing")
        if self.server_type == "unix":
            self._refuse("server.host", self.server_host)
            self._refuse("server.port", self.server_port)
            return _unix(_needed("server.path", self.server_path))
        self._refuse("server.path", self.server_path)
        host = _needed("server.host", self.server_host)
        return Address(host=host, port=_needed("server.port", self.server_port))

    def _by_short_names(self, also_server: bool) -> Address:
        if also_server:
            raise ConfigError("Cannot use 'server' and path/host/port at the same time")
        if self.path is not None and self.host is not None:
            raise ConfigError("path and host may not be used at the same time")
        if self.path is not None:
            if self.port is not None:
                raise ConfigError("port may not be used without host")
            return _unix(self.path)
        if self.host is None:
            raise ConfigError("NBD server address missing")
        return Address(host=self.host, port=self.port or DEFAULT_PORT)

    @staticmethod
    def _refuse(name: str, value: str | None) -> None:
        if value is not None:
            raise ConfigError(f"Parameter '{name}' is unexpected")


def _needed(name: str, value: str | None) -> str:
    if value is None:
        raise ConfigError(f"Parameter '{name}' is missing")
    return value


def _unix(path: str) -> Address:
    if len(os.fsencode(path)) > _MAX_PATH:
        raise ConfigError(f"UNIX socket path '{path}' is too long")
    return Address(path=path)


@dataclass(frozen=True, slots=True)
class Address:
    """A server: the path of a socket, or a host and a port."""

    path: str = ""
    host: str = ""
    port: str = ""

    def __str__(self) -> str:
        return self.path or f"{self.host}:{self.port}"

    def filename(self, export: str | None) -> str:
        """The name that stands for an export there, nothing if it would be too long."""
        if self.path:
            name = f"/{export}" if export is not None else ""
            text = f"nbd+unix://{name}?socket={self.path}"
        else:
            name = f"/{export}" if export is not None else ""
            text = f"nbd://{self.host}:{self.port}{name}"
        return text if len(text) < _MAX_FILENAME else ""

    def host_needs(self) -> HostNeeds:
        """What a later connect needs."""
        if self.path:
            return HostNeeds(unix_sockets=(self.path,))
        try:
            port = int(self.port) if self.port.isdecimal() else socket.getservbyname(self.port)
        except OSError:
            port = 0  # then nobody connects
        return HostNeeds(tcp_ports=(port,))

    async def connect(self) -> socket.socket:
        """A connection that does not block.

        Raises:
            ConfigError: nobody is there, in QEMU's words.
        """
        if self.path:
            return await self._connect(socket.AF_UNIX, 0, self.path)
        failure = ConfigError(f"Failed to connect to '{self}'")
        for family, _, protocol, _, place in await self._resolve():
            try:
                return await self._connect(family, protocol, place, _TCP)
            except ConfigError as error:
                failure = error
        raise failure

    async def _resolve(self) -> list[Any]:
        kind = socket.SOCK_STREAM
        try:
            # What is written as numbers needs nobody to be asked, so no thread that waits for that.
            return socket.getaddrinfo(
                self.host,
                self.port,
                type=kind,
                flags=socket.AI_NUMERICHOST | socket.AI_NUMERICSERV,
            )
        except (OSError, UnicodeError):
            pass
        try:
            loop = asyncio.get_running_loop()
            return await loop.getaddrinfo(self.host, self.port, type=kind)
        except (OSError, UnicodeError) as error:
            reason = error.strerror if isinstance(error, OSError) else "Invalid name"
            raise ConfigError(
                f"address resolution failed for {self}: {reason}", errno.EIO
            ) from None

    async def _connect(
        self,
        family: int,
        protocol: int,
        place: Any,
        options: tuple[tuple[int, int, int], ...] = (),
    ) -> socket.socket:
        try:
            connection = socket.socket(family, socket.SOCK_STREAM | socket.SOCK_CLOEXEC, protocol)
            try:
                connection.setblocking(False)
                for level, name, value in options:
                    connection.setsockopt(level, name, value)
                await asyncio.get_running_loop().sock_connect(connection, place)
            except BaseException:
                connection.close()
                raise
        except OSError as error:
            raise ConfigError(
                f"Failed to connect to '{self}': {os.strerror(error.errno or errno.EIO)}",
                errno.ECONNREFUSED,
            ) from None
        return connection


# ---------------------------------------------------------------------- file names


def parse_filename(filename: str) -> dict[str, Any]:
    """The options that `nbd:unix:PATH[:exportname=X]`, `nbd:HOST:PORT[:exportname=X]` or an URL stand for.

    Raises:
        ConfigError: it is no such name.
    """
    if "://" in filename:
        return _parse_url(filename)
    place, has_name, export = filename.partition(_EXPORT_NAME)
    options: dict[str, Any] = {}
    if has_name:
        if not export:
            return {}  # as QEMU: the address is missing, then
        options["export"] = export
    if not place.startswith("nbd:"):
        raise ConfigError("File name string for NBD must start with 'nbd:'")
    place = place.removeprefix("nbd:")
    if not place:
        return options
    if place.startswith("unix:"):
        options |= {"server.type": "unix", "server.path": place.removeprefix("unix:")}
        return options
    host, port = _parse_host(place)
    return options | {"server.type": "inet", "server.host": host, "server.port": port}


def _parse_host(place: str) -> tuple[str, str]:
    if place.startswith("["):
        host, bracket, rest = place[1:].partition("]")
        if not bracket or not rest.startswith(":") or not host:
            raise ConfigError(f"error parsing IPv6 address '{place}'")
        port = rest[1:]
    elif place.startswith(":"):
        host, port = "", place[1:]
    else:
        host, _, port = place.partition(":")
    port, comma, flags = port.partition(",")
    if not port:
        raise ConfigError(f"error parsing address '{place}'")
    if comma:
        raise ConfigError(f"Flags of an address are not supported: '{flags}'", errno.ENOTSUP)
    return host, port


def _parse_url(filename: str) -> dict[str, Any]:
    bad = ConfigError("No valid URL specified")
    try:
        url = urlsplit(filename)
        port = url.port
    except ValueError:
        raise bad from None
    query = parse_qsl(url.query, keep_blank_values=True)
    options: dict[str, Any] = {}
    if export := unquote(url.path).removeprefix("/"):
        options["export"] = export
    if url.scheme == "nbd+unix":
        if url.netloc or len(query) != 1 or query[0][0] != "socket":
            raise bad
        return options | {"server.type": "unix", "server.path": query[0][1]}
    if url.scheme not in ("nbd", "nbd+tcp") or not url.hostname or query:
        raise bad
    # As it is written: urlsplit makes it small letters.
    host = url.netloc.rpartition("@")[2]
    host = host[1 : host.index("]")] if host.startswith("[") else host.partition(":")[0]
    return options | {
        "server.type": "inet",
        "server.host": unquote(host),
        "server.port": str(port or DEFAULT_PORT),
    }
