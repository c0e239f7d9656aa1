"""`vhostblk img` (= `vhostblk-img`): qemu-img's subcommands, its output, its messages, its exit codes (those of 7.2).

`program.py` is the command line as a whole, `table.py` says which subcommands there are and where; each has a module of
its own, with its options as a dataclass (`arguments.py`), a coroutine that does it, and a `Command` that names both.
What subcommands share: `session.py` (images, messages, objects), `progress.py`, `numbers.py`.

What is done to images is in `vhostblk.block`; here it is only called, and what came of it is printed.
"""
