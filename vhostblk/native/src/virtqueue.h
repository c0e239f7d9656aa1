/*
 * The device's half of a virtqueue: chains out of guest memory, used elements into it. Knows nothing of eventfds, block
 * devices or threads. This header is what the rest of the engine uses; the formats of rings stand behind it.
 */
#pragma once
#include <linux/virtio_ring.h>
#include <sys/uio.h>
#include "../engine.h"
#include "common.h"
#include "inflight.h"
#include "memory.h"
#include "memory_log.h"

/* A chain, popped: readable pieces first, then writable ones; pieces are merged where memory is contiguous. */
struct chain {
	uint16_t head;     /* its name: what the used ring calls it */
	uint16_t slots;    /* of the ring that it occupies, where that matters: packed */
	uint16_t entry;    /* of the in-flight region, the same */
	uint32_t readable; /* pieces */
	uint32_t writable;
	uint64_t readable_bytes;
	uint64_t writable_bytes;
	uint32_t capacity;
	uint32_t descriptors; /* that were looked at */
	bool saw_writable;    /* a writable descriptor, of whatever length */
	bool incomplete;      /* a buffer is not in guest memory; of writable ones only those behind it are here */
	struct iovec iov[];
};

struct split_ring {
	/* In guest memory. */
	struct vring_desc *desc;
	struct vring_avail *avail;
	struct vring_used *used;
};

/* A place in a packed ring. */
struct packed_position {
	uint16_t slot;
	uint16_t flags; /* AVAIL and USED as they are there, in this round, when it is what we wait for, or write */
};

struct packed_ring {
	/* In guest memory. */
	struct vring_packed_desc *desc;
	const uint32_t *driver_event; /* struct vring_packed_desc_event, as a whole */
	uint32_t *device_event;

	struct packed_position avail; /* the next chain to pop */
	struct packed_position used;  /* where the next used descriptor goes */
	uint16_t first_slot;          /* of the used descriptors that the driver cannot see yet, if there are any */
	uint16_t first_flags;         /* what will show it */
	uint32_t unpublished;         /* slots of chains pushed and not published */
	uint32_t unnotified;          /* slots of chains published since the last decision about a notification */
};

struct virtqueue {
	uint16_t size;
	bool is_packed;
	uint16_t next_avail; /* split: chains popped, free-running */
	uint16_t avail_idx;  /* split: what the driver had published when we last looked */
	uint16_t used_idx;   /* chains pushed, free-running */
	uint16_t published;  /* what the driver can see of used_idx */
	uint16_t notified;   /* used_idx at the last decision about a notification */
	bool notified_valid; /* false: the first decision since the start, so the driver's wish is unknown: notify */
	bool event_idx;
	bool indirect;
	uint32_t in_flight; /* split: chains popped and not pushed; packed: slots of chains popped and not published */

	union {
		struct split_ring split;
		struct packed_ring packed;
	};
	struct inflight inflight;

	struct ring_log log; /* what we write to the ring is marked here */

	/* The piece of guest memory that the last address was in: the next one nearly always is too. */
	struct memory_window window;

	char *table; /* our copy of an indirect table that is not in one piece: table_max entries */
	uint32_t table_max;
};

/* 0, -EFAULT: rings outside of memory or misaligned, -EINVAL: size or base, -ENOMEM, or what inflight_init says. */
int virtqueue_init(struct virtqueue *vq, const struct vb_memory *memory, const struct vb_queue_config *config);
void virtqueue_deinit(struct virtqueue *vq);

/* Find the rings in another memory map. -EFAULT: they are not there, and nothing has changed. */
int virtqueue_move(struct virtqueue *vq, const struct vb_memory *memory, const struct vb_queue_config *config);

/* A chain big enough for any that virtqueue_pop accepts. */
struct chain *virtqueue_new_chain(const struct virtqueue *vq);

/* ---------------------------------------------------------------- split_ring.c */

/* As the functions of the queue below. */
int split_init(struct virtqueue *vq, const struct vb_queue_config *config);
int split_find(struct virtqueue *vq, const struct vb_memory *memory, const struct vb_queue_config *config);
int split_pop(struct virtqueue *vq, const struct vb_memory *memory, struct chain *chain);
bool split_pending(const struct virtqueue *vq);
void split_push(struct virtqueue *vq, uint16_t head, uint32_t written);
void split_publish(struct virtqueue *vq);
bool split_should_notify(struct virtqueue *vq);
void split_enable_kicks(struct virtqueue *vq);
void split_disable_kicks(struct virtqueue *vq);
void split_mark_ring(const struct virtqueue *vq);

/* ---------------------------------------------------------------- packed_ring.c */

int packed_init(struct virtqueue *vq, const struct vb_queue_config *config);
int packed_find(struct virtqueue *vq, const struct vb_memory *memory, const struct vb_queue_config *config);
int packed_pop(struct virtqueue *vq, const struct vb_memory *memory, struct chain *chain);
bool packed_pending(const struct virtqueue *vq);
void packed_push(struct virtqueue *vq, uint16_t id, uint16_t slots, uint16_t entry, uint32_t written);
void packed_publish(struct virtqueue *vq);
bool packed_should_notify(struct virtqueue *vq);
void packed_enable_kicks(struct virtqueue *vq);
void packed_disable_kicks(struct virtqueue *vq);
void packed_mark_ring(const struct virtqueue *vq);
uint32_t packed_base(const struct virtqueue *vq);

/* ---------------------------------------------------------------- the queue, whatever its ring */

/* 1: *chain is the next one; 0: there is none; negative: -enum vb_broken. */
static inline int virtqueue_pop(struct virtqueue *vq, const struct vb_memory *memory, struct chain *chain)
{
	return vq->is_packed ? packed_pop(vq, memory, chain) : split_pop(vq, memory, chain);
}

/* Whether the driver has published something we have not popped. */
static inline bool virtqueue_pending(const struct virtqueue *vq)
{
	return vq->is_packed ? packed_pending(vq) : split_pending(vq);
}

/* Give a chain back, by what virtqueue_pop has said of it; the driver sees it after virtqueue_publish. */
static inline void virtqueue_push(struct virtqueue *vq, uint16_t head, uint16_t slots, uint16_t entry, uint32_t written)
{
	if (vq->is_packed)
		packed_push(vq, head, slots, entry, written);
	else
		split_push(vq, head, written);
}

static inline void virtqueue_publish(struct virtqueue *vq)
{
	if (vq->is_packed)
		packed_publish(vq);
	else
		split_publish(vq);
}

/* Whether anything was pushed since the last decision about a notification. */
static inline bool virtqueue_has_news(const struct virtqueue *vq)
{
	return vq->notified != vq->used_idx;
}

/* Whether what was published since the last call asks for a notification. */
static inline bool virtqueue_should_notify(struct virtqueue *vq)
{
	return vq->is_packed ? packed_should_notify(vq) : split_should_notify(vq);
}

/* Ask to be kicked, or not to be. After enabling, look at virtqueue_pending(). */
static inline void virtqueue_enable_kicks(struct virtqueue *vq)
{
	if (vq->is_packed)
		packed_enable_kicks(vq);
	else
		split_enable_kicks(vq);
}

static inline void virtqueue_disable_kicks(struct virtqueue *vq)
{
	if (vq->is_packed)
		packed_disable_kicks(vq);
	else
		split_disable_kicks(vq);
}

/* Mark all of the ring that devices write: there is a log. */
static inline void virtqueue_mark_ring(const struct virtqueue *vq)
{
	if (vq->is_packed)
		packed_mark_ring(vq);
	else
		split_mark_ring(vq);
}

/* Whether what is in flight can be found by whoever has the ring next. */
static inline bool virtqueue_tracks(const struct virtqueue *vq)
{
	return vq->inflight.region || vq->inflight.packed;
}

/* Chains of somebody else's that virtqueue_pop will give first. */
static inline uint16_t virtqueue_replays(const struct virtqueue *vq)
{
	return inflight_replays(&vq->inflight);
}

/* Where the ring is to be started again: vb_queue_config.base. */
static inline uint32_t virtqueue_base(const struct virtqueue *vq)
{
	return vq->is_packed ? packed_base(vq) : vq->next_avail;
}
