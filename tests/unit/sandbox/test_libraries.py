"""What is said where the packages of a sandbox are missing."""

from __future__ import annotations

import importlib
import sys
import types

import pytest

from vhostblk.errors import ConfigError
from vhostblk.sandbox import libraries


@pytest.mark.parametrize(
    ("find", "hidden", "named"),
    [
        (libraries.seccomp, ("seccomp", "pyseccomp"), "pyseccomp"),
        (libraries.landlock, ("landlockpy",), "landlockpy"),
        (libraries.prctl, ("pyprctl",), "pyprctl"),
    ],
)
def test_missing_package_is_named(
    find: types.FunctionType, hidden: tuple[str, ...], named: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    for name in hidden:
        monkeypatch.setitem(sys.modules, name, None)
    with pytest.raises(ConfigError) as raised:
        find()
    assert str(raised.value) == (
        f"--sandbox: needs the Python package {named}: pip install 'vhostblk[sandbox]'"
    )


def test_binding_of_the_distribution_is_preferred(monkeypatch: pytest.MonkeyPatch) -> None:
    theirs = types.ModuleType("seccomp")
    monkeypatch.setitem(sys.modules, "seccomp", theirs)
    assert libraries.seccomp() is theirs


def test_missing_c_library_is_told_of(monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(name: str) -> types.ModuleType:
        raise RuntimeError("Unable to find libseccomp")

    monkeypatch.setattr(importlib, "import_module", fail)
    with pytest.raises(ConfigError, match=r"^--sandbox: pyseccomp: Unable to find libseccomp$"):
        libraries.seccomp()
