"""What it takes to run QEMU's iotests: the tests, from Debian's source package, and programs by the names they use.

Nothing of QEMU is kept in the repository: the tests are fetched into build/iotests, for the version of qemu-img that is
installed. Their script `check` finds the programs through environment variables, and calls them by whatever name those
have; messages begin with that name, so ours must be called qemu-img, too.
"""

from __future__ import annotations

import atexit
import shutil
import sys
import tempfile
import tomllib
from collections.abc import Collection
from dataclasses import dataclass
from pathlib import Path

from tests.debian_source import BuildError, fetch, install_packages, qemu_version

ROOT = Path(__file__).resolve().parents[2]
BUILD = ROOT / "build" / "iotests"
CHECK = BUILD / "qemu" / "tests" / "qemu-iotests"
EMULATOR = "qemu-system-x86_64"

_NEEDED = ("tests/qemu-iotests", "python")
"""Folders of QEMU's source: the tests, and the Python modules that they import."""

_OURS = {
    "qemu-img": "vhostblk-img",
    "qemu-io": "vhostblk-io",
    "qemu-storage-daemon": "vhostblk-storage-daemon",
}

_LAUNCHER = """\
#!{python} -I
import sys
sys.path.insert(0, {root!r})
from {module} import {function}
sys.exit({function}())
"""

# check itself asks for the machines, tests for devices and drivers: they may know. An emulator that would run is
# refused, and that it was called is written down.
_EMULATOR = """\
#!/bin/sh
for word; do
    case $word in *help | --version) exec {emulator} "$@" ;; esac
done
echo "$*" >>"$VHOSTBLK_EMULATOR_CALLS"
echo "{name}: no emulator is started here" >&2
exit 1
"""


@dataclass(frozen=True)
class Tools:
    """Programs that are tested, in one folder, by QEMU's names."""

    name: str
    folder: Path

    @property
    def environment(self) -> dict[str, str]:
        """Where `check` finds them."""
        variables = {
            "QEMU_IMG_PROG": "qemu-img",
            "QEMU_IO_PROG": "qemu-io",
            "QSD_PROG": "qemu-storage-daemon",
            "QEMU_NBD_PROG": "qemu-nbd",
            "QEMU_PROG": EMULATOR,
        }
        return {variable: str(self.folder / name) for variable, name in variables.items()}


def say(*words: object) -> None:
    """For people, not a part of the table."""
    print("iotests:", *words, file=sys.stderr, flush=True)


def get_suite() -> str:
    """Fetches the tests, unless they are there for the installed QEMU; returns its version.

    Raises:
        BuildError: something is missing.
    """
    for name in ("qemu-img", "qemu-io", "qemu-nbd", "qemu-storage-daemon", EMULATOR):
        if shutil.which(name) is None:
            raise BuildError(f"{name} is not installed", 77)
    source_version, package_version = qemu_version("qemu-img")
    stamp = BUILD / "fetched-for"
    if stamp.exists() and stamp.read_text() == package_version:
        return package_version
    install_packages(
        ("dpkg-dev", "xz-utils", "patch"), ROOT / "build" / "iotests-packages.log", say
    )
    shutil.rmtree(BUILD, ignore_errors=True)
    BUILD.mkdir(parents=True)
    say("fetching the source package of QEMU", source_version)
    source = fetch(source_version, BUILD, BUILD / "log")
    for folder in _NEEDED:
        target = BUILD / "qemu" / folder
        target.parent.mkdir(parents=True, exist_ok=True)
        (source / folder).rename(target)
    shutil.rmtree(source)
    stamp.write_text(package_version)
    return package_version


def stock_tools() -> Tools:
    """QEMU's."""
    folder = _folder("stock")
    for name in (*_OURS, "qemu-nbd"):
        (folder / name).symlink_to(_installed(name))
    return Tools("stock", folder)


def our_tools(stock: Collection[str] = ()) -> Tools:
    """Ours, from this checkout, but for those in `stock`. Serving NBD is not what is tested: qemu-nbd is QEMU's."""
    folder = _folder("ours")
    scripts = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]["scripts"]
    for name, ours in _OURS.items():
        if name in stock:
            (folder / name).symlink_to(_installed(name))
            continue
        module, _, function = scripts[ours].partition(":")
        text = _LAUNCHER.format(
            python=sys.executable, root=str(ROOT), module=module, function=function
        )
        _write_program(folder / name, text)
    (folder / "qemu-nbd").symlink_to(_installed("qemu-nbd"))
    return Tools("ours", folder)


def _folder(name: str) -> Path:
    """Of this run alone: several may go on at the same time."""
    folder = Path(tempfile.mkdtemp(dir=BUILD, prefix=f"{name}-"))
    atexit.register(shutil.rmtree, folder, ignore_errors=True)
    text = _EMULATOR.format(emulator=_installed(EMULATOR), name=EMULATOR)
    _write_program(folder / EMULATOR, text)
    return folder


def _installed(name: str) -> str:
    found = shutil.which(name)
    if found is None:
        raise BuildError(f"{name} is not installed", 77)
    return found


def _write_program(path: Path, text: str) -> None:
    path.write_text(text)
    path.chmod(0o755)
