"""Numbers as qemu-img takes them, and what it says of others."""

from __future__ import annotations

from vhostblk.block.sizes import read_size
from vhostblk.cli.img.arguments import ImgError

_INT64_MAX = (1 << 63) - 1


def size(what: str, text: str, least: int = 0, most: int = _INT64_MAX) -> int:
    """Bytes: `512`, `0x200`, `1.5k`.

    Args:
        what: how the message calls it (`rate limit`).

    Raises:
        ImgError: it is no such number, or is outside what is allowed.
    """
    try:
        value = read_size(text)
    except ValueError:
        raise ImgError(
            f"Invalid {what} specified. You may use k, M, G, T, P or E suffixes for",
            more=["kilobytes, megabytes, gigabytes, terabytes, petabytes and exabytes."],
        ) from None
    except OverflowError:
        value = -1
    if not least <= value <= most:
        raise ImgError(f"Invalid {what} specified. Must be between {least} and {most}.")
    return value
