"""Capabilities, and privileges that a process could get by executing something: capabilities(7), PR_SET_NO_NEW_PRIVS.

Capabilities belong to threads; new threads have those of the one that starts them. So they are dropped while there is
one thread.
"""

from __future__ import annotations

from vhostblk.sandbox import libraries

__all__ = ["drop_privileges"]


def drop_privileges(*, but_chown: bool) -> None:
    """Give up every capability, also those that a program could come with.

    Args:
        but_chown: keep the one to give files away, for the moment; call this again.

    Raises:
        ConfigError: the library is missing.
        OSError: the kernel refuses.

    Context: the only thread there is.
    """
    prctl = libraries.prctl()
    prctl.set_no_new_privs()
    state = prctl.CapState.get_current()
    if (
        prctl.Cap.SETPCAP in state.effective
    ):  # otherwise nobody can execute anything that would give it one
        prctl.cap_ambient_clear_all()
        for capability in prctl.capbset_probe():
            prctl.capbset_drop(capability)
    kept = {prctl.Cap.CHOWN} & state.permitted if but_chown else set()
    prctl.CapState(effective=kept, permitted=kept, inheritable=set()).set_current()
