/*
 * The device's half of a virtqueue: chains out of guest memory, used elements into it. Knows nothing of eventfds, block
 * devices or threads. What is here is the split ring; everything the rest of the engine uses is in this header, so that
 * another ring format can stand behind the same functions.
 */
#pragma once
#include <linux/virtio_ring.h>
#include <sys/uio.h>
#include "../engine.h"
#include "common.h"
#include "memory.h"

/* A chain, popped: readable pieces first, then writable ones; pieces are merged where memory is contiguous. */
struct chain {
	uint16_t head;
	uint32_t readable; /* pieces */
	uint32_t writable;
	uint64_t readable_bytes;
	uint64_t writable_bytes;
	uint32_t capacity;
	uint32_t descriptors; /* that were looked at */
	bool saw_writable;    /* a writable descriptor, of whatever length */
	struct iovec iov[];
};

struct virtqueue {
	uint16_t size;
	uint16_t next_avail; /* chains popped, free-running */
	uint16_t avail_idx;  /* what the driver had published when we last looked */
	uint16_t used_idx;   /* chains pushed, free-running */
	uint16_t published;  /* what the driver can see of used_idx */
	uint16_t notified;   /* used_idx at the last decision about a notification */
	bool notified_valid; /* false: the first decision since the start, so the driver's wish is unknown: notify */
	bool event_idx;
	bool indirect;
	uint32_t in_flight; /* popped and not pushed */

	/* In guest memory. */
	struct vring_desc *desc;
	struct vring_avail *avail;
	struct vring_used *used;

	/* The piece of guest memory that the last address was in: the next one nearly always is too. */
	struct memory_window window;

	struct vring_desc *table; /* our copy of an indirect table that is not in one piece: table_max entries */
	uint32_t table_max;
};

/* 0, -EFAULT: rings outside of memory or misaligned, -EINVAL: size, -ENOMEM. */
int virtqueue_init(struct virtqueue *vq, const struct vb_memory *memory, const struct vb_queue_config *config);
void virtqueue_deinit(struct virtqueue *vq);

/* Find the rings in another memory map. -EFAULT: they are not there, and nothing has changed. */
int virtqueue_move(struct virtqueue *vq, const struct vb_memory *memory, const struct vb_queue_config *config);

/* A chain big enough for any that virtqueue_pop accepts. */
struct chain *virtqueue_new_chain(const struct virtqueue *vq);

/* 1: *chain is the next one; 0: there is none; negative: -enum vb_broken. */
int virtqueue_pop(struct virtqueue *vq, const struct vb_memory *memory, struct chain *chain);

/* Whether the driver has published something we have not popped. */
bool virtqueue_pending(const struct virtqueue *vq);

/* Give a chain back; the driver sees it after virtqueue_publish. */
void virtqueue_push(struct virtqueue *vq, uint16_t head, uint32_t written);
void virtqueue_publish(struct virtqueue *vq);

/* Whether what was published since the last call asks for a notification. */
bool virtqueue_should_notify(struct virtqueue *vq);

/* Ask to be kicked, or not to be. After enabling, look at virtqueue_pending(). */
void virtqueue_enable_kicks(struct virtqueue *vq);
void virtqueue_disable_kicks(struct virtqueue *vq);
