"""vhost-user: how a front-end (a VMM) hands its virtqueues and memory to a back-end.

`payload` and `message` are the wire format, `action` and `session` the back-end's state machine,
`vring` a ring as the front-end described it, `mem_table` the front-end's memory, `frontend` the
other role; only `transport` and `listener` touch sockets. Nothing here knows what kind of device is
served.
"""
