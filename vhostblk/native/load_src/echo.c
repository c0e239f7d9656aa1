#include <errno.h>
#include <linux/virtio_blk.h>
#include <linux/virtio_ring.h>
#include <pthread.h>
#include <signal.h>
#include <stdlib.h>
#include "../src/common.h"
#include "load.h"

struct echo_ring {
	struct vring_desc *desc;
	struct vring_avail *avail;
	struct vring_used *used;
	uint16_t mask;
	uint16_t next;
};

struct vb_load_echo {
	struct echo_ring *rings;
	uint32_t count;
	uint32_t stop;
	pthread_t thread;
};

/* The generator is trusted here, and its memory is where it says: gpa is an address in this process. */
static void complete(const struct vring_desc *desc, uint16_t head)
{
	const struct vring_desc *table = desc;
	uint16_t at = head;

	if (desc[head].flags & VRING_DESC_F_INDIRECT) {
		table = (const void *)(uintptr_t)desc[head].addr;
		at = 0;
	}
	while (table[at].flags & VRING_DESC_F_NEXT)
		at = table[at].next;
	store_relaxed((uint8_t *)(uintptr_t)table[at].addr, VIRTIO_BLK_S_OK);
}

/* With EVENT_IDX; the flag says it without. This thread looks all the time. */
static void need_no_kick(struct echo_ring *ring)
{
	store_relaxed((uint16_t *)(void *)&ring->used->ring[ring->mask + 1u], (uint16_t)(ring->next + 0x8000));
}

static void turn(struct echo_ring *ring)
{
	uint16_t end = load_acquire(&ring->avail->idx), begin = ring->next;

	for (; ring->next != end; ring->next++) {
		uint16_t head = ring->avail->ring[ring->next & ring->mask];

		complete(ring->desc, head);
		ring->used->ring[ring->next & ring->mask] = (struct vring_used_elem){.id = head, .len = 1};
	}
	if (ring->next == begin) {
		cpu_relax();
		return;
	}
	store_release(&ring->used->idx, ring->next);
	if ((uint16_t)(ring->next ^ begin) & 0x4000)
		need_no_kick(ring);
}

static void *echo_main(void *argument)
{
	struct vb_load_echo *echo = argument;

	while (!load_relaxed(&echo->stop))
		for (uint32_t i = 0; i < echo->count; i++)
			turn(&echo->rings[i]);
	return NULL;
}

int vb_load_echo_create(const struct vb_load_ring *rings, uint32_t count, struct vb_load_echo **ret)
{
	struct vb_load_echo *echo = calloc(1, sizeof(*echo));
	sigset_t all, old;
	int error;

	if (!echo)
		return -ENOMEM;
	echo->count = count;
	echo->rings = calloc(count, sizeof(*echo->rings));
	if (!echo->rings) {
		free(echo);
		return -ENOMEM;
	}
	for (uint32_t i = 0; i < count; i++) {
		struct echo_ring *ring = &echo->rings[i];

		ring->desc = (void *)(uintptr_t)rings[i].desc;
		ring->avail = (void *)(uintptr_t)rings[i].avail;
		ring->used = (void *)(uintptr_t)rings[i].used;
		ring->mask = (uint16_t)(rings[i].size - 1);
		ring->next = ring->used->idx;
		ring->used->flags = VRING_USED_F_NO_NOTIFY;
		need_no_kick(ring);
	}
	sigfillset(&all);
	pthread_sigmask(SIG_SETMASK, &all, &old);
	error = -pthread_create(&echo->thread, NULL, echo_main, echo);
	pthread_sigmask(SIG_SETMASK, &old, NULL);
	if (error) {
		free(echo->rings);
		free(echo);
		return error;
	}
	*ret = echo;
	return 0;
}

void vb_load_echo_destroy(struct vb_load_echo *echo)
{
	store_relaxed(&echo->stop, 1);
	pthread_join(echo->thread, NULL);
	free(echo->rings);
	free(echo);
}
