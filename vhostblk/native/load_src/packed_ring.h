/*
 * The driver's half of a packed virtqueue, VIRTIO 1.2 §2.8, as far as a generator needs it: chains are prepared once by
 * their owner (slot.c) and copied into the ring when their turn comes. A chain's name, its buffer id, is a slot's number.
 *
 * Places are counted freely; the ring's size is a power of two, so the bit above the slot is the wrap counter, inverted.
 */
#pragma once
#include <linux/virtio_ring.h>
#include "../src/common.h"

#define PACKED_AVAIL (1u << VRING_PACKED_DESC_F_AVAIL)
#define PACKED_USED (1u << VRING_PACKED_DESC_F_USED)
#define PACKED_BOTH (PACKED_AVAIL | PACKED_USED)

/* How many chains are looked at in advance. */
#define PACKED_FOUND 64

struct packed_ring {
	struct vring_packed_desc *desc;
	uint32_t *driver_event;       /* struct vring_packed_desc_event, as a whole */
	const uint32_t *device_event; /* the same */
	uint32_t size;
	uint32_t next;      /* behind the last descriptor added */
	uint32_t shown;     /* behind the last one the device can see */
	uint32_t used;      /* where the next used descriptor comes */
	uint16_t in_flight; /* chains */
	uint16_t first_flags;
	bool event_idx;

	/* The owner's: its chains by id, `per_chain` descriptors apart. */
	const struct vring_packed_desc *chains;
	const uint16_t *lengths;
	uint32_t per_chain;
	uint32_t count;

	uint16_t found[PACKED_FOUND]; /* ids of chains that have come back, as packed_ready saw them */
};

static inline uint32_t packed_event(const struct packed_ring *ring, uint32_t place)
{
	return (place & (ring->size - 1)) | (place & ring->size ? 0 : 1u << VRING_PACKED_EVENT_F_WRAP_CTR);
}

static inline void packed_disable_calls(struct packed_ring *ring)
{
	store_relaxed(ring->driver_event, VRING_PACKED_EVENT_FLAG_DISABLE << 16);
}

/* Ask for a call for the next chain; full_fence() and a look at packed_ready() must follow. */
static inline void packed_enable_calls(struct packed_ring *ring)
{
	uint32_t event = VRING_PACKED_EVENT_FLAG_ENABLE << 16;

	if (ring->event_idx)
		event = VRING_PACKED_EVENT_FLAG_DESC << 16 | packed_event(ring, ring->used);
	store_relaxed(ring->driver_event, event);
}

/* The ring is new: nothing was ever put into it. */
static inline void packed_init(
	struct packed_ring *ring, uint64_t desc, uint64_t avail, uint64_t used, uint32_t size, bool event_idx)
{
	*ring = (struct packed_ring){
		.desc = (struct vring_packed_desc *)(uintptr_t)desc,
		.driver_event = (uint32_t *)(uintptr_t)avail,
		.device_event = (uint32_t *)(uintptr_t)used,
		.size = size,
		.event_idx = event_idx,
	};
	packed_disable_calls(ring);
}

/* How many chains have come back, as far as is worth knowing. Acquire: what the device wrote is visible after this. */
static inline uint16_t packed_ready(struct packed_ring *ring)
{
	uint32_t place = ring->used;
	uint16_t count = 0;

	while (count < ring->in_flight && count < PACKED_FOUND) {
		const struct vring_packed_desc *d = &ring->desc[place & (ring->size - 1)];
		uint16_t flags = load_acquire(&d->flags), id;

		if ((flags & PACKED_BOTH) != (place & ring->size ? 0 : PACKED_BOTH))
			break;
		id = load_relaxed(&d->id); /* a number from the device, so anything */
		ring->found[count++] = id;
		if (id >= ring->count)
			break;
		place += ring->lengths[id];
	}
	return count;
}

/* The first chains that were found, and are in flight, are the driver's again. */
static inline void packed_take(struct packed_ring *ring, uint16_t count)
{
	for (uint16_t i = 0; i < count; i++)
		ring->used += ring->lengths[ring->found[i]];
	ring->in_flight -= count;
}

static inline void packed_add(struct packed_ring *ring, uint16_t id)
{
	const struct vring_packed_desc *from = &ring->chains[id * ring->per_chain];

	for (uint32_t i = 0; i < ring->lengths[id]; i++, ring->next++) {
		struct vring_packed_desc *d = &ring->desc[ring->next & (ring->size - 1)];
		uint16_t flags = (uint16_t)(from[i].flags | (ring->next & ring->size ? PACKED_USED : PACKED_AVAIL));

		d->addr = from[i].addr;
		d->len = from[i].len;
		d->id = id;
		/* Without the first one's flags the device sees none of them. */
		if (ring->next == ring->shown)
			ring->first_flags = flags;
		else
			store_relaxed(&d->flags, flags);
	}
	ring->in_flight++;
}

/* Show the device what was added. True: it wants to be kicked (VIRTIO 1.2 §2.8.21.2). */
static inline bool packed_publish(struct packed_ring *ring)
{
	uint32_t added = ring->next - ring->shown, rounds = 2 * ring->size, event, flags, at;

	/* Release: descriptors and requests are visible before the flags that show them. */
	store_release(&ring->desc[ring->shown & (ring->size - 1)].flags, ring->first_flags);
	ring->shown = ring->next;
	/* The device writes its event, and then looks at the flags; we do it the other way round. */
	full_fence();
	event = load_relaxed(ring->device_event);
	flags = event >> 16 & 3;
	if (!ring->event_idx || flags != VRING_PACKED_EVENT_FLAG_DESC)
		return flags != VRING_PACKED_EVENT_FLAG_DISABLE;
	at = (event & 0x7fff) + (event & 0x8000 ? 0 : ring->size);
	return ((ring->next - 1 - at) & (rounds - 1)) < added;
}
