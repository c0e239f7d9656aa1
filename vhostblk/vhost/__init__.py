"""vhost-user: how a front-end (a VMM) hands its virtqueues and memory to a back-end.

`payload` and `message` are the wire format; `session` is the back-end's state machine, with
`negotiation` (features), `exchange` (one request and its reply), `action` (what the caller has to
do), `vring`, `ring_states`, `config_access`, `device_messages`, `ring_messages`, `device_status`, `device_state`
(what the next back-end has to know), `backend_messages`, `log_state`, `dirty_log` and `inflight` (where requests
are tracked for the next back-end; `device_note` is what else it finds there, `inflight_region` is that
memory, `inflight_split` and `inflight_packed` write it); `mem_table` is the front-end's memory, mapped by
`shared_file`; `frontend` the other role; only `transport` and `connection` touch sockets, and `access` looks
who is at the other end. Nothing here knows what kind of device is served.
"""
