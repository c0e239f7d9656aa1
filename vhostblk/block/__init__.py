"""The block layer: nodes, their graph, and one pipeline that owns every rule about requests.

Where to look. Requests: `driver.py` is the contract of a driver, `node.py` what every node has;
`pipeline.py`, `submit.py`, `clear.py`, `flush.py` and `status.py` are one request on one node,
`tracking.py` which request waits for which, `dirty_map.py` what was written, `quiesce.py` drain,
`eager.py` what never waits. The graph: `graph.py` finding and closing, `opening.py` opening,
`edge.py`, `roles.py` and `permissions.py` who may do what,
`transaction.py` changes that happen as a whole or not at all; on top of it `surgery.py`,
`reopen.py` and `activation.py`. Bytes that move: `copy_range.py` and `block_copy.py`, and
`snapshot.py` is how old ones are shown. What users write and read: `options.py`, `keyval.py`,
`filename.py`, `modes.py`, `introspection.py`. `backend.py` is the view from outside, `host_io.py`
file I/O, `drivers/` and `filters/` one node class per file.

All in bytes;
QEMU's block layer is the model. Knows nothing about virtio or vhost-user.
"""
