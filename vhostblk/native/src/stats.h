/* Counters of one queue: one writer, any number of readers, possibly in other processes. */
#pragma once
#include "../engine.h"
#include "common.h"

/* The writer is alone, so a relaxed store is enough; a reader never sees half a number. */
#define stat_add(field, n) store_relaxed(&(field), (field) + (n))

void stats_finish(struct vb_queue_stats *stats, enum vb_op op, uint64_t bytes, bool failed, uint64_t latency_ns);
