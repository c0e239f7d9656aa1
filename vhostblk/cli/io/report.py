"""What qemu-io prints of sizes, times and bytes; text only."""

from __future__ import annotations

_UNITS = tuple(
    (1 << 10 * power, unit) for power, unit in zip(range(6, 0, -1), "EPTGMK", strict=True)
)


def human(value: float) -> str:
    """A number of bytes: `512 bytes`, `1.500 KiB`."""
    for scale, unit in _UNITS:
        if value >= scale:
            return f"{_trim(f'{value / scale:.3f}')} {unit}iB"
    return f"{_trim(f'{value:f}')} bytes"


def _trim(number: str) -> str:
    """Cut at the first `.000`, whatever follows."""
    return number.partition(".000")[0]


def elapsed(seconds: float, *, fixed: bool = False) -> str:
    """A time: `00.25 sec`, from a second on `0:00:01.25`.

    Args:
        fixed: the long form always.
    """
    if seconds < 1 and not fixed:
        return f"{seconds:05.2f} sec"
    minutes, rest = divmod(seconds, 60)
    return f"{int(minutes // 60)}:{int(minutes % 60):02}:{rest:05.2f}"


def report(done: str, offset: int, length: int, seconds: float, *, machine: bool) -> str:
    """What a request has moved, and how fast.

    Args:
        done: the verb.
        machine: one line with commas in between: bytes, requests, time, bytes and requests per second.
    """
    per_second = 1 / max(seconds, 1e-9)
    if machine:
        time = elapsed(seconds, fixed=True)
        return f"{length},1,{time},{length * per_second:.3f},{per_second:.3f}"
    return (
        f"{done} {length}/{length} bytes at offset {offset}\n"
        f"{human(length)}, 1 ops; {elapsed(seconds)} "
        f"({human(length * per_second)}/sec and {per_second:.4f} ops/sec)"
    )


def dump(data: memoryview, offset: int) -> str:
    """Bytes in hexadecimal, sixteen a line, and those that are letters or digits once more.

    Args:
        offset: of the first one.
    """
    lines = []
    for start in range(0, len(data), 16):
        row = bytes(data[start : start + 16])
        text = "".join(chr(byte) if byte < 128 and chr(byte).isalnum() else "." for byte in row)
        lines.append(f"{offset + start:08x}:  {row.hex(' ')}  {text}")
    return "\n".join(lines)
