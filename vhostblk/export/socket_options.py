"""Options about who may connect, as users spell them: modes in octal digits, users and groups by name or number.

Names are looked up in the host's databases (getpwnam(3), getgrnam(3)) when the options are read, and never again.
"""

from __future__ import annotations

import grp
import pwd
import re
from collections.abc import Callable
from typing import Any

from vhostblk.block.options import OptionType
from vhostblk.errors import ConfigError
from vhostblk.vhost.access import PeerRule, SocketAccess

__all__ = ["GROUP", "GROUPS", "MODE", "OWNER", "USERS", "peer_rule", "socket_access"]

Owner = tuple[int, int | None]
"""A user, and a group if that was said."""

_MODE = re.compile(r"0?[0-7]{3}\Z")
_NUMBER = re.compile(r"[0-9]{1,10}\Z")
# All bits set means "leave it as it is" to the kernel.
_LAST_ID = (1 << 32) - 2


def to_mode(name: str, value: Any) -> int:
    """`660` or `0660`: a number in JSON would be a decimal one, and is refused."""
    if isinstance(value, str) and _MODE.match(value):
        return int(value, 8)
    raise ConfigError(f"Parameter '{name}' expects three octal digits, as in 0660, not '{value}'")


def to_user(name: str, value: Any) -> int:
    """The number of a user."""
    return _identify(name, value, "user", lambda text: pwd.getpwnam(text).pw_uid)


def to_group(name: str, value: Any) -> int:
    """The number of a group."""
    return _identify(name, value, "group", lambda text: grp.getgrnam(text).gr_gid)


def to_owner(name: str, value: Any) -> Owner:
    """`USER` or `USER:GROUP`, as chown(1) has it."""
    user, colon, group = str(value).partition(":")
    return to_user(name, user), to_group(name, group) if colon else None


def _identify(name: str, value: Any, kind: str, find: Callable[[str], int]) -> int:
    text = str(value)
    if _NUMBER.match(text):
        number = int(text)
    else:
        try:
            number = find(text)
        except (KeyError, ValueError):  # no such name; a NUL in it
            raise ConfigError(f"Parameter '{name}': there is no {kind} '{text}'") from None
    if number > _LAST_ID:
        raise ConfigError(f"Parameter '{name}' expects a {kind}, not '{text}'")
    return number


def _list_of(read_item: Callable[[str, Any], int]) -> OptionType:
    """`name.0=…,name.1=…`, or a list in JSON."""

    def read(name: str, flat: dict[str, Any]) -> tuple[int, ...]:
        items: list[int] = []
        while (number := str(len(items))) in flat:
            items.append(read_item(f"{name}.{number}", flat.pop(number)))
        for key in flat:
            raise ConfigError(f"Parameter '{name}.{key}' is unexpected")
        return tuple(items)

    return OptionType(read, "list", is_list=True)


MODE = OptionType(to_mode, "string")
OWNER = OptionType(to_owner, "string")
GROUP = OptionType(to_group, "string")
USERS = _list_of(to_user)
GROUPS = _list_of(to_group)


def socket_access(mode: int | None, owner: Owner | None, group: int | None) -> SocketAccess:
    """What was asked for.

    Raises:
        ConfigError: two groups.
    """
    user, users_group = owner or (None, None)
    if users_group is not None and group is not None:
        raise ConfigError("the group of the socket is given twice")
    return SocketAccess(mode, user, group if users_group is None else users_group)


def peer_rule(users: tuple[int, ...], groups: tuple[int, ...]) -> PeerRule | None:
    """Who is served; None: whoever connects."""
    return PeerRule(frozenset(users), frozenset(groups)) if users or groups else None
