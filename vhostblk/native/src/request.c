/*
 * request.c: the life of a request, from the chain that was popped to the used ring. What it is served from is serve.c's.
 */
#include <linux/virtio_blk.h>
#include <stdlib.h>
#include "queue.h"
#include "stats.h"

struct request *request_find(struct vb_thread *thread, uint64_t cookie)
{
	uint16_t slot = (uint16_t)(cookie >> 16), index = (uint16_t)cookie;
	struct queue *queue = slot < thread->slots ? thread->queues[slot] : NULL;
	struct request *request = queue && index < queue->fresh ? &queue->requests[index] : NULL;

	return request && request->state == REQUEST_CONTROL && request_cookie(request) == cookie ? request : NULL;
}

/* There always is one: the virtqueue never lets more chains be in flight than the ring has descriptors, and the queue
 * pops not more than QUEUE_REQUESTS. */
static struct request *request_take(struct queue *queue)
{
	struct request *request = queue->free;

	if (request) {
		queue->free = request->next_free;
	} else {
		request = &queue->requests[queue->fresh];
		request->index = (uint16_t)queue->fresh++;
		request->queue = queue;
	}
	request->generation++;
	request->state = REQUEST_ENGINE;
	request->head = queue->chain->head;
	request->slots = queue->chain->slots;
	request->entry = queue->chain->entry;
	request->missed = false;
	request->started_ns = queue->thread->now;
	request->memory = queue->attachment->memory;
	memory_use_get(request->memory);
	request->half = ages_begin(&queue->ages, request->started_ns);
	/* The rest is told at the end of the turn, but this one's I/O may keep the thread from getting there. */
	if (!queue->in_flight++) {
		store_relaxed(&queue->stats->in_flight, 1);
		store_relaxed(&queue->stats->oldest_ns, request->started_ns);
	}
	return request;
}

void request_release(struct request *request)
{
	struct queue *queue = request->queue;

	if (request->spilled) {
		free(request->spilled);
		queue->spilled -= request->spilled_pieces;
		request->spilled = NULL;
	}
	memory_use_put(queue->attachment, request->memory);
	request->state = REQUEST_FREE;
	request->next_free = queue->free;
	queue->free = request;
	ages_end(&queue->ages, request->half);
	queue->in_flight--;
}

/* Of the disk that a request was about: for statistics. */
static uint64_t bytes_of(const struct blk_request *blk)
{
	const struct vb_segment *segments = (const void *)blk->data;
	uint64_t bytes = 0;

	if (blk->op != VB_OP_DISCARD && blk->op != VB_OP_WRITE_ZEROES)
		return blk->length;
	for (uint32_t i = 0; i < blk->pieces; i++)
		bytes += segments[i].length;
	return bytes;
}

/* The data, also of a read that has failed: part of it may be there. A request that was refused has none. */
__attribute__((noinline)) void request_mark_written(struct request *request)
{
	struct attachment *a = request->queue->attachment;
	const struct vb_memory *memory = request->memory->memory;
	const struct blk_request *blk = &request->blk;
	struct iovec status = {blk->status_byte, 1};

	a->marked = true;
	memory_log_mark_pieces(a->data_log, memory, &a->log_region, &status, 1);
	if (blk->status < 0 && (blk->op == VB_OP_READ || blk->op == VB_OP_GET_ID))
		memory_log_mark_pieces(a->data_log, memory, &a->log_region, blk->data, blk->pieces);
}

void request_complete(struct request *request, int status, uint64_t written)
{
	struct queue *queue = request->queue;
	struct blk_request *blk = &request->blk;
	bool failed = status != VIRTIO_BLK_S_OK;

	queue_wake(queue);
	if (!queue->dead) {
		/* After a failure nothing is vouched for but the status, VIRTIO 1.2 §2.7.8.2. */
		store_relaxed(blk->status_byte, (uint8_t)status);
		if (queue->attachment->data_log)
			request_mark_written(request);
		written = failed ? 1 : MIN(written, blk->length) + 1;
		virtqueue_push(
			&queue->vq, request->head, request->slots, request->entry, (uint32_t)MIN(written, UINT32_MAX));
	} else if (queue->attachment->data_log) {
		request_mark_written(request);
	}
	/* Clocks are not free. What began since the clock was last read is counted when the driver is shown that it is
	 * done, which for the driver is when it is done. */
	if (request->started_ns == queue->thread->now && !failed && !request->missed)
		stats_batch_add(&queue->batch, blk->op, bytes_of(blk));
	else
		stats_finish(queue->stats, blk->op, 1, failed ? 0 : bytes_of(blk), failed,
			queue->thread->now - request->started_ns);
	if (!request->missed)
		stat_add(queue->stats->hits, 1);
	if (blk->status >= 0)
		stat_add(queue->stats->invalid[blk->op], 1);
	request_release(request);
}

/* Room for `size` bytes: inside the request, or allocated. */
static void *request_room(struct request *request, uint64_t size)
{
	if (size <= sizeof(request->room))
		return &request->room;
	request->spilled = malloc(size);
	if (!request->spilled)
		return NULL;
	request->spilled_pieces = (uint32_t)(size / sizeof(struct iovec));
	request->queue->spilled += request->spilled_pieces;
	return request->spilled;
}

/* The chain is scratch: keep what the request needs of it. -1 or a status. */
static int keep_data(struct request *request)
{
	struct blk_request *blk = &request->blk;
	size_t size = blk->pieces * sizeof(*blk->data);
	void *room = request_room(request, size);

	if (!room)
		return VIRTIO_BLK_S_IOERR;
	if (blk->pieces == 1)
		*(struct iovec *)room = *blk->data;
	else if (size)
		memcpy(room, blk->data, size);
	blk->data = room;
	return -1;
}

static int keep_segments(struct request *request, const struct blk_limits *limits)
{
	struct blk_request *blk = &request->blk;
	uint64_t count = blk->length / sizeof(struct virtio_blk_discard_write_zeroes);
	void *room = request_room(request, count * sizeof(struct vb_segment));
	int status = room ? blk_read_segments(blk, limits, room) : VIRTIO_BLK_S_IOERR;

	blk->data = room;
	blk->pieces = (uint32_t)count;
	return status;
}

static struct blk_limits limits_of(const struct vb_disk *disk)
{
	return (struct blk_limits){
		.capacity = load_relaxed(&disk->capacity),
		.read_only = disk->config.read_only,
		.max_segments = disk->config.max_segments,
	};
}

void request_accept(struct queue *queue)
{
	struct blk_limits limits = limits_of(queue->attachment->disk);
	struct request *request = request_take(queue);
	struct blk_request *blk = &request->blk;
	int broken = blk_parse(queue->chain, &limits, blk);

	if (broken) {
		request_release(request);
		queue_break(queue, (enum vb_broken) - broken);
		return;
	}
	if (blk->status < 0 && (blk->op == VB_OP_DISCARD || blk->op == VB_OP_WRITE_ZEROES))
		blk->status = keep_segments(request, &limits);
	else if (blk->status < 0)
		blk->status = keep_data(request);
	request_serve(request);
}
