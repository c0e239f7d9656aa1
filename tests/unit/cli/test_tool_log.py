"""What image tools show of the block layer's log, and of trace events."""

from __future__ import annotations

import logging
from pathlib import Path

import pytest

from vhostblk.cli.tool_log import ToolLog
from vhostblk.cli.trace_option import read_trace_option
from vhostblk.errors import ConfigError

log = logging.getLogger("vhostblk.block.test")


def test_tools_show_what_qemu_says_and_errors(capsys: pytest.CaptureFixture[str]) -> None:
    with ToolLog("tool"):
        log.info("for daemons")
        log.info("for daemons", extra={"qemu_says": "AS IT IS"})
        log.info("for daemons", extra={"qemu_warns": "something"})
    log.info("later", extra={"qemu_says": "nothing"})
    assert capsys.readouterr().err == "AS IT IS\ntool: warning: something\n"


def test_more_is_shown_to_those_who_ask(capsys: pytest.CaptureFixture[str]) -> None:
    with ToolLog("tool") as shown:
        shown.show("info")
        log.info("opened")
    assert capsys.readouterr().err == "tool: INFO: opened\n"


@pytest.mark.warns("trace event")
def test_no_trace_event_exists(capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    events = tmp_path / "events"
    events.write_text("# comment\n\nb\n")
    with ToolLog("tool"):
        assert not read_trace_option(f"-a,events={events}")
        assert not read_trace_option("enable=a*,file=x")
    warnings = ("trace event 'a' does not exist", "trace event 'b' does not exist")
    assert capsys.readouterr().err == "".join(f"tool: warning: {text}\n" for text in warnings)


def test_the_list_of_trace_events_is_empty() -> None:
    assert read_trace_option("help")


@pytest.mark.parametrize("text", ["foo=bar", "events=/nonexistent/file"])
def test_wrong_trace_options_are_refused(text: str) -> None:
    with pytest.raises(ConfigError):
        read_trace_option(text)
