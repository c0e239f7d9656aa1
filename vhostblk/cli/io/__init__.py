"""`vhostblk io` (= `vhostblk-io`): qemu-io's commands for the block layer, one by one, from a command line or a script.

`program.py` has the options of the command line, `shell.py` reads the commands. A command is a row: name, arguments,
what it needs, and the function that does it (`command.py`); the rows are in `requests.py`, `background.py` (aio_*),
`image.py` (open, close, reopen), `inspection.py` and `control.py`. `session.py` is what they share.

What is printed is what qemu-io 7.2 prints, down to the numbers that `numbers.py` reads and `report.py` writes.
"""
