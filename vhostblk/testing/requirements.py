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

from vhostblk.testing.accelerator import find_qemu
from vhostblk.testing.initramfs import (
    VIRTIO_MODULES,
    GuestKernel,
    MissingToolError,
    build_initramfs,
)

__all__ = ["missing", "require"]


def require(*tools: str) -> None:
    """Skips the test unless every tool is there; fails it if VHOSTBLK_REQUIRE names the tool.

    Args:
        tools: "qemu" (the emulator, a guest kernel with its modules, static busybox), "engine"
            (the C extension), "io_uring" (the kernel allows it), "root", or a program's name.
    """
    for tool in tools:
        reason = missing(tool)
        if reason is None:
            continue
        demanded = os.environ.get("VHOSTBLK_REQUIRE", "").split(",")
        if tool in demanded or "all" in demanded:
            pytest.fail(f"VHOSTBLK_REQUIRE demands {tool}: {reason}", pytrace=False)
        pytest.skip(f"needs {tool}: {reason}")


def missing(tool: str) -> str | None:
    """Why `tool` cannot be used here, or None if it can."""
    return _CHECKS.get(tool, lambda: _missing_program(tool))()


def _missing_program(name: str) -> str | None:
    # A user's PATH often lacks the sbin folders.
    path = os.pathsep.join((os.environ.get("PATH", ""), "/usr/sbin", "/sbin"))
    return None if shutil.which(name, path=path) else f"{name} is not installed"


def _missing_guest() -> str | None:
    try:
        find_qemu()
        build_initramfs(GuestKernel.newest(), "", modules=VIRTIO_MODULES, programs=())
    except MissingToolError as error:
        return str(error)
    return None


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


_CHECKS: Mapping[str, Callable[[], str | None]] = MappingProxyType(
    {
        "qemu": _missing_guest,
        "engine": _missing_engine,
        "io_uring": _missing_io_uring,
        "root": _missing_root,
    }
)
