/*
 * A ring of messages with one producer and one consumer, and the sleep of the consumer.
 *
 * Barriers, in labelled pairs:
 *   [R1] a message is stored before `head`         | `head` is loaded before the message
 *   [R2] a message is loaded before `tail` stored  | `tail` is loaded before the slot is stored to again
 *   [S1] `head` is stored before `asleep` loaded   | `asleep` is stored before `head` is loaded for the last time:
 *        one of the two sees the other, so either the producer wakes or the consumer does not sleep
 */
#pragma once
#include <sys/eventfd.h>
#include "../engine.h"
#include "common.h"

#define MESSAGE_RING_SIZE 4096u

struct message_ring {
	_Alignas(64) uint32_t head; /* producer's, free-running; what the consumer may see */
	uint32_t filled;            /* producer's; what it has stored */
	_Alignas(64) uint32_t tail; /* consumer's */
	uint32_t asleep;            /* set by the consumer, cleared by whoever is first */
	_Alignas(64) struct vb_message slots[MESSAGE_RING_SIZE];
};

/* How many more messages fit. Context: producer. */
static inline uint32_t message_ring_room(const struct message_ring *ring)
{
	return MESSAGE_RING_SIZE - (ring->filled - load_acquire(&ring->tail)); /* [R2] */
}

/* There must be room. The consumer sees it after message_ring_publish. Context: producer. */
static inline void message_ring_put(struct message_ring *ring, const struct vb_message *message)
{
	ring->slots[ring->filled++ % MESSAGE_RING_SIZE] = *message;
}

/* Show what was put, and wake a consumer that sleeps. Context: producer. */
static inline void message_ring_publish(struct message_ring *ring, int event_fd)
{
	if (ring->filled == load_relaxed(&ring->head))
		return;
	store_release(&ring->head, ring->filled); /* [R1] */
	full_fence();                             /* [S1] */
	if (load_relaxed(&ring->asleep) && __atomic_exchange_n(&ring->asleep, 0, __ATOMIC_RELAXED))
		eventfd_write(event_fd, 1);
}

/* Copy out at most `max` messages. Context: consumer. */
static inline uint32_t message_ring_take(struct message_ring *ring, struct vb_message *messages, uint32_t max)
{
	uint32_t tail = ring->tail, count = load_acquire(&ring->head) - tail; /* [R1] */

	count = MIN(count, max);
	for (uint32_t i = 0; i < count; i++)
		messages[i] = ring->slots[(tail + i) % MESSAGE_RING_SIZE];
	store_release(&ring->tail, tail + count); /* [R2] */
	return count;
}

static inline bool message_ring_empty(const struct message_ring *ring)
{
	return load_acquire(&ring->head) == ring->tail;
}

/* Announce the sleep; false: something came meanwhile, do not sleep. Context: consumer. */
static inline bool message_ring_fall_asleep(struct message_ring *ring)
{
	store_relaxed(&ring->asleep, 1);
	full_fence(); /* [S1] */
	if (message_ring_empty(ring))
		return true;
	store_relaxed(&ring->asleep, 0);
	return false;
}

static inline void message_ring_wake_up(struct message_ring *ring)
{
	store_relaxed(&ring->asleep, 0);
}
