/*
 * suspend.c: a queue that stops although requests are in flight. vhost-user, VHOST_USER_GET_VRING_BASE_SKIP_DRAIN.
 *
 * Theory of operation: whoever has the ring next serves them again, and finds them in `inflight`, where nothing has to be
 * done for that: they are marked as long as they are not pushed. But when the stop is acknowledged nothing may touch guest
 * memory, or the file, for them any more: a read that ends later would write into memory that somebody else has then, and a
 * write that ends later could overtake what the next one writes there. So each of them is ended first, in the way that is
 * fastest: what waits for its turn is taken out of its line, what the kernel is at is cancelled if the kernel can, and
 * waited for if not. What comes to its end meanwhile is answered as any other request.
 */
#include "queue.h"

void request_suspend(struct request *request)
{
	struct attachment *a = request->queue->attachment;

	/* Part of it may have been done. */
	if (request->blk.op == VB_OP_WRITE)
		disk_wrote(a->disk, request->blk.offset, request->blk.length);
	if (a->data_log)
		request_mark_written(request);
	queue_wake(request->queue);
	request_release(request);
}

static void suspend(struct request *request)
{
	struct aio *aio = request->queue->thread->aio;

	switch (request->state) {
	case REQUEST_LINE:
		flush_leave(request);
		request_untrack(request);
		request_suspend(request);
		break;
	case REQUEST_FAILED:
		list_remove(&request->in_line);
		request_suspend(request);
		break;
	case REQUEST_ENGINE:
		/* Those in the line wait for its end, also of other queues. */
		if (request->op.kind != VB_IO_FDATASYNC)
			aio_cancel(aio, &request->op);
		break;
	}
}

void queue_suspend(struct queue *queue)
{
	queue->suspending = true;
	for (uint32_t i = 0; i < queue->fresh; i++)
		suspend(&queue->requests[i]);
	aio_sweep(queue->thread->aio);
}
