"""A benchmark of any vhost-user-blk back-end.

`options` is what is asked for, `session` sets up a guest for it, `run` performs it, `result` is what
came out, `report` shows it; `compare` alternates two back-ends, `plot` draws. The requests are made
by the generator of `vhostblk.native.load`, because Python cannot make them fast enough to measure
anything but itself.
"""
