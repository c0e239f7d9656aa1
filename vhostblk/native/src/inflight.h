/*
 * Which chains of a split ring are in flight, in memory that outlives us: vhost-user, "Inflight I/O tracking". Whoever
 * serves the ring next, after we were killed at whatever instruction, finds there what we owe the driver.
 */
#pragma once
#include "../engine.h"
#include "common.h"

/* DescStateSplit */
struct inflight_state {
	uint8_t inflight;
	uint8_t padding[5];
	uint16_t next;
	uint64_t counter;
};

/* QueueRegionSplit */
struct inflight_region {
	uint64_t features;
	uint16_t version;
	uint16_t desc_num;
	uint16_t last_batch_head;
	uint16_t used_idx;
	struct inflight_state desc[];
};

/* A place in a packed ring. */
struct inflight_position {
	uint16_t slot;
	bool wrap;
};

struct inflight {
	struct inflight_region *region; /* shared with the front-end; NULL: nothing is tracked */
	int guard;                      /* of its memory; -1: none */
	uint64_t counter;               /* of the next chain */
	uint16_t last_batch_head;       /* ours; what the region says may change under us */
	uint16_t batched;               /* chains pushed and not published */
	uint16_t *batch;                /* their heads */
	uint16_t *replays;              /* heads that somebody else has left in flight, oldest first */
	uint16_t replayed;
	uint16_t replays_end;

	/* Of packed rings: see inflight_packed.h. What is here is ours, and the region has the same. */
	struct inflight_packed_region *packed; /* NULL: nothing is tracked */
	uint16_t *next;                        /* of entries */
	uint16_t *last;                        /* entry of a chain, by its first one */
	uint16_t free_head;
	uint16_t cursor;               /* of the chain that is being taken: the next entry, */
	uint16_t tail;                 /* and the one before */
	struct inflight_position used; /* what the driver has been shown */
};

/*
 * Begin to track, and learn what was in flight. *next_avail, where the ring would be started otherwise, becomes where it
 * has to be started. Later the replays come first. 0; -ENOMEM; -ENOSPC: too much memory is guarded; -EBADMSG: this was not
 * written for this ring, and nothing was changed.
 */
int inflight_init(struct inflight *f, const struct vb_queue_config *config, uint16_t used_idx, uint16_t avail_idx,
	uint16_t *next_avail);
void inflight_deinit(struct inflight *f);

/* Whether the memory was truncated. */
bool inflight_faulted(const struct inflight *f);

/* Chains that have to be served again, and are not yet. */
static inline uint16_t inflight_replays(const struct inflight *f)
{
	return (uint16_t)(f->replays_end - f->replayed);
}

/*
 * The stores below are in an order that makes sense wherever it ends. Only the compiler could change it: a processor
 * that stops has done what comes before, and nothing of what comes after. Pairs with inflight_init:
 *   [I1] counter before inflight, and both before those of the next chain: n in flight are the n popped after used.idx
 *   [I2] next and last_batch_head before used.idx: what used.idx has that used_idx has not is in the list
 *   [I3] used.idx before inflight is 0: no chain is lost; one that is used may look as if it were in flight
 *   [I4] all of inflight before used_idx: until then the list says which
 */

/* A chain was popped, and nothing was done with it yet. */
static inline void inflight_begin(struct inflight *f, uint16_t head)
{
	struct inflight_state *state;

	if (!f->region)
		return;
	state = &f->region->desc[head];
	store_release(&state->counter, f->counter++);
	store_release(&state->inflight, 1); /* [I1] */
}

/* A chain is in the used ring, where the driver does not look yet. */
static inline void inflight_push(struct inflight *f, uint16_t head)
{
	if (!f->region)
		return;
	store_release(&f->region->desc[head].next, f->last_batch_head);
	store_release(&f->region->last_batch_head, head); /* [I2] */
	f->last_batch_head = head;
	f->batch[f->batched++] = head;
}

/* The driver can see all that was pushed. */
static inline void inflight_publish(struct inflight *f, uint16_t used_idx)
{
	if (!f->region)
		return;
	while (f->batched)
		store_release(&f->region->desc[f->batch[--f->batched]].inflight, 0); /* [I3] */
	store_release(&f->region->used_idx, used_idx);                               /* [I4] */
}
