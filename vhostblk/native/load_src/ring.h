/* The driver's half of a virtqueue of either format: split_ring.h, packed_ring.h. */
#pragma once
#include "packed_ring.h"
#include "split_ring.h"

struct ring {
	bool is_packed;
	union {
		struct split_ring split;
		struct packed_ring packed;
	};
};

static inline uint32_t ring_size(const struct ring *ring)
{
	return ring->is_packed ? ring->packed.size : ring->split.mask + 1u;
}

static inline void ring_enable_calls(struct ring *ring)
{
	if (ring->is_packed)
		packed_enable_calls(&ring->packed);
	else
		split_enable_calls(&ring->split);
}

/* After a sleep: ask for no more calls, unless what was asked for is over by itself. */
static inline void ring_stop_calls(struct ring *ring)
{
	if (ring->is_packed)
		packed_disable_calls(&ring->packed);
	else if (!ring->split.event_idx)
		split_disable_calls(&ring->split);
}

static inline uint16_t ring_in_flight(const struct ring *ring)
{
	return ring->is_packed ? ring->packed.in_flight : split_in_flight(&ring->split);
}

static inline uint16_t ring_ready(struct ring *ring)
{
	return ring->is_packed ? packed_ready(&ring->packed) : split_ready(&ring->split);
}

/* The name of the i-th of the chains that are ready: a number from the device, so anything. */
static inline uint32_t ring_peek(const struct ring *ring, uint16_t i)
{
	return ring->is_packed ? ring->packed.found[i] : split_peek(&ring->split, i);
}

static inline void ring_take(struct ring *ring, uint16_t count)
{
	if (ring->is_packed)
		packed_take(&ring->packed, count);
	else
		split_take(&ring->split, count);
}

static inline void ring_add(struct ring *ring, uint16_t head)
{
	if (ring->is_packed)
		packed_add(&ring->packed, head);
	else
		split_add(&ring->split, head);
}

/* Show the device what was added. True: it wants to be kicked. */
static inline bool ring_publish(struct ring *ring)
{
	return ring->is_packed ? packed_publish(&ring->packed) : split_publish(&ring->split);
}
