"""Standard streams that cannot be written."""

from __future__ import annotations

import errno
import io
import os
import select
import threading
from pathlib import Path

from vhostblk.cli.streams import PatientFile


def text(file: PatientFile) -> io.TextIOWrapper:
    return io.TextIOWrapper(io.BufferedWriter(file), line_buffering=True)


def test_what_is_written_arrives(tmp_path: Path) -> None:
    with (tmp_path / "f").open("wb") as target:
        file = PatientFile(target.fileno())
        stream = text(file)
        stream.write("one\n")
        stream.write("two\n" * 10000)
        stream.flush()
        assert (stream.fileno(), stream.isatty()) == (target.fileno(), False)
        stream.close()
        os.fstat(target.fileno())  # is nobody's to close
    assert (tmp_path / "f").read_text() == "one\n" + "two\n" * 10000
    assert file.error is None


def test_reader_that_has_left_is_no_error() -> None:
    reader, writer = os.pipe()
    os.close(reader)
    file = PatientFile(writer)
    stream = text(file)
    stream.write("nobody reads this\n" * 10000)
    stream.close()
    os.close(writer)
    assert file.error is None


def test_full_disk_is_remembered_and_not_raised() -> None:
    with open("/dev/full", "wb", buffering=0) as full:
        file = PatientFile(full.fileno())
        stream = text(file)
        stream.write("this has no room\n")
        stream.write("nor has this\n")
        stream.close()
    assert file.error is not None
    assert file.error.errno == errno.ENOSPC


def test_pipe_that_must_not_be_waited_for_is_waited_for() -> None:
    reader, writer = os.pipe()
    os.set_blocking(writer, False)
    filled = 0
    try:
        while True:
            filled += os.write(writer, bytes(65536))
    except BlockingIOError:
        pass
    file = PatientFile(writer)
    thread = threading.Thread(target=file.write, args=(b"end",))
    thread.start()
    read = bytearray()
    while len(read) < filled + 3:
        read += os.read(reader, 65536)
    thread.join()
    os.close(reader)
    os.close(writer)
    assert file.error is None
    assert read == bytes(filled) + b"end"


def test_nobody_is_waited_for_if_so_wanted_and_what_is_missing_is_counted() -> None:
    reader, writer = os.pipe()
    try:
        file = PatientFile(writer)
        file.drop_when_full("{} are missing")
        stream = text(file)
        written = 0
        while select.select([], [writer], [], 0)[1]:
            stream.write("line\n")
            written += 1
        for _ in range(3):
            stream.write("no room\n")
        os.read(reader, 4 * select.PIPE_BUF)
        stream.write("room\n")
        os.set_blocking(reader, False)
        with open(reader, "rb", closefd=False) as rest:
            lines = rest.read().decode().splitlines()
    finally:
        os.close(reader)
        os.close(writer)
    assert lines[-1] == "room"
    assert lines[-2] == "3 are missing"
    assert lines.count("no room") == 0


def test_bytes_of_file_names_come_out_and_other_characters_are_escaped(tmp_path: Path) -> None:
    name = "n\udcff\udce4 \u2026"
    with open(tmp_path / "f", "w", encoding="ascii", errors="vhostblk.escape") as target:
        target.write(name)
    assert (tmp_path / "f").read_bytes() == b"n\xff\xe4 \\u2026"
