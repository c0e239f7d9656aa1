"""Random scripts for qemu-io, and random images and nodes to run them on."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path

from hypothesis import strategies as st

from tests.differential.tools import MARK

MIB = 1 << 20
#: Requests that run at the same time stay in one of these each: what overlaps may happen in any order.
SLOT = 128 << 10
_LARGEST_ALIGN = 65536


@dataclass(frozen=True)
class Image:
    """A file: its length, and where it has which bytes."""

    length: int
    data: tuple[tuple[int, int, int], ...]

    def with_data_at_the_beginning(self) -> Image:
        """QEMU finds the alignment for O_DIRECT by reading there; holes are read with any, so then it guesses."""
        return Image(max(self.length, MIB), ((0, 4096, 1), *self.data))

    def of_whole_blocks(self) -> Image:
        """QEMU does not open an image that ends in the middle of a block of blkdebug's `align`; ours does."""
        return Image(-(-self.length // _LARGEST_ALIGN) * _LARGEST_ALIGN, self.data)

    def make(self, path: Path) -> None:
        """Write it."""
        with path.open("wb") as file:
            file.truncate(self.length)
            for offset, length, byte in self.data:
                file.seek(offset)
                file.write(bytes([byte]) * max(0, min(length, self.length - offset)))


@st.composite
def images(draw: st.DrawFn) -> Image:
    """Files around one MiB; some end in the middle of a sector."""
    length = draw(st.sampled_from([MIB, MIB, MIB + 512, MIB - 4096, MIB + 100, MIB - 1, 700]))
    pieces = st.tuples(
        st.integers(0, MIB // 4096 - 1).map(lambda block: block * 4096),
        st.sampled_from([1, 4096, 65536, 200000]),
        st.integers(1, 255),
    )
    return Image(length, tuple(draw(st.lists(pieces, max_size=4))))


_UNITS = (1, 512, 4096, 65536)


@st.composite
def places(
    draw: st.DrawFn, start: int = 0, size: int = MIB + 8192, shortest: int = 0
) -> tuple[int, int]:
    """(offset, length), of any alignment, inside a range."""
    unit = draw(st.sampled_from(_UNITS))
    offset = draw(st.integers(0, (size - 1) // unit)) * unit
    unit = draw(st.sampled_from(_UNITS))
    longest = min(size - offset, draw(st.sampled_from([512, 8192, 300_000])))
    length = draw(st.integers(0, max(longest // unit, 0))) * unit
    return start + offset, max(length, shortest)


def _number(value: int) -> st.SearchStrategy[str]:
    forms = [str(value), hex(value)]
    for suffix, scale in (("k", 1024), ("M", MIB)):
        if value % scale == 0:
            forms.append(f"{value // scale}{suffix}")
        elif value % (scale // 2) == 0:
            forms.append(f"{value / scale}{suffix}")
    return st.sampled_from(forms)


def _flags(draw: st.DrawFn, *words: str) -> str:
    return "".join(f"{word} " for word in words if draw(st.booleans()))


def _pattern(draw: st.DrawFn) -> str:
    return draw(st.sampled_from(["", "-P 0 ", "-P 0x5a ", "-P 205 ", "-P 0377 "]))


def _operands(draw: st.DrawFn, place: tuple[int, int]) -> str:
    return " ".join(draw(_number(value)) for value in place)


def _vector(draw: st.DrawFn, place: tuple[int, int]) -> str:
    offset, length = place
    cuts = sorted(draw(st.lists(st.integers(0, length), max_size=3)))
    ends = [0, *cuts, length]
    lengths = [end - begin for begin, end in pairwise(ends)]
    return " ".join(str(value) for value in (offset, *lengths))


_KINDS = (
    *("read", "read", "readv", "write", "write", "write", "writev", "zero", "zero"),
    *("discard", "discard", "flush", "map", "alloc", "length", "truncate", "reopen", "info"),
)


@st.composite
def commands(draw: st.DrawFn, *, faulty: bool = False) -> str:
    """One command that is over when it is over.

    Args:
        faulty: only what errors concern in the same way: empty requests get as far as QEMU's drivers, not as far as
            ours.
    """
    place = draw(places(shortest=int(faulty)))
    kind = draw(st.sampled_from([kind for kind in _KINDS if kind != "reopen" or not faulty]))
    match kind:
        case "read":
            window = _window(draw, place[1])
            flags = _flags(draw, "-q", "-C", *(["-v"] if place[1] <= 4096 else []))
            return f"read {flags}{window}{_operands(draw, place)}"
        case "readv":
            return f"readv {_flags(draw, '-q', '-C')}{_pattern(draw)}{_vector(draw, place)}"
        case "write":
            return f"write {_flags(draw, '-q', '-f')}{_pattern(draw)}{_operands(draw, place)}"
        case "writev":
            return f"writev {_flags(draw, '-q', '-C', '-f')}{_pattern(draw)}{_vector(draw, place)}"
        case "zero":
            flags = _flags(draw, "-q", "-u", "-n", "-f")
            return f"write -z {flags}{_operands(draw, place)}"
        case "discard":
            return f"discard {_flags(draw, '-q', '-C')}{_operands(draw, place)}"
        case "alloc":
            return f"alloc {_operands(draw, place)}"
        case "truncate":
            mode = draw(
                st.sampled_from(["", "", "-m off ", "-m falloc ", "-m full ", "-m metadata "])
            )
            # QEMU allocates the first block of an empty file that grows.
            return f"truncate {mode}{draw(_number(max(place[0], 1)))}"
        case "reopen":
            how = draw(
                st.sampled_from(["-r", "-w", "-c writethrough", "-c unsafe", "-w -c writeback", ""])
            )
            return f"reopen {how}"
    return kind


def _window(draw: st.DrawFn, length: int) -> str:
    """What `read` verifies: nothing, all, or a part."""
    pattern = _pattern(draw)
    if not pattern or draw(st.booleans()):
        return pattern
    start = draw(st.integers(0, length + 1))
    return f"{pattern}-s {start} " + draw(
        st.one_of(st.just(""), st.integers(0, length + 1).map(lambda count: f"-l {count} "))
    )


@st.composite
def batches(draw: st.DrawFn) -> list[str]:
    """Requests in the background, no two of which touch the same bytes; and their end."""
    slots = draw(st.lists(st.integers(0, 7), min_size=1, max_size=6, unique=True))
    found = []
    for slot in slots:
        place = draw(places(slot * SLOT, SLOT))
        flags = _flags(draw, "-q", "-C")
        kind = draw(
            st.sampled_from(
                ["aio_read", "aio_write", "aio_write -z", "aio_write -f", "aio_write -zu"]
            )
        )
        if "z" in kind:
            found.append(f"{kind} {flags}{_operands(draw, place)}")
        else:
            found.append(f"{kind} {flags}{_pattern(draw)}{_vector(draw, place)}")
    return [MARK, *found, "aio_flush", MARK]


def scripts(*, faulty: bool = False) -> st.SearchStrategy[list[str]]:
    """Some commands."""
    steps = [commands(faulty=faulty).map(lambda command: [command])]
    if not faulty:
        steps.append(batches())
    return st.lists(st.one_of(*steps), min_size=1, max_size=12).map(
        lambda lists: [command for commands in lists for command in commands]
    )


def raw(image: Path, options: Mapping[str, str]) -> dict[str, str]:
    """`raw` over a file."""
    below = {"file.driver": "file", "file.filename": str(image)}
    return {"driver": "raw", **below, **_both(options)}


def _both(options: Mapping[str, str]) -> dict[str, str]:
    """QEMU's own zero-writes go past `discard=ignore` of the top node, ours do not: let the next one say so, too."""
    if options.get("discard") == "ignore":
        return {**options, "file.discard": "ignore"}
    return dict(options)


def debugged(image: Path, rules: Mapping[str, str], options: Mapping[str, str]) -> dict[str, str]:
    """`raw` over `blkdebug` over a file."""
    below = {"driver": "blkdebug", "image.driver": "file", "image.filename": str(image), **rules}
    file = {f"file.{name}": value for name, value in below.items()}
    return {"driver": "raw", **file, **_both(options)}


@st.composite
def modes(draw: st.DrawFn, *, direct: bool = True) -> dict[str, str]:
    """Options of the top node.

    Args:
        direct: O_DIRECT, perhaps.
    """
    found: dict[str, str] = {}
    for name, values in (
        ("discard", ["unmap", "ignore"]),
        ("detect-zeroes", ["on", "off", "unmap"]),
        ("cache.direct", ["on", "off"]),
        ("cache.no-flush", ["on", "off"]),
    ):
        if (direct or name != "cache.direct") and draw(st.booleans()):
            found[name] = draw(st.sampled_from(values))
    if found.get("detect-zeroes") == "unmap":
        found["discard"] = "unmap"
    return found


@st.composite
def limits(draw: st.DrawFn) -> dict[str, str]:
    """Limits that blkdebug is to have, which make sense together."""
    align = draw(st.sampled_from([0, 512, 4096, _LARGEST_ALIGN]))
    unit = align or 512
    found = {"align": align} if align else {}
    for name in ("opt-write-zero", "opt-discard"):
        if draw(st.booleans()):
            found[name] = unit * draw(st.sampled_from([1, 2, 8]))
    for name, of in (
        ("max-transfer", unit),
        ("max-write-zero", found.get("opt-write-zero", unit)),
        ("max-discard", found.get("opt-discard", unit)),
    ):
        if draw(st.booleans()):
            found[name] = of * draw(st.sampled_from([1, 3, 16]))
    return {name: str(value) for name, value in found.items()}


_EVENTS = (
    *("none", "read_aio", "write_aio", "pwritev", "pwritev_zero", "flush_to_disk"),
    *("pwritev_rmw_head", "pwritev_rmw_after_tail", "pwritev_done"),
)


_TYPES = ("write", "write-zeroes", "discard", "flush", "block-status")


@st.composite
def debug_options(draw: st.DrawFn) -> dict[str, str]:
    """Limits that blkdebug is to have, and errors to inject."""
    found = draw(limits())
    # QEMU goes on with a read-modify-write whose read has failed, and so writes rubbish; ours fails.
    types = _TYPES if "align" in found else ("", "read", *_TYPES)
    for index in range(draw(st.integers(1, 3))):
        rule: Mapping[str, Sequence[str]] = {
            "event": _EVENTS,
            "iotype": types,
            "errno": ["", "28", "5", "95"],
            "once": ["", "on", "off"],
            "immediately": ["", "on"],
            "sector": ["", "", "8", "200"],
            "state": ["", "", "1", "2"],
        }
        for name, values in rule.items():
            value = draw(st.sampled_from(values))
            if value:
                found[f"inject-error.{index}.{name}"] = value
    if draw(st.booleans()):
        found["set-state.0.event"] = draw(st.sampled_from(["pwritev", "read_aio", "pwritev_done"]))
        found["set-state.0.new_state"] = "2"
    return found
