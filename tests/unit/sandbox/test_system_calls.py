"""The list of system calls is a list of system calls, and of harmless ones."""

from __future__ import annotations

from tests.requirements import require
from vhostblk.sandbox import libraries
from vhostblk.sandbox.system_calls import ALLOWED

NAMES = " ".join(ALLOWED.values()).split()
# What libseccomp before 2.5.5 does not know.
NEW = {"futex_wait", "futex_wake", "futex_requeue", "epoll_pwait2", "futex_waitv"}

FORBIDDEN = {
    *(
        "execve",
        "execveat",
        "fork",
        "vfork",
        "clone",
        "clone3",
        "unshare",
        "setns",
        "chroot",
        "pivot_root",
    ),
    *(
        "open",
        "openat",
        "openat2",
        "creat",
        "open_by_handle_at",
        "name_to_handle_at",
        "mknod",
        "mkdir",
    ),
    *("rename", "renameat", "renameat2", "link", "symlink", "chmod", "fchmod", "chown", "fchown"),
    *("socket", "socketpair", "connect", "bind", "listen", "io_uring_setup", "ioctl", "prctl"),
    *(
        "ptrace",
        "process_vm_readv",
        "process_vm_writev",
        "pidfd_open",
        "pidfd_getfd",
        "pidfd_send_signal",
    ),
    *("kill", "tkill", "tgkill", "setrlimit", "prlimit64", "personality", "seccomp", "capset"),
    *("setuid", "setgid", "setresuid", "setresgid", "setgroups", "keyctl", "add_key", "quotactl"),
    *(
        "mount",
        "umount2",
        "swapon",
        "acct",
        "reboot",
        "init_module",
        "kexec_load",
        "bpf",
        "userfaultfd",
    ),
    *("perf_event_open", "settimeofday", "clock_settime"),
}


def test_every_name_is_that_of_a_system_call() -> None:
    """Of some architecture; libseccomp gives -1 for what is none of any."""
    require("sandbox")
    seccomp = libraries.seccomp()
    unknown = {name for name in NAMES if seccomp.resolve_syscall(seccomp.Arch.NATIVE, name) == -1}
    assert unknown <= NEW


def test_no_name_stands_twice() -> None:
    assert len(NAMES) == len(set(NAMES))


def test_what_serves_no_disk_is_not_allowed_without_condition() -> None:
    assert FORBIDDEN.isdisjoint(NAMES)
