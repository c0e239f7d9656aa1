"""vhost-user: how a front-end (a VMM) hands its virtqueues and memory to a back-end.

`payload` and `message` are the wire format; `session` is the back-end's state machine, with
`negotiation` (features), `exchange` (one request and its reply), `action` (what the caller has to
do), `vring` and `ring_states`; `mem_table` is the front-end's memory; `frontend` the other role;
only `transport` and `connection` touch sockets. Nothing here knows what kind of device is served.
"""
