"""The plugin catches what it is there to catch: each rule is broken on purpose."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

from vhostblk.testing.requirements import require, require_no_sandbox

HEADER = """
import logging, mmap, os, threading
import pytest
from vhostblk.testing.plugin import require
log = logging.getLogger("vhostblk.some.module")
KEPT = []
"""

REPOSITORY = Path(__file__).resolve().parents[3]


BROKEN = {
    "leaks_a_descriptor": ("def test_x():\n os.dup(0)", "1 more descriptors"),
    "leaks_a_mapping": (
        "def test_x():\n KEPT.append(mmap.mmap(-1, 4096))",
        "1 more mappings: 1 x /dev/zero",
    ),
    "leaks_a_thread": (
        "def test_x():\n threading.Thread(target=threading.Event().wait, daemon=True).start()",
        "1 more threads",
    ),
    "warns": (
        "def test_x():\n log.warning('odd %d', 7)",
        "not announced: WARNING vhostblk.some.module: odd 7",
    ),
    "logs_something_else": (
        "def test_x(expect_log):\n expect_log.expect('never'); log.error('other')",
        "not announced: ERROR vhostblk.some.module: other; announced, but never logged: never",
    ),
    "leaves_a_task": (
        "import asyncio\n"
        "async def fail():\n raise ValueError\n"
        "async def go():\n t = asyncio.create_task(fail()); await asyncio.sleep(0)\n"
        "def test_x():\n asyncio.run(go())",
        "ERROR asyncio: Task exception was never retrieved",
    ),
    "does_not_warn": (
        "@pytest.mark.warns('never')\ndef test_x(): pass",
        "announced, but never logged: never",
    ),
    "gives_no_reason": (
        "@pytest.mark.leaks\ndef test_x(): pass",
        "the marker leaks needs an argument",
    ),
    "daemon_fails": (
        "def test_x(daemon):\n daemon('x', command=['sh', '-c', 'exit 4']).wait()",
        "ended with status 4",
    ),
    "demands_a_tool": (
        "def test_x():\n require('no-such-tool')",
        "VHOSTBLK_REQUIRE demands no-such-tool: no-such-tool is not installed",
    ),
}

KEPT = {
    "nothing": "def test_x(): pass",
    "logs_info": "def test_x():\n log.info('fine')",
    "excused": "@pytest.mark.leaks('it is about leaks')\ndef test_x():\n os.dup(0)",
    "announces_by_marker": "@pytest.mark.warns('od+ 7')\ndef test_x():\n log.warning('odd %d', 7)",
    "announces": "def test_x(expect_log):\n expect_log.expect('odd'); log.error('odd')",
    "is_slow": (
        "def test_x():\n logging.getLogger('asyncio').warning('Executing %s took %.3f seconds', '<x>', 1)"
    ),
    "allows": "def test_x(expect_log):\n expect_log.allow('odd')",
    "garbage_in_a_cycle": (
        "class Cycle: pass\ndef test_x():\n c = Cycle(); c.me = c; c.map = mmap.mmap(-1, 4096)"
    ),
    "fixture_of_a_module": (
        "@pytest.fixture(scope='module')\n"
        "def shared():\n fd = os.dup(0); yield; os.close(fd)\n"
        "def test_x(shared): pass"
    ),
    "killed_daemon": (
        "def test_x(daemon):\n daemon('x', command=['sh', '-c', 'exec sleep 60']).kill()"
    ),
}


def run(folder: Path, bodies: dict[str, str], demand: str) -> str:
    """Runs each body as a test file, all in one process of their own; returns pytest's words."""
    (folder / "conftest.py").write_text('pytest_plugins = ["vhostblk.testing.plugin"]\n')
    (folder / "pytest.ini").write_text("[pytest]\nleak_seconds = 0.2\n")
    for name, body in bodies.items():
        (folder / f"test_{name}.py").write_text(HEADER + body)
    environment = {"PYTHONPATH": str(REPOSITORY), "VHOSTBLK_REQUIRE": demand, "COLUMNS": "500"}
    command = [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", "-rA", str(folder)]
    done = subprocess.run(
        command,
        capture_output=True,
        text=True,
        timeout=100,
        check=False,
        cwd=folder,
        env={**os.environ, **environment},
    )
    return done.stdout + done.stderr


def outcome(said: str, name: str) -> str:
    """The lines of pytest's summary about one test file, without the passing call of an error."""
    lines = [line for line in said.splitlines() if f"test_{name}.py::test_x" in line]
    judged = [line for line in lines if line.startswith(("PASSED", "FAILED", "ERROR "))]
    worst = [line for line in judged if not line.startswith("PASSED")]
    return "\n".join(worst or judged)


@pytest.fixture(scope="module")
def said(tmp_path_factory: pytest.TempPathFactory) -> str:
    bodies = {name: body for name, (body, _) in BROKEN.items()} | KEPT
    return run(tmp_path_factory.mktemp("plugin"), bodies, "qemu,no-such-tool")


@pytest.mark.parametrize("name", BROKEN)
def test_broken_rule_is_reported(said: str, name: str) -> None:
    complaint = BROKEN[name][1]
    if name == "gives_no_reason":
        assert complaint in said
        assert outcome(said, name).startswith("ERROR")
    else:
        assert complaint in outcome(said, name)


@pytest.mark.parametrize("name", KEPT)
def test_kept_rule_is_not_reported(said: str, name: str) -> None:
    assert outcome(said, name).startswith("PASSED")


@pytest.mark.parametrize(
    ("demand", "expected"),
    [
        ("qemu", pytest.skip.Exception),
        ("", pytest.skip.Exception),
        ("all", pytest.fail.Exception),
        ("a,no-such-tool", pytest.fail.Exception),
    ],
)
def test_missing_tool_is_a_skip_unless_it_is_demanded(
    monkeypatch: pytest.MonkeyPatch, demand: str, expected: type[BaseException]
) -> None:
    monkeypatch.setenv("VHOSTBLK_REQUIRE", demand)
    with pytest.raises(expected, match="no-such-tool is not installed"):
        require("no-such-tool")


@pytest.mark.parametrize("demand", ["", "all"])
def test_what_no_sandbox_allows_is_a_skip_in_one_and_runs_elsewhere(
    monkeypatch: pytest.MonkeyPatch, demand: str
) -> None:
    monkeypatch.setenv("VHOSTBLK_REQUIRE", demand)
    for mode in ("on", "kill", "log"):
        monkeypatch.setenv("VHOSTBLK_SANDBOX", mode)
        with pytest.raises(pytest.skip.Exception, match="not in a sandbox: it does that"):
            require_no_sandbox("it does that")
    monkeypatch.setenv("VHOSTBLK_SANDBOX", "off")
    require_no_sandbox("it does that")
    monkeypatch.delenv("VHOSTBLK_SANDBOX")
    require_no_sandbox("it does that")
