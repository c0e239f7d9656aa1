"""A guest without a VM: a vhost-user front-end and a virtio-blk driver in one blocking object.

`client` is the whole of it (`requests` those that are waited for), `control` speaks vhost-user, `queue`
moves requests, `shared_memory` is
the guest's memory, `memory_copy` copies it as for a migration, `inflight` is the file in which
requests are tracked, `workload` checks that what was written is what is read. They obey the
protocols (`manners`) unless told otherwise, and can be told otherwise in every respect: they are
for testing back-ends.
"""
