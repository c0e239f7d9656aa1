"""How results of QEMU's iotests are read, and that what the document says can be found in it."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

from tests.iotests.results import DOCUMENT, Kept, known_failures
from tests.iotests.running import FAILED, NOT_RUN, PASSED, Result, judge
from tests.iotests.suite import ROOT


@pytest.mark.parametrize(
    ("said", "status", "remark"),
    [
        ("001   ...  [17:0]  ...  \r001   pass  [17:0] [17:1]  1.3s\nPassed all 1 iotests\n", PASSED, ""),
        (
            "055   pass  [17:0] [17:1]\n    [case not run] no quorum\nPassed all 1 iotests\n",
            PASSED,
            "1 cases not run",
        ),
        (
            "007   ...   ...  007   not run    [17:02:51] [17:02:51]   ...   not suitable: raw\nNot run: 007\n",
            NOT_RUN,
            "not suitable: raw",
        ),
        ("Failures: 001\nFailed 1 of 1 iotests\n", FAILED, ""),
        ("Traceback (most recent call last):\n", FAILED, ""),
    ],
)  # fmt: skip
def test_what_check_says_is_understood(said: str, status: str, remark: str) -> None:
    assert judge(said, 1.0) == Result(status, 1.0, remark)


def test_reasons_are_those_of_the_document() -> None:
    text = "| format | tests | why |\n|---|---|---|\n| raw, qcow2 | `277` | no NBD |\n| qcow2 | `049`, `134` | no |\n"
    assert known_failures(text) == {
        ("raw", "277"): "no NBD",
        ("qcow2", "277"): "no NBD",
        ("qcow2", "049"): "no",
        ("qcow2", "134"): "no",
    }
    assert all(known_failures(DOCUMENT.read_text()).values())


def test_results_are_kept_for_one_version(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("tests.iotests.results.BUILD", tmp_path)
    Kept("ours", "raw", "1").put("001", Result(PASSED, 2.0))
    assert Kept("ours", "raw", "1").results == {"001": Result(PASSED, 2.0)}
    assert not Kept("ours", "raw", "2").results


_HANGING = """\
from pathlib import Path
from tests.iotests import running
from tests.iotests.suite import Tools
running.BUILD = running.CHECK = folder = Path({folder!r})
running.adopt_orphans()
print(running.run_test(Tools("ours", folder), "raw", "001", 1).remark)
print(Path("/proc/thread-self/children").read_text())
"""


def test_test_that_hangs_is_ended_with_all_it_has_started(tmp_path: Path) -> None:
    (tmp_path / "check").write_text(
        "import subprocess\n"
        "subprocess.Popen(['setsid', 'sleep', '1000'])\n"
        "subprocess.run(['sleep', '1000'])\n"
    )
    # By a process of its own, because all its children are ended.
    script = _HANGING.format(folder=str(tmp_path))
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, cwd=ROOT)
    assert done.stdout.split("\n") == ["no end within 1 s", "", ""], done.stderr
