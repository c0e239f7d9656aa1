"""A conformance suite for any vhost-user-blk back-end: what `vhostblk check` runs.

`check` says what a check is, `rig` and `guest` are what checks work with, `offer` is what a back-end
says about itself, `runner` decides what runs and judges it. Every other module is one area and holds
nothing but checks; `registry` lists them.
"""
