"""Help about drivers comes from what they declare."""

from __future__ import annotations

import pytest

from vhostblk.block.drivers import DRIVERS
from vhostblk.block.options import NodeOptions, describe_options
from vhostblk.block.registry import DriverRegistry
from vhostblk.cli.blockdev_help import blockdev_help, export_help
from vhostblk.cli.main import main
from vhostblk.errors import ConfigError
from vhostblk.export.options import describe_export

ALL = DriverRegistry(DRIVERS)


def test_other_values_do_not_ask_for_help() -> None:
    assert blockdev_help("driver=file,filename=help.img", ALL) is None
    assert blockdev_help('{"driver": "file"}', ALL) is None


def test_all_drivers_are_listed() -> None:
    text = blockdev_help("help", ALL)
    assert text is not None
    assert set(text.splitlines()[1:]) == set(DRIVERS)


def test_drivers_that_may_not_be_used_are_not_listed() -> None:
    text = blockdev_help("help", DriverRegistry(DRIVERS, read_write=["raw"], read_only=["file"]))
    assert text is not None
    assert text.splitlines()[1:] == ["file", "raw"]


@pytest.mark.parametrize("driver", DRIVERS)
def test_every_option_of_a_driver_is_explained(driver: str) -> None:
    for text in (f"driver={driver},help", f"{driver},?"):
        lines = blockdev_help(text, ALL)
        assert lines is not None
        for options in (NodeOptions, DRIVERS[driver].options_type):
            for name, values, about in describe_options(options):
                assert f"  {name}=<{values}>  {about}" in lines


def test_unknown_driver_is_named() -> None:
    with pytest.raises(ConfigError, match="Unknown driver 'nope'"):
        blockdev_help("nope,help", ALL)


def test_every_option_of_an_export_is_explained() -> None:
    for text in ("help", "type=vhost-user-blk,help", "vhost-user-blk,?"):
        lines = export_help(text)
        assert lines is not None
        for name, values, about in describe_export():
            assert f"  {name}=<{values}>  {about}" in lines
    assert export_help("type=vhost-user-blk,id=help") is None


def test_export_help_is_printed_and_nothing_is_served(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["storage-daemon", "--export", "help"]) == 0
    assert "num-queues=<number (default: 64)>" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("text", "shown"),
    [
        ("help", ["iothread", "secret", "throttle-group"]),
        ("?", ["iothread", "secret", "throttle-group"]),
        ("iothread,help", ["  id=<string (required)>", "  poll-max-ns=<number (default: 32768)>"]),
        ("qom-type=throttle-group,?", ["  id=<", "  limits.bps-total=<", "  limits.iops-size=<"]),
        ("secret,id=a,help", ["  id=<", "  format=<raw|base64 (default: raw)>"]),
    ],
)
def test_objects_are_explained_and_nothing_is_served(
    capsys: pytest.CaptureFixture[str], text: str, shown: list[str]
) -> None:
    assert main(["storage-daemon", "--object", text]) == 0
    lines = capsys.readouterr().out.splitlines()
    for beginning in shown:
        assert any(line.startswith(beginning) for line in lines), lines


def test_help_about_an_object_that_there_is_not_is_an_error(
    capsys: pytest.CaptureFixture[str],
) -> None:
    assert main(["storage-daemon", "--object", "tls-creds-x509,help"]) == 1
    assert "'tls-creds-x509' is not supported (allowed: iothread, secret" in capsys.readouterr().err


def test_list_of_trace_events_is_empty_and_nothing_is_served(
    capsys: pytest.CaptureFixture[str],
) -> None:
    assert main(["storage-daemon", "--trace", "help"]) == 0
    assert capsys.readouterr() == ("", "")


def test_help_is_printed_and_nothing_is_served(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["storage-daemon", "--blockdev", "raw,help"]) == 0
    assert "offset=<size (default: 0)>" in capsys.readouterr().out
