"""Decides how QEMU runs a guest's processors: KVM where it really works, else TCG.

That /dev/kvm exists proves little: inside a virtual machine QEMU may stop with a failed MSR, the
firmware may never reach the kernel, or the kernel may hang after its first instructions. So a
kernel is booted, without any disk, up to its complaint about the missing root file system.

This module knows nothing of disks and of vhost-user.
"""

from __future__ import annotations

import functools
import os
import shutil
import subprocess
from dataclasses import dataclass
from pathlib import Path

from vhostblk.testing.initramfs import GuestKernel, MissingToolError

__all__ = ["Accelerator", "KVM", "QEMU", "TCG", "choose_accelerator", "find_qemu"]

QEMU = "qemu-system-x86_64"

#: A kernel under KVM gets here within a second; TCG takes three. Longer is not worth waiting for.
PROBE_SECONDS = 5.0


@dataclass(frozen=True)
class Accelerator:
    """QEMU's -accel and -cpu.

    `slowness` scales the deadlines of what is measured against a guest that runs at full speed.
    """

    name: str
    accel: str
    cpu: str
    slowness: int

    @property
    def arguments(self) -> list[str]:
        """For QEMU's command line."""
        return ["-accel", self.accel, "-cpu", self.cpu]


KVM = Accelerator("kvm", "kvm", "host", 1)
# Nehalem has what Debian's programs and the kernel's crc32c want, and TCG can do all of it but vme.
TCG = Accelerator("tcg", "tcg,thread=multi", "Nehalem,vme=off", 4)


def find_qemu() -> str:
    """Path of qemu-system-x86_64, or of what VHOSTBLK_QEMU names.

    Raises:
        MissingToolError: there is none.
    """
    name = os.environ.get("VHOSTBLK_QEMU", QEMU)
    found = shutil.which(name)
    if found is None:
        raise MissingToolError(f"{name} is not installed")
    return found


def choose_accelerator() -> Accelerator:
    """KVM if a kernel boots with it, else TCG; VHOSTBLK_ACCELERATOR=kvm|tcg decides otherwise.

    The trial is made once per process.

    Raises:
        MissingToolError: QEMU or a kernel is missing, or the variable says something else.
    """
    wanted = os.environ.get("VHOSTBLK_ACCELERATOR")
    if wanted is not None:
        for accelerator in (KVM, TCG):
            if accelerator.name == wanted:
                return accelerator
        raise MissingToolError(f"VHOSTBLK_ACCELERATOR={wanted}: expected kvm or tcg")
    return KVM if _kvm_boots(find_qemu(), str(GuestKernel.newest().image)) else TCG


@functools.cache
def _kvm_boots(qemu: str, image: str) -> bool:
    if not os.access("/dev/kvm", os.R_OK | os.W_OK):
        return False
    return boots(KVM, Path(qemu), Path(image), PROBE_SECONDS)


def boots(accelerator: Accelerator, qemu: Path, image: Path, seconds: float) -> bool:
    """Whether kernel `image` runs up to the mount of its root file system within `seconds`."""
    command = [str(qemu), "-nodefaults", "-no-user-config", "-no-reboot", "-display", "none"]
    command += ["-m", "128M", *accelerator.arguments, "-serial", "stdio"]
    # It panics where the root should be mounted; panic=-1 resets at once, -no-reboot then exits.
    command += ["-kernel", str(image), "-append", "console=ttyS0 panic=-1"]
    try:
        done = subprocess.run(
            command,
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            timeout=seconds,
            check=False,
        )
    except subprocess.TimeoutExpired:
        return False
    # A triple fault ends with exit status 0 as well: only the kernel's own words prove the boot.
    return done.returncode == 0 and b"Unable to mount root fs" in done.stdout
