"""Builds the initial RAM file system that a test guest runs from.

Theory of operation: the Linux kernel unpacks a cpio archive in "newc" format into a RAM disk and
runs /init (Documentation/driver-api/early-userspace/buffer-format.rst). The archive holds a
static busybox, the modules a guest needs to see a virtio-blk disk, and any program of the host
together with the shared libraries it is linked against. The kernel and its modules come from the
newest cloud kernel installed on the host, or from a kernel package unpacked into a folder.

This module knows nothing of QEMU, of vhost-user and of what the guest is going to do.
"""

from __future__ import annotations

import os
import re
import shutil
import stat
import subprocess
from dataclasses import dataclass
from pathlib import Path

from vhostblk.errors import VhostBlkError

__all__ = ["CpioArchive", "GuestKernel", "MissingToolError", "VIRTIO_MODULES", "build_initramfs"]

#: In the order of insmod; what the kernel has built in is skipped.
VIRTIO_MODULES = (
    "virtio_ring",
    "virtio",
    "virtio_pci_legacy_dev",
    "virtio_pci_modern_dev",
    "virtio_pci",
    "virtio_blk",
)

#: Where `contrib/setup-debian.sh` unpacks a kernel package that cannot be installed.
UNPACKED_KERNEL = Path(__file__).resolve().parents[2] / "build" / "guest-kernel"

_LIBRARY = re.compile(r"(?:^|=>)\s*(/\S+)\s+\(0x", re.MULTILINE)


class MissingToolError(VhostBlkError):
    """A program, kernel or module that a guest needs is not on this machine."""


class CpioArchive:
    """Writes a cpio archive in newc format, from memory, in the order given.

    Parent folders are made when first needed. Every file belongs to root and has time 0, so that
    equal contents give equal archives.
    """

    def __init__(self) -> None:
        self._parts: list[bytes] = []
        self._names: set[str] = set()

    def __contains__(self, name: object) -> bool:
        return name in self._names

    def add_directory(self, name: str, mode: int = 0o755) -> None:
        """Adds folder `name` (without leading slash) unless it is there."""
        if name and name not in self._names:
            self._add_parents(name)
            self._add(name, stat.S_IFDIR | mode, b"")

    def add_file(self, name: str, content: bytes, mode: int = 0o644) -> None:
        """Adds a regular file; a name that is already there is an error (ValueError)."""
        if name in self._names:
            raise ValueError(f"{name} is in the archive already")
        self._add_parents(name)
        self._add(name, stat.S_IFREG | mode, content)

    def add_symlink(self, name: str, target: str) -> None:
        """Adds a symbolic link `name` that points to `target`."""
        self._add_parents(name)
        self._add(name, stat.S_IFLNK | 0o777, os.fsencode(target))

    def add_character_device(self, name: str, major: int, minor: int) -> None:
        """Adds a device node: /dev/console must exist before anybody can mount devtmpfs."""
        self._add_parents(name)
        self._add(name, stat.S_IFCHR | 0o600, b"", device=(major, minor))

    def to_bytes(self) -> bytes:
        """The whole archive with its trailer."""
        trailer = self._entry("TRAILER!!!", 0, b"", 0, (0, 0))
        return b"".join(self._parts) + trailer

    def _add_parents(self, name: str) -> None:
        self.add_directory(os.path.dirname(name))

    def _add(self, name: str, mode: int, content: bytes, device: tuple[int, int] = (0, 0)) -> None:
        self._names.add(name)
        self._parts.append(self._entry(name, mode, content, len(self._names), device))

    @staticmethod
    def _entry(name: str, mode: int, content: bytes, inode: int, device: tuple[int, int]) -> bytes:
        encoded = os.fsencode(name) + b"\0"
        links = 2 if stat.S_ISDIR(mode) else 1
        # c_ino c_mode c_uid c_gid c_nlink c_mtime c_filesize c_dev(2) c_rdev(2) c_namesize c_check
        fields = (inode, mode, 0, 0, links, 0, len(content), 0, 0, *device, len(encoded), 0)
        head = b"070701" + b"".join(b"%08x" % field for field in fields) + encoded
        # Name and content both end on a multiple of four, counted from the start of the header.
        return head + bytes(-len(head) % 4) + content + bytes(-len(content) % 4)


@dataclass(frozen=True)
class GuestKernel:
    """A kernel image and the folder of its modules."""

    release: str
    image: Path
    modules: Path

    @classmethod
    def newest(cls, roots: tuple[Path, ...] | None = None) -> GuestKernel:
        """The newest kernel below `roots` that has its modules; cloud kernels go first.

        Args:
            roots: folders with boot/ and lib/modules/ in them. By default the folder named by
                VHOSTBLK_GUEST_KERNEL, the machine's own, and the one that set-up unpacks into.

        Raises:
            MissingToolError: there is none.
        """
        if roots is None:
            chosen = os.environ.get("VHOSTBLK_GUEST_KERNEL")
            roots = (Path(chosen),) if chosen else (Path("/"), UNPACKED_KERNEL)
        found: list[GuestKernel] = []
        for root in roots:
            for image in sorted((root / "boot").glob("vmlinuz-*")):
                release = image.name.removeprefix("vmlinuz-")
                modules = root / "lib" / "modules" / release
                if (modules / "modules.dep").is_file() and os.access(image, os.R_OK):
                    found.append(cls(release, image, modules))
        if not found:
            places = ", ".join(str(root) for root in roots)
            raise MissingToolError(f"no Linux kernel with its modules below {places}")
        return max(found, key=lambda kernel: kernel.sort_key)

    @property
    def sort_key(self) -> tuple[bool, list[int]]:
        """Orders kernels: cloud kernels last, then by the numbers in their release."""
        return "cloud" in self.release, [int(part) for part in re.findall(r"\d+", self.release)]

    def module_paths(self, names: tuple[str, ...]) -> list[Path]:
        """The files to insmod, in this order, so that `names` and what they need are there.

        Raises:
            MissingToolError: a name is neither a module nor built in.
        """
        dependencies = self._dependencies()
        built_in = self._built_in()
        ordered: list[Path] = []
        for name in names:
            name = name.replace("-", "_")
            if name in built_in:
                continue
            if name not in dependencies:
                raise MissingToolError(f"kernel {self.release} has no module {name}")
            path, needed = dependencies[name]
            # modules.dep lists what a module needs nearest first; insmod wants farthest first.
            for file in [*reversed(needed), path]:
                if self.modules / file not in ordered:
                    ordered.append(self.modules / file)
        return ordered

    def _dependencies(self) -> dict[str, tuple[str, list[str]]]:
        table = {}
        for line in (self.modules / "modules.dep").read_text().splitlines():
            path, _, needed = line.partition(":")
            table[_module_name(path)] = (path, needed.split())
        return table

    def _built_in(self) -> set[str]:
        file = self.modules / "modules.builtin"
        return {_module_name(line) for line in file.read_text().splitlines() if line}


def build_initramfs(
    kernel: GuestKernel,
    init: str,
    *,
    modules: tuple[str, ...] = VIRTIO_MODULES,
    programs: tuple[str, ...] = ("mke2fs",),
    files: dict[str, bytes] | None = None,
) -> bytes:
    """An initramfs whose /init is the shell script `init`.

    Args:
        init: text of /init, run by busybox's shell; every busybox applet is on its PATH. The
            modules are in /modules, to be loaded in the order of /modules/order.
        modules: names of kernel modules; what they depend on comes along.
        programs: programs of the host (names or paths), with their shared libraries.
        files: more files, by absolute name.

    Raises:
        MissingToolError: busybox, a program or a module is missing.
    """
    archive = CpioArchive()
    archive.add_character_device("dev/console", 5, 1)
    for folder in ("proc", "sys", "dev", "mnt", "tmp", "run", "sbin", "usr/bin", "usr/sbin"):
        archive.add_directory(folder)
    _add_busybox(archive)
    order = []
    for path in kernel.module_paths(modules):
        archive.add_file(f"modules/{path.name}", path.read_bytes())
        order.append(path.name)
    archive.add_file("modules/order", "".join(f"{name}\n" for name in order).encode())
    for program in programs:
        _add_program(archive, program)
    for name, content in (files or {}).items():
        archive.add_file(name.lstrip("/"), content, mode=0o755)
    archive.add_file("init", init.encode(), mode=0o755)
    return archive.to_bytes()


def _module_name(path: str) -> str:
    # "kernel/drivers/virtio/virtio-pci.ko.xz" and "virtio_pci" are one module.
    return os.path.basename(path).split(".ko")[0].replace("-", "_")


def _add_busybox(archive: CpioArchive) -> None:
    busybox = shutil.which("busybox")
    if busybox is None:
        raise MissingToolError("busybox is not installed")
    if shared_libraries(Path(busybox)):
        raise MissingToolError(f"{busybox} is not the static one (package busybox-static)")
    archive.add_file("bin/busybox", Path(busybox).read_bytes(), mode=0o755)
    archive.add_symlink("bin/sh", "busybox")


def _add_program(archive: CpioArchive, program: str) -> None:
    # A user's PATH often lacks the sbin folders, where mke2fs lives.
    search = os.pathsep.join((os.environ.get("PATH", ""), "/usr/local/sbin", "/usr/sbin", "/sbin"))
    found = shutil.which(program, path=search)
    if found is None:
        raise MissingToolError(f"{program} is not installed")
    archive.add_file(f"bin/{os.path.basename(program)}", Path(found).read_bytes(), mode=0o755)
    for library in shared_libraries(Path(found)):
        name = str(library).lstrip("/")
        if name not in archive:
            archive.add_file(name, library.read_bytes(), mode=0o755)


def shared_libraries(program: Path) -> list[Path]:
    """The shared libraries and the loader that `program` needs; empty if it is static."""
    listing = subprocess.run(
        ["ldd", str(program)], capture_output=True, text=True, check=False, timeout=20
    )
    return [Path(path) for path in _LIBRARY.findall(listing.stdout)]
