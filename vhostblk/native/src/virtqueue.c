/*
 * virtqueue.c: the split virtqueue, device side. VIRTIO 1.2 §2.7; vhostblk/virtio/split.py is the readable reference.
 *
 * The counters obey, modulo 65536:  used_idx <= next_avail <= avail.idx <= used_idx + size.  The first two are ours,
 * the third is checked whenever it is read.
 *
 * Barriers; behind the bar what the driver does on the other side (VIRTIO 1.2 §2.7.13, §2.7.14):
 *   [A] avail.idx is loaded before the entries and descriptors behind it | stored after them
 *   [B] used.idx is stored after the used elements and the data          | loaded before them
 *   [C] used.idx stored, full fence, flags or used_event loaded          | used_event stored, fence, used.idx loaded
 *   [D] flags or avail_event stored, full fence, avail.idx loaded        | avail.idx stored, fence, avail_event loaded
 */
#include <endian.h>
#include <errno.h>
#include <stdlib.h>
#include "virtqueue.h"

/* Linux sizes its indirect tables by the device's seg_max only, and not by the queue: a queue of 64 gets tables of 128
 * entries (126 segments, header, status). */
#define INDIRECT_ENTRIES_MIN (128 + 2)

/* Pieces a chain may have beyond its descriptors, because buffers cross from one memory region to the next. */
#define SPARE_PIECES 64

static uint16_t *used_event(const struct virtqueue *vq)
{
	return (uint16_t *)&vq->avail->ring[vq->size];
}

static uint16_t *avail_event(const struct virtqueue *vq)
{
	return (uint16_t *)&vq->used->ring[vq->size];
}

int virtqueue_move(struct virtqueue *vq, const struct vb_memory *memory, const struct vb_queue_config *config)
{
	uint64_t size = config->size;
	void *desc = memory_ring(memory, config->desc_uva, 16 * size);
	void *avail = memory_ring(memory, config->avail_uva, 6 + 2 * size);
	void *used = memory_ring(memory, config->used_uva, 6 + 8 * size);

	/* VIRTIO 1.2 §2.7.1: the driver MUST align the parts to 16, 2 and 4 bytes. */
	if (!desc || !avail || !used || config->desc_uva % 16 || config->avail_uva % 2 || config->used_uva % 4)
		return -EFAULT;
	/* Where regions are not mapped at page boundaries the copy of an aligned address may not be. */
	if ((uintptr_t)desc % 16 || (uintptr_t)avail % 2 || (uintptr_t)used % 4)
		return -EFAULT;
	vq->desc = desc;
	vq->avail = avail;
	vq->used = used;
	vq->window = (struct memory_window){0};
	return 0;
}

int virtqueue_init(struct virtqueue *vq, const struct vb_memory *memory, const struct vb_queue_config *config)
{
	uint32_t size = config->size;
	int error;

	/* VIRTIO 1.2 §2.7: a power of two, at most 32768. */
	if (!size || size > 32768 || size & (size - 1))
		return -EINVAL;
	*vq = (struct virtqueue){
		.size = (uint16_t)size,
		.next_avail = config->base,
		.avail_idx = config->base,
		.event_idx = config->event_idx,
		.indirect = config->indirect,
		.table_max = MAX(size, (uint32_t)INDIRECT_ENTRIES_MIN),
	};
	error = virtqueue_move(vq, memory, config);
	if (error)
		return error;
	/* The used index survives a restart of the ring only in the ring itself. */
	vq->used_idx = vq->published = vq->notified = le16toh(load_relaxed(&vq->used->idx));
	vq->table = malloc(vq->table_max * sizeof(*vq->table));
	return vq->table ? 0 : -ENOMEM;
}

void virtqueue_deinit(struct virtqueue *vq)
{
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

/* Add one piece behind the last one, or to it if it continues it. */
static int append_piece(struct chain *chain, void *address, uint64_t length, bool writable)
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

/* A buffer may cross from one region into the next, so it may become several pieces. */
static int append_buffer(struct virtqueue *vq, struct chain *chain, const struct vb_memory *memory, uint64_t gpa,
	uint32_t length, bool writable)
{
	uint64_t left = length;

	/* VIRTIO 1.2 §2.7.4.2: the driver MUST place writable descriptors after readable ones. */
	if (!writable && chain->saw_writable)
		return -VB_BROKEN_ORDER;
	if (gpa > UINT64_MAX - length)
		return -VB_BROKEN_ADDRESS;
	chain->saw_writable |= writable;
	while (left) {
		uint64_t piece = left;
		void *address = memory_at(memory, &vq->window, gpa, &piece);
		int error = address ? append_piece(chain, address, piece, writable) : -VB_BROKEN_ADDRESS;

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

/* Copy an indirect table that is not in one piece, before anything in it is looked at. */
static int copy_table(struct virtqueue *vq, const struct vb_memory *memory, uint64_t gpa, uint64_t length)
{
	uint64_t done = 0;

	while (done < length) {
		uint64_t piece = length - done;
		void *from = memory_at(memory, &vq->window, gpa + done, &piece);

		if (!from)
			return -VB_BROKEN_ADDRESS;
		copy_once((char *)vq->table + done, from, piece);
		done += piece;
	}
	return 0;
}

/* What descriptors are read from: the queue's table, or an indirect one. */
struct table {
	const char *entries; /* at any address: nothing says that an indirect one is aligned */
	uint32_t count;
};

/* Find an indirect table. 0 or -enum vb_broken. */
static int find_table(
	struct virtqueue *vq, const struct vb_memory *memory, const struct vring_desc *d, struct table *ret)
{
	uint64_t gpa = le64toh(d->addr), length = le32toh(d->len), piece = length;

	/* VIRTIO 1.2 §2.7.5.3.1: only if negotiated, never together with NEXT. §2.7.5.3.2: WRITE is ignored. */
	if (!vq->indirect || le16toh(d->flags) & VRING_DESC_F_NEXT)
		return -VB_BROKEN_INDIRECT;
	if (!length || length % sizeof(*d) || length / sizeof(*d) > vq->table_max)
		return -VB_BROKEN_INDIRECT;
	if (gpa > UINT64_MAX - length)
		return -VB_BROKEN_ADDRESS;
	ret->count = (uint32_t)(length / sizeof(*d));
	ret->entries = memory_at(memory, &vq->window, gpa, &piece);
	if (!ret->entries)
		return -VB_BROKEN_ADDRESS;
	if (piece == length)
		return 0;
	ret->entries = (const char *)vq->table;
	return copy_table(vq, memory, gpa, length);
}

/* Follow the chain that starts at `head`, which is in range. Each descriptor is read once, where the guest has it. */
static int walk(struct virtqueue *vq, const struct vb_memory *memory, uint16_t head, struct chain *chain)
{
	struct table table = {(const char *)vq->desc, vq->size};
	uint32_t left = vq->size, index = head;
	bool in_table = false;

	/* VIRTIO 1.2 §2.7.5.3.1: no chain is longer than the queue, so one that is has a loop. */
	while (left--) {
		struct vring_desc d;
		uint16_t flags;
		int result;

		chain->descriptors++;
		copy_once(&d, table.entries + index * sizeof(d), sizeof(d));
		flags = le16toh(d.flags);
		if (flags & VRING_DESC_F_INDIRECT) {
			/* §2.7.5.3.2: direct ones may come before an indirect one. §2.7.5.3.1: none in a table. */
			result = in_table ? -VB_BROKEN_INDIRECT : find_table(vq, memory, &d, &table);
			if (result)
				return result;
			left = table.count;
			index = 0;
			in_table = true;
			continue;
		}
		result = append_buffer(vq, chain, memory, le64toh(d.addr), le32toh(d.len), flags & VRING_DESC_F_WRITE);
		if (result)
			return result;
		if (!(flags & VRING_DESC_F_NEXT))
			return 1;
		index = le16toh(d.next);
		if (index >= table.count)
			return -VB_BROKEN_CHAIN_NEXT;
	}
	return -VB_BROKEN_CHAIN_LOOP;
}

/* Look how far the driver is. 1: there is something, 0: nothing, or -enum vb_broken. */
static int refresh_avail_idx(struct virtqueue *vq)
{
	uint16_t avail_idx = le16toh(load_acquire(&vq->avail->idx)); /* [A] */
	uint16_t available = (uint16_t)(avail_idx - vq->next_avail);

	if (!available)
		return 0;
	/* VIRTIO 1.2 §2.7.13: what is in flight occupies descriptors; with it the new ones cannot exceed the ring. */
	if (available + vq->in_flight > vq->size)
		return -VB_BROKEN_AVAIL_IDX;
	vq->avail_idx = avail_idx;
	return 1;
}

int virtqueue_pop(struct virtqueue *vq, const struct vb_memory *memory, struct chain *chain)
{
	uint16_t head;
	int result;

	if (vq->next_avail == vq->avail_idx) {
		result = refresh_avail_idx(vq);
		if (result <= 0)
			return result;
	}
	head = le16toh(load_relaxed(&vq->avail->ring[vq->next_avail & (vq->size - 1)]));
	if (head >= vq->size)
		return -VB_BROKEN_HEAD;
	*chain = (struct chain){.head = head, .capacity = chain->capacity};
	result = walk(vq, memory, head, chain);
	if (result < 0)
		return result;
	/* A chain is ours from here on. Tracking of requests in flight (vhost-user, "Inflight I/O tracking") begins
	 * here. */
	vq->next_avail++;
	vq->in_flight++;
	return 1;
}

bool virtqueue_pending(const struct virtqueue *vq)
{
	return vq->next_avail != vq->avail_idx || le16toh(load_relaxed(&vq->avail->idx)) != vq->next_avail;
}

void virtqueue_push(struct virtqueue *vq, uint16_t head, uint32_t written)
{
	struct vring_used_elem *element = &vq->used->ring[vq->used_idx & (vq->size - 1)];

	store_relaxed(&element->id, htole32(head));
	store_relaxed(&element->len, htole32(written));
	vq->used_idx++;
	vq->in_flight--;
}

void virtqueue_publish(struct virtqueue *vq)
{
	/* VIRTIO 1.2 §2.7.8.2: the elements and the data before the index. Here the driver learns that chains are done:
	 * tracking of requests in flight ends, and the used ring is dirty for live migration. */
	if (vq->published == vq->used_idx)
		return;
	store_release(&vq->used->idx, htole16(vq->used_idx)); /* [B] */
	vq->published = vq->used_idx;
}

bool virtqueue_should_notify(struct virtqueue *vq)
{
	uint16_t before = vq->notified, now = vq->published;
	bool first = !vq->notified_valid;

	if (before == now)
		return false;
	vq->notified = now;
	vq->notified_valid = true;
	full_fence(); /* [C] */
	if (first)
		return true;
	/* VIRTIO 1.2 §2.7.7.2. */
	if (!vq->event_idx)
		return !(le16toh(load_relaxed(&vq->avail->flags)) & VRING_AVAIL_F_NO_INTERRUPT);
	return vring_need_event(le16toh(load_relaxed(used_event(vq))), now, before);
}

void virtqueue_enable_kicks(struct virtqueue *vq)
{
	/* VIRTIO 1.2 §2.7.10.2. */
	if (vq->event_idx)
		store_relaxed(avail_event(vq), htole16(vq->next_avail));
	else
		store_relaxed(&vq->used->flags, htole16(0));
	full_fence(); /* [D] */
}

void virtqueue_disable_kicks(struct virtqueue *vq)
{
	/* An avail_event that the driver has passed asks for no more kicks (but for one, 65536 chains later). */
	if (vq->event_idx)
		store_relaxed(avail_event(vq), htole16((uint16_t)(vq->next_avail - 1)));
	else
		store_relaxed(&vq->used->flags, htole16(VRING_USED_F_NO_NOTIFY));
}
