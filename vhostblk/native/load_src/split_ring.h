/*
 * The driver's half of a split virtqueue, VIRTIO 1.2 §2.7, as far as a generator needs it: descriptors are prepared once
 * by their owner (slot.c), chains are known by their head.
 *
 * Notifications are exact in both directions: we kick if and only if the device's avail_event, or its flag, wants it, and
 * ask for a call only before sleeping.
 */
#pragma once
#include <linux/virtio_ring.h>
#include "../src/common.h"

_Static_assert(__BYTE_ORDER__ == __ORDER_LITTLE_ENDIAN__, "rings are little-endian");

struct split_ring {
	struct vring_desc *desc;
	struct vring_avail *avail;
	struct vring_used *used;
	uint16_t mask;
	uint16_t avail_idx; /* behind the last chain added */
	uint16_t shown_idx; /* behind the last chain the device can see */
	uint16_t used_idx;  /* behind the last chain taken back */
	uint16_t event_set; /* used_idx when used_event was written last */
	bool event_idx;
};

static inline uint16_t *split_used_event(struct split_ring *ring)
{
	return &ring->avail->ring[ring->mask + 1u];
}

static inline const uint16_t *split_avail_event(const struct split_ring *ring)
{
	return (const uint16_t *)&ring->used->ring[ring->mask + 1u];
}

/* Ask for no call: with event_idx by an event half way round, to be set anew before it comes near from either side. */
static inline void split_disable_calls(struct split_ring *ring)
{
	if (ring->event_idx)
		store_relaxed(split_used_event(ring), (uint16_t)(ring->used_idx + 0x8000));
	else
		store_relaxed(&ring->avail->flags, VRING_AVAIL_F_NO_INTERRUPT);
	ring->event_set = ring->used_idx;
}

/* Ask for a call for the next chain; full_fence() and a look at split_ready() must follow. */
static inline void split_enable_calls(struct split_ring *ring)
{
	if (ring->event_idx)
		store_relaxed(split_used_event(ring), ring->used_idx);
	else
		store_relaxed(&ring->avail->flags, 0);
	ring->event_set = ring->used_idx;
}

/* False: somebody else's chains are in it. */
static inline bool split_init(
	struct split_ring *ring, uint64_t desc, uint64_t avail, uint64_t used, uint32_t size, bool event_idx)
{
	*ring = (struct split_ring){
		.desc = (struct vring_desc *)(uintptr_t)desc,
		.avail = (struct vring_avail *)(uintptr_t)avail,
		.used = (struct vring_used *)(uintptr_t)used,
		.mask = (uint16_t)(size - 1),
		.event_idx = event_idx,
	};
	ring->avail_idx = ring->shown_idx = load_relaxed(&ring->avail->idx);
	ring->used_idx = load_acquire(&ring->used->idx);
	store_relaxed(&ring->avail->flags, 0);
	split_disable_calls(ring);
	return ring->avail_idx == ring->used_idx;
}

static inline uint16_t split_in_flight(const struct split_ring *ring)
{
	return (uint16_t)(ring->avail_idx - ring->used_idx);
}

/* How many chains have come back. Acquire: what the device wrote before it said so is visible after this. */
static inline uint16_t split_ready(const struct split_ring *ring)
{
	return (uint16_t)(load_acquire(&ring->used->idx) - ring->used_idx);
}

/* The head of the i-th of the chains that are ready: a number from the device, so anything. */
static inline uint32_t split_peek(const struct split_ring *ring, uint16_t i)
{
	return ring->used->ring[(uint16_t)(ring->used_idx + i) & ring->mask].id;
}

static inline void split_take(struct split_ring *ring, uint16_t count)
{
	ring->used_idx = (uint16_t)(ring->used_idx + count);
	if ((uint16_t)(ring->used_idx - ring->event_set) >= 0x4000)
		split_disable_calls(ring);
}

static inline void split_add(struct split_ring *ring, uint16_t head)
{
	ring->avail->ring[ring->avail_idx++ & ring->mask] = head;
}

/* Show the device what was added. True: it wants to be kicked (VIRTIO 1.2 §2.7.13.4, §2.7.10). */
static inline bool split_publish(struct split_ring *ring)
{
	uint16_t old = ring->shown_idx, new = ring->avail_idx, event;

	/* Release: descriptors, requests and entries are visible before the index that covers them. */
	store_release(&ring->avail->idx, new);
	ring->shown_idx = new;
	/* The device writes its event, or flag, and then looks at the index; we do it the other way round. */
	full_fence();
	if (!ring->event_idx)
		return !(load_relaxed(&ring->used->flags) & VRING_USED_F_NO_NOTIFY);
	event = load_relaxed(split_avail_event(ring));
	return (uint16_t)(new - event - 1) < (uint16_t)(new - old);
}
