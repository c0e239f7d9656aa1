"""Runs of the program in this process: what the differential runs cannot compare, because qemu-io has it otherwise."""

from __future__ import annotations

import os
from collections.abc import Callable
from pathlib import Path

import pytest

from vhostblk.cli.io.program import main

Run = Callable[..., tuple[int, str, str]]


@pytest.fixture
def image(tmp_path: Path) -> Path:
    path = tmp_path / "image"
    path.write_bytes(bytes(1 << 20))
    return path


@pytest.fixture
def run(capsys: pytest.CaptureFixture[str]) -> Run:
    """(exit status, standard output, standard error) of a run."""

    def call(*words: object) -> tuple[int, str, str]:
        try:
            status = main([str(word) for word in words], "vhostblk-io")
        except SystemExit as stop:
            status = int(str(stop.code))
        return status, *capsys.readouterr()

    return call


@pytest.mark.parametrize(
    ("words", "complaint"),
    [
        (("-k", "-f", "raw"), "aio=native was specified, but it requires cache.direct=on"),
        (
            ("-i", "native", "-f", "raw"),
            "aio=native was specified, but it requires cache.direct=on",
        ),
        (("--object", "secret,id=s"), "Either 'file' or 'data' must be provided"),
        (("--object", "iothread,id=s"), "Parameter 'qom-type' does not accept value 'iothread'"),
        (("--object", "throttle-group"), "Parameter 'id' is missing"),
        (("-f", "foo"), "Unknown driver 'foo'"),
    ],
)
def test_what_is_not_there_is_refused_by_name(
    run: Run, image: Path, words: tuple[str, ...], complaint: str
) -> None:
    status, out, err = run(*words, "-c", "length", image)
    assert (status, out) == (1, "")
    assert err.startswith("vhostblk-io: ")
    assert complaint in err
    assert err.count("\n") == 1


def test_what_is_written_to_a_temporary_overlay_is_gone_afterwards(run: Run, image: Path) -> None:
    before = image.read_bytes()
    words = ("-f", "raw", "-s", "-c", "write -q -P 9 0 4k", "-c", "read -q -P 9 0 4k")
    assert run(*words, image) == (0, "", "")
    assert run(*words[:2], "-c", f"open -s {image}", *words[3:]) == (0, "", "")
    assert image.read_bytes() == before


def test_waiting_for_what_cannot_come_ends(run: Run, image: Path) -> None:
    status, out, _ = run(
        "-f", "raw", "-c", "break pwritev a", "-c", "wait_break a", f"blkdebug::{image}"
    )
    assert (status, out) == (1, "No request can come to breakpoint a\n")


def test_suspended_request_goes_on_when_the_program_ends(run: Run, image: Path) -> None:
    commands = ("break pwritev a", "aio_write -q -P 1 0 512", "break pwritev b", "wait_break a")
    words = [word for command in commands for word in ("-c", command)]
    status, out, _ = run("-f", "raw", *words, f"blkdebug::{image}")
    assert status == 0
    assert "Resuming request 'a'" in out
    assert image.read_bytes()[:513] == b"\1" * 512 + b"\0"


def test_copy_on_read_reads_through_a_filter(run: Run, image: Path) -> None:
    status, out, _ = run("-f", "raw", "-C", "-c", "read -q -P 0 0 1k", "-c", "info", image)
    assert status == 0
    assert "format name: raw" in out


def test_direct_io_with_memory_that_is_not_aligned(run: Run, image: Path) -> None:
    commands = ("-c", "write -q -P 9 1000 70000", "-c", "read -q -P 9 1000 70000")
    for mode in ("threads", "io_uring"):
        assert run("-f", "raw", "-n", "-m", "-i", mode, *commands, image) == (0, "", "")
    assert image.read_bytes()[1000:71000] == b"\x09" * 70000


def test_throttle_group_of_the_command_line(run: Run, image: Path) -> None:
    node = f"driver=throttle,throttle-group=g,file.driver=raw,file.file.filename={image}"
    group = "throttle-group,id=g,limits.iops-total=100000"
    assert run("--object", group, "--image-opts", "-c", "read -q 0 512", node) == (0, "", "")


def test_file_name_that_is_no_text_is_taken_as_it_is(run: Run, tmp_path: Path) -> None:
    path = os.fsdecode(os.fsencode(tmp_path) + b"/\xff")
    Path(path).write_bytes(bytes(512))
    assert run("-f", "raw", "-c", "read -q 0 512", path) == (0, "", "")


def test_several_images_one_after_the_other(run: Run, tmp_path: Path) -> None:
    for name in ("a", "b"):
        (tmp_path / name).write_bytes(bytes(512))
    script = []
    for name, byte in (("a", 1), ("b", 2)):
        script += ["-c", f"open -o driver=raw {tmp_path / name}", "-c", f"write -q -P {byte} 0 512"]
        script += ["-c", "reopen -r", "-c", f"read -q -P {byte} 0 512", "-c", "close"]
    assert run(*script) == (0, "", "")
    assert (tmp_path / "b").read_bytes() == b"\2" * 512
