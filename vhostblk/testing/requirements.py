"""Tells whether a tool that a test needs is there: a clear skip, or a failure where it must be.

VHOSTBLK_REQUIRE=qemu,fio (or =all) in the environment turns the skip into a failure, so that a
machine that is meant to run every test cannot pass by lacking a package.
"""

from __future__ import annotations

import os
import shutil
from collections.abc import Callable, Mapping
from types import MappingProxyType

import pytest

from vhostblk.testing.guest import missing_guest

__all__ = ["missing", "require", "require_no_sandbox"]


def require(tool: str, *more: str, group: str | None = None) -> str:
    """Skips the test unless every tool is there; fails it if VHOSTBLK_REQUIRE names the tool.

    Args:
        tool, more: "qemu" (the emulator, a guest kernel with its modules, static busybox),
            "engine" (the C extension), "io_uring" (the kernel allows it), "root", "fuse" (file
            systems can be mounted), "sandbox" (its packages, and Landlock), or a program's name.
        group: another name for them in VHOSTBLK_REQUIRE, for example "compiler".

    Returns:
        the path of `tool` if it is a program, otherwise its name.
    """
    demanded = os.environ.get("VHOSTBLK_REQUIRE", "").split(",")
    for name in (tool, *more):
        reason = missing(name)
        if reason is None:
            continue
        if not {name, group or name, "all"}.isdisjoint(demanded):
            pytest.fail(f"VHOSTBLK_REQUIRE demands {name}: {reason}", pytrace=False)
        pytest.skip(f"needs {name}: {reason}")
    return shutil.which(tool, path=_search_path()) or tool


def require_no_sandbox(why: str) -> None:
    """Skips the test where all daemons are put into a sandbox (VHOSTBLK_SANDBOX).

    Nothing is missing there, so VHOSTBLK_REQUIRE does not ask for it.

    Args:
        why: what the test does to a daemon that no sandbox allows.
    """
    if os.environ.get("VHOSTBLK_SANDBOX", "off") != "off":
        pytest.skip(f"not in a sandbox: {why}")


def missing(tool: str) -> str | None:
    """Why `tool` cannot be used here, or None if it can."""
    return _CHECKS.get(tool, lambda: _missing_program(tool))()


def _search_path() -> str:
    # A user's PATH often lacks the sbin folders.
    return os.pathsep.join((os.environ.get("PATH", ""), "/usr/sbin", "/sbin"))


def _missing_program(name: str) -> str | None:
    return None if shutil.which(name, path=_search_path()) else f"{name} is not installed"


def _missing_engine() -> str | None:
    from vhostblk import native

    return None if native.available else "the C engine has not been built"


def _missing_io_uring() -> str | None:
    from vhostblk import native

    if not native.available:
        return "the C engine has not been built"
    error = native.io_uring_error()
    return None if error == 0 else f"io_uring does not work here: {os.strerror(-error)}"


def _missing_root() -> str | None:
    return None if os.geteuid() == 0 else "not running as root"


def _missing_sandbox() -> str | None:
    from vhostblk.errors import ConfigError
    from vhostblk.sandbox import libraries

    try:
        for library in (libraries.seccomp, libraries.landlock, libraries.prctl):
            library()
        return None if libraries.landlock().supported() else "this kernel has no Landlock"
    except ConfigError as error:
        return str(error)


def _missing_fuse() -> str | None:
    if not os.access("/dev/fuse", os.R_OK | os.W_OK):
        return "/dev/fuse cannot be used"
    return _missing_root()


_CHECKS: Mapping[str, Callable[[], str | None]] = MappingProxyType(
    {
        "qemu": missing_guest,
        "engine": _missing_engine,
        "io_uring": _missing_io_uring,
        "root": _missing_root,
        "sandbox": _missing_sandbox,
        "fuse": _missing_fuse,
    }
)
