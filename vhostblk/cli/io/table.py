"""The commands: one row each; and one line of a script carried out."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from types import MappingProxyType

from vhostblk.block.permissions import Perm
from vhostblk.cli.io import background, control, image, inspection, requests
from vhostblk.cli.io.command import (
    Arguments,
    Command,
    CommandError,
    ComplaintError,
    RefusedError,
    UsageError,
    operands,
    parse,
)
from vhostblk.cli.io.session import Session

_ANY = (0, None)

_QUIET = """
 -C  one line for machines: bytes, requests, time, bytes per second, requests per second
 -q  say nothing about how long it took"""
_READ = f"""
 -P BYTE  fail unless all bytes are this one
 -v  dump what was read{_QUIET}"""
_WRITE = f"""
 -f  durable when it completes (FUA)
 -P BYTE  the byte to write (default: 0xcd){_QUIET}"""
_ZEROES = """
 -z  write zeroes without data
 -u  with -z: the range may lose its allocation"""
_IGNORED = """
 -p  accepted, no effect"""
_INVALID = """
 -i  make no request, count it as invalid"""
_MODES = """
 -r  read-only
 -s  changes go to a temporary overlay
 -C  copy on read
 -n  no host cache, as -t none
 -k  as -i native
 -U  share the image with whoever else uses it; needs -r
 -i MODE  I/O by threads, io_uring or native
 -t MODE  cache: none, off, directsync, writeback, unsafe, writethrough
 -d MODE  discard: unmap (default) or ignore
 -o OPTIONS  options of the node: driver=raw,offset=512"""


@dataclass
class Help(Arguments):
    """`help`."""

    names: tuple[str, ...] = operands(0, 1)


async def help_(session: Session, args: Help) -> None:
    """Say what a command does, or what there is."""
    if not args.names:
        for command in sorted(_ROWS, key=lambda row: row.name):
            session.out(command.usage)
        session.out("\nUse 'help commandname' for extended help.")
        return
    (name,) = args.names
    found = COMMANDS.get(name)
    if found is None:
        raise CommandError(f"command {name} not found")
    session.out(found.usage_as(name))
    if found.details:
        session.out(f"{found.details}\n")


_ROWS = (
    Command(
        "read",
        requests.read,
        "[-abCqv] [-P pattern [-s off] [-l len]] off len",
        "reads a number of bytes at a specified offset",
        words=(2, None),
        takes=requests.Read,
        alias="r",
        details=f"""
 read -P 0xcd -l 512 4k 64k: of 64 KiB at 4 KiB, the first 512 bytes have to be 0xcd
 -b  the guest's saved state instead of the disk
 -s OFF  -P begins there, counted from the first byte read
 -l LEN  -P is for so many bytes{_READ}{_IGNORED}""",
    ),
    Command(
        "readv",
        requests.readv,
        "[-Cqv] [-P pattern] off len [len..]",
        "reads a number of bytes at a specified offset",
        words=(2, None),
        takes=requests.ReadVector,
        details=f"""
 readv 0 512 4k: one request for 4608 bytes, into two buffers{_READ}""",
    ),
    Command(
        "write",
        requests.write,
        "[-bcCfnquz] [-P pattern | -s source_file] off len",
        "writes a number of bytes at a specified offset",
        words=(2, None),
        takes=requests.Write,
        alias="w",
        perm=Perm.WRITE,
        details=f"""
 write -zu 1M 64k: 64 KiB at 1 MiB read as zeroes, and may take no room any more
 -b  the guest's saved state instead of the disk
 -c  compressed
 -s FILE  repeat what this file begins with
 -n  with -z: fail rather than write data{_ZEROES}{_WRITE}{_IGNORED}""",
    ),
    Command(
        "writev",
        requests.writev,
        "[-Cfq] [-P pattern] off len [len..]",
        "writes a number of bytes at a specified offset",
        words=(2, None),
        takes=requests.WriteVector,
        perm=Perm.WRITE,
        details=_WRITE,
    ),
    Command(
        "aio_read",
        background.aio_read,
        "[-Ciqv] [-P pattern] off len [len..]",
        "asynchronously reads a number of bytes",
        words=(2, None),
        takes=background.BackgroundRead,
        details=f"""
 What came of it is printed when it is over; the command itself has succeeded.{_READ}{_INVALID}""",
    ),
    Command(
        "aio_write",
        background.aio_write,
        "[-Cfiquz] [-P pattern] off len [len..]",
        "asynchronously writes a number of bytes",
        words=(2, None),
        takes=background.BackgroundWrite,
        perm=Perm.WRITE,
        details=f"""
 What came of it is printed when it is over; the command itself has succeeded.{_ZEROES}{_WRITE}{_INVALID}""",
    ),
    Command("aio_flush", background.aio_flush, None, "completes all outstanding aio requests"),
    Command(
        "discard",
        requests.discard,
        "[-Cq] off len",
        "discards a number of bytes at a specified offset",
        words=(2, None),
        takes=requests.Discard,
        alias="d",
        perm=Perm.WRITE,
        details=_QUIET,
    ),
    Command("flush", requests.flush, None, "flush all in-core file state to disk", alias="f"),
    Command("length", inspection.length, None, "gets the length of the current file", alias="l"),
    Command("info", inspection.info, None, "prints information about the current file", alias="i"),
    Command("map", inspection.map_, "", "prints the allocated areas of a file", alias="m"),
    Command(
        "alloc",
        inspection.alloc,
        "offset [count]",
        "checks if offset is allocated in the file",
        words=(1, 2),
        takes=inspection.Alloc,
        alias="a",
    ),
    Command(
        "truncate",
        inspection.truncate,
        "[-m prealloc_mode] off",
        "truncates the current file at the given offset",
        words=(1, 3),
        takes=inspection.Truncate,
        alias="t",
        perm=Perm.WRITE | Perm.RESIZE,
        details="""
 -m MODE  what to do about the new part: off, metadata, falloc or full""",
    ),
    Command(
        "open",
        image.open_,
        "[-rsCnkU] [-t cache] [-d discard] [-o options] [path]",
        "open the file specified by path",
        words=(1, None),
        takes=image.Open,
        alias="o",
        needs_image=False,
        details=_MODES,
    ),
    Command("close", image.close, None, "close the current open file", alias="c"),
    Command(
        "reopen",
        image.reopen,
        "[(-r|-w)] [-c cache] [-o options]",
        "reopens an image with new options",
        words=_ANY,
        takes=image.Reopen,
        details="""
 -r, -w  read-only, writable
 -c MODE  the cache mode
 -o OPTIONS  options of the node that may change""",
    ),
    Command(
        "break",
        control.break_,
        "event tag",
        "sets a breakpoint on event and tags the stopped request as tag",
        words=(2, 2),
        takes=control.Break,
    ),
    Command(
        "remove_break",
        control.remove_break,
        "tag",
        "remove a breakpoint by tag",
        words=(1, 1),
        takes=control.Tag,
    ),
    Command(
        "resume",
        control.resume,
        "tag",
        "resumes the request tagged as tag",
        words=(1, 1),
        takes=control.Tag,
    ),
    Command(
        "wait_break",
        control.wait_break,
        "tag",
        "waits for the suspension of a request",
        words=(1, 1),
        takes=control.Tag,
    ),
    Command(
        "sleep",
        control.sleep,
        None,
        "waits for the given value in milliseconds",
        words=(1, 1),
        takes=control.Sleep,
        needs_image=False,
    ),
    Command(
        "abort", control.abort, None, "simulate a program crash using abort(3)", needs_image=False
    ),
    Command(
        "sigraise",
        control.sigraise,
        "signal",
        "raises a signal",
        words=(1, 1),
        takes=control.SigRaise,
        needs_image=False,
    ),
    Command(
        "quit",
        control.quit_,
        None,
        "exit the program",
        words=_ANY,
        takes=control.Quit,
        alias="q",
        needs_image=False,
    ),
    Command(
        "help",
        help_,
        "[command]",
        "help for one or all commands",
        words=(0, 1),
        takes=Help,
        alias="?",
        needs_image=False,
    ),
)

COMMANDS: Mapping[str, Command] = MappingProxyType(
    {name: row for row in _ROWS for name in (row.name, row.alias) if name}
)


async def run_line(session: Session, line: str) -> bool:
    """Carry out one line: a command and its words, with spaces in between; an empty one is none.

    Returns:
        False if it has failed, and has said so.
    """
    words = line.split(" ")
    name, *words = [word for word in words if word] or [""]
    if not name:
        return True
    command = COMMANDS.get(name)
    try:
        if command is None:
            raise ComplaintError(f'command "{name}" not found')
        if command.needs_image and session.image is None:
            raise ComplaintError("no file open, try 'help open'")
        command.check_words(name, len(words))
        await session.need(command.perm)
        await command.run(session, parse(command.takes, name, words))
    except UsageError as error:
        if str(error):
            session.complain(str(error))
        assert command is not None
        session.out(command.usage)
    except ComplaintError as error:
        session.complain(str(error), named=isinstance(error, RefusedError))
    except CommandError as error:
        if str(error):
            session.out(str(error))
    else:
        return True
    return False
