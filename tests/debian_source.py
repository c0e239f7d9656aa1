"""Debian's source package of the QEMU that is installed, and the packages it takes to use it.

apt's own configuration and lists stay as they are: the repositories that are configured are asked for sources in a
configuration of its own. Nothing but the standard library is used, so that any Python 3.9 can run it.
"""

from __future__ import annotations

import os
import re
import shlex
import shutil
import subprocess
from collections.abc import Callable, Iterable
from pathlib import Path


class BuildError(Exception):
    """One line for people, and the exit status: 77 if something is missing and cannot be installed."""

    def __init__(self, what: str, status: int = 2) -> None:
        super().__init__(what)
        self.status = status


def run(
    command: list[str],
    log: Path,
    cwd: Path | None = None,
    env: dict[str, str] | None = None,
) -> None:
    """Runs one step of a build; its words go to a log, whose end is shown if it fails."""
    with log.open("ab") as file:
        file.write(f"$ {shlex.join(command)}\n".encode())
        file.flush()
        done = subprocess.run(
            command, stdout=file, stderr=file, stdin=subprocess.DEVNULL, cwd=cwd, env=env
        )
    if done.returncode:
        tail = "\n".join(log.read_text(errors="replace").splitlines()[-20:])
        raise BuildError(f"{command[0]} ended with status {done.returncode}\n{tail}\n(see {log})")


def qemu_version(program: str) -> tuple[str, str]:
    """Of the installed QEMU: the version of its source package, and what --version has in ()."""
    said = subprocess.run([program, "--version"], capture_output=True, text=True, check=True).stdout
    found = re.search(r"\((Debian [^)]+)\)", said)
    if found is None:
        raise BuildError(f"this is not Debian's QEMU: {said.splitlines()[0]}", 77)
    package = found[1].removeprefix("Debian ")
    return re.sub(r"\+b\d+$", "", package), found[1]


def install_packages(names: Iterable[str], log: Path, say: Callable[..., None]) -> None:
    """Installs those of the packages that are missing.

    Raises:
        BuildError: they cannot be installed.
    """
    query = ["dpkg-query", "-W", "-f", "${db:Status-Status}"]
    missing = [
        package
        for package in names
        if subprocess.run([*query, package], capture_output=True).stdout != b"installed"
    ]
    if not missing:
        return
    if os.geteuid() != 0:
        raise BuildError(f"not root, and these packages are missing: {' '.join(missing)}", 77)
    say("installing", *missing)
    log.parent.mkdir(exist_ok=True)
    environment = {**os.environ, "DEBIAN_FRONTEND": "noninteractive"}
    run(["apt-get", "-q", "update"], log, env=environment)
    install = ["apt-get", "-q", "-y", "--no-install-recommends", "install"]
    run([*install, *missing], log, env=environment)


def fetch(version: str, folder: Path, log: Path) -> Path:
    """Gets and unpacks QEMU's source package below `folder`; returns where it is."""
    apt = folder / "apt"
    (apt / "lists" / "partial").mkdir(parents=True)
    (apt / "cache" / "archives" / "partial").mkdir(parents=True)
    (apt / "debian.sources").write_text(_source_entries())
    options = {
        "Dir::Etc::sourcelist": apt / "debian.sources",
        "Dir::Etc::sourceparts": "-",
        "Dir::State::lists": apt / "lists",
        "Dir::Cache": apt / "cache",
        "APT::Sandbox::User": "root",
    }
    flags = [f"-o{name}={value}" for name, value in options.items()]
    run(["apt-get", "-q", *flags, "update"], log)
    run(["apt-get", "-q", *flags, "source", f"qemu={version}"], log, cwd=folder)
    (source,) = (path for path in folder.glob("qemu-*") if path.is_dir())
    for archive in folder.glob("qemu_*"):
        archive.unlink()
    shutil.rmtree(apt)
    return source


def _source_entries() -> str:
    """Debian's repositories among those configured, as deb-src in deb822 format."""
    entries = []
    etc = Path("/etc/apt")
    lists = [etc / "sources.list", *sorted((etc / "sources.list.d").glob("*.list"))]
    for path in lists:
        for line in path.read_text().splitlines() if path.exists() else ():
            found = re.match(
                r"deb\s+(?:\[([^]]*)\]\s+)?(\S*/debian\S*)\s+(\S+)\s+(.+)", line.strip()
            )
            if found:
                signed = re.search(r"signed-by=(\S+)", found[1] or "")
                key = f"Signed-By: {signed[1]}\n" if signed else ""
                fields = f"URIs: {found[2]}\nSuites: {found[3]}\nComponents: {found[4]}\n{key}"
                entries.append("Types: deb-src\n" + fields)
    for path in sorted((etc / "sources.list.d").glob("*.sources")):
        for stanza in re.split(r"\n\s*\n", path.read_text()):
            text = "\n".join(line for line in stanza.splitlines() if not line.startswith("#"))
            enabled = not re.search(r"^Enabled:\s*(no|false|0)", text, re.MULTILINE)
            if enabled and re.search(r"^URIs:.*/debian", text, re.MULTILINE):
                entries.append(re.sub(r"(?m)^Types:.*$", "Types: deb-src", text) + "\n")
    if not entries:
        raise BuildError("no Debian repository is configured for apt", 77)
    return "\n".join(entries)
