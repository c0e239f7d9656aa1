/*
 * virtqueue.c: what a virtqueue has whatever the format of its ring is: memory for chains and tables, and addresses that
 * are found anew. The rings are in split_ring.c and packed_ring.c.
 */
#include <errno.h>
#include <stdlib.h>
#include "chain.h"

/* Linux sizes its indirect tables by the device's seg_max only, and not by the queue: a queue of 64 gets tables of 128
 * entries (126 segments, header, status). */
#define INDIRECT_ENTRIES_MIN (128 + 2)

/* Pieces a chain may have beyond its descriptors, because buffers cross from one memory region to the next. */
#define SPARE_PIECES 64

int virtqueue_move(struct virtqueue *vq, const struct vb_memory *memory, const struct vb_queue_config *config)
{
	int error = vq->is_packed ? packed_find(vq, memory, config) : split_find(vq, memory, config);

	if (!error)
		vq->window = (struct memory_window){0};
	return error;
}

int virtqueue_init(struct virtqueue *vq, const struct vb_memory *memory, const struct vb_queue_config *config)
{
	uint32_t size = config->size;
	int error;

	/* VIRTIO 1.2 §2.7, §2.8: at most 32768; of split rings a power of two. */
	if (!size || size > 32768 || (!config->packed && size & (size - 1)))
		return -EINVAL;
	*vq = (struct virtqueue){
		.size = (uint16_t)size,
		.is_packed = config->packed,
		.event_idx = config->event_idx,
		.indirect = config->indirect,
		.table_max = MAX(size, (uint32_t)INDIRECT_ENTRIES_MIN),
		.inflight = {.guard = -1},
	};
	error = virtqueue_move(vq, memory, config);
	if (!error)
		error = vq->is_packed ? packed_init(vq, config) : split_init(vq, config);
	if (error)
		return error;
	vq->table = malloc(vq->table_max * DESC_SIZE);
	return vq->table ? 0 : -ENOMEM;
}

void virtqueue_deinit(struct virtqueue *vq)
{
	inflight_deinit(&vq->inflight);
	free(vq->table);
	vq->table = NULL;
}

struct chain *virtqueue_new_chain(const struct virtqueue *vq)
{
	uint32_t capacity = vq->size + vq->table_max + SPARE_PIECES;
	struct chain *chain = malloc(sizeof(*chain) + capacity * sizeof(*chain->iov));

	if (chain)
		chain->capacity = capacity;
	return chain;
}

__attribute__((cold)) void chain_lacks(struct chain *chain, bool writable)
{
	chain->incomplete = true;
	/* Nobody will use them, and the status is the last writable byte: it is behind this, or nowhere. */
	if (writable)
		chain->writable = 0;
	if (writable)
		chain->writable_bytes = 0;
}

/* Before anything in it is looked at. */
int chain_copy_table(struct virtqueue *vq, const struct vb_memory *memory, uint64_t gpa, uint64_t length)
{
	uint64_t done = 0;

	while (done < length) {
		uint64_t piece = length - done;
		void *from = memory_at(memory, &vq->window, gpa + done, &piece);

		if (!from)
			return -VB_BROKEN_ADDRESS;
		copy_once(vq->table + done, from, piece);
		done += piece;
	}
	return 0;
}
