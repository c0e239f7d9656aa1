"""Where the specifications meet: a vhost-user session, a virtio-blk device and a block node become an export.

`export` runs the session's actions, `blk_device` turns requests into block-layer calls, `data_path` is what both ways
of moving data have in common: `native_path` (the C engine) and `python_path` (the readable reference). `disk_threads`
and `engine_queues` say which engine threads know a disk and which have its queues; `write_record` is what the engine
has written alone, for the block layer.
"""
