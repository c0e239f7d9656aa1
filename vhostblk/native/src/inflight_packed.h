/*
 * Which chains of a packed ring are in flight, in memory that outlives us: vhost-user, "Inflight I/O tracking". As a used
 * descriptor may overwrite those of a chain that is in flight, the region has copies of them all, in entries that form a
 * free list, and are taken from it and given back as in a transaction: what `old_free_head` does not say has not happened.
 */
#pragma once
#include <linux/virtio_ring.h>
#include "inflight.h"

/* DescStatePacked. The last four are as the guest has them, little-endian. */
struct inflight_packed_state {
	uint8_t inflight;
	uint8_t padding;
	uint16_t next;
	uint16_t last;
	uint16_t num;
	uint64_t counter;
	uint16_t id;
	uint16_t flags;
	uint32_t len;
	uint64_t addr;
};

/* QueueRegionPacked */
struct inflight_packed_region {
	uint64_t features;
	uint16_t version;
	uint16_t desc_num;
	uint16_t free_head;
	uint16_t old_free_head;
	struct inflight_packed_used {
		uint16_t used_idx;
		uint16_t old_used_idx;
		uint8_t used_wrap_counter;
		uint8_t old_used_wrap_counter;
		uint8_t padding[2];
	} __attribute__((aligned(8), may_alias)) used;
	uint8_t padding[8];
	struct inflight_packed_state desc[];
};

/* In one store: an index without its wrap counter is another place, where the flags may say anything. */
static inline void inflight_packed_store_used(
	struct inflight *f, struct inflight_position used, struct inflight_position old)
{
	struct inflight_packed_used fields = {used.slot, old.slot, used.wrap, old.wrap, {0, 0}};
	uint64_t word;

	memcpy(&word, &fields, sizeof(word));
	store_release((uint64_t *)&f->packed->used, word);
	f->used = old;
}

/*
 * As inflight_init. *used and *avail become where the ring has to be gone on with. `ring` is looked at to find out whether
 * the last batch was shown to the driver.
 */
int inflight_packed_init(struct inflight *f, const struct vb_queue_config *config, const struct vring_packed_desc *ring,
	struct inflight_position *used, struct inflight_position *avail);

/* The next descriptor of a chain that serves as a replay, whose first entry is *entry: copied to *d. */
void inflight_packed_read(const struct inflight *f, uint16_t *entry, struct vring_packed_desc *d);

/*
 * Stores are in an order that makes sense wherever it ends, see inflight.h. Pairs with inflight_packed_init:
 *   [I5] copies, num, last, counter and inflight before old_free_head: then the chain is in flight
 *   [I6] next, free_head and the used position before the flags that show the batch: then all of it is done
 *   [I7] these flags before inflight is 0, and that before old_free_head and the old used position
 */

/* A descriptor of the chain that is being taken; nothing is in flight by that. */
static inline void inflight_packed_copy(struct inflight *f, const struct vring_packed_desc *d)
{
	struct inflight_packed_state *state;

	if (!f->packed)
		return;
	state = &f->packed->desc[f->cursor];
	store_release(&state->addr, d->addr);
	store_release(&state->len, d->len);
	store_release(&state->flags, d->flags);
	store_release(&state->id, d->id);
	f->tail = f->cursor;
	f->cursor = f->next[f->cursor];
}

/* Begin with a chain, or with another one instead. */
static inline void inflight_packed_restart(struct inflight *f)
{
	f->cursor = f->free_head;
}

/* The chain is whole, and popped; gives its entry. */
static inline uint16_t inflight_packed_begin(struct inflight *f, uint16_t slots)
{
	uint16_t entry = f->free_head;
	struct inflight_packed_state *state;

	if (!f->packed)
		return 0;
	state = &f->packed->desc[entry];
	store_release(&state->num, slots);
	store_release(&state->last, f->tail);
	store_release(&state->counter, f->counter++);
	store_release(&state->inflight, 1);
	store_release(&f->packed->free_head, f->cursor);
	store_release(&f->packed->old_free_head, f->cursor); /* [I5] */
	f->last[entry] = f->tail;
	f->free_head = f->cursor;
	return entry;
}

/* A chain is in the ring as used, where the driver does not look yet. */
static inline void inflight_packed_push(struct inflight *f, uint16_t entry)
{
	if (f->packed)
		f->batch[f->batched++] = entry;
}

/* What was pushed will be shown to the driver by the next store. */
static inline void inflight_packed_prepare(struct inflight *f, struct inflight_position used)
{
	if (!f->packed)
		return;
	for (uint16_t i = 0; i < f->batched; i++) {
		uint16_t entry = f->batch[i];

		f->next[f->last[entry]] = f->free_head;
		store_release(&f->packed->desc[f->last[entry]].next, f->free_head);
		f->free_head = entry;
		store_release(&f->packed->free_head, entry);
	}
	inflight_packed_store_used(f, used, f->used); /* [I6] */
}

/* It was shown. */
static inline void inflight_packed_publish(struct inflight *f, struct inflight_position used)
{
	if (!f->packed)
		return;
	while (f->batched)
		store_release(&f->packed->desc[f->batch[--f->batched]].inflight, 0);
	store_release(&f->packed->old_free_head, f->free_head); /* [I7] */
	inflight_packed_store_used(f, used, used);
}
