/*
 * What the two ring formats share: how a descriptor becomes pieces of a chain, and where indirect tables are. In a header,
 * because it is done for every descriptor of every request. Only virtqueue.c and the rings need it.
 */
#pragma once
#include <errno.h>
#include "virtqueue.h"

/* Of both formats. */
#define DESC_SIZE 16u

/* Add one piece behind the last one, or to it if it continues it. */
static inline int append_piece(struct chain *chain, void *address, uint64_t length, bool writable)
{
	uint32_t count = chain->readable + chain->writable;
	bool first = writable ? !chain->writable : !chain->readable;
	struct iovec *last = first ? NULL : &chain->iov[count - 1];

	if (last && (char *)last->iov_base + last->iov_len == address) {
		last->iov_len += length;
		return 0;
	}
	if (count == chain->capacity)
		return -VB_BROKEN_CHAIN_LOOP;
	chain->iov[count] = (struct iovec){address, length};
	if (writable)
		chain->writable++;
	else
		chain->readable++;
	return 0;
}

/* A buffer is not in guest memory, or not all of it. */
void chain_lacks(struct chain *chain, bool writable);

/* A buffer may cross from one region into the next, so it may become several pieces. One that is not in guest memory
 * costs the request, not the queue: memory may have been unplugged under it. */
static inline int append_buffer(struct virtqueue *vq, struct chain *chain, const struct vb_memory *memory, uint64_t gpa,
	uint32_t length, bool writable)
{
	uint64_t left = length;

	/* VIRTIO 1.2 §2.7.4.2: the driver MUST place writable descriptors after readable ones. */
	if (!writable && chain->saw_writable)
		return -VB_BROKEN_ORDER;
	chain->saw_writable |= writable;
	while (left) {
		uint64_t piece = left;
		void *address = gpa > UINT64_MAX - left ? NULL : memory_at(memory, &vq->window, gpa, &piece);
		int error;

		if (!address) {
			chain_lacks(chain, writable);
			return 0;
		}
		error = append_piece(chain, address, piece, writable);
		if (error)
			return error;
		gpa += piece;
		left -= piece;
	}
	if (writable)
		chain->writable_bytes += length;
	else
		chain->readable_bytes += length;
	return 0;
}

/* What descriptors are read from: the queue's ring, or an indirect table. */
struct table {
	const char *entries; /* at any address: nothing says that an indirect one is aligned */
	uint32_t count;
};

/* Copy an indirect table that is not in one piece to vq->table. 0 or -enum vb_broken. */
int chain_copy_table(struct virtqueue *vq, const struct vb_memory *memory, uint64_t gpa, uint64_t length);

/* Find the indirect table that a descriptor with these flags refers to. 0 or -enum vb_broken. */
static inline int find_table(struct virtqueue *vq, const struct vb_memory *memory, uint16_t flags, uint64_t gpa,
	uint64_t length, struct table *ret)
{
	uint64_t piece = length;

	/* VIRTIO 1.2 §2.7.5.3.1, §2.8.19: only if negotiated, never together with NEXT. WRITE is ignored. */
	if (!vq->indirect || flags & VRING_DESC_F_NEXT)
		return -VB_BROKEN_INDIRECT;
	if (!length || length % DESC_SIZE || length / DESC_SIZE > vq->table_max)
		return -VB_BROKEN_INDIRECT;
	if (gpa > UINT64_MAX - length)
		return -VB_BROKEN_ADDRESS;
	ret->count = (uint32_t)(length / DESC_SIZE);
	ret->entries = memory_at(memory, &vq->window, gpa, &piece);
	if (!ret->entries)
		return -VB_BROKEN_ADDRESS;
	if (piece == length)
		return 0;
	ret->entries = vq->table;
	return chain_copy_table(vq, memory, gpa, length);
}
