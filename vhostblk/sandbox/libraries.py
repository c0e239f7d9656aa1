"""The packages that talk to the kernel, imported when a sandbox is asked for: the extra `sandbox`.

`seccomp` is what libseccomp itself comes with and distributions package; `pyseccomp` has the same interface, is on
PyPI, and needs libseccomp too.
"""

from __future__ import annotations

import importlib
from types import ModuleType

from vhostblk.errors import ConfigError

__all__ = ["landlock", "prctl", "seccomp"]


def seccomp() -> ModuleType:
    """The binding of libseccomp.

    Raises:
        ConfigError: there is none.
    """
    try:
        return _find("seccomp")
    except ConfigError:
        return _find("pyseccomp")


def landlock() -> ModuleType:
    """The binding of Landlock. Raises: ConfigError: there is none."""
    return _find("landlockpy")


def prctl() -> ModuleType:
    """The binding of prctl(2) and capset(2). Raises: ConfigError: there is none."""
    return _find("pyprctl")


def _find(name: str) -> ModuleType:
    try:
        return importlib.import_module(name)
    except ImportError:
        reason = f"needs the Python package {name}: pip install 'vhostblk[sandbox]'"
    except (RuntimeError, OSError) as error:
        reason = f"{name}: {error}"  # the C library is missing
    raise ConfigError(f"--sandbox: {reason}") from None
