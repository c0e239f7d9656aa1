"""The block layer: nodes, their graph, and one pipeline that owns every rule about requests.

Where to look. Requests: `driver.py` is the contract of a driver, `image_driver.py` the part of it that
is about images as a whole, `node.py` what every node has; `lane.py`, `admission.py`, `pipeline.py`, `submit.py`,
`clear.py`, `flush.py` and `status.py` are one request on one node, `image_map.py` lists what is where,
`eager.py` begins one that may never wait,
`tracking.py` knows which waits for which, `quiesce.py` is drain. What they need: `iov.py`, `py_buffer.py`
and `bounce.py` memory, `registered_buf.py` where it is, `limits.py` how much at once, `flags.py` QEMU's
names, `extent.py`, `host_extent.py` and `extent_user.py` what may be done without asking, `write_log.py`,
`dirty_map.py`, `dirty_bitmap.py` and `write_threshold.py` what was written. Bytes that move: `copy_range.py`,
`block_copy.py`, and `convert.py`, asked as `convert_options.py` says, for which `convert_runs.py` and
`convert_chunks.py` say what there is to copy and `sparse.py` looks for zeroes; `extent_io.py` moves many
pieces at once; `compare.py` looks whether they are the same, and `snapshot.py` is how old ones are shown;
`internal_snapshot.py` is states that an image keeps, `vm_state.py` what a guest adds to them.

The graph: `graph.py` finding and closing, `names.py`, `opening.py` opening, for which `probing.py` guesses
drivers, `registry.py` and `driver_table.py` those there are, `foreign_formats.py` those there are not,
`edge.py`, `roles.py`, `permissions.py` and `op_blockers.py` who may do what, `execution.py` from where;
`transaction.py` changes that happen as a whole or not at all; on top of it `surgery.py`, `reopen.py`,
`activation.py`, `lock_wait.py` and `length.py`; `creation.py`, `create.py` and `amend.py` make and change images,
`measure.py` says how large they get, `check.py` looks whether one is whole.
Backing chains: `chain.py` looks, `backing.py` changes links, `commit.py` and `rebase.py` move what is in layers, and
work through `operation.py`; `temporary_overlay.py` is `snapshot=on`. What users write and read: `options.py`
(`lean_dataclass.py`), `image_options.py`, `sizes.py`, `keyval.py`, `filename.py`, `modes.py`, `seconds.py`,
`json_text.py`, `qjson.py`; `introspection.py`, `node_info.py` and `image_info.py` say what there is.
`throttle_group.py` and `leaky_bucket.py` are budgets, `crypto/` is encryption. `backend.py` is the view from outside,
`no_medium.py` what it stands on without a disk, `host_io.py` file I/O, `host_needs.py` what open nodes need of the
host, `uevents.py` says which of its devices have changed, `drivers/` and `filters/` have one node class per file.

All in bytes; QEMU's block layer is the model. Knows nothing about virtio or vhost-user.
"""
