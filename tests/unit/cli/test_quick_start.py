"""What a short run of an image tool does not need is not imported, or not executed before somebody looks into it."""

from __future__ import annotations

import os
import subprocess
import sys
import threading
from importlib.machinery import PathFinder
from pathlib import Path

import pytest

from vhostblk.cli import quick_start

REPORT = """
import os, sys
from vhostblk.cli import quick_start

def report(status, leave=os._exit):
    for name, module in sys.modules.items():
        if type(module).__name__ != "_LateModule":
            print("imported", name)
    sys.stdout.flush()
    leave(status)

os._exit = report
sys.exit(quick_start.main())
"""


def imported_by(*words: object) -> set[str]:
    # -S: what an editable installation adds to every start of Python imports things, too.
    done = subprocess.run(
        [sys.executable, "-S", "-c", REPORT, *map(str, words)],
        env={**os.environ, "PYTHONPATH": os.pathsep.join(sys.path)},
        capture_output=True,
        text=True,
        check=False,
        timeout=60,
    )
    assert done.returncode == 0, done.stderr
    lines = done.stdout.splitlines()
    return {line.split()[1] for line in lines if line.startswith("imported ")}


# A dataclass without a docstring looks into `inspect` to write one.
UNUSED = {"argparse", "hashlib", "inspect", "ssl", "tempfile", "uuid"}


def test_qcow2_image_is_made_without_filters(tmp_path: Path) -> None:
    found = imported_by("img", "create", "-f", "qcow2", "-o", "size=1M", tmp_path / "image")
    assert "vhostblk.block.drivers.qcow2.node" in found
    assert found.isdisjoint(UNUSED)
    assert not [name for name in found if ".filters." in name]


def test_raw_image_is_made_without_other_drivers(tmp_path: Path) -> None:
    found = imported_by("img", "create", "-f", "raw", "-o", "size=1M", tmp_path / "image")
    assert (tmp_path / "image").stat().st_size == 1 << 20
    assert "vhostblk.block.drivers.file" in found
    assert found.isdisjoint(UNUSED)
    assert not [name for name in found if "qcow2" in name or ".filters." in name]


def test_what_needs_no_image_is_said_without_the_block_layer() -> None:
    found = imported_by("img", "--version")
    assert found.isdisjoint(UNUSED | {"asyncio", "vhostblk.block.graph", "vhostblk.native"})


def test_no_threads_are_imported_by_who_starts_none(tmp_path: Path) -> None:
    (tmp_path / "image").write_bytes(bytes(1 << 20))
    found = imported_by("img", "map", "-f", "raw", tmp_path / "image")
    assert "vhostblk.block.host_io" in found
    assert "concurrent.futures.thread" not in found


def test_name_of_every_late_module_is_right() -> None:
    for name in quick_start.LATE:
        assert PathFinder.find_spec(name.rpartition(".")[2], _path(name)) is not None


def _path(name: str) -> list[str] | None:
    package = name.rpartition(".")[0]
    return list(__import__(package, fromlist=["x"]).__path__) if package else None


@pytest.fixture
def late(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> str:
    """The name of a module that counts how often it is executed."""
    name = "vhostblk_test_late"
    (tmp_path / f"{name}.py").write_text(
        "import builtins\nimport vhostblk_test_late as me\nme.first = 1\n"
        "builtins.late_runs = getattr(builtins, 'late_runs', 0) + 1\nsecond = me.first + 1\n"
    )
    monkeypatch.syspath_prepend(tmp_path)
    monkeypatch.setattr(quick_start, "LATE", frozenset({name}))
    monkeypatch.setattr(sys, "meta_path", [quick_start._LateFinder, *sys.meta_path])
    import builtins

    monkeypatch.setattr(builtins, "late_runs", 0, raising=False)
    monkeypatch.delitem(sys.modules, name, raising=False)
    return name


def test_late_module_is_executed_when_it_is_looked_into_and_once(late: str) -> None:
    import builtins

    for _ in range(2):
        module = __import__(late)
    assert builtins.late_runs == 0  # type: ignore[attr-defined]
    assert module.second == 2
    assert __import__(late).first == 1
    assert builtins.late_runs == 1  # type: ignore[attr-defined]
    assert type(module) is type(sys)
    del sys.modules[late]


def test_threads_that_look_at_the_same_time_all_see_the_whole_module(late: str) -> None:
    import builtins

    module = __import__(late)
    found = []
    start = threading.Barrier(8)

    def look() -> None:
        start.wait(30)
        found.append(module.second)

    threads = [threading.Thread(target=look) for _ in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(30)
    assert found == [2] * 8
    assert builtins.late_runs == 1  # type: ignore[attr-defined]
    del sys.modules[late]
