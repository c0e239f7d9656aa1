/*
 * split_ring.c: the split ring, device side. VIRTIO 1.2 §2.7; vhostblk/virtio/split.py is the readable reference.
 *
 * The counters obey, modulo 65536:  published <= used_idx <= next_avail <= avail.idx <= published + size.  All but
 * avail.idx are ours, and that is checked whenever it is read.
 *
 * Barriers; behind the bar what the driver does on the other side (VIRTIO 1.2 §2.7.13, §2.7.14):
 *   [A] avail.idx is loaded before the entries and descriptors behind it | stored after them
 *   [B] used.idx is stored after the used elements and the data          | loaded before them
 *   [C] used.idx stored, full fence, flags or used_event loaded          | used_event stored, fence, used.idx loaded
 *   [D] flags or avail_event stored, full fence, avail.idx loaded        | avail.idx stored, fence, avail_event loaded
 */
#include <endian.h>
#include "chain.h"

static uint16_t *used_event(const struct virtqueue *vq)
{
	return (uint16_t *)&vq->split.avail->ring[vq->size];
}

static uint16_t *avail_event(const struct virtqueue *vq)
{
	return (uint16_t *)&vq->split.used->ring[vq->size];
}

int split_find(struct virtqueue *vq, const struct vb_memory *memory, const struct vb_queue_config *config)
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
	vq->split.desc = desc;
	vq->split.avail = avail;
	vq->split.used = used;
	return 0;
}

int split_init(struct virtqueue *vq, const struct vb_queue_config *config)
{
	uint16_t avail_idx = le16toh(load_relaxed(&vq->split.avail->idx)), base = (uint16_t)config->base;
	int error;

	if (config->base > UINT16_MAX)
		return -EINVAL;
	/* The used index survives a restart of the ring only in the ring itself. */
	vq->used_idx = vq->published = vq->notified = le16toh(load_relaxed(&vq->split.used->idx));
	error = inflight_init(&vq->inflight, config, vq->used_idx, avail_idx, &base);
	vq->next_avail = vq->avail_idx = base;
	vq->in_flight = virtqueue_replays(vq);
	return error;
}

/* Follow the chain that starts at `head`, which is in range. Each descriptor is read once, where the guest has it. */
static int walk(struct virtqueue *vq, const struct vb_memory *memory, uint16_t head, struct chain *chain)
{
	struct table table = {(const char *)vq->split.desc, vq->size};
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
			result = in_table ? -VB_BROKEN_INDIRECT
					  : find_table(vq, memory, flags, le64toh(d.addr), le32toh(d.len), &table);
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
	uint16_t avail_idx = le16toh(load_acquire(&vq->split.avail->idx)); /* [A] */
	uint16_t available = (uint16_t)(avail_idx - vq->next_avail);
	uint16_t unpublished = (uint16_t)(vq->used_idx - vq->published);

	if (!available)
		return 0;
	/* VIRTIO 1.2 §2.7.13: what the driver was not shown to be done occupies descriptors; with it the new ones cannot
	 * exceed the ring. Memory for a batch of used chains counts on that. */
	if (available + vq->in_flight + unpublished > vq->size)
		return -VB_BROKEN_AVAIL_IDX;
	vq->avail_idx = avail_idx;
	return 1;
}

/* A chain that was popped by whoever had the ring before. */
static int pop_replay(struct virtqueue *vq, const struct vb_memory *memory, struct chain *chain)
{
	uint16_t head = vq->inflight.replays[vq->inflight.replayed];
	int result;

	*chain = (struct chain){.head = head, .capacity = chain->capacity};
	result = walk(vq, memory, head, chain);
	vq->inflight.replayed += result > 0;
	return result;
}

int split_pop(struct virtqueue *vq, const struct vb_memory *memory, struct chain *chain)
{
	uint16_t head;
	int result;

	if (inflight_replays(&vq->inflight))
		return pop_replay(vq, memory, chain);
	if (vq->next_avail == vq->avail_idx) {
		result = refresh_avail_idx(vq);
		if (result <= 0)
			return result;
	}
	head = le16toh(load_relaxed(&vq->split.avail->ring[vq->next_avail & (vq->size - 1)]));
	if (head >= vq->size)
		return -VB_BROKEN_HEAD;
	*chain = (struct chain){.head = head, .capacity = chain->capacity};
	result = walk(vq, memory, head, chain);
	if (result < 0)
		return result;
	inflight_begin(&vq->inflight, head); /* it is ours from here on */
	vq->next_avail++;
	vq->in_flight++;
	return 1;
}

bool split_pending(const struct virtqueue *vq)
{
	return vq->next_avail != vq->avail_idx || virtqueue_replays(vq) ||
	       le16toh(load_relaxed(&vq->split.avail->idx)) != vq->next_avail;
}

void split_push(struct virtqueue *vq, uint16_t head, uint32_t written)
{
	struct vring_used_elem *element = &vq->split.used->ring[vq->used_idx & (vq->size - 1)];

	store_relaxed(&element->id, htole32(head));
	store_relaxed(&element->len, htole32(written));
	inflight_push(&vq->inflight, head);
	vq->used_idx++;
	vq->in_flight--;
}

/* Bytes of the used ring were written. */
static void mark_used(const struct virtqueue *vq, size_t offset, size_t length)
{
	vb_memory_log_mark(vq->log.log, vq->log.gpa + offset, length);
}

/* What is published has been written since the last time: the elements, and the index. Behind the index, which the log
 * is to cover, too; a front-end that has stopped the ring finds all of it. */
__attribute__((noinline)) static void mark_published(const struct virtqueue *vq)
{
	uint32_t first = vq->published & (vq->size - 1), count = (uint16_t)(vq->used_idx - vq->published);
	uint32_t before_end = MIN(count, vq->size - first);

	mark_used(vq, offsetof(struct vring_used, ring[first]), before_end * sizeof(struct vring_used_elem));
	mark_used(vq, offsetof(struct vring_used, ring), (count - before_end) * sizeof(struct vring_used_elem));
	mark_used(vq, 0, offsetof(struct vring_used, ring));
}

/* What asks for kicks was written. */
__attribute__((noinline)) static void mark_wish(const struct virtqueue *vq)
{
	if (vq->event_idx)
		mark_used(vq, offsetof(struct vring_used, ring[vq->size]), sizeof(uint16_t));
	else
		mark_used(vq, offsetof(struct vring_used, flags), sizeof(uint16_t));
}

void split_publish(struct virtqueue *vq)
{
	/* VIRTIO 1.2 §2.7.8.2: the elements and the data before the index. Here the driver learns that chains are done.
	 */
	if (vq->published == vq->used_idx)
		return;
	store_release(&vq->split.used->idx, htole16(vq->used_idx)); /* [B] */
	inflight_publish(&vq->inflight, vq->used_idx);
	if (vq->log.log)
		mark_published(vq);
	vq->published = vq->used_idx;
}

bool split_should_notify(struct virtqueue *vq)
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
		return !(le16toh(load_relaxed(&vq->split.avail->flags)) & VRING_AVAIL_F_NO_INTERRUPT);
	return vring_need_event(le16toh(load_relaxed(used_event(vq))), now, before);
}

void split_enable_kicks(struct virtqueue *vq)
{
	/* VIRTIO 1.2 §2.7.10.2. */
	if (vq->event_idx)
		store_relaxed(avail_event(vq), htole16(vq->next_avail));
	else
		store_relaxed(&vq->split.used->flags, htole16(0));
	full_fence(); /* [D] */
	if (vq->log.log)
		mark_wish(vq);
}

void split_disable_kicks(struct virtqueue *vq)
{
	/* An avail_event that the driver has passed asks for no more kicks (but for one, 65536 chains later). */
	if (vq->event_idx)
		store_relaxed(avail_event(vq), htole16((uint16_t)(vq->next_avail - 1)));
	else
		store_relaxed(&vq->split.used->flags, htole16(VRING_USED_F_NO_NOTIFY));
	if (vq->log.log)
		mark_wish(vq);
}

void split_mark_ring(const struct virtqueue *vq)
{
	mark_used(vq, 0, offsetof(struct vring_used, ring[vq->size]));
	if (vq->event_idx)
		mark_wish(vq);
}
