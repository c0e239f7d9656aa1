"""Where the specifications meet: a vhost-user session, a virtio-blk device and a block node become an export.

`reception` lets front-ends in, one at a time (`lobby`), `front_end` runs a session's actions, `blk_device` turns
requests into block-layer calls, `data_path` is what both ways of moving data have in common: `native_path` (the C
engine) and `python_path` and `python_queue` (the readable reference). `disk_threads` and `engine_queues` say which
engine threads know a disk and which have its queues; `write_record` is what the engine has written alone, for the
block layer; `state_transfer` brings a device's state to the next back-end, `cache_mode` has the part of it that
guests change. `stall_watch` says that a disk does not answer; `device_watch` has exports follow devices of the host
that change (`again` is what such looks have in common). `options` and `socket_options` are what users write.
"""
