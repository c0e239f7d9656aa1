"""A guest without a VM: a vhost-user front-end and a virtio-blk driver in one blocking object.

`client` is the whole of it, `control` speaks vhost-user, `queue` moves requests, `shared_memory` is
the guest's memory, `workload` checks that what was written is what is read. They obey the protocols
unless told otherwise, and can be told otherwise in every respect: they are for testing back-ends.
"""
