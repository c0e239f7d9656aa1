"""What testers of guests import: guest runner, pytest plugin, demonstration.

Nothing in the daemon imports this package. It knows the daemon only as a program on a command
line with a socket, so everything here works against another vhost-user-blk back-end as well.
"""
