"""Kernels without Landlock, and files that no rule can be made for."""

from __future__ import annotations

import errno
import os
import types
from pathlib import Path
from typing import Any, ClassVar, Self

import pytest

from vhostblk.block.host_needs import HostNeeds
from vhostblk.sandbox import libraries
from vhostblk.sandbox.files import Places, restrict_files


class Rules:
    """What a ruleset is asked for."""

    made: ClassVar[list[Rules]] = []

    def __init__(self, **_: object) -> None:
        self.paths: dict[str, int] = {}
        self.ports: list[int] = []
        self.is_in_force = False
        self.made.append(self)

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None: ...

    def allow_path(self, path: str, rights: int) -> None:
        if path == "/proc/self/fd/77":
            raise OSError(errno.EBADFD, "memory")
        self.paths[path] = rights

    def allow_port(self, port: int, _: int) -> None:
        self.ports.append(port)

    def restrict(self) -> None:
        self.is_in_force = True


class UnsupportedError(OSError):
    """As landlockpy's."""


def fake(ruleset: Any) -> Any:
    landlock: Any = types.ModuleType("landlockpy")
    names = "READ_FILE WRITE_FILE TRUNCATE IOCTL_DEV EXECUTE READ_DIR MAKE_SOCK REMOVE_FILE RESOLVE_UNIX"
    access = types.SimpleNamespace(
        **{name: 1 << number for number, name in enumerate(names.split())}
    )
    landlock.AccessFS = access
    landlock.AccessNet = types.SimpleNamespace(BIND_TCP=1, CONNECT_TCP=2)
    landlock.Scope = types.SimpleNamespace(ABSTRACT_UNIX_SOCKET=1)
    landlock.UnsupportedError = UnsupportedError
    landlock.Ruleset = ruleset
    return landlock


@pytest.fixture
def rules(monkeypatch: pytest.MonkeyPatch) -> type[Rules]:
    monkeypatch.setattr(Rules, "made", [])
    monkeypatch.setattr(libraries, "landlock", lambda: fake(Rules))
    return Rules


def test_kernel_without_landlock_is_told_of(monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(**_: object) -> None:
        raise UnsupportedError(errno.ENOSYS, "Function not implemented")

    monkeypatch.setattr(libraries, "landlock", lambda: fake(refuse))
    assert restrict_files(HostNeeds(), Places()) == "Function not implemented"


def test_only_what_is_needed_can_be_written_made_or_removed(
    rules: type[Rules], tmp_path: Path
) -> None:
    places = Places((f"{tmp_path}/s", f"{tmp_path}/nowhere/s"), tmp_path / "run" / "pid")
    (tmp_path / "run").mkdir()
    assert restrict_files(HostNeeds(files=(5, 77)), places) is None
    (made,) = rules.made
    assert made.is_in_force
    assert made.ports == []
    read_only = (1, 1 | 1 << 5)
    more = {path: rights for path, rights in made.paths.items() if rights not in read_only}
    assert more == {
        os.devnull: 0b11,
        "/proc/self/fd/5": 0b1111,
        str(tmp_path): 1 << 5 | 1 << 6 | 1 << 7 | 1 << 8,
        str(tmp_path / "run"): 1 << 7,
        "/dev/shm": 1 << 7,
    }
    assert str(Path.cwd()) not in made.paths


def test_servers_that_are_connected_to_again_need_names_and_ports(
    rules: type[Rules], tmp_path: Path
) -> None:
    path = str(tmp_path / "nbd.sock")
    restrict_files(HostNeeds(unix_sockets=(path,), tcp_ports=(10809, 0)), Places())
    (made,) = rules.made
    assert made.ports == [53, 10809]
    assert made.paths[str(tmp_path)] == 1 << 8
