/* Counters of one queue: one writer, any number of readers, possibly in other processes. */
#pragma once
#include "../engine.h"
#include "common.h"

/* The writer is alone, so a relaxed store is enough; a reader never sees half a number. */
#define stat_add(field, n) store_relaxed(&(field), (field) + (n))

/* `requests` of them, which took as long as each other. */
void stats_finish(struct vb_queue_stats *stats, enum vb_op op, uint64_t requests, uint64_t bytes, bool failed,
	uint64_t latency_ns);

/* Requests that began together, collected until it is known when they ended. */
struct stats_batch {
	uint32_t ops; /* a bit for each that has any */
	struct {
		uint64_t requests;
		uint64_t bytes;
	} op[VB_OPS];
};

static inline void stats_batch_add(struct stats_batch *batch, enum vb_op op, uint64_t bytes)
{
	batch->ops |= 1u << op;
	batch->op[op].requests++;
	batch->op[op].bytes += bytes;
}

/* All of them have ended, and succeeded. */
void stats_batch_finish(struct stats_batch *batch, struct vb_queue_stats *stats, uint64_t latency_ns);
