"""The block layer: nodes, their graph, and one pipeline that owns every rule about requests.

Where to look: `node.py` is the contract of a driver, `pipeline.py` and `clear.py` one request on
one node, `tracking.py` which request waits for which, `edge.py` and `permissions.py` who may do
what, `graph.py` opening and closing, `options.py` and `keyval.py` what users write, `backend.py`
the view from outside, `host_io.py` file I/O, `drivers/` one node class per file. All in bytes;
QEMU's block layer is the model. Knows nothing about virtio or vhost-user.
"""
