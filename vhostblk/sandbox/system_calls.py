"""Which system calls a daemon that serves may make: seccomp(2), by libseccomp.

An allow-list. What is not on it fails with EPERM, and the kernel logs it; or ends the process; or is only logged. The
filter is for all threads, those that there are and those to come (SECCOMP_FILTER_FLAG_TSYNC).

What is asked of io_uring does not go through the filter. New rings cannot be made, and those that there are belong to
the engine, which has restricted them to reading, writing and flushing (native/src/aio_uring.c).
"""

from __future__ import annotations

import errno
import os
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

from vhostblk.errors import ConfigError
from vhostblk.sandbox import libraries
from vhostblk.sandbox.mode import SandboxMode

__all__ = ["ALLOWED", "restrict_system_calls"]

# By what they are for. Names of all architectures and C libraries: those that this kernel or libseccomp does not know
# are left out.
ALLOWED = {
    "requests: on files that are open": """
        read write readv writev pread64 pwrite64 preadv pwritev preadv2 pwritev2 lseek _llseek fsync fdatasync
        sync_file_range fallocate ftruncate ftruncate64 copy_file_range fadvise64 fadvise64_64 readahead
        io_uring_enter io_uring_register io_setup io_submit io_getevents io_pgetevents io_cancel io_destroy""",
    "front-ends: on sockets that are open": """
        accept accept4 recvmsg sendmsg recvfrom sendto recv send recvmmsg sendmmsg getsockopt setsockopt getsockname
        getpeername shutdown""",
    "waiting": """
        epoll_create1 epoll_ctl epoll_wait epoll_pwait epoll_pwait2 poll ppoll ppoll_time64 select pselect6 _newselect
        eventfd2 timerfd_create timerfd_settime timerfd_settime64 timerfd_gettime pipe2 nanosleep clock_nanosleep
        clock_nanosleep_time64 clock_gettime clock_gettime64 clock_getres gettimeofday time restart_syscall""",
    "memory": """
        brk mmap mmap2 munmap mremap mprotect madvise msync mincore membarrier memfd_create get_mempolicy""",
    "threads": """
        futex futex_time64 futex_waitv futex_wait futex_wake futex_requeue set_robust_list get_robust_list rseq
        set_tid_address sched_yield sched_getaffinity sched_getparam sched_getscheduler sched_get_priority_max
        sched_get_priority_min getcpu gettid exit exit_group""",
    "signals of its own": """
        rt_sigaction rt_sigprocmask rt_sigreturn rt_sigpending rt_sigtimedwait sigaltstack signalfd4 sigreturn""",
    "what it is, and is told": """
        getpid getppid getpgrp getuid geteuid getgid getegid getresuid getresgid getgroups uname sysinfo getrusage times
        getrandom getrlimit ugetrlimit getcwd capget arch_prctl getuid32 geteuid32 getgid32 getegid32""",
    "descriptors": """
        close close_range dup dup2 dup3 fcntl fcntl64 flock fstat fstat64 fstatfs fstatfs64 getdents64 umask""",
    "names: which of them can be opened or removed is for Landlock to say": """
        stat stat64 lstat lstat64 newfstatat fstatat64 statx statfs statfs64 access faccessat faccessat2 readlink
        readlinkat unlink unlinkat chdir""",
}

# Of these, only with these arguments: (number of the argument, mask, value) which have to be so.
_FIONBIO, _FIONREAD, _FIOCLEX, _FIONCLEX, _TCGETS = 0x5421, 0x541B, 0x5451, 0x5450, 0x5401
_BLOCK_DEVICES = 0x12  # linux/fs.h: BLK...
_PR_SET_NAME, _PR_SET_VMA = 15, 0x53564D41
_CLONE_THREAD = 0x10000
_O_TMPFILE = 0o20000000  # without O_DIRECTORY, which is a part of Python's
_ALL = 0xFFFFFFFF

Condition = tuple[int, int, int]


@dataclass(frozen=True, slots=True)
class _Rule:
    """A call that is allowed if all conditions hold."""

    call: str
    conditions: tuple[Condition, ...]


def _conditional() -> Iterator[_Rule]:
    # Threads, no processes.
    yield _Rule("clone", ((0, _CLONE_THREAD, _CLONE_THREAD),))
    # Files that are there, no new ones.
    yield _Rule("openat", ((2, os.O_CREAT | _O_TMPFILE, 0),))
    yield _Rule("open", ((1, os.O_CREAT | _O_TMPFILE, 0),))
    yield _Rule("ioctl", ((1, 0xFF00, _BLOCK_DEVICES << 8),))
    for command in (_FIONBIO, _FIONREAD, _FIOCLEX, _FIONCLEX, _TCGETS):
        yield _Rule("ioctl", ((1, _ALL, command),))
    for what in (_PR_SET_NAME, _PR_SET_VMA):
        yield _Rule("prctl", ((0, _ALL, what),))
    # abort(3), pthread_kill(3): to itself.
    yield _Rule("tgkill", ((0, _ALL, os.getpid()),))
    # Looking at limits, setting none.
    yield _Rule("prlimit64", ((0, _ALL, 0), (2, (1 << 64) - 1, 0)))


# A server that went away is connected to again.
_AF_UNIX, _AF_INET, _AF_INET6, _AF_NETLINK = 1, 2, 10, 16


def _connecting(unix: bool, tcp: bool) -> Iterator[_Rule]:
    families = [_AF_UNIX] if unix or tcp else []
    if tcp:
        families += [_AF_INET, _AF_INET6, _AF_NETLINK]  # getaddrinfo(3) asks for addresses
    for family in families:
        yield _Rule("socket", ((0, _ALL, family),))
    if families:
        yield _Rule("connect", ())
    if tcp:
        yield _Rule("bind", ())  # of that netlink socket; TCP is for Landlock to say


def restrict_system_calls(mode: SandboxMode, *, unix: bool = False, tcp: bool = False) -> None:
    """Make no other system calls from now on, in any thread.

    Args:
        mode: what becomes of others.
        unix, tcp: whether servers of these kinds are connected to.

    Raises:
        ConfigError: the library is missing, or the kernel cannot do it.
    """
    seccomp = libraries.seccomp()
    try:
        # The flags of clone3 are in memory, where no filter sees them: it is not there, and the C library uses clone.
        # A filter of its own, because that is nothing to log; of what two filters say, the stricter counts.
        first = _new_filter(seccomp, seccomp.ALLOW)
        _add(seccomp, first, seccomp.ERRNO(errno.ENOSYS), _Rule("clone3", ()))
        rules = _new_filter(seccomp, _otherwise(seccomp, mode))
        rules.set_attr(seccomp.Attr.CTL_LOG, 1)
        _allow(seccomp, rules, _Rule("clone3", ()))
        for name in " ".join(ALLOWED.values()).split():
            _allow(seccomp, rules, _Rule(name, ()))
        for rule in (*_conditional(), *_connecting(unix, tcp)):
            _allow(seccomp, rules, rule)
        first.load()
        rules.load()
    except OSError as error:
        raise ConfigError(f"--sandbox: seccomp: {error.strerror or error}") from None


def _new_filter(seccomp: Any, otherwise: int) -> Any:
    rules = seccomp.SyscallFilter(otherwise)
    rules.set_attr(seccomp.Attr.CTL_NNP, 1)
    rules.set_attr(seccomp.Attr.CTL_TSYNC, 1)
    rules.set_attr(
        seccomp.Attr.CTL_OPTIMIZE, 2
    )  # a tree, not a list: kernels before 5.11 go through it each time
    # System calls of another architecture (32 bits on x86-64) are nobody's here.
    rules.set_attr(seccomp.Attr.ACT_BADARCH, seccomp.KILL_PROCESS)
    return rules


def _otherwise(seccomp: Any, mode: SandboxMode) -> int:
    actions = {
        SandboxMode.ON: seccomp.ERRNO(errno.EPERM),
        SandboxMode.KILL: seccomp.KILL_PROCESS,
        SandboxMode.LOG: seccomp.LOG,
    }
    action: int = actions[mode]
    return action


def _allow(seccomp: Any, rules: Any, rule: _Rule) -> None:
    _add(seccomp, rules, seccomp.ALLOW, rule)


def _add(seccomp: Any, rules: Any, action: int, rule: _Rule) -> None:
    number = seccomp.resolve_syscall(seccomp.Arch.NATIVE, rule.call)
    if number >= 0:  # not so: there is none of this name here
        conditions = [
            seccomp.Arg(argument, seccomp.MASKED_EQ, mask, value)
            for argument, mask, value in rule.conditions
        ]
        rules.add_rule(action, number, *conditions)
