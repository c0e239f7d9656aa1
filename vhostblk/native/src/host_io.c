/*
 * host_io.c: file I/O for the block layer, on the same machinery the engine threads use.
 */
#include <errno.h>
#include <stdlib.h>
#include <sys/epoll.h>
#include "aio.h"

_Static_assert(sizeof(struct vb_iov) == sizeof(struct iovec), "vb_iov is iovec with 64-bit fields");

struct host_request {
	struct aio_op op; /* first, so that an op is its request */
	uint64_t cookie;
	struct host_request *next_free;
};

struct vb_io {
	struct aio *aio;
	struct host_request *free;
	struct aio_op *finished; /* reaped from aio and not yet by the caller */
	uint32_t in_flight;      /* not yet reaped by the caller */
	struct host_request requests[];
};

int vb_io_create(uint32_t kind, uint32_t depth, uint32_t workers, struct vb_io **ret)
{
	uint32_t count = MIN(MAX(depth, 1u), 65536u);
	struct vb_io *io = calloc(1, sizeof(*io) + count * sizeof(io->requests[0]));
	int error;

	if (!io)
		return -ENOMEM;
	error = aio_create(kind, MIN(count, 1024u), workers, &io->aio);
	if (error) {
		free(io);
		return error;
	}
	for (uint32_t i = count; i-- > 0;) {
		io->requests[i].next_free = io->free;
		io->free = &io->requests[i];
	}
	*ret = io;
	return 0;
}

void vb_io_destroy(struct vb_io *io)
{
	struct vb_io_result ignored;

	if (!io)
		return;
	while (io->in_flight) {
		struct epoll_event event;

		while (vb_io_reap(io, &ignored, 1))
			;
		if (io->in_flight)
			epoll_wait(aio_fd(io->aio), &event, 1, 100);
	}
	aio_destroy(io->aio);
	free(io);
}

int vb_io_fd(const struct vb_io *io)
{
	return aio_fd(io->aio);
}

int vb_io_kind(const struct vb_io *io)
{
	return (int)aio_kind(io->aio);
}

int vb_io_submit(struct vb_io *io, const struct vb_io_request *requests, uint32_t count)
{
	uint32_t taken = 0;

	while (taken < count && io->free) {
		const struct vb_io_request *from = &requests[taken++];
		struct host_request *request = io->free;
		bool transfer = from->op != VB_IO_FDATASYNC && from->op != VB_IO_FALLOCATE;

		io->free = request->next_free;
		io->in_flight++;
		request->cookie = from->cookie;
		request->op = (struct aio_op){
			.iov = (struct iovec *)from->iov,
			.pieces = transfer ? from->niov : 0,
			.kind = (uint8_t)from->op,
			.flags = from->op == VB_IO_WRITE && from->flags & 1 ? AIO_DSYNC : 0,
			.buffer = -1,
			.file = -1,
			.fd = from->fd,
			.mode = (int32_t)from->flags,
			.offset = from->offset,
			.length = from->length,
		};
		aio_start(io->aio, &request->op);
	}
	aio_flush(io->aio);
	return (int)taken;
}

int vb_io_reap(struct vb_io *io, struct vb_io_result *results, uint32_t max)
{
	uint32_t count = 0;

	if (!io->finished)
		io->finished = aio_reap(io->aio);
	while (count < max && io->finished) {
		struct host_request *request = container_of(io->finished, struct host_request, op);

		io->finished = io->finished->next;
		results[count++] = (struct vb_io_result){request->cookie, request->op.result};
		request->next_free = io->free;
		io->free = request;
		io->in_flight--;
		if (!io->finished)
			io->finished = aio_reap(io->aio);
	}
	aio_flush(io->aio); /* what was continued, or had found the ring full */
	return (int)count;
}
